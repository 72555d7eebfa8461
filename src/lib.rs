//! Confidential virtual machines in Rust: one contract, several trusted entities behind it.
//!
//! This crate is the front door: the contract of [`cvm_core`], and by feature the backends that fulfil it.
//!
//! | feature | module | protection |
//! |---|---|---|
//! | `kvm` (default) | `kvm` | software-only isolation on Linux KVM |
//! | `sev` (default) | `sev` | AMD SEV, SEV-ES, SEV-SNP: launches on Linux KVM, and what launches of others are measured as |
//! | `linux` | `linux` | none of its own: launches from Linux's images |
//!
//! The feature `listeners` adds the module `listeners`: who outside of the VMM must know of conversions. It is off by
//! default, because a VMM whose devices are all in its own process needs none of it.
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

/// The crate whose traits and types this API uses: guest addresses, and access to the shared pages.
pub use vm_memory;

#[cfg(feature = "kvm")]
pub use cvm_backend_kvm as kvm;

#[cfg(feature = "sev")]
pub use cvm_backend_sev as sev;

#[cfg(feature = "listeners")]
pub use cvm_listeners as listeners;
