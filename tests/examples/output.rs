//! Closed and full standard streams: every program ends by an error or quietly, and none panics.

use crate::{example, kvm};
use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::{Command, Stdio};

const OVMF: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/ovmf/all-sections");
const GUEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/guests/tiny/tiny-guest.elf");

/// How a program runs, and whether that takes KVM.
struct Run {
    program: &'static str,
    arguments: &'static [&'static str],
    needs_kvm: bool,
}

const fn run(program: &'static str, arguments: &'static [&'static str], needs_kvm: bool) -> Run {
    Run { program, arguments, needs_kvm }
}

/// Every example, with every subcommand and form of output.
const RUNS: &[Run] = &[
    run("boot_igvm", &["--timeout", "240"], true),
    run("boot_tiny_guest", &["--timeout", "240"], true),
    run("boot_tiny_guest", &["--json", "--timeout", "240"], true),
    run("io_overhead", &["--ios", "2", "--rounds", "1"], true),
    run("io_overhead", &["--ios", "2", "--rounds", "1", "--json"], true),
    run("measure", &["snp", "--ovmf", OVMF, "--vcpus", "1", "--vcpu-type", "EPYC"], false),
    run("measure", &["snp", "--ovmf", OVMF, "--vcpus", "1", "--vcpu-type", "EPYC", "--json"], false),
    run("measure", &["sev-es", "--ovmf", OVMF, "--vcpus", "1", "--vcpu-type", "EPYC"], false),
    run("measure", &["sev", "--ovmf", OVMF], false),
    run("minimal_vmm", &[GUEST], true),
    run("probe", &[], false),
    run("probe", &["--json"], false),
    run("boot_igvm", &["--help"], false),
    run("boot_linux", &["--help"], false),
    run("boot_tiny_guest", &["--help"], false),
    run("io_overhead", &["--help"], false),
    run("measure", &["--help"], false),
    run("measure", &["snp", "--help"], false),
    run("measure", &["sev-es", "--help"], false),
    run("measure", &["sev", "--help"], false),
    run("probe", &["--help"], false),
];

/// The write end of a pipe that nobody reads.
fn closed() -> Stdio {
    std::io::pipe().unwrap().1.into()
}

fn full() -> Stdio {
    OpenOptions::new().write(true).open("/dev/full").unwrap().into()
}

/// What `program` ends with, and what it writes to the standard error.
fn ends(program: &Path, arguments: &[&str], stdout: Stdio) -> (Option<i32>, String) {
    let output = Command::new(program).args(arguments).stdout(stdout).stderr(Stdio::piped()).output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn the_list_has_every_example() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let examples = entries.filter(|path| path.is_file() || path.join("main.rs").is_file());
    let examples: BTreeSet<_> = examples.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    let listed: BTreeSet<_> = RUNS.iter().map(|run| run.program.to_owned()).collect();
    assert_eq!(listed, examples);
}

#[test]
fn a_reader_that_closes_the_pipe_is_no_error() {
    for Run { program, arguments, .. } in RUNS.iter().filter(|run| !run.needs_kvm || kvm()) {
        let (code, errors) = ends(&example(program), arguments, closed());
        // The guest's verdict, or what a shell says of a program that SIGPIPE ended.
        assert!(matches!(code, Some(0 | 141)), "{program} {arguments:?}: {code:?}: {errors}");
        assert!(!errors.contains("panicked") && !errors.contains("error"), "{program} {arguments:?}: {errors}");
    }
}

#[test]
fn a_full_disk_behind_the_standard_output_is_reported() {
    for Run { program, arguments, .. } in RUNS.iter().filter(|run| !run.needs_kvm || kvm()) {
        let (code, errors) = ends(&example(program), arguments, full());
        assert_eq!(code, Some(1), "{program} {arguments:?}: {errors}");
        assert!(errors.contains("No space left on device"), "{program} {arguments:?}: {errors}");
        assert!(!errors.contains("panicked"), "{program} {arguments:?}: {errors}");
    }
}

#[test]
fn an_error_that_cannot_be_written_still_decides_the_exit_status() {
    for Run { program, .. } in RUNS {
        for stderr in [closed(), full()] {
            let mut command = Command::new(example(program));
            command.args(["--no-such-option"]).stdout(full()).stderr(stderr);
            let status = command.status().unwrap();
            // A panic ends a program with 101.
            assert!(matches!(status.code(), Some(1 | 2)), "{program}: {status}");
        }
    }
}
