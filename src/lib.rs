//! Confidential virtual machines in Rust: one contract, several trusted entities behind it.
//!
//! This crate is the front door: the contract of [`cvm_core`], and by feature the backends that fulfil it.
//!
//! | feature | module | protection |
//! |---|---|---|
//! | `kvm` (default) | `kvm` | software-only isolation on Linux KVM |
//! | `linux` | `linux` | none of its own: launches from Linux's images |
//!
//! A whole VMM, `examples/minimal_vmm.rs`:
//!
//! ```no_run
#![doc = include_str!("../examples/minimal_vmm.rs")]
//! ```
//!
//! What runs inside the guest is in the crate `cvm-guest`.

#![forbid(unsafe_code)]

pub use cvm_core::*;

#[cfg(feature = "kvm")]
pub use cvm_backend_kvm as kvm;
