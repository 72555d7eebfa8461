//! The contract of [`cvm_core`] as a test suite, which a backend depends on in its tests.
//!
//! The suite drives guests of a few instructions through the contract's traits and nothing else, so that any backend can run
//! it, whether it is in this repository or not:
//!
//! 1. implement [`Subject`] for each kind of protection that the backend offers;
//! 2. have a test without libtest's harness (`harness = false`), whose main makes a [`Suite`] of them and runs it.
//!
//! ```no_run
//! # use cvm_core::launch::{Launch, Rehearsal, VmConfig};
//! # use cvm_core::platform::{Offer, Platform, Powers, TrustModel};
//! # struct MyPlatform;
//! # impl MyPlatform {
//! #     fn open() -> Result<Self, cvm_core::Error> { Ok(Self) }
//! # }
//! # impl Platform for MyPlatform {
//! #     type Loader = Rehearsal;
//! #     fn probe() -> Vec<Offer> { Vec::new() }
//! #     fn trust_model(&self) -> TrustModel { TrustModel::new(|_, _| Powers::all()) }
//! #     fn launch(&self, config: VmConfig) -> Result<Launch<Rehearsal>, cvm_core::Error> {
//! #         Launch::rehearse(config, cvm_core::doorbell::Transport::Doorbell)
//! #     }
//! # }
//! use cvm_conformance::{Departure, Subject, Suite};
//! use cvm_core::{BoxError, Protection};
//!
//! struct Mine;
//!
//! impl Subject for Mine {
//!     type Platform = MyPlatform;
//!
//!     fn protection(&self) -> Protection {
//!         Protection::Tdx
//!     }
//!
//!     fn open(&self) -> Result<MyPlatform, BoxError> {
//!         Ok(MyPlatform::open()?)
//!     }
//!
//!     fn departures(&self, _: &MyPlatform) -> Vec<Departure> {
//!         vec![Departure::not_offered("4.27", "page state changes are another maker's")]
//!     }
//! }
//!
//! fn main() -> Result<std::process::ExitCode, BoxError> {
//!     let mut suite = Suite::new();
//!     suite.add(Mine)?;
//!     Ok(suite.run())
//! }
//! ```
//!
//! Each clause of the contract has a number and a name, and is explained in `docs/contract.md`. What a backend does not offer
//! or cannot do it declares, with the reason, as [`Subject::departures`]; the clause runs all the same, and fails if there
//! turns out to be nothing to declare. So nothing is left out in silence.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod clause;
mod clauses;
mod entity;
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
pub use entity::{Rehearsed, Report, TrustedEntity};
pub use harness::{Line, Outcome, REPORT_PREFIX, Suite, User};
pub use subject::{Bench, Departure, ShownBy, Subject, VmOf};
pub use vmm::{Converted, Guest};
