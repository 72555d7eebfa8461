//! Confidential virtual machines in Rust: one contract, several trusted entities behind it.
//!
//! This crate is the facade: the contract of [`cvm_core`], and by feature the backends that fulfil it.
//!
//! | feature | module | contents |
//! |---|---|---|
//! | `kvm` (default) | `kvm` | software-only isolation on Linux KVM |
//! | `sev` (default) | `sev` | AMD SEV, SEV-ES and SEV-SNP: launches on Linux KVM, and portable measurements |
//! | `linux` | `linux` | launches from Linux's images, on any backend |
//! | `listeners` | `listeners` | listeners for conversions outside of the VMM's process: IOMMU, vhost-user, balloon |
//!
//! The API uses types of vm-memory 0.18, which is here as [`vm_memory`]; device models on `virtio-queue` need its version 0.18.
//!
//! This whole VMM, `examples/minimal_vmm.rs`, needs no other crate. Its argument is the guest's file,
//! `guests/tiny/tiny-guest.elf` in the repository:
//!
//! ```no_run
#![doc = include_str!("../examples/minimal_vmm.rs")]
//! ```
//!
//! The crate `cvm-guest` is the guest's side.

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
