//! On files that the crate `igvm` has written.

use super::reader::{FIXED_HEADER, HEADER_START, LARGE, OPTIONAL, headers};
use super::*;
use crate::doorbell::Transport;
use crate::launch::{Entry, Rehearsal, digest};
use crate::x86::VcpuState;
use crate::{Error, Launch, VmConfig};
use igvm::{Arch, IgvmDirectiveHeader, IgvmFile, IgvmPlatformHeader, IgvmRevision};
use igvm_defs::{
    IGVM_VHS_PARAMETER, IGVM_VHS_PARAMETER_INSERT, IGVM_VHS_SUPPORTED_PLATFORM, IgvmNativeVpContextX64,
    IgvmPageDataFlags, IgvmPageDataType, IgvmPlatformType,
};
use proptest::prelude::*;
use std::sync::LazyLock;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

const NATIVE: u32 = 1;
const SNP: u32 = 2;

fn platform(mask: u32, platform_type: IgvmPlatformType) -> IgvmPlatformHeader {
    IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: mask,
        highest_vtl: 0,
        platform_type,
        platform_version: 1,
        shared_gpa_boundary: 0,
    })
}

fn page(gpa: u64, mask: u32, unmeasured: bool, data: &[u8]) -> IgvmDirectiveHeader {
    IgvmDirectiveHeader::PageData {
        gpa,
        compatibility_mask: mask,
        flags: IgvmPageDataFlags::new().with_unmeasured(unmeasured),
        data_type: IgvmPageDataType::NORMAL,
        data: data.to_vec(),
    }
}

/// The state that vCPUs start from, as `IgvmNativeVpContextX64` has it.
fn native(state: &VcpuState) -> IgvmNativeVpContextX64 {
    IgvmNativeVpContextX64::read_from_prefix(&native_page(state)).unwrap().0
}

const STATE: VcpuState = VcpuState { rsp: 0x8000, ..VcpuState::long_mode(Gpa(0x1000), Gpa(0x3000), 0, Gpa(0x2000)) };

fn parameter(index: u32, offset: u32) -> IGVM_VHS_PARAMETER {
    IGVM_VHS_PARAMETER { parameter_area_index: index, byte_offset: offset }
}

fn insert(gpa: u64, index: u32) -> IgvmDirectiveHeader {
    IgvmDirectiveHeader::ParameterInsert(IGVM_VHS_PARAMETER_INSERT {
        gpa,
        compatibility_mask: NATIVE | SNP,
        parameter_area_index: index,
    })
}

fn area(index: u32, initial: &[u8]) -> IgvmDirectiveHeader {
    let initial_data = initial.to_vec();
    IgvmDirectiveHeader::ParameterArea { number_of_bytes: 0x1000, parameter_area_index: index, initial_data }
}

fn directives() -> Vec<IgvmDirectiveHeader> {
    vec![
        area(0, &[7; 0x1000]),
        page(0x1000, NATIVE | SNP, false, &[1; 0x1000]),
        page(0x2000, NATIVE | SNP, false, &[2; 100]),
        page(0x3000, NATIVE, false, &[]),
        page(0x4000, NATIVE, true, &[4; 0x1000]),
        page(0x9000, SNP, false, &[9; 0x1000]),
        IgvmDirectiveHeader::VpCount(parameter(0, 0)),
        IgvmDirectiveHeader::MemoryMap(parameter(0, 0x100)),
        IgvmDirectiveHeader::CommandLine(parameter(0, 0x200)),
        IgvmDirectiveHeader::EnvironmentInfo(parameter(0, 0x300)),
        insert(0x5000, 0),
        IgvmDirectiveHeader::RequiredMemory {
            gpa: 0x6000,
            compatibility_mask: NATIVE,
            number_of_bytes: 0x2000,
            vtl2_protectable: false,
        },
        IgvmDirectiveHeader::X64NativeVpContext {
            compatibility_mask: NATIVE,
            vp_index: 0,
            context: Box::new(native(&STATE)),
        },
    ]
}

/// A file with each thing that there is for plain KVM, and some for another platform.
fn file(directives: Vec<IgvmDirectiveHeader>) -> Vec<u8> {
    let platforms = vec![platform(NATIVE, IgvmPlatformType::NATIVE), platform(SNP, IgvmPlatformType::SEV_SNP)];
    let revision = IgvmRevision::V2 { arch: Arch::X64, page_size: 4096 };
    let mut bytes = Vec::new();
    IgvmFile::new(revision, platforms, vec![], directives).unwrap().serialize(&mut bytes).unwrap();
    bytes
}

fn launch(memory: u64, vcpus: u32) -> Launch<Rehearsal> {
    Launch::rehearse(VmConfig::new(memory, vcpus).unwrap(), Transport::Doorbell).unwrap()
}

fn load(file: &[u8], memory: u64) -> Result<Vec<Entry>, Error> {
    let mut launch = launch(memory, 1);
    launch.load_igvm(&IgvmImage::native(file)?, "quiet")?;
    Ok(launch.transcript()?.entries()[1..].to_vec())
}

