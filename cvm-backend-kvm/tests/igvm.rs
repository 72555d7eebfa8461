//! Guests that come as IGVM files, which the crate `igvm` has written.

mod common;

use common::{CODE, DATA, Guest, MEMORY, TABLES, assemble, config, kvm};
use cvm_core::igvm::{IgvmError, IgvmImage, native_page};
use cvm_core::x86::{VcpuState, identity_map};
use cvm_core::{Error, Gpa, PAGE_SIZE, PageState, Platform, Side, Vm, VmConfig};
use iced_x86::code_asm::{rax, rsi};
use igvm::{Arch, IgvmDirectiveHeader, IgvmFile, IgvmPlatformHeader, IgvmRevision};
use igvm_defs::{
    IGVM_VHS_PARAMETER, IGVM_VHS_PARAMETER_INSERT, IGVM_VHS_SUPPORTED_PLATFORM, IgvmNativeVpContextX64,
    IgvmPageDataFlags, IgvmPageDataType, IgvmPlatformType,
};
use zerocopy::FromBytes;

/// Where the guest is told of its machine, and in it the memory map and the command line.
const PARAMETERS: u64 = DATA;
const MEMORY_MAP: u32 = 0x100;
const COMMAND_LINE: u32 = 0x200;
/// A page whose contents are not measured.
const UNMEASURED: u64 = DATA + PAGE_SIZE;
const STACK: u64 = DATA + 4 * PAGE_SIZE;

/// A guest that reports what it was told and given, and ends.
fn code(config: &VmConfig) -> Vec<u8> {
    assemble(config, CODE, |a| {
        let map = PARAMETERS + u64::from(MEMORY_MAP);
        for place in [PARAMETERS, map, map + 8, PARAMETERS + u64::from(COMMAND_LINE), UNMEASURED] {
            a.load(place, Side::Private)?;
            a.report()?;
        }
        // The state: what the file has in RSI, and a stack.
        a.push(rsi)?;
        a.pop(rax)?;
        a.report()?;
        a.end(0)
    })
}

/// The guest as a file, whose vCPU starts in `state`.
fn file(config: &VmConfig, state: &VcpuState) -> Vec<u8> {
    let page = |gpa: u64, unmeasured, data: &[u8]| IgvmDirectiveHeader::PageData {
        gpa,
        compatibility_mask: 1,
        flags: IgvmPageDataFlags::new().with_unmeasured(unmeasured),
        data_type: IgvmPageDataType::NORMAL,
        data: data.to_vec(),
    };
    let parameter = |byte_offset| IGVM_VHS_PARAMETER { parameter_area_index: 0, byte_offset };
    let mut directives = vec![
        page(CODE, false, &code(config)),
        page(UNMEASURED, true, &[0x55; 4096]),
        IgvmDirectiveHeader::ParameterArea {
            number_of_bytes: PAGE_SIZE,
            parameter_area_index: 0,
            initial_data: Vec::new(),
        },
        IgvmDirectiveHeader::VpCount(parameter(0)),
        IgvmDirectiveHeader::MemoryMap(parameter(MEMORY_MAP)),
        IgvmDirectiveHeader::CommandLine(parameter(COMMAND_LINE)),
        IgvmDirectiveHeader::ParameterInsert(IGVM_VHS_PARAMETER_INSERT {
            gpa: PARAMETERS,
            compatibility_mask: 1,
            parameter_area_index: 0,
        }),
    ];
    let tables = identity_map(Gpa(TABLES), MEMORY, None).unwrap();
    let tables = (TABLES..).step_by(PAGE_SIZE as usize).zip(tables.chunks(PAGE_SIZE as usize));
    directives.extend(tables.map(|(gpa, table)| page(gpa, false, table)));
    directives.push(IgvmDirectiveHeader::X64NativeVpContext {
        compatibility_mask: 1,
        vp_index: 0,
        context: Box::new(IgvmNativeVpContextX64::read_from_prefix(&native_page(state)).unwrap().0),
    });
    let platform = IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: 1,
        highest_vtl: 0,
        platform_type: IgvmPlatformType::NATIVE,
        platform_version: 1,
        shared_gpa_boundary: 0,
    });
    let revision = IgvmRevision::V2 { arch: Arch::X64, page_size: PAGE_SIZE as u32 };
    let mut file = Vec::new();
    IgvmFile::new(revision, vec![platform], Vec::new(), directives).unwrap().serialize(&mut file).unwrap();
    file
}

const STATE: VcpuState = VcpuState { rip: CODE, rsp: STACK, rdi: 0, rsi: 0x1234_5678, cr3: TABLES };

#[test]
fn a_guest_from_a_file_finds_its_pages_its_state_and_what_it_asked_for() {
    let Some(platform) = kvm() else { return };
    let config = config(1);
    let file = file(&config, &STATE);
    let mut launch = platform.launch(config).unwrap();
    launch.load_igvm(&IgvmImage::native(&file).unwrap(), "quiet").unwrap();
    let mut guest = Guest::from_launch(launch);
    let pages = (MEMORY / PAGE_SIZE) as u32;
    let told = [1, 0, pages, u32::from_le_bytes(*b"quie"), 0x5555_5555, STATE.rsi as u32];
    assert_eq!(told.map(|_| guest.report()), told);
    guest.end();
    assert_eq!(guest.vm.memory().map().count(PageState::Shared), 0);
}

#[test]
fn a_file_that_is_too_large_for_the_vm_is_refused_and_nothing_is_left_of_the_launch() {
    let Some(platform) = kvm() else { return };
    let config = config(1);
    let file = file(&config, &STATE);
    let small = VmConfig { memory: vec![common::range(0, CODE / PAGE_SIZE)], ..config };
    let error = platform.launch(small).unwrap().load_igvm(&IgvmImage::native(&file).unwrap(), "").unwrap_err();
    assert!(matches!(error, Error::OutsideMemory { gpa: Gpa(CODE) }), "{error}");
}

#[test]
fn a_file_whose_vcpu_starts_otherwise_is_refused() {
    let config = config(1);
    let mut file = file(&config, &STATE);
    let page = native_page(&STATE);
    let place = file.windows(page.len()).position(|window| window == page).unwrap();
    // CR0.CD.
    file[place + 203] |= 0x40;
    let error = IgvmImage::native(&file).unwrap_err();
    assert_eq!(error, IgvmError::State { vcpu: 0, field: "cr0", at: 203 });
}
