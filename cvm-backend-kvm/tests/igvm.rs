//! Guests that come as IGVM files, which the crate `igvm` has written.

mod common;

use common::{CODE, DATA, Guest, MEMORY, TABLES, assemble, config, kvm};
use cvm_backend_kvm::KvmPlatform;
use cvm_core::igvm::{IgvmError, IgvmImage, native_page};
use cvm_core::platform::Offer;
use cvm_core::x86::{Segment, VcpuState, identity_map};
use cvm_core::{Error, Gpa, PAGE_SIZE, PageState, Platform, Protection, Side, Vm, VmConfig};
use iced_x86::code_asm::*;
use igvm::{Arch, IgvmDirectiveHeader, IgvmFile, IgvmPlatformHeader, IgvmRevision};
use igvm_defs::{
    IGVM_VHS_PARAMETER, IGVM_VHS_PARAMETER_INSERT, IGVM_VHS_SUPPORTED_PLATFORM, IgvmNativeVpContextX64,
    IgvmPageDataFlags, IgvmPageDataType, IgvmPlatformType,
};
use std::error::Error as _;
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

/// A guest that reports the registers that it starts with, and ends.
fn code_of_registers(config: &VmConfig, reads_cr4: bool) -> Vec<u8> {
    const EFER: u32 = 0xc000_0080;
    assemble(config, CODE, |a| {
        // Before anything that changes flags or other registers.
        a.mov(r14, rax)?;
        a.pushfq()?;
        a.pop(r13)?;
        for register in [r14, r8, r15, r13] {
            a.mov(rax, register)?;
            a.report()?;
        }
        a.mov(rax, cr0)?;
        a.report()?;
        if reads_cr4 {
            a.mov(rax, cr4)?;
            a.report()?;
        }
        a.mov(ecx, EFER)?;
        a.rdmsr()?;
        a.report()?;
        a.sub(rsp, 0x20)?;
        a.sgdt(ptr(rsp))?;
        a.sidt(ptr(rsp + 0x10))?;
        for place in [0, 2, 0x10, 0x12] {
            a.mov(eax, dword_ptr(rsp + place))?;
            a.report()?;
        }
        a.mov(eax, cs)?;
        a.report()?;
        a.mov(eax, ds)?;
        a.report()?;
        a.lea(rsi, qword_ptr(rsp))?;
        a.mov(eax, dword_ptr(rsi + 0x10).gs())?;
        a.report()?;
        a.end(0)
    })
}

