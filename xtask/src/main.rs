//! Maintenance of the workspace, run as `cargo xtask`.
//!
//! - [`conformance`]: the contract's clauses with every backend, and the report
//! - [`fuzz`]: random bytes for what takes bytes from others
//! - [`guest`]: the committed images of the guests, the same bytes on every machine
//! - [`l1`]: a command in a small VM whose KVM has the whole confidential-VM interface
//! - [`l1_kernel`]: the kernel of that VM
//! - [`measure_matrix`]: measurements of launches against another implementation's
//! - [`memcheck`]: the tests of the guest's library under valgrind
//! - [`ratios`]: the results of the benchmarks against their targets

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
mod ratios;
mod rust_src;
mod tools;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Maintenance of the workspace.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    Conformance(conformance::Conformance),
    Fuzz(fuzz::Fuzz),
    Guest(guest::Guest),
    L1(l1::L1),
    L1Kernel(l1_kernel::L1Kernel),
    MeasureMatrix(measure_matrix::MeasureMatrix),
    Memcheck(memcheck::Memcheck),
    Ratios(ratios::Ratios),
}

fn main() -> ExitCode {
    let done = guest::run_as_rustc().unwrap_or_else(|| match Cli::parse().task {
        Task::Conformance(task) => task.run(),
        Task::Fuzz(task) => task.run(),
        Task::Guest(task) => task.run(),
        Task::L1(task) => task.run(),
        Task::L1Kernel(task) => task.run(),
        Task::MeasureMatrix(task) => task.run(),
        Task::Memcheck(task) => task.run(),
        Task::Ratios(task) => task.run(),
    });
    done.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::FAILURE
    })
}
