//! The guest's library under a memory checker.

use std::process::{Command, ExitCode};

use clap::Args;

use crate::error::Result;
use crate::{tools, workspace};

/// Tests of several threads that spin: there is one at a time under valgrind, which would take minutes.
const SKIPPED: [&str; 2] = ["threads::", "scribbles"];

/// Run the tests of cvm-guest under valgrind, which stops at a byte too many.
///
/// What it copies to and from shared memory goes by assembly, which the compiler's sanitizers do not see.
#[derive(Args)]
pub struct Memcheck {
    /// How many cases to run of each property
    #[arg(long, default_value_t = 16)]
    cases: u32,
}

impl Memcheck {
    /// Builds the tests and runs them.
    pub fn run(&self) -> Result<ExitCode> {
        let valgrind = tools::find("valgrind", "valgrind libc6-dbg")?;
        let mut test = Command::new("cargo");
        test.args(["test", "-p", "cvm-guest", "--all-features", "--tests", "--"]).current_dir(workspace::root());
        test.args(SKIPPED.iter().flat_map(|name| ["--skip", name]));
        let runner = format!("{} -q --error-exitcode=99", valgrind.display());
        test.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER", runner);
        tools::run(test.env("PROPTEST_CASES", self.cases.to_string()))?;
        Ok(ExitCode::SUCCESS)
    }
}
