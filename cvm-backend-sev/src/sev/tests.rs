//! Expected digests are of the Python package sev-snp-measure 0.0.13, as those of SEV-SNP; the HMAC is of Python's `hmac`.

use super::*;
use crate::ovmf::tests::image;
use crate::{SevFeatures, SevFlags, Vmm};

#[test]
fn a_launch_is_measured_as_the_other_implementation_does() {
    let image = image();
    let firmware = Firmware::parse(&image).unwrap();
    let kernel = KernelHashes::new(b"a kernel", b"a ram disk", b"quiet");
    let signature = "EPYC-Milan".parse().unwrap();
    let vcpus = Vcpus { count: 3, signature, vmm: Vmm::Qemu, features: SevFeatures::empty() };
    for (es, kernel, expected) in [
        (None, None, "519b3a50ad3444397f93a71935086028cc4ebdb7149360af5081cdddd556836a"),
        (None, Some(&kernel), "a68b6b989a32019ec91adafb75c91b99174ef9f619171313cbc8984fbdfccb84"),
        (Some(&vcpus), None, "128c535df33e68a9cf32812d28661ff43871ff5748e67bf53ab17defce2b9830"),
        (Some(&vcpus), Some(&kernel), "63af603ae40bfe33902189f134b115b7436c9a5ecbe7584baef969ef4e087288"),
    ] {
        assert_eq!(of_firmware(&firmware, es, kernel).unwrap().to_string(), expected);
    }
}

#[test]
fn the_measurement_is_an_hmac_of_firmware_policy_digest_and_nonce() {
    let bytes = |start: u8| std::array::from_fn(|index| start + index as u8);
    let digest = SevDigest(std::array::from_fn(|index| index as u8));
    let api = Api { major: 1, minor: 0x33, build: 7 };
    let policy = SevPolicy { least_api: (0, 0), flags: SevFlags::NO_DEBUG | SevFlags::ES };
    let (nonce, key) = (bytes(100), bytes(0));
    let mut measurement = digest.measurement(api, policy, &nonce, &key);
    assert_eq!(SevDigest(measurement).to_string(), "40b4be42e93f57ca88671e1812567e5a2c8ca3b2990686da2a7589357facfb32");
    assert!(digest.is_measured_as(&measurement, (api, policy), &nonce, &key));
    measurement[31] ^= 1;
    assert!(!digest.is_measured_as(&measurement, (api, policy), &nonce, &key));
}

#[test]
fn a_kernel_that_the_firmware_would_not_check_is_refused() {
    let silent = [0; 0x1000];
    let firmware = Firmware::parse(&silent).unwrap();
    assert!(of_firmware(&firmware, None, None).is_ok());
    let kernel = KernelHashes::new(b"a kernel", b"", b"");
    assert!(matches!(of_firmware(&firmware, None, Some(&kernel)), Err(Error::FirmwareLacks { .. })));
}