/// Where the headers of a kind start, with their 8 bytes of kind and length.
fn places(file: &[u8], kind: u32) -> Vec<usize> {
    headers(file).unwrap().iter().filter(|header| header.kind == kind).map(|header| header.offset).collect()
}

#[test]
fn a_file_is_loaded_as_it_says_to_this_platform() {
    let entries = load(&file(directives()), 0x10000).unwrap();
    let padded = |byte, len: usize| [vec![byte; len], vec![0; 0x1000 - len]].concat();
    let measured =
        |gpa, contents: &[u8]| Entry::Page { kind: PageKind::Measured, gpa: Gpa(gpa), contents: digest(contents) };
    let unmeasured = |gpa| Entry::Page { kind: PageKind::Unmeasured, gpa: Gpa(gpa), contents: [0; 48] };
    let expected = [
        measured(0x1000, &[1; 0x1000]),
        measured(0x2000, &padded(2, 100)),
        measured(0x3000, &[0; 0x1000]),
        unmeasured(0x4000),
        unmeasured(0x5000),
        Entry::Vcpu { index: 0, state: STATE },
    ];
    assert_eq!(entries, expected);
}

#[test]
fn a_guest_is_told_what_it_asks_for() {
    let range = GpaRange::new(0x1000, 0x4000).unwrap();
    let machine = image::Machine { vcpus: 3, memory: &[range], command_line: "quiet" };
    let mut area = vec![7; 0x1000];
    for (parameter, at) in [
        (Parameter::VcpuCount, 0),
        (Parameter::MemoryMap, 0x100),
        (Parameter::CommandLine, 0x200),
        (Parameter::Environment, 0x300),
        (Parameter::MmioRanges, 0xfe0),
    ] {
        machine.tell(&mut area, parameter, at).unwrap();
    }
    let map = [1u64, 4, 0, 0, 0, 0].map(u64::to_le_bytes).concat();
    let mut expected = vec![7; 0x1000];
    expected[..4].copy_from_slice(&[3, 0, 0, 0]);
    expected[0x100..0x130].copy_from_slice(&map);
    expected[0x200..0x206].copy_from_slice(b"quiet\0");
    expected[0x300..0x304].fill(0);
    expected[0xfe0..].fill(0);
    assert_eq!(area, expected);
    for (parameter, at) in [(Parameter::VcpuCount, 0xffd), (Parameter::MmioRanges, usize::MAX), (Parameter::Madt, 0)] {
        let problem = machine.tell(&mut area, parameter, at).unwrap_err();
        assert!(problem.contains(&format!("{parameter:?}")), "{problem}");
    }
    let machine = image::Machine { command_line: "a\0b", ..machine };
    assert!(machine.tell(&mut area, Parameter::CommandLine, 0).unwrap_err().contains("zero"));
}

#[test]
fn what_a_launch_cannot_do_is_refused() {
    let refused = |directive, memory, problem: &str| {
        let mut all = directives();
        all.insert(1, directive);
        let error = load(&file(all), memory).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}, not {problem}");
    };
    let shared = IgvmDirectiveHeader::ErrorRange { gpa: 0x8000, compatibility_mask: NATIVE, size_bytes: 0x1000 };
    refused(shared, 0x10000, "shared");
    refused(IgvmDirectiveHeader::Madt(parameter(0, 0)), 0x10000, "Madt");
    refused(IgvmDirectiveHeader::VpCount(parameter(0, 0x1000)), 0x10000, "no room at 0x1000");
    refused(page(0x6000, NATIVE, false, &[]), 0x6000, "outside");
    refused(page(0x6000, NATIVE, false, &[]), 0x7000, "outside");
}

#[test]
fn a_file_for_another_platform_is_not_loaded() {
    let file = file(directives());
    let snp = Igvm::parse(&file, IgvmPlatform::SevSnp).unwrap();
    let pages = snp.directives().filter(|(_, directive)| matches!(directive, Directive::Page { .. })).count();
    assert_eq!((pages, snp.contexts().count()), (3, 0));
    let image = IgvmImage::new(snp, |_| Ok::<_, IgvmError>(STATE)).unwrap();
    let error = launch(0x10000, 1).load_igvm(&image, "").unwrap_err();
    assert!(matches!(&error, Error::Config(problem) if problem.contains("sev-snp")), "{error}");
}

#[test]
fn every_vcpu_needs_a_state_of_the_file_s() {
    let file = file(directives());
    let mut launch = launch(0x10000, 2);
    launch.load_igvm(&IgvmImage::native(&file).unwrap(), "").unwrap();
    assert!(matches!(launch.transcript(), Err(Error::VcpuState { vcpu: 1, .. })));
}

