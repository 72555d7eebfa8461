//! The tests of the portable crates on a big-endian machine.

use std::process::{Command, ExitCode};

use clap::Args;

use crate::error::Result;
use crate::rust_src::Rustc;
use crate::{tools, workspace};

const TARGET: &str = "s390x-unknown-linux-gnu";

/// The crates that a machine of any byte order can use: to check evidence, to compute measurements, to follow conversions.
const PACKAGES: [&str; 4] = ["cvm-core", "cvm-backend-sev", "cvm-guest", "cvm-listeners"];

/// Tests of what runs on x86-64 processors alone, with their byte order.
const SKIPPED: [&str; 3] = ["sev::ap::", "sev::cpuid::", "sev::vcpu::"];

/// Run the library tests of the portable crates on an emulated big-endian processor (s390x).
///
/// The bytes that are measured, signed or sent to a guest are little-endian on every machine. A type with the byte order of the
/// machine passes every test on x86-64, and computes other digests here.
#[derive(Args)]
pub struct BigEndian {
    /// How many cases to run of each property
    #[arg(long, default_value_t = 16)]
    cases: u32,
    /// Arguments of the test programs, such as a part of a test's name
    #[arg(last = true)]
    arguments: Vec<String>,
}

impl BigEndian {
    /// Builds the standard library and the tests, and runs them.
    pub fn run(&self) -> Result<ExitCode> {
        let linker = tools::find("s390x-linux-gnu-gcc", "gcc-s390x-linux-gnu libc6-dev-s390x-cross")?;
        let qemu = tools::find("qemu-s390x", "qemu-user")?;
        let library = Rustc::new()?.library()?;
        let mut test = Command::new("cargo");
        test.args(["test", "--locked", "--lib", "--no-fail-fast", "-Zbuild-std=std,test", "--target", TARGET]);
        test.args(PACKAGES.iter().flat_map(|package| ["-p", package]));
        test.arg("--target-dir").arg(workspace::cache().join("big-endian"));
        test.arg("--").args(SKIPPED.iter().flat_map(|name| ["--skip", name])).args(&self.arguments);
        test.current_dir(workspace::root());
        // The unstable flag of cargo, with the stable toolchain.
        test.env("RUSTC_BOOTSTRAP", "1").env("__CARGO_TESTS_ONLY_SRC_ROOT", &library);
        test.env("CARGO_TARGET_S390X_UNKNOWN_LINUX_GNU_LINKER", linker);
        let runner = format!("{} -L /usr/s390x-linux-gnu", qemu.display());
        test.env("CARGO_TARGET_S390X_UNKNOWN_LINUX_GNU_RUNNER", runner);
        // Optimised code takes less time under emulation than the compiler takes for it.
        test.env("CARGO_PROFILE_DEV_OPT_LEVEL", "1").env("CARGO_PROFILE_DEV_DEBUG", "false");
        tools::run(test.env("PROPTEST_CASES", self.cases.to_string()))?;
        Ok(ExitCode::SUCCESS)
    }
}
