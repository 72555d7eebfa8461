//! Input that the examples must refuse, with an error that names it.

use crate::{changed_image, example, kvm, run, stderr};
use std::fs;
use std::process::Command;

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
fn a_long_file_of_another_kind_is_refused_by_its_start() {
    let file = tempfile::NamedTempFile::new().unwrap();
    // To read all of it would take minutes, and more memory than there is.
    file.as_file().set_len(1 << 40).unwrap();
    let path = file.path().to_str().unwrap();
    let cases: [(&str, &[&str], &str); 3] = [
        ("boot_linux", &["--kernel", path], "is no bzImage or ELF file"),
        ("boot_igvm", &[path], "is no igvm file"),
        ("boot_tiny_guest", &["--guest", path], "is no ELF file"),
    ];
    for (program, arguments, expected) in cases {
        if program == "boot_tiny_guest" && !kvm() {
            continue;
        }
        let output = run(program, arguments);
        assert_eq!(stderr(&output), format!("error: {path} {expected}\n"));
    }
}

#[test]
fn an_error_about_a_temporary_file_names_its_directory() {
    if !kvm() {
        return;
    }
    for program in ["boot_tiny_guest", "io_overhead"] {
        let output = Command::new(example(program)).env("TMPDIR", "/nonexistent").output().unwrap();
        let expected = "failed to write the disk to a temporary file in /nonexistent: No such file or directory";
        assert!(!output.status.success() && stderr(&output).contains(expected), "{}", stderr(&output));
    }
}

/// A bzImage whose kernel does nothing for ever (Linux Documentation/arch/x86/boot.rst): one setup sector, and a 64-bit
/// entry at 0x200 that jumps to itself.
fn spinning_bzimage() -> Vec<u8> {
    let mut file = vec![0; 0x400 + 0x1000];
    let fields: [(usize, &[u8]); 13] = [
        (0x1f1, &[1]),
        (0x200, &[0xeb, 0x6a]),
        (0x202, b"HdrS"),
        (0x206, &0x20fu16.to_le_bytes()),
        (0x211, &[1]),
        (0x214, &0x10_0000u32.to_le_bytes()),
        (0x22c, &0x7fff_ffffu32.to_le_bytes()),
        (0x230, &0x20_0000u32.to_le_bytes()),
        (0x234, &[1, 0, 1, 0]),
        (0x238, &255u32.to_le_bytes()),
        (0x258, &0x20_0000u64.to_le_bytes()),
        (0x260, &0x10_0000u32.to_le_bytes()),
        (0x400 + 0x200, &[0xeb, 0xfe]),
    ];
    for (at, bytes) in fields {
        file[at..at + bytes.len()].copy_from_slice(bytes);
    }
    file
}

#[test]
fn a_kernel_that_runs_too_long_is_stopped_with_a_hint_at_more_time_and_a_vmlinux() {
    if !kvm() {
        return;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), spinning_bzimage()).unwrap();
    let output = run("boot_linux", &["--kernel", file.path().to_str().unwrap(), "--timeout", "1"]);
    let errors = stderr(&output);
    assert!(errors.contains("longer than 1 s; --timeout") && errors.contains("a vmlinux starts at once"), "{errors}");
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
        (
            &["--kvm", "/nonexistent"],
            "failed to open /nonexistent: No such file or directory (os error 2); load kvm_intel or kvm_amd",
        ),
        (&["--kvm", "/dev/null"], "Inappropriate ioctl for device (os error 25); it must be a kvm device"),
        (&["--kvm", text], "it must be a kvm device"),
        (&["--vcpus", "0"], "0 is not in 1..=16"),
        (&["--vcpus", "4294967296"], "not in 1..=16"),
        (&["--vcpus", "-1"], "unexpected argument"),
        (&["--memory", "0"], "0 is not in 6..=3328"),
        (&["--memory", "18446744073709551615"], "not in 6..=3328"),
        (&["--guest", "/nonexistent"], "failed to read /nonexistent"),
        (&["--guest", text], "text: the image is refused: it is not an ELF file"),
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
