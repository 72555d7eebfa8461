//! SEV-SNP guests that come as IGVM files, which the crate `igvm` has written.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::*;
use cvm_backend_sev::digest::VMSA_GPA;
use cvm_backend_sev::id_block::PrivateKey;
use cvm_backend_sev::kvm::SnpOptions;
use cvm_backend_sev::snp::of_transcript;
use cvm_backend_sev::{IdAuth, IdBlock, SevFeatures, Vmsa, igvm as snp_igvm};
use cvm_core::x86::{VcpuState, identity_map};
use cvm_core::{Error, Gpa, PAGE_SIZE, Platform, Protection, Side, Vm};
use igvm::snp_defs::SevVmsa;
use igvm::{IgvmDirectiveHeader, IgvmFile, IgvmInitializationHeader, IgvmPlatformHeader, IgvmRevision};
use igvm_defs::{
    IGVM_VHS_PARAMETER, IGVM_VHS_PARAMETER_INSERT, IGVM_VHS_SUPPORTED_PLATFORM, IgvmPageDataFlags, IgvmPageDataType,
    IgvmPlatformType,
};
use zerocopy::FromBytes;

const POLICY: u64 = 0x3_0000;
const KEY: &str = include_str!("../src/id_block/snpguest/numbers-1.pem");

/// Where the guest is told how many vCPUs it has.
const PARAMETERS: u64 = DATA;
const UNMEASURED: u64 = DATA + PAGE_SIZE;
const SECRETS: u64 = DATA + 2 * PAGE_SIZE;

/// A guest that reports what it was told, and what a page has that is not measured, as a file.
fn file(host: &Host, vcpus: u16) -> Vec<u8> {
    let launch = host.platform.launch(config(1)).unwrap();
    let private_bit = launch.interface().private_bit.unwrap();
    let code = host.assemble(&launch, CODE, |a| {
        for place in [PARAMETERS, UNMEASURED] {
            a.load(place, Side::Private)?;
            a.report()?;
        }
        a.end(0)
    });
    let page = |gpa: u64, kind, unmeasured, data: &[u8]| IgvmDirectiveHeader::PageData {
        gpa,
        compatibility_mask: 1,
        flags: IgvmPageDataFlags::new().with_unmeasured(unmeasured),
        data_type: kind,
        data: data.to_vec(),
    };
    let mut directives = vec![
        page(CODE, IgvmPageDataType::NORMAL, false, &code),
        page(UNMEASURED, IgvmPageDataType::NORMAL, true, &[0x55; 4096]),
        page(SECRETS, IgvmPageDataType::SECRETS, false, &[]),
        page(SECRETS + PAGE_SIZE, IgvmPageDataType::CPUID_DATA, false, &[]),
        // Zeros, as a normal page.
        page(SECRETS + 2 * PAGE_SIZE, IgvmPageDataType::NORMAL, false, &[]),
        IgvmDirectiveHeader::ParameterArea {
            number_of_bytes: PAGE_SIZE,
            parameter_area_index: 0,
            initial_data: Vec::new(),
        },
        IgvmDirectiveHeader::VpCount(IGVM_VHS_PARAMETER { parameter_area_index: 0, byte_offset: 0 }),
        IgvmDirectiveHeader::ParameterInsert(IGVM_VHS_PARAMETER_INSERT {
            gpa: PARAMETERS,
            compatibility_mask: 1,
            parameter_area_index: 0,
        }),
    ];
    let tables = identity_map(Gpa(TABLES), MEMORY, Some(private_bit)).unwrap();
    let tables = (TABLES..).step_by(PAGE_SIZE as usize).zip(tables.chunks(PAGE_SIZE as usize));
    directives.extend(tables.map(|(gpa, table)| page(gpa, IgvmPageDataType::NORMAL, false, table)));
    directives.extend((0..vcpus).map(|index| {
        let root = Gpa(TABLES | 1 << private_bit);
        let state = VcpuState::long_mode(Gpa(CODE), root, index.into(), Gpa(BOOT_PAGE));
        let vmsa = Vmsa::of(&state, SevFeatures::SNP_ACTIVE);
        IgvmDirectiveHeader::SnpVpContext {
            gpa: VMSA_GPA.0,
            compatibility_mask: 1,
            vp_index: index,
            vmsa: Box::new(SevVmsa::read_from_bytes(vmsa.as_bytes()).unwrap()),
        }
    }));
    let platform = IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: 1,
        highest_vtl: 0,
        platform_type: IgvmPlatformType::SEV_SNP,
        platform_version: 1,
        shared_gpa_boundary: 0,
    });
    let policy = IgvmInitializationHeader::GuestPolicy { policy: POLICY, compatibility_mask: 1 };
    let mut file = Vec::new();
    let igvm = IgvmFile::new(IgvmRevision::V1, vec![platform], vec![policy], directives).unwrap();
    igvm.serialize(&mut file).unwrap();
    file
}

#[test]
fn the_firmware_measures_a_file_as_it_says_and_takes_an_id_block_of_that() {
    let Some(mut host) = host(Protection::SevSnp) else { return };
    for vcpus in [1, 3] {
        let file = file(&host, vcpus);
        let igvm = snp_igvm::parse(&file).unwrap();
        let (digest, policy) = (snp_igvm::measurement(&igvm).unwrap(), snp_igvm::policy(&igvm).unwrap());
        let features = snp_igvm::features(&igvm).unwrap();
        let block = IdBlock { digest, family: [1; 16], image: [2; 16], svn: 3, policy };
        let auth = IdAuth::sign(&block, &PrivateKey::from_pem(KEY).unwrap(), None);
        let options = SnpOptions::default().policy(policy).features(features).id_block(block, auth);
        host = host.with_snp(options);
        let mut launch = host.platform.launch(config(vcpus.into())).unwrap();
        launch.load_igvm(&snp_igvm::image(igvm).unwrap(), "").unwrap();
        let mut guest = Guest::from_launch(launch);
        assert_eq!(of_transcript(guest.vm.transcript(), host.platform.features()), digest);
        if processor::is_faked() {
            let finish = processor::snp_finish();
            assert!(finish.contains(&format!("ld={digest} ")), "{digest}: {finish}");
        }
        assert_eq!((guest.report(), guest.report()), (vcpus.into(), 0x5555_5555));
        guest.end();
    }
}

#[test]
fn a_file_that_is_measured_with_another_digest_than_its_id_block_has_is_not_launched() {
    let Some(host) = host(Protection::SevSnp) else { return };
    let file = file(&host, 1);
    let igvm = snp_igvm::parse(&file).unwrap();
    let mut digest = snp_igvm::measurement(&igvm).unwrap();
    digest.0[0] ^= 1;
    let policy = snp_igvm::policy(&igvm).unwrap();
    let block = IdBlock { digest, family: [0; 16], image: [0; 16], svn: 0, policy };
    let auth = IdAuth::sign(&block, &PrivateKey::from_pem(KEY).unwrap(), None);
    let host = host.with_snp(SnpOptions::default().policy(policy).id_block(block, auth));
    let mut launch = host.platform.launch(config(1)).unwrap();
    launch.load_igvm(&snp_igvm::image(igvm).unwrap(), "").unwrap();
    assert!(matches!(launch.seal(), Err(Error::Backend { step: "seal the vm", .. })));
}
