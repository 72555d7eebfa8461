//! The examples with little to vary: `minimal_vmm`, `probe`, `boot_igvm`.

use crate::{kvm, run, stderr, stdout};
use std::fs;
use std::path::Path;

#[test]
fn the_smallest_vmm_greets_and_is_refused() {
    if !kvm() {
        return;
    }
    let output = run("minimal_vmm", &[concat!(env!("CARGO_MANIFEST_DIR"), "/guests/tiny/tiny-guest.elf")]);
    let text = stdout(&output);
    assert!(output.status.success(), "{text}\n{}", stderr(&output));
    assert!(text.contains("hello from protected memory"), "{text}");
    assert!(text.contains("private at 0x1000: Guest memory error"), "{text}");
}

#[test]
fn the_probe_names_every_kind_of_protection_and_a_remedy_for_what_lacks() {
    let output = run("probe", &["--json"]);
    let offers = crate::parse(&stdout(&output)).unwrap();
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
    let [made, read] =
        [&["--timeout", "240"][..], &["--timeout", "240", path]].map(|arguments| run("boot_igvm", arguments));
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
