//! `measure`: digests of files.

use crate::{run, stderr, stdout};
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
    let json = crate::parse(&stdout(&output)).unwrap();
    assert_eq!((&json["digest"], &json["firmware"]), (&digest.into(), &"0xffffd000..0x100000000".into()));

    let plain = tempfile::NamedTempFile::new().unwrap();
    fs::write(&plain, [0; 0x1000]).unwrap();
    let plain = plain.path().to_str().unwrap();
    let output = run("measure", &["snp", "--ovmf", plain, "--vcpus", "2", "--vcpu-type", "EPYC"]);
    assert!(!output.status.success() && stderr(&output).contains("where vcpus"), "{}", stderr(&output));
    assert!(stderr(&output).starts_with(&format!("error: {plain}: the firmware ")), "{}", stderr(&output));
    let output = run("measure", &["snp", "--igvm", plain]);
    assert!(!output.status.success() && stderr(&output).contains("no igvm file"), "{}", stderr(&output));

    fs::write(plain, "no firmware").unwrap();
    let output = run("measure", &["snp", "--ovmf", plain, "--vcpus", "1", "--vcpu-type", "EPYC"]);
    assert!(
        !output.status.success() && stderr(&output).contains("whole pages; an image of OVMF"),
        "{}",
        stderr(&output)
    );
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/igvm/sev-snp");
    let output = run("measure", &["snp", "--igvm", file]);
    let last = stdout(&output).lines().last().unwrap_or_default().to_owned();
    assert!(last.len() == 96 && last.bytes().all(|byte| byte.is_ascii_hexdigit()), "{}", stderr(&output));
    let elf = concat!(env!("CARGO_MANIFEST_DIR"), "/guests/tiny/tiny-guest.elf");
    let of = |more: &[&str]| {
        let output = run("measure", &[&["snp", "--elf", elf, "--vcpus", "2"], more].concat());
        let last = stdout(&output).lines().last().unwrap_or_default().to_owned();
        assert!(last.len() == 96 && last.bytes().all(|byte| byte.is_ascii_hexdigit()), "{}", stderr(&output));
        last
    };
    assert_eq!(of(&[]), of(&["--arguments", "0,0"]));
    let output = run("measure", &["snp", "--elf", elf, "--vcpus", "2", "--json"]);
    let json = crate::parse(&crate::stdout(&output)).expect("an object");
    let (config, host_data) = (json["config"].as_str().unwrap(), json["host_data"].as_str().unwrap());
    assert!(config.len() == 96 && host_data.len() == 64 && config.starts_with(host_data), "{json}");
    for more in [&["--arguments", "0,0x1"][..], &["--memory", "32"], &["--msr"], &["--private-bit", "47"]] {
        assert_ne!(of(&[]), of(more), "{more:?}");
    }
    let output = run("measure", &["snp", "--igvm", file, "--vcpus", "2"]);
    assert!(!output.status.success() && stderr(&output).contains("cannot be used with"), "{}", stderr(&output));
}

/// The digest that `measure` prints, or its error.
fn digest(arguments: &[&str]) -> Result<String, String> {
    let output = run("measure", arguments);
    let last = stdout(&output).lines().last().map(str::to_owned);
    if output.status.success() { Ok(last.unwrap_or_default()) } else { Err(stderr(&output)) }
}

/// Digests of images like some that are shipped, which the Python package sev-snp-measure 0.0.13 and an independent
/// implementation compute as well.
#[test]
fn firmware_is_measured_whatever_is_missing_that_only_another_technology_needs() {
    let image = |name: &str| format!("{}/tests/data/ovmf-{name}.bin", env!("CARGO_MANIFEST_DIR"));
    let two = ["--vcpus", "2", "--vcpu-sig", "0x800f12"];
    for (name, mode, expected) in [
        ("svsm-calling-area", "sev", "5bf4daf89105a00d5a32bca2400a6ffde8d6056aad6b7d2f57a39e968166f63f"),
        ("svsm-calling-area", "sev-es", "1d94ebb07876bd9e3dfb06eb97f95cbbcdd6030deda4dd3c9eafa26852fbb839"),
        ("empty-sections", "sev", "a572a7aeb7b91d2bee2cdae8cfc60e0a9b2af41b5da25d8b7dd04b3dcf342949"),
        ("empty-sections", "sev-es", "6f50e236e43663dc7e42afcfb76a3955a0d13bb3420f738eec422094259b0e9b"),
        (
            "empty-sections",
            "snp",
            "bc46c3ed406849d28084434b349d2949d74f2c63ca01808261a087fcc76cf5270742202a5b0ec6f064f346adb3588a3a",
        ),
    ] {
        let image = image(name);
        let vcpus = if mode == "sev" { &[][..] } else { &two };
        assert_eq!(digest(&[&[mode, "--ovmf", &image], vcpus].concat()), Ok(expected.to_owned()), "{name} {mode}");
    }
    let silent = image("no-reset-block");
    for mode in ["sev-es", "snp"] {
        let one = [mode, "--ovmf", &silent, "--vcpus", "1", "--vcpu-type", "EPYC"];
        assert!(digest(&one).is_ok(), "{mode}: {:?}", digest(&one));
        assert!(
            digest(&[&[mode, "--ovmf", &silent], &two[..]].concat()).unwrap_err().contains("where vcpus"),
            "{mode}"
        );
    }
}

#[test]
fn the_model_of_vcpus_is_a_name_with_any_version_or_numbers() {
    let image = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/ovmf/all-sections");
    let of = |more: &[&str]| digest(&[&["snp", "--ovmf", image, "--vcpus", "3"], more].concat());
    let milan = of(&["--vcpu-type", "EPYC-Milan"]).unwrap();
    for same in [
        &["--vcpu-type", "EPYC-Milan-v4"][..],
        &["--vcpu-sig", "0xa00f11"],
        &["--vcpu-family", "25", "--vcpu-model", "1", "--vcpu-stepping", "1"],
    ] {
        assert_eq!(of(same).as_ref(), Ok(&milan), "{same:?}");
    }
    assert_ne!(of(&["--vcpu-family", "0x19", "--vcpu-model", "1"]).unwrap(), milan);
    // A feature without a name is measured all the same.
    assert_ne!(of(&["--vcpu-sig", "0xa00f11", "--features", "0x8000000000000001"]).unwrap(), milan);
    assert!(of(&["--vmm", "ec2"]).is_ok() && of(&[]).unwrap_err().contains("--vcpu-type"));
    for (alternatives, expected) in [
        (&["--vcpu-sig", "1", "--vcpu-type", "EPYC"][..], "cannot be used with"),
        (&["--vcpu-family", "25"], "--vcpu-model"),
        (&["--vcpu-family", "256", "--vcpu-model", "1"], "--vcpu-family"),
        (&["--vcpu-family", "25", "--vcpu-model", "1", "--vcpu-stepping", "16"], "0 to 15"),
    ] {
        assert!(of(alternatives).unwrap_err().contains(expected), "{alternatives:?}: {:?}", of(alternatives));
    }
    let usage = run("measure", &["snp", "--help"]);
    assert!(stdout(&usage).contains("<--ovmf <FILE>|--igvm <FILE>|--elf <FILE>>"), "{}", stdout(&usage));
}
