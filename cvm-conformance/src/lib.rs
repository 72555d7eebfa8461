//! The contract of [`cvm_core`] as a test suite, which a backend depends on in its tests.
//!
//! The suite drives guests of a few instructions through the contract's traits and nothing else, so that any backend can run
//! it, whether it is in this repository or not:
//!
//! 1. implement [`Subject`] for each kind of protection that the backend offers;
//! 2. have a test without libtest's harness (`harness = false`), whose main makes a [`Suite`] of them and runs it.
//!
//! Each clause of the contract has a number and a name, and is explained in `docs/contract.md`. What a backend does not offer
//! or cannot do it declares, with the reason, as [`Subject::departures`]; the clause runs all the same, and fails if there
//! turns out to be nothing to declare. So nothing is left out in silence.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod clause;
mod clauses;
pub mod faults;
pub mod guest;
mod harness;
mod held;
mod quality;
mod subject;
mod tiny;
mod vmm;

pub use clause::{Clause, Verdict};
pub use clauses::clauses;
pub use harness::{Line, Outcome, REPORT_PREFIX, Suite};
pub use subject::{Bench, Departure, Subject, VmOf};
pub use vmm::{Converted, Guest};
