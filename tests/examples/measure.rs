//! `measure`: digests of files.

use crate::{run, stderr, stdout};
use serde_json::Value;
use std::fs;

#[test]
fn measure_prints_the_digest_alone_on_its_last_line_and_says_what_firmware_lacks() {
    // What the Python package sev-snp-measure 0.0.13 computes for this image.
    let digest = "d806ef9bcfdb2717d82b1eb5b9ef2c62231dca3afa56617cfae8333d91edf13eb0a2e6c6736345687bc002df969c291c";
    let image = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/ovmf/all-sections");
    let arguments = ["snp", "--ovmf", image, "--vcpus", "3", "--vcpu-type", "EPYC-Milan"];
    let output = run("measure", &arguments);
    assert_eq!(stdout(&output).lines().last(), Some(digest), "{}", stderr(&output));
    let output = run("measure", &[&arguments[..], &["--json"]].concat());
    let json: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!((&json["digest"], &json["firmware"]), (&digest.into(), &"0xffffd000..0x100000000".into()));

    let plain = tempfile::NamedTempFile::new().unwrap();
    fs::write(&plain, [0; 0x1000]).unwrap();
    let plain = plain.path().to_str().unwrap();
    let output = run("measure", &["snp", "--ovmf", plain, "--vcpus", "1", "--vcpu-type", "EPYC"]);
    assert!(!output.status.success() && stderr(&output).contains("where vcpus"), "{}", stderr(&output));
    let output = run("measure", &["snp", "--igvm", plain]);
    assert!(!output.status.success() && stderr(&output).contains("no igvm file"), "{}", stderr(&output));

    fs::write(plain, "no firmware").unwrap();
    let output = run("measure", &["snp", "--ovmf", plain, "--vcpus", "1", "--vcpu-type", "EPYC"]);
    assert!(!output.status.success() && stderr(&output).contains("it takes an image of OVMF"), "{}", stderr(&output));
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/igvm/sev-snp");
    let output = run("measure", &["snp", "--igvm", file]);
    let last = stdout(&output).lines().last().unwrap_or_default().to_owned();
    assert!(last.len() == 96 && last.bytes().all(|byte| byte.is_ascii_hexdigit()), "{}", stderr(&output));
    let elf = concat!(env!("CARGO_MANIFEST_DIR"), "/guests/tiny/tiny-guest.elf");
    let of = |more: &[&str]| {
        let output = run("measure", &[&["snp", "--elf", elf, "--vcpus", "2"], more].concat());
        let last = stdout(&output).trim().to_owned();
        assert!(last.len() == 96 && last.bytes().all(|byte| byte.is_ascii_hexdigit()), "{}", stderr(&output));
        last
    };
    assert_eq!(of(&[]), of(&["--arguments", "0,0"]));
    for more in [&["--arguments", "0,0x1"][..], &["--memory", "32"], &["--msr"], &["--private-bit", "47"]] {
        assert_ne!(of(&[]), of(more), "{more:?}");
    }
    let output = run("measure", &["snp", "--igvm", file, "--vcpus", "2"]);
    assert!(!output.status.success() && stderr(&output).contains("cannot be used with"), "{}", stderr(&output));
}
