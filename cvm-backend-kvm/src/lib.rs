//! Confidential VMs on plain Linux KVM.
//!
//! [`KvmPlatform`] launches VMs of three kinds:
//!
//! - [`Protection::None`](cvm_core::Protection::None): private and shared memory are two files. The guest sees one window
//!   in which each page comes from one of them: private at first, and from the other one after a conversion that the
//!   guest asked for. Nothing protects the private file from the VMM's own process. This is for development, on any KVM,
//!   with the rules that real protection imposes.
//! - [`Protection::GuestMemfd`](cvm_core::Protection::GuestMemfd): private memory is a `guest_memfd`, which no process can
//!   map, read or write. Who holds the vCPUs can still steer the guest. It takes a kernel with
//!   `KVM_X86_SW_PROTECTED_VM`.
//!
//! - [`Protection::Vault`](cvm_core::Protection::Vault): another process holds the VM, see [`vault`], with private memory of
//!   the better kind that KVM has. It takes a program whose `main` begins with [`vault::init`].
//!
//! Who can do what is data: [`TrustModel`](cvm_core::TrustModel).

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("cvm-backend-kvm needs Linux on x86-64; build `cvm` with `default-features = false` elsewhere");

pub mod backend;
mod error;
mod eventfd;
mod handles;
mod host;
mod hypercall;
mod local;
mod platform;
mod policy;
mod probe;
mod questions;
mod trust;
pub mod vault;

pub use error::{Error, Remedied};
pub use handles::{KvmLoader, KvmVcpu, KvmVm};
pub use platform::KvmPlatform;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks what a thread that panicked leaves in order, as all that is locked here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
