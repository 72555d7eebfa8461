//! A firmware image from anywhere: it is refused, or its sections lie apart and it can be measured.

#![no_main]

use cvm_backend_sev::{CpuSignature, Firmware, KernelHashes, SevFeatures, Vcpus, Vmm, sev, snp};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    // The table of an image is at its end.
    let mut image = vec![0; file.len().next_multiple_of(4096) - file.len()];
    image.extend(file);
    let Ok(firmware) = Firmware::parse(&image) else { return };
    let sections = firmware.sections();
    let mut ranges: Vec<_> = sections.iter().flatten().map(|section| section.range).collect();
    ranges.push(firmware.range());
    ranges.sort();
    assert!(ranges.windows(2).all(|pair| pair[0].end() <= pair[1].start()), "{ranges:?}");
    if ranges.iter().map(|range| range.pages()).sum::<u64>() > 256 {
        // Sound, but measuring takes long.
        return;
    }
    let kernel = KernelHashes::new(b"kernel", b"", b"");
    for vmm in [Vmm::Qemu, Vmm::Ec2, Vmm::Gce] {
        let vcpus = Vcpus { count: 2, signature: CpuSignature(0), vmm, features: SevFeatures::SNP_ACTIVE };
        let without = snp::of_firmware(&firmware, &vcpus, None);
        let has_vector = firmware.reset_vector().is_ok();
        assert_eq!(without.is_ok(), has_vector && sections.is_ok());
        let with = snp::of_firmware(&firmware, &vcpus, Some(&kernel));
        assert!(with.is_err() || with != without);
        assert_eq!(sev::of_firmware(&firmware, Some(&vcpus), None).is_ok(), has_vector);
    }
    assert!(sev::of_firmware(&firmware, None, None).is_ok());
});
