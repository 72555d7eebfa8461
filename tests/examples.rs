//! The examples, run as a user runs them. What needs KVM is skipped, loudly, where there is none; with the variable
//! `CVM_REQUIRE_KVM` set that is a failure.

use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Where cargo has put an example; it builds them before it runs this.
fn example(name: &str) -> PathBuf {
    let this = std::env::current_exe().unwrap();
    let path = this.parent().and_then(Path::parent).unwrap().join("examples").join(name);
    assert!(path.is_file(), "{} is not built: run `cargo build --examples`", path.display());
    path
}

/// Whether guests can run here.
fn kvm() -> bool {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) if std::env::var_os("CVM_REQUIRE_KVM").is_some() => panic!("/dev/kvm is required: {error}"),
        Err(error) => {
            eprintln!("SKIPPED: /dev/kvm cannot be opened: {error}");
            false
        }
    }
}

fn run(name: &str, arguments: &[&str]) -> Output {
    let output = Command::new(example(name)).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!errors.contains("panicked"), "{name} {arguments:?} panicked: {errors}");
    output
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Boots the tiny guest and returns the JSON and whether the exit status was 0.
fn boot(arguments: &[&str]) -> (Value, bool) {
    let output = run("boot_tiny_guest", &[arguments, &["--json"]].concat());
    let json = serde_json::from_str(&stdout(&output)).unwrap_or_else(|error| {
        panic!("{arguments:?} gave no json: {error}\n{}\n{}", stdout(&output), stderr(&output))
    });
    (json, output.status.success())
}

/// Boots the tiny guest, which must go well, and has far longer than it needs where processors are emulated.
fn boot_well(arguments: &[&str]) -> Value {
    let (json, success) = boot(&[arguments, &["--timeout", "240"]].concat());
    assert!(success && json["ok"] == true, "{arguments:?}: {json:#}");
    json
}

#[test]
fn the_tiny_guest_does_its_work_whatever_the_number_of_vcpus_and_the_size_of_memory() {
    if !kvm() {
        return;
    }
    for (vcpus, memory) in [("1", "6"), ("2", "64"), ("16", "3328")] {
        let json = boot_well(&["--vcpus", vcpus, "--memory", memory]);
        assert_eq!(json["ends"].as_array().unwrap().len(), vcpus.parse::<usize>().unwrap());
        assert_eq!(json["checks"].as_array().unwrap().len(), 14);
        // The guest shared its pool of 512 pages, one page for the report, and 16 for each further vCPU.
        let others = vcpus.parse::<u64>().unwrap() - 1;
        assert_eq!(json["conversions"]["pages_to_shared"], 513 + 16 * others);
        assert!(json["bounced_from_device"].as_u64().unwrap() >= 32 << 10);
    }
}

#[test]
fn every_way_to_ring_and_to_ask_leads_to_the_same() {
    if !kvm() {
        return;
    }
    for doorbell in ["port", "msr"] {
        let json = boot_well(&["--doorbell", doorbell, "--transport", "doorbell"]);
        assert_eq!(json["transport"], "doorbell");
        let output = run("boot_tiny_guest", &["--doorbell", doorbell, "--transport", "hypercall", "--json"]);
        if output.status.success() {
            let json: Value = serde_json::from_str(&stdout(&output)).unwrap();
            assert_eq!((&json["transport"], &json["ok"]), (&"hypercall".into(), &true.into()));
        } else {
            assert!(stderr(&output).contains("hypercalls do not work on this kvm"), "{}", stderr(&output));
            eprintln!("SKIPPED: conversions by hypercall, which does not work on this kvm");
        }
    }
}

#[test]
fn the_contract_gives_nothing_away_and_the_rest_is_what_the_trust_model_admits() {
    if !kvm() {
        return;
    }
    let register = "read a register";
    let memory = ["read every open file of this process", "read every mapping of this process"];
    let isolations =
        [("none", [&[register][..], &memory[..]].concat()), ("guest-memfd", vec![register]), ("vault", vec![])];
    for (isolation, open) in isolations {
        if !offered(isolation) {
            eprintln!("SKIPPED: isolation {isolation}, which this kvm does not offer");
            continue;
        }
        let json = boot_well(&["--isolation", isolation]);
        assert_eq!(json["isolation"], isolation);
        let attempts = json["attempts"].as_array().unwrap();
        let reached = attempts.iter().filter(|attempt| attempt["reached"] == true);
        let reached: Vec<_> = reached.map(|attempt| attempt["what"].as_str().unwrap()).collect();
        assert_eq!((attempts.len(), reached), (8, open), "with isolation {isolation}: {attempts:#?}");
    }
}

