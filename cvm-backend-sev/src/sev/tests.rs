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
    let measurement = digest.measurement(api, policy, &nonce, &key);
    assert_eq!(SevDigest(measurement).to_string(), "40b4be42e93f57ca88671e1812567e5a2c8ca3b2990686da2a7589357facfb32");
    let mut launch = LaunchMeasurement { measurement, nonce, api, policy };
    assert!(launch.is_of(&digest, &key));
    launch.measurement[31] ^= 1;
    assert!(!launch.is_of(&digest, &key));
}

#[test]
fn a_kernel_that_the_firmware_would_not_check_is_refused() {
    let silent = [0; 0x1000];
    let firmware = Firmware::parse(&silent).unwrap();
    assert!(of_firmware(&firmware, None, None).is_ok());
    let kernel = KernelHashes::new(b"a kernel", b"", b"");
    assert!(matches!(of_firmware(&firmware, None, Some(&kernel)), Err(Error::FirmwareLacks { .. })));
}

mod by_transcript {
    use super::*;
    use cvm_core::GpaRange;
    use cvm_core::x86::VcpuState;

    const PAGE: usize = PAGE_SIZE as usize;

    fn page(gpa: u64, contents: &[u8; PAGE]) -> Entry {
        Entry::Page { kind: PageKind::Measured, gpa: Gpa(gpa), contents: launch::digest(contents) }
    }

    fn vcpu(index: u32) -> (VcpuState, Entry) {
        let state = VcpuState::long_mode(Gpa(0x20_0000), Gpa(0x10_0000), index, Gpa(0x1000));
        (state, Entry::Vcpu { index, state })
    }

    #[test]
    fn contents_are_hashed_in_the_order_of_loading_and_vcpus_in_that_of_their_indices() {
        let (first, second) = ([1; PAGE], [2; PAGE]);
        let (one, zeroth) = (vcpu(1), vcpu(0));
        let zero = Entry::Zero { range: GpaRange::from_pages(0x3000, 2).unwrap() };
        let entries = [one.1, page(0x2000, &second), zero, page(0x1000, &first), zeroth.1];
        let transcript: Transcript = entries.into_iter().collect();
        let contents = |gpa: Gpa| Some(if gpa.0 == 0x1000 { &first } else { &second });

        let loaded = Sha256::new_with_prefix(second).chain_update([0; 2 * PAGE]).chain_update(first);
        let expected = SevDigest(loaded.clone().finalize().into());
        assert_eq!(of_transcript(&transcript, None, contents).unwrap(), expected);
        let features = SevFeatures::DEBUG_SWAP;
        let states = [zeroth.0, one.0].map(|state| Vmsa::of(&state, features));
        let with_states = states.iter().fold(loaded, |digest, state| digest.chain_update(state.as_bytes()));
        let expected = SevDigest(with_states.finalize().into());
        assert_eq!(of_transcript(&transcript, Some(features), contents).unwrap(), expected);
    }

    #[test]
    fn pages_that_are_unknown_or_others_or_not_measured_are_refused() {
        let (right, wrong) = ([1; PAGE], [2; PAGE]);
        let transcript: Transcript = [page(0x1000, &right)].into_iter().collect();
        assert!(of_transcript(&transcript, None, |_| Some(&right)).is_ok());
        assert!(matches!(of_transcript(&transcript, None, |_| Some(&wrong)), Err(Error::Transcript { .. })));
        assert!(matches!(of_transcript(&transcript, None, |_| None), Err(Error::Transcript { .. })));
        let kinds = [PageKind::Unmeasured, PageKind::Secrets, PageKind::Cpuid];
        for kind in kinds {
            let page = Entry::Page { kind, gpa: Gpa(0x1000), contents: [0; 48] };
            let transcript: Transcript = [page].into_iter().collect();
            assert!(matches!(of_transcript(&transcript, None, |_| Some(&right)), Err(Error::Transcript { .. })));
        }
    }
}
