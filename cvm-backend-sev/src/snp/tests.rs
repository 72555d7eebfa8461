//! Expected digests are of the Python package sev-snp-measure 0.0.13: `calc_launch_digest` of the image that
//! `ovmf::tests::image` makes, with features 1, and for chains its class `GCTX`, with save areas by its `SevEsSaveArea`.

use super::*;
use crate::ovmf::tests::{image, image_without_kernel_hashes};
use cvm_core::launch::digest as sha384;
use cvm_core::x86::VcpuState;
use cvm_core::{Gpa, GpaRange};

fn vcpus(vmm: Vmm, count: u32, model: &str) -> Vcpus {
    Vcpus { count, signature: model.parse().unwrap(), vmm, features: SevFeatures::SNP_ACTIVE }
}

#[test]
fn a_launch_of_firmware_is_measured_as_the_other_implementation_does() {
    let kernel = KernelHashes::new(b"a kernel", b"a ram disk", b"quiet");
    let image = image();
    let firmware = Firmware::parse(&image).unwrap();
    for (vmm, alone, three, with_kernel) in [
        (
            Vmm::Qemu,
            "690c09510cebef5ea93cf369291a6f14ce47ddb03cb08b71db65793ba5ba908af53412047d80a6e6fe8f2ceba3db08d4",
            "d806ef9bcfdb2717d82b1eb5b9ef2c62231dca3afa56617cfae8333d91edf13eb0a2e6c6736345687bc002df969c291c",
            "ed6cc2ff94baec6676468c5ed43e2525a1eeaca4af1b2e1490cdab739933f0a563d519bfc53bf05389bf9025f90004d6",
        ),
        (
            Vmm::Ec2,
            "cb851b33ff66e7b482ebe8a71095711be0c349d1292d1b6a825061c0a511763fce972170ccc870b9cba4775900240cdd",
            "2a7de4ef7005068b662bb3cb0f6dbc8d1c70b21043b3b87681be02be571ed30ce07d9b087cfd8b7c8e37c51b50aa1cb0",
            "14e1de7010d07af63ff6076d0cc6bc1dab9b6a1baa94b092fad1b4c22ef80f55ebdd6c2f2d6759f7912d78e76423123c",
        ),
        (
            Vmm::Gce,
            "429b97a82fb2648524581155e387458c2a382e8e631ea82ebf498c468fc2080ce01babba6df14ac6816861e2cd0f0cc8",
            "8cb39361ea6da3d712eb885f13a4224388c500f0dac50d4eb17587392225260b72ef8cf4b6bd52d1b491b651f7d30ff8",
            "d4025f2e86b4e20f2f6ede62f1760a17c2fa15defba85faa6e1b2024347c6211252ec6f8ec015dd60b01345fed47effc",
        ),
    ] {
        for (count, model, kernel, expected) in
            [(1, "EPYC-v4", None, alone), (3, "EPYC-Milan", None, three), (3, "EPYC-Milan", Some(&kernel), with_kernel)]
        {
            let measured = of_firmware(&firmware, &vcpus(vmm, count, model), kernel).unwrap();
            assert_eq!(measured.to_string(), expected, "{vmm:?}, {count}");
        }
    }
}

#[test]
fn what_firmware_does_not_offer_is_refused() {
    let kernel = KernelHashes::new(b"a kernel", b"", b"");
    let image = image_without_kernel_hashes();
    let firmware = Firmware::parse(&image).unwrap();
    let qemu = |count| vcpus(Vmm::Qemu, count, "EPYC");
    assert!(of_firmware(&firmware, &qemu(1), None).is_ok());
    assert!(matches!(of_firmware(&firmware, &qemu(1), Some(&kernel)), Err(Error::FirmwareLacks { .. })));
    for count in [0, MAX_VCPUS + 1] {
        assert_eq!(of_firmware(&firmware, &qemu(count), None), Err(Error::Vcpus { vcpus: count }));
    }
    let silent = [0; 0x1000];
    let silent = Firmware::parse(&silent).unwrap();
    // The first vCPU starts at the reset vector, whatever the firmware says.
    assert!(of_firmware(&silent, &qemu(1), None).is_ok());
    assert!(matches!(of_firmware(&silent, &qemu(2), None), Err(Error::FirmwareLacks { .. })));
}

#[test]
fn a_kernels_hashes_outside_of_their_page_are_refused() {
    let kernel = KernelHashes::new(b"a kernel", b"", b"");
    // The address of the table, in the entry of the table at the end.
    let place = image().windows(4).rposition(|bytes| bytes == 0x81_0c00u32.to_le_bytes()).unwrap();
    for (gpa, fits) in [(0x81_0f50u32, true), (0x81_0f51, false), (0x81_1000, false), (0x80_ffff, false)] {
        let mut image = image();
        image[place..place + 4].copy_from_slice(&gpa.to_le_bytes());
        let firmware = Firmware::parse(&image).unwrap();
        let measured = of_firmware(&firmware, &vcpus(Vmm::Qemu, 1, "EPYC"), Some(&kernel));
        assert_eq!(measured.is_ok(), fits, "{gpa:#x}: {measured:?}");
    }
}

#[test]
fn pages_are_chained_as_the_other_implementation_does() {
    let mut digest = LaunchDigest::new();
    digest.normal(Gpa(0x1000), &[7; PAGE_SIZE as usize]).unwrap();
    for (page, gpa, len) in [
        (PageType::Zero, 0x3000, 0x2000),
        (PageType::Unmeasured, 0x8000, 0x1000),
        (PageType::Secrets, 0x9000, 0x1000),
        (PageType::Cpuid, 0xa000, 0x1000),
    ] {
        digest.without_contents(page, GpaRange::new(gpa, len).unwrap());
    }
    assert_eq!(
        digest.measurement().to_string(),
        "338ca58b3359a2b14f60c9c3cc3917394f82f6dbc10321460493889268f9e8feb1ef1a4a8f2e117223810104eccdb0e6"
    );
}

#[test]
fn a_transcript_is_measured_page_by_page_and_then_its_vcpus() {
    let page = |kind, gpa, contents| Entry::Page { kind, gpa: Gpa(gpa), contents };
    let vcpu = |index: u32| {
        let state = VcpuState::long_mode(Gpa(0x10_0000), Gpa(0x5000), index, Gpa(0x4000));
        let state = VcpuState { rsp: 0x2000, ..state };
        Entry::Vcpu { index, state }
    };
    let entries = [
        vcpu(1),
        page(PageKind::Measured, 0x1000, sha384(&[7; PAGE_SIZE as usize])),
        Entry::Zero { range: GpaRange::new(0x3000, 0x2000).unwrap() },
        vcpu(0),
        page(PageKind::Unmeasured, 0x8000, [0; 48]),
    ];
    let measured = of_transcript(&entries.into_iter().collect(), SevFeatures::SNP_ACTIVE);
    assert_eq!(
        measured.to_string(),
        "7af0fc2039fee0252786be60df5d68b87277d5c9d2814508d095793f370ddecc23fd54c1d65a9e58d9ed1358cfdae7bc"
    );
}

#[test]
fn host_data_is_the_first_two_thirds_of_the_configurations_digest_unless_it_is_said_otherwise() {
    let mut digest = [0xdd; 48];
    digest[..32].copy_from_slice(b"0123456789abcdef0123456789abcdef");
    let digest = cvm_core::launch::ConfigDigest(digest);
    assert_eq!(HostData::default().bytes(&digest), *b"0123456789abcdef0123456789abcdef");
    assert_eq!(HostData::Custom([7; 32]).bytes(&digest), [7; 32]);
}