/// Whether this host offers a kind of protection.
fn offered(protection: &str) -> bool {
    let offers: Value = serde_json::from_str(&stdout(&run("probe", &["--json"]))).unwrap();
    offers.as_array().unwrap().iter().any(|offer| offer["protection"] == protection && offer["offered"] == true)
}

#[test]
fn a_policy_is_enforced_or_refused_with_a_reason() {
    if !kvm() {
        return;
    }
    let output = run("boot_tiny_guest", &["--isolation", "none", "--policy", "no-debug"]);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("the policy cannot be fulfilled: whoever holds the vcpus"), "{}", stderr(&output));

    boot_well(&["--isolation", "vault", "--policy", "no-debug,no-mmio"]);
    for demand in ["no-smt", "no-performance-counters", "flush-l1d"] {
        let output = run("boot_tiny_guest", &["--json", "--policy", demand]);
        if !output.status.success() {
            assert!(stderr(&output).contains("the policy cannot be fulfilled"), "{demand}: {}", stderr(&output));
        }
    }
}

#[test]
fn an_isolation_that_the_host_does_not_offer_is_refused_with_what_lacks() {
    if !kvm() || offered("guest-memfd") {
        return;
    }
    let output = run("boot_tiny_guest", &["--isolation", "guest-memfd"]);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("guest-memfd is not offered here: kvm has no"), "{}", stderr(&output));
}

#[test]
fn hardware_that_the_host_lacks_is_refused_with_what_lacks_and_how_to_see_it_all_the_same() {
    if !kvm() {
        return;
    }
    for (platform, protection) in [("snp", "sev-snp"), ("sev-es", "sev-es"), ("sev", "sev")] {
        if offered(protection) {
            let mut arguments = vec!["--platform", platform];
            // The secure processor of L1.
            let emulated = Path::new("/proc/fakepsp").exists();
            arguments.extend(emulated.then_some("--emulated"));
            let checks = if platform == "snp" { 16 } else { 14 };
            let json = boot_well(&arguments);
            assert_eq!(json["checks"].as_array().unwrap().len(), checks);
            if platform == "snp" {
                let image = if emulated { "tiny-guest-unvalidated.elf" } else { "tiny-guest.elf" };
                let image = concat!(env!("CARGO_MANIFEST_DIR"), "/guests/tiny/").to_owned() + image;
                let given = format!("0,{}", json["nonce"]);
                let output = run("measure", &["snp", "--elf", &image, "--vcpus", "2", "--arguments", &given]);
                assert_eq!(Some(stdout(&output).trim()), json["measurement"].as_str(), "{}", stderr(&output));
            }
            continue;
        }
        let output = run("boot_tiny_guest", &["--platform", platform]);
        assert!(!output.status.success(), "{platform}");
        let errors = stderr(&output);
        assert!(errors.starts_with(&format!("error: {protection} is not offered here: ")), "{errors}");
        assert!(errors.contains(&format!("boot_tiny_guest --platform {platform} --emulated")), "{errors}");
    }
}

#[test]
fn a_disk_of_the_users_is_read_whole_and_left_alone() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let contents: Vec<u8> = (0..40 * 512u32).map(|i| ((i * i) >> 3) as u8).collect();
    fs::write(&path, &contents).unwrap();
    let json = boot_well(&["--disk", path.to_str().unwrap()]);
    let sha256: String = Sha256::digest(&contents).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(json["disk_sha256"], sha256);
    assert_eq!(fs::read(&path).unwrap(), contents);
}

#[test]
fn a_guest_that_misbehaves_is_stopped_with_a_clear_reason() {
    if !kvm() {
        return;
    }
    for (how, reason) in [
        ("spin", "ran too long"),
        ("triple-fault", "triple fault"),
        ("unknown-doorbell", "doorbell register 0x1fc"),
        ("bad-conversions", "ended with code 203"),
        ("panic", "ended with code 101"),
    ] {
        let (json, success) = boot(&["--misbehave", how, "--timeout", "1"]);
        let end = json["ends"][0].as_str().unwrap();
        assert!(!success && end.contains(reason), "{how}: {end}");
    }
    let (json, _) = boot(&["--misbehave", "bad-conversions"]);
    assert_eq!(json["conversions"]["refused"], 3);
    assert_eq!(json["conversions"]["pages_to_shared"].as_u64().unwrap() % 4, 0, "vcpu 0 converted something");
    assert!(json["refused_conversions"][0].as_str().unwrap().contains("outside the guest's memory"));
}