/// The guest as a file, whose vCPU starts in `state`.
fn file(code: &[u8], state: &VcpuState) -> Vec<u8> {
    let page = |gpa: u64, unmeasured, data: &[u8]| IgvmDirectiveHeader::PageData {
        gpa,
        compatibility_mask: 1,
        flags: IgvmPageDataFlags::new().with_unmeasured(unmeasured),
        data_type: IgvmPageDataType::NORMAL,
        data: data.to_vec(),
    };
    let parameter = |byte_offset| IGVM_VHS_PARAMETER { parameter_area_index: 0, byte_offset };
    let mut directives = vec![
        page(CODE, false, code),
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

const STATE: VcpuState = VcpuState { rsp: STACK, ..VcpuState::long_mode(Gpa(CODE), Gpa(TABLES), 0, Gpa(0x1234_5678)) };

#[test]
fn a_guest_from_a_file_finds_its_pages_its_state_and_what_it_asked_for() {
    let Some(platform) = kvm() else { return };
    let config = config(1);
    let file = file(&code(&config), &STATE);
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
fn a_vcpu_starts_from_the_state_in_the_file() {
    let Some(platform) = kvm() else { return };
    let config = config(1);
    // KVM intercepts reads of CR4. Where the processor does not decode the instruction, KVM fetches it, and from private memory in a
    // guest_memfd it cannot.
    let offers = KvmPlatform::probe();
    let has_guest_memfd = |offer: &Offer| offer.protection == Protection::GuestMemfd && offer.missing.is_empty();
    let reads_cr4 = platform.protection() == Protection::None || !offers.iter().any(has_guest_memfd);
    if !reads_cr4 {
        eprintln!("SKIPPED: CR4 of a guest whose private memory is in a guest_memfd");
    }
    let code = code_of_registers(&config, reads_cr4);
    // As tools write them that build files for services in the guest: other control bits, limits of 0 and so on.
    let wide = Segment { attributes: 0xa093, ..STATE.data };
    for state in [
        STATE,
        VcpuState { gdt_limit: 0, idt_limit: 0, cr0: 0x8000_0031, efer: 0xd00, data: wide, ..STATE },
        VcpuState { efer: 0xd00, ..STATE },
        VcpuState { cr4: 0x20, ..STATE },
        VcpuState { cr0: 0x8000_0033, ..STATE },
        VcpuState { gdt_base: 0x6000, gdt_limit: 0x17, idt_base: 0x7000, idt_limit: 0xff, ..STATE },
        VcpuState { rax_to_rbx: [7, 8, 9, 10], rbp: 11, r8_to_r15: [12, 13, 14, 15, 16, 17, 18, 19], ..STATE },
        VcpuState { rflags: 0x402, gs_base: 0x10, code: Segment { selector: 0x18, ..STATE.code }, ..STATE },
    ] {
        let mut launch = platform.launch(config.clone()).unwrap();
        let file = file(&code, &state);
        let image = IgvmImage::native(&file).unwrap();
        assert_eq!(image.states()[&0], state);
        launch.load_igvm(&image, "").unwrap();
        let mut guest = Guest::from_launch(launch);
        let selectors = [state.code, state.data].map(|segment| segment.selector.into());
        let registers = [state.rax_to_rbx[0], state.r8_to_r15[0], state.r8_to_r15[7], state.rflags, state.cr0];
        let [gdt, idt] = [(state.gdt_base, state.gdt_limit), (state.idt_base, state.idt_limit)]
            .map(|(base, limit)| [base << 16 | u64::from(limit), base]);
        let control: &[u64] = if reads_cr4 { &[state.cr4] } else { &[] };
        let expected = [&registers[..], control, &[state.efer], &gdt, &idt, &selectors].concat();
        for (index, register) in expected.into_iter().enumerate() {
            assert_eq!(guest.report(), register as u32, "register {index} of {state:x?}");
        }
        // What lies behind the place that is read is 0.
        let at = if state.gs_base == 0 { idt[0] as u32 } else { 0 };
        assert_eq!(guest.report(), at, "gs of {state:x?}");
        guest.end();
    }
}

#[test]
fn a_register_that_kvm_refuses_is_named() {
    let Some(platform) = kvm() else { return };
    let config = config(1);
    // A bit of CR4 that no processor has.
    let file = file(&code(&config), &VcpuState { cr4: 1 << 63 | 0x20, ..STATE });
    let mut launch = platform.launch(config).unwrap();
    launch.load_igvm(&IgvmImage::native(&file).unwrap(), "").unwrap();
    let error = launch.seal().err().unwrap();
    let source = error.source().map(ToString::to_string).unwrap_or_default();
    assert!(source.contains("kvm cannot start a vcpu with 0x8000000000000020 in cr4"), "{error}: {source}");
}

#[test]
fn a_file_that_is_too_large_for_the_vm_is_refused_and_nothing_is_left_of_the_launch() {
    let Some(platform) = kvm() else { return };
    let config = config(1);
    let file = file(&code(&config), &STATE);
    let small = VmConfig { memory: vec![common::range(0, CODE / PAGE_SIZE)], ..config };
    let error = platform.launch(small).unwrap().load_igvm(&IgvmImage::native(&file).unwrap(), "").unwrap_err();
    assert!(matches!(error, Error::OutsideMemory { gpa: Gpa(CODE) }), "{error}");
}

#[test]
fn a_file_whose_vcpu_has_a_state_that_no_processor_has_is_refused() {
    let config = config(1);
    let mut file = file(&code(&config), &STATE);
    let page = native_page(&STATE);
    let place = file.windows(page.len()).position(|window| window == page).unwrap();
    // CR0.NW without CR0.CD.
    file[place + 203] |= 0x20;
    let error = IgvmImage::native(&file).unwrap_err();
    assert_eq!(error, IgvmError::State { vcpu: 0, field: "cr0", at: 200 });
}
