//! Input that the examples must refuse, with an error that names it.

use crate::{changed_image, kvm, run, stderr};
use std::fs;

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
