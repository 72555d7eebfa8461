//! `boot_tiny_guest`: what works, what is refused, and how a guest that misbehaves ends.

use crate::{boot, boot_well, changed_image, example, kvm, offered, run, stderr, stdout};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

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
        let arguments = ["--doorbell", doorbell, "--transport", "hypercall", "--json", "--timeout", "240"];
        let output = run("boot_tiny_guest", &arguments);
        if output.status.success() {
            let json = crate::parse(&stdout(&output)).unwrap();
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

#[test]
fn a_policy_is_enforced_or_refused_with_a_reason() {
    if !kvm() {
        return;
    }
    let output = run("boot_tiny_guest", &["--isolation", "none", "--policy", "no-debug"]);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("the policy cannot be fulfilled: whoever holds the vcpus"), "{}", stderr(&output));

    let hidden = ["--isolation", "vault", "--policy", "no-debug"];
    if rustix::process::geteuid().is_root() {
        let output = run("boot_tiny_guest", &hidden);
        assert!(stderr(&output).contains("the policy cannot be fulfilled: the vmm is root"), "{}", stderr(&output));
    } else {
        boot_well(&hidden);
    }
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
            let checks = if platform == "snp" { 17 } else { 14 };
            let json = boot_well(&["--platform", platform]);
            assert_eq!(json["checks"].as_array().unwrap().len(), checks);
            if platform == "snp" {
                let image = concat!(env!("CARGO_MANIFEST_DIR"), "/guests/tiny/tiny-guest.elf");
                let given = format!("0,{}", json["nonce"].as_str().unwrap());
                let output = run("measure", &["snp", "--elf", image, "--vcpus", "2", "--arguments", &given]);
                assert_eq!(stdout(&output).lines().last(), json["measurement"].as_str(), "{}", stderr(&output));
            }
            continue;
        }
        let output = run("boot_tiny_guest", &["--platform", platform]);
        assert!(!output.status.success(), "{platform}");
        let errors = stderr(&output);
        assert!(errors.starts_with(&format!("error: {protection} is not offered here: ")), "{errors}");
        assert!(errors.contains(&format!("boot_tiny_guest --platform {platform}")), "{errors}");
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

/// A guest that did not try MMIO was not refused it, however it ended.
fn assert_no_mmio(json: &Value) {
    let checks = json["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["what"] == "the guest's mmio was refused").unwrap();
    assert_eq!(check["holds"], false, "{check:#}");
}

#[test]
fn a_guest_of_somebody_elses_passes_for_nothing() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    // Where the code begins, another guest has an instruction that faults (UD2). The tables of handlers are not loaded yet.
    let image = changed_image(directory.path(), start_of_code(), 0x0b0f);
    let mut settings = vec![vec!["--guest", &image]];
    settings.extend(["guest-memfd", "vault"].map(|isolation| vec!["--guest", &image, "--isolation", isolation]));
    settings.extend(["snp", "sev-es", "sev"].map(|platform| vec!["--guest", &image, "--platform", platform]));
    for arguments in settings {
        let is_offered = match arguments[..] {
            [_, _, "--platform", "snp"] => offered("sev-snp"),
            [_, _, _, protection] => offered(protection),
            _ => true,
        };
        if !is_offered {
            continue;
        }
        let (json, success) = boot(&arguments);
        assert!(!success, "{arguments:?}: {json:#}");
        assert_no_mmio(&json);
    }
}

/// Where the built image has its first instruction (ELF-64: the first program header at 64, whose offset in the file is at
/// 8).
fn start_of_code() -> usize {
    let (offset, _) = ::tiny_guest::IMAGE[64 + 8..].split_first_chunk().unwrap();
    u64::from_le_bytes(*offset) as usize
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
        // A loaded machine needs long until the others misbehave.
        let timeout = if how == "spin" { "1" } else { "240" };
        let (json, success) = boot(&["--misbehave", how, "--timeout", timeout]);
        let end = json["ends"][0].as_str().unwrap();
        assert!(!success && end.contains(reason), "{how}: {end}");
        assert_no_mmio(&json);
    }
    let (json, _) = boot(&["--misbehave", "bad-conversions", "--timeout", "240"]);
    assert_eq!(json["conversions"]["refused"], 3);
    assert_eq!(json["conversions"]["pages_to_shared"].as_u64().unwrap() % 4, 0, "vcpu 0 converted something");
    assert!(json["refused_conversions"][0].as_str().unwrap().contains("outside the guest's memory"));
}

/// A child of the process `parent`: the fourth word of its stat file is the parent's number, the second its name.
fn child_of(parent: u32) -> Option<Pid> {
    fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let is_child = stat.rsplit_once(") ")?.1.split(' ').nth(1)? == parent.to_string();
        Pid::from_raw(stat.split(' ').next()?.parse().ok()?).filter(|_| is_child)
    })
}

#[test]
fn a_vault_that_is_killed_is_named_as_the_cause_and_the_rest_is_still_reported() {
    if !kvm() {
        return;
    }
    // The vault is there before the guest runs. A loaded machine needs more time in between than the first rounds give it.
    for wait in (0..12).map(|round| Duration::from_millis(50 << round)) {
        let mut command = Command::new(example("boot_tiny_guest"));
        command.args(["--isolation", "vault", "--misbehave", "spin", "--timeout", "600", "--json"]);
        let vmm = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        thread::sleep(wait);
        match child_of(vmm.id()) {
            Some(vault) => kill_process(vault, Signal::KILL).unwrap(),
            None => kill_process(Pid::from_child(&vmm), Signal::KILL).unwrap(),
        }
        let output = vmm.wait_with_output().unwrap();
        assert!(!output.status.success());
        let Ok(json) = crate::parse(&stdout(&output)) else { continue };
        assert!(json["ends"][0].as_str().unwrap().contains("the vault is dead"), "{json:#}");
        assert!(json["memory"]["error"].as_str().unwrap().contains("the vault is dead"), "{json:#}");
        assert!(json["measurement"].is_string() && json["checks"].is_array(), "{json:#}");
        return;
    }
    panic!("the guest never ran");
}
