//! Maintenance of the workspace, run as `cargo xtask`.
//!
//! - [`big_endian`]: the portable crates' tests on a big-endian machine
//! - [`conformance`]: the contract's clauses with every backend, and the report
//! - [`fuzz`]: random bytes for what takes bytes from others
//! - [`guest`]: the committed images of the guests, the same bytes on every machine
//! - [`l1`]: a command in a small VM whose KVM has the whole confidential-VM interface
//! - [`l1_kernel`]: the kernel of that VM
//! - [`measure_matrix`]: measurements of launches against another implementation's
//! - [`memcheck`]: the tests of the guest's library under valgrind
//! - [`ratios`]: the results of the benchmarks against their targets
//! - [`readme`]: the program that the README shows, built outside of this workspace

#![deny(clippy::print_stdout, clippy::print_stderr, reason = "they panic where the stream is closed or full")]

mod big_endian;
mod conformance;
mod cpio;
mod debian;
mod error;
mod fuzz;
mod guest;
mod l1;
mod l1_kernel;
mod measure_matrix;
mod memcheck;
#[path = "../../examples/common/program.rs"]
mod program;
mod ratios;
mod readme;
mod rust_src;
mod tools;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::{Error, Result};

/// Maintenance of the workspace.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    BigEndian(big_endian::BigEndian),
    Conformance(conformance::Conformance),
    Fuzz(fuzz::Fuzz),
    Guest(guest::Guest),
    L1(l1::L1),
    L1Kernel(l1_kernel::L1Kernel),
    MeasureMatrix(measure_matrix::MeasureMatrix),
    Memcheck(memcheck::Memcheck),
    Ratios(ratios::Ratios),
    Readme(readme::Readme),
}

fn main() -> ExitCode {
    match guest::run_as_rustc() {
        Some(done) => program::end(done.map_err(Error::boxed)),
        None => program::run(|cli: Cli| cli.task.run().map_err(Error::boxed)),
    }
}

impl Task {
    fn run(&self) -> Result<ExitCode> {
        match self {
            Self::BigEndian(task) => task.run(),
            Self::Conformance(task) => task.run(),
            Self::Fuzz(task) => task.run(),
            Self::Guest(task) => task.run(),
            Self::L1(task) => task.run(),
            Self::L1Kernel(task) => task.run(),
            Self::MeasureMatrix(task) => task.run(),
            Self::Memcheck(task) => task.run(),
            Self::Ratios(task) => task.run(),
            Self::Readme(task) => task.run(),
        }
    }
}
