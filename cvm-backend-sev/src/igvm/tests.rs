//! Against the crate `igvm`, which writes the files here and measures them too.

use super::*;
use igvm::measurement::generate_snp_measurement;
use igvm::snp_defs::SevVmsa;
use igvm::{IgvmDirectiveHeader, IgvmFile, IgvmInitializationHeader, IgvmPlatformHeader, IgvmRevision};
use igvm_defs::{
    IGVM_VHS_PARAMETER_INSERT, IGVM_VHS_SUPPORTED_PLATFORM, IgvmPageDataFlags, IgvmPageDataType, IgvmPlatformType,
};
use proptest::prelude::*;
use zerocopy::FromZeros;

/// The bits of SEV-SNP and of another platform.
const SNP: u32 = 2;
const OTHER: u32 = 1;

fn page(
    gpa: u64,
    mask: u32,
    flags: IgvmPageDataFlags,
    data_type: IgvmPageDataType,
    data: &[u8],
) -> IgvmDirectiveHeader {
    IgvmDirectiveHeader::PageData { gpa, compatibility_mask: mask, flags, data_type, data: data.to_vec() }
}

/// A file with each thing that is measured, and what `igvm` measures it as.
fn file() -> (Vec<u8>, [u8; 48]) {
    let platform = |mask, platform_type| {
        IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
            compatibility_mask: mask,
            highest_vtl: 0,
            platform_type,
            platform_version: 1,
            shared_gpa_boundary: 0,
        })
    };
    let none = IgvmPageDataFlags::new();
    let mut vmsa = SevVmsa::new_box_zeroed().unwrap();
    (vmsa.rip, vmsa.cr0) = (0x1234, 0x11);
    let policy = IgvmInitializationHeader::GuestPolicy { policy: 0x3_0000, compatibility_mask: SNP };
    let directives = vec![
        IgvmDirectiveHeader::ParameterArea { number_of_bytes: 0x2000, parameter_area_index: 3, initial_data: vec![] },
        page(0x1000, SNP | OTHER, none, IgvmPageDataType::NORMAL, &[7; 4096]),
        page(0x2000, SNP, none, IgvmPageDataType::NORMAL, &[9; 100]),
        page(0x3000, SNP, none, IgvmPageDataType::NORMAL, &[]),
        page(0x4000, OTHER, none, IgvmPageDataType::NORMAL, &[1; 4096]),
        page(0x5000, SNP, none.with_unmeasured(true), IgvmPageDataType::NORMAL, &[2; 4096]),
        page(0x6000, SNP, none.with_shared(true), IgvmPageDataType::NORMAL, &[]),
        page(0x7000, SNP, none, IgvmPageDataType::SECRETS, &[]),
        page(0x8000, SNP, none, IgvmPageDataType::CPUID_DATA, &[]),
        IgvmDirectiveHeader::ParameterInsert(IGVM_VHS_PARAMETER_INSERT {
            gpa: 0xa000,
            compatibility_mask: SNP,
            parameter_area_index: 3,
        }),
        IgvmDirectiveHeader::SnpVpContext { gpa: 0xffff_ffff_f000, compatibility_mask: SNP, vp_index: 0, vmsa },
    ];
    let expected = generate_snp_measurement(std::slice::from_ref(&policy), &directives, SNP).unwrap();
    let platforms = vec![platform(OTHER, IgvmPlatformType::VSM_ISOLATION), platform(SNP, IgvmPlatformType::SEV_SNP)];
    let mut bytes = Vec::new();
    IgvmFile::new(IgvmRevision::V1, platforms, vec![policy], directives).unwrap().serialize(&mut bytes).unwrap();
    (bytes, expected)
}

/// Where the headers of a kind start, with their 8 bytes of kind and length.
fn places(file: &[u8], kind: u32) -> Vec<usize> {
    let igvm = Igvm::parse(file).unwrap();
    igvm.headers.iter().filter(|header| header.kind == kind).map(|header| header.offset).collect()
}

#[test]
fn a_file_is_measured_as_the_crate_igvm_does() {
    let (file, expected) = file();
    let igvm = Igvm::parse(&file).unwrap();
    assert_eq!(igvm.policy().bits(), 0x3_0000);
    assert_eq!(igvm.measurement(), Ok(Measurement(expected)));
}

#[test]
fn headers_that_cannot_be_are_refused() {
    let (file, _) = file();
    let first = |kind| places(&file, kind)[0];
    let header = |kind, at| first(kind) + HEADER_START + at;
    for (at, value, problem) in [
        (0, 0u32, "no igvm file"),
        (4, 2, "no igvm file"),
        (8, 0, "bytes of headers"),
        (12, u32::MAX, "bytes of headers"),
        (16, 0, "it is to have"),
        (first(kind::PLATFORM), 0x200, "unknown kind 0x200"),
        (first(kind::PLATFORM) + 4, u32::MAX, "longer than all headers"),
        (header(kind::GUEST_POLICY, 8), OTHER, "no policy"),
        (header(kind::GUEST_POLICY, 0), 0, "bit 17"),
        (header(kind::PARAMETER_AREA, 4), 1, "too long"),
        (header(kind::PARAMETER_INSERT, 12), 4, "no area 4"),
        (header(kind::PARAMETER_INSERT, 0), 0xa001, "whole pages"),
        (header(kind::PAGE_DATA, 0), 1, "whole pages"),
        (header(kind::PAGE_DATA, 12), u32::MAX, "outside the file"),
        (header(kind::PAGE_DATA, 16), LARGE, "2 MiB"),
        (header(kind::PAGE_DATA, 16), 8, "unknown flags"),
        (header(kind::PAGE_DATA, 20), 4, "type 4"),
        (header(kind::VP_CONTEXT, 12), file.len() as u32 - 0xfff, "outside the file"),
    ] {
        let mut file = file.clone();
        file[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let error = Igvm::parse(&file).and_then(|igvm| igvm.measurement()).unwrap_err();
        assert!(error.to_string().contains(problem), "{error}, not {problem}");
    }
}

#[test]
fn a_header_of_unknown_kind_that_may_be_ignored_is() {
    let (mut file, expected) = file();
    // The page for the other platform.
    let place = places(&file, kind::PAGE_DATA)[3];
    file[place..place + 4].copy_from_slice(&(OPTIONAL | 0x200).to_le_bytes());
    assert_eq!(Igvm::parse(&file).unwrap().measurement(), Ok(Measurement(expected)));
}

proptest! {
    #[test]
    fn changed_and_cut_files_do_not_panic(
        changes in proptest::collection::vec((0..0x240usize, any::<u8>()), 0..4),
        cut in 0..0x300usize,
    ) {
        let (mut file, _) = file();
        for (at, byte) in changes {
            file[at] = byte;
        }
        let _ = Igvm::parse(&file).and_then(|igvm| igvm.measurement());
        file.truncate(cut);
        prop_assert!(Igvm::parse(&file).is_err());
    }
}