#[test]
fn headers_that_cannot_be_are_refused() {
    let file = file(directives());
    let first = |kind| places(&file, kind)[0];
    let header = |kind, at| first(kind) + HEADER_START + at;
    for (at, value, problem) in [
        (0, 0u32, "no igvm file"),
        (4, 3, "no igvm file"),
        (8, FIXED_HEADER as u32, "bytes of headers"),
        (12, u32::MAX, "bytes of headers"),
        (16, 0, "it is to have"),
        (24, 1, "x86-64"),
        (28, 0x10000, "4 KiB"),
        (first(kind::PLATFORM), 0x200, "unknown kind 0x200"),
        (first(kind::PLATFORM), kind::ENVIRONMENT, "later sections"),
        (first(kind::PLATFORM) + 4, u32::MAX, "longer than all headers"),
        (header(kind::PLATFORM, 0), 3, "not for the platform native"),
        (header(kind::PLATFORM, 4), 2 << 16, "version 2 of the platform native, and not 1"),
        (header(kind::PARAMETER_AREA, 4), 1, "too long"),
        (header(kind::PARAMETER_AREA, 12), file.len() as u32, "outside the file"),
        (header(kind::VP_COUNT, 0), 1, "no area 1"),
        (header(kind::PARAMETER_INSERT, 12), 4, "no area 4"),
        (header(kind::PARAMETER_INSERT, 0), 0xa001, "aligned"),
        (header(kind::PAGE_DATA, 0), 1, "aligned"),
        (header(kind::PAGE_DATA, 12), u32::MAX, "outside the file"),
        (header(kind::PAGE_DATA, 16), LARGE, "2 MiB"),
        (header(kind::PAGE_DATA, 16), 8, "unknown flags"),
        (header(kind::PAGE_DATA, 20), 4, "type 4"),
        (header(kind::VP_CONTEXT, 12), file.len() as u32 - 0xfff, "outside the file"),
    ] {
        let mut file = file.clone();
        file[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let error = Igvm::parse(&file, IgvmPlatform::Native).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}, not {problem}");
    }
}

#[test]
fn a_header_of_unknown_kind_that_may_be_ignored_is() {
    let mut file = file(directives());
    let expected = load(&file, 0x10000).unwrap();
    // The page for the other platform.
    let place = places(&file, kind::PAGE_DATA)[4];
    file[place..place + 4].copy_from_slice(&(OPTIONAL | 0x200).to_le_bytes());
    assert_eq!(load(&file, 0x10000).unwrap(), expected);
}

#[test]
fn a_state_that_no_processor_can_have_is_refused_by_its_field() {
    let mut context = native(&STATE);
    let bytes = context.as_mut_bytes().len();
    for (at, place, field) in [
        (139, 136, "rflags"),
        (155, 155, "reserved field"),
        (170, 170, "code attributes"),
        (182, 182, "data attributes"),
        (207, 200, "cr0"),
        (231, 224, "efer"),
    ] {
        let mut contents = native_page(&STATE);
        contents[at] ^= 0xc0;
        let context = Context { vcpu: 3, gpa: Gpa(0), contents: &contents };
        assert_eq!(native::state(&context), Err(IgvmError::State { vcpu: 3, field, at: place }));
    }
    let mut contents = native_page(&STATE);
    contents[bytes] = 1;
    let context = Context { vcpu: 0, gpa: Gpa(0), contents: &contents };
    assert!(native::state(&context).unwrap_err().to_string().contains("0xe8"));
}

#[test]
fn the_state_of_a_vcpu_is_laid_out_as_the_format_has_it() {
    let mut expected = IgvmNativeVpContextX64::new_zeroed();
    (expected.rip, expected.rsp, expected.rdi, expected.rsi, expected.cr3) = (1, 2, 3, 4, 5);
    (expected.rflags, expected.idtr_limit, expected.gdtr_limit) = (2, 0xffff, 0xffff);
    (expected.code_selector, expected.code_attributes, expected.code_limit) = (8, 0xa09b, u32::MAX);
    (expected.data_selector, expected.data_attributes, expected.data_limit) = (16, 0xc093, u32::MAX);
    (expected.cr0, expected.cr4, expected.efer) = (0x8001_0033, 0x60, 0x500);
    let state = VcpuState { rsp: 2, ..VcpuState::long_mode(Gpa(1), Gpa(5), 3, Gpa(4)) };
    assert_eq!(native(&state), expected);
    let contents = native_page(&state);
    assert_eq!(native::state(&Context { vcpu: 0, gpa: Gpa(0), contents: &contents }), Ok(state));
}

/// Written once.
static FILE: LazyLock<Vec<u8>> = LazyLock::new(|| file(directives()));

proptest! {
    #[test]
    fn changed_and_cut_files_do_not_panic(
        changes in proptest::collection::vec((0..0x280usize, any::<u8>()), 0..4),
        cut in 0..0x280usize,
    ) {
        let mut file = FILE.clone();
        for (at, byte) in changes {
            file[at] = byte;
        }
        let _ = load(&file, 0x10000);
        file.truncate(cut);
        prop_assert!(Igvm::parse(&file, IgvmPlatform::Native).is_err());
    }
}