/// The built image with eight bytes changed.
fn changed_image(directory: &Path, offset: usize, value: u64) -> String {
    let mut image = tiny_guest::IMAGE.to_vec();
    image[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    let path = directory.join(format!("image-{offset}-{value}"));
    fs::write(&path, image).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_file_that_is_no_kernel_is_refused_before_anything_is_launched() {
    let directory = tempfile::tempdir().unwrap();
    let text = directory.path().join("text");
    fs::write(&text, "this is no kernel").unwrap();
    let text = text.to_str().unwrap();
    let elf = directory.path().join("elf");
    fs::write(&elf, b"\x7fELF").unwrap();
    for (kernel, expected) in [
        ("/nonexistent", "failed to read /nonexistent"),
        (text, "the image is refused: it ends within its setup header"),
        (elf.to_str().unwrap(), "the image is refused"),
    ] {
        let output = run("boot_linux", &["--kernel", kernel]);
        assert!(!output.status.success() && stderr(&output).contains(expected), "{}", stderr(&output));
    }
}

#[test]
fn bad_input_gives_an_error_that_says_what_is_wrong() {
    let directory = tempfile::tempdir().unwrap();
    let text = directory.path().join("text");
    fs::write(&text, "this is no executable").unwrap();
    let text = text.to_str().unwrap();
    // The physical address of the second segment (ELF-64: program headers of 56 bytes from 64 on, the address at 24).
    let second = 64 + 56 + 24;
    let overlapping = changed_image(directory.path(), second, 0x20_0000);
    let outside = changed_image(directory.path(), second, 0x4000_0000);
    let cases: [(&[&str], &str); 15] = [
        (&["--kvm", "/nonexistent"], "failed to open /nonexistent: load kvm_intel or kvm_amd"),
        (&["--kvm", "/dev/null"], "failed to open /dev/null: it must be a kvm device"),
        (&["--kvm", text], "it must be a kvm device"),
        (&["--vcpus", "0"], "0 is not in 1..=16"),
        (&["--vcpus", "4294967296"], "not in 1..=16"),
        (&["--vcpus", "-1"], "unexpected argument"),
        (&["--memory", "0"], "0 is not in 6..=3328"),
        (&["--memory", "18446744073709551615"], "not in 6..=3328"),
        (&["--guest", "/nonexistent"], "failed to read /nonexistent"),
        (&["--guest", text], "the image is refused"),
        (&["--guest", &overlapping], "overlap"),
        (&["--guest", &outside], "outside the guest's memory"),
        (&["--disk", "/nonexistent"], "failed to open the disk /nonexistent"),
        (&["--disk", text], "a disk of 21 bytes will not do"),
        (&["--disk", "/dev/null"], "a disk of 0 bytes will not do"),
    ];
    for (arguments, expected) in cases {
        let needs_kvm = ["--guest"].contains(&arguments[0]);
        if needs_kvm && !kvm() {
            continue;
        }
        let output = run("boot_tiny_guest", arguments);
        assert!(!output.status.success(), "{arguments:?} succeeded");
        let errors = stderr(&output);
        assert!(errors.starts_with("error:") && errors.contains(expected), "{arguments:?}: {errors}");
    }
}

/// What both guests of `io_overhead` did, case by case, in a short run.
fn io_overhead(arguments: &[&str]) -> Value {
    let output = run("io_overhead", &[&["--json", "--ios", "2", "--rounds", "1"], arguments].concat());
    let json: Value = serde_json::from_str(&stdout(&output))
        .unwrap_or_else(|error| panic!("{arguments:?} gave no json: {error}\n{}", stderr(&output)));
    assert!(output.status.success() && json["ok"] == true, "{arguments:?}: {json:#}");
    json
}

#[test]
fn payloads_are_copied_once_each_way_when_protected_and_never_when_not() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let chart = directory.path().join("chart.svg");
    let json = io_overhead(&["--svg", chart.to_str().unwrap()]);
    let cases = json["cases"].as_array().unwrap();
    let (blocks, frames) = ([4 << 10, 64 << 10, 1 << 20], [64, 256, 1500, 4096, 9000]);
    let mut expected = Vec::new();
    for (operation, copied) in
        [("read sequential", (0, 1)), ("read random", (0, 1)), ("write sequential", (1, 0)), ("write random", (1, 0))]
    {
        expected.extend(blocks.map(|size| (operation, size, copied)));
    }
    for (operation, copied) in [("send", (1, 0)), ("receive", (0, 1)), ("echo", (1, 1))] {
        expected.extend(frames.map(|size| (operation, size, copied)));
    }
    assert_eq!(cases.len(), expected.len() + 2, "these, and two of the network stack");
    let ios = 2;
    for (case, (operation, size, (to_device, from_device))) in cases.iter().zip(expected) {
        assert_eq!((&case["operation"], &case["size"]), (&operation.into(), &size.into()));
        let (protected, unprotected) = (&case["protected"], &case["unprotected"]);
        for side in [protected, unprotected] {
            assert_eq!((&side["ios"], &side["bytes"]), (&ios.into(), &(ios * size).into()), "{case:#}");
            assert_eq!(side["verified"], true, "{case:#}");
            // The guest compares what comes to it; the VMM what leaves it.
            assert_eq!(side["compared"].as_u64().unwrap() > 0, from_device > 0, "{case:#}");
        }
        assert_eq!(protected["copied_to_device"], to_device * ios * size, "{case:#}");
        assert_eq!(protected["copied_from_device"], from_device * ios * size, "{case:#}");
        assert_eq!(protected["copies_per_io"], (to_device + from_device) as f64, "{case:#}");
        for copied in ["copied_to_device", "copied_from_device", "headers_copied"] {
            assert_eq!(unprotected[copied], 0, "{case:#}");
        }
        assert_eq!(unprotected["copies_per_io"], 0.0, "{case:#}");
    }
    for case in &cases[cases.len() - 2..] {
        assert_eq!(case["operation"], "udp echo");
        for side in [&case["protected"], &case["unprotected"]] {
            assert_eq!(side["compared"], side["bytes"], "datagrams are compared byte by byte: {case:#}");
        }
    }
    let (protected, unprotected) = (&json["shared_protected"], &json["shared_unprotected"]);
    assert!(protected.as_u64().unwrap() < unprotected.as_u64().unwrap());

    let chart = fs::read_to_string(chart).unwrap();
    for case in cases {
        assert!(chart.contains(&format!(">{}</text>", case["name"].as_str().unwrap())), "{chart}");
    }
    // A bar for each side, and what says which is which.
    assert_eq!(chart.matches("<rect class=").count(), 2 * cases.len() + 2);
}

#[test]
fn the_smallest_vmm_greets_and_is_refused() {
    if !kvm() {
        return;
    }
    let output = run("minimal_vmm", &[]);
    let text = stdout(&output);
    assert!(output.status.success(), "{text}\n{}", stderr(&output));
    assert!(text.contains("hello from protected memory"), "{text}");
    assert!(text.contains("private at 0x1000: Guest memory error"), "{text}");
}

#[test]
fn the_probe_names_every_kind_of_protection_and_a_remedy_for_what_lacks() {
    let output = run("probe", &["--json"]);
    let offers: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let kinds: Vec<_> = offers.as_array().unwrap().iter().map(|offer| offer["protection"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["none", "guest-memfd", "vault", "tdx", "secure-execution", "sev", "sev-es", "sev-snp"]);
    for offer in offers.as_array().unwrap() {
        let missing = offer["missing"].as_array().unwrap();
        assert_eq!(offer["offered"], missing.is_empty());
        for missing in missing {
            assert!(!missing["what"].as_str().unwrap().is_empty() && !missing["remedy"].as_str().unwrap().is_empty());
        }
    }
    if kvm() {
        assert_eq!((&offers[0]["offered"], &offers[2]["offered"]), (&true.into(), &true.into()));
    }
}

#[test]
fn the_readme_shows_the_smallest_vmm_as_it_is() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let code = fs::read_to_string(root.join("examples/minimal_vmm.rs")).unwrap();
    let block = format!("```rust\n{code}```\n");
    assert!(readme.contains(&block), "README.md does not have the code of examples/minimal_vmm.rs");
}

#[test]
fn a_guest_from_an_igvm_file_says_hello_and_a_file_that_is_none_is_refused() {
    if !kvm() {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    assert!(run("boot_igvm", &["--save", path]).status.success());
    let [made, read] = [vec![], vec![path]].map(|arguments: Vec<&str>| run("boot_igvm", &arguments));
    for output in [&made, &read] {
        assert!(output.status.success() && stdout(output).contains("hello"), "{}", stderr(output));
    }
    assert_eq!(stdout(&made), stdout(&read));

    let small = run("boot_igvm", &[path, "--memory", "1"]);
    assert!(!small.status.success() && stderr(&small).contains("outside the guest's memory"), "{}", stderr(&small));
    let many = run("boot_igvm", &[path, "--vcpus", "2"]);
    assert!(!many.status.success() && stderr(&many).contains("vcpu 1"), "{}", stderr(&many));
    fs::write(path, [0; 0x1000]).unwrap();
    let output = run("boot_igvm", &[path]);
    assert!(!output.status.success() && stderr(&output).contains("no igvm file"), "{}", stderr(&output));
}

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
