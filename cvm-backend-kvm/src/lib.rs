//! Confidential VMs on plain Linux KVM.
//!
//! [`KvmPlatform`] launches VMs whose private and shared memory are two files. The guest sees one window in which
//! each page comes from one of them: private at first, and from the other one after a conversion that the guest asked
//! for. Nothing protects the private file from the VMM's own process, which [`TrustModel`](cvm_core::TrustModel) says:
//! this isolation is for development, on any KVM, with the rules that real protection imposes.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("cvm-backend-kvm needs Linux on x86-64; build `cvm` with `default-features = false` elsewhere");

mod backing;
mod error;
mod guest_memory;
mod host;
mod hypercall;
mod kick;
mod loader;
mod platform;
mod probe;
mod vcpu;
mod vcpu_fd;
mod vm;
mod window;

pub use error::Error;
pub use loader::KvmLoader;
pub use platform::KvmPlatform;
pub use vcpu::KvmVcpu;
pub use vm::KvmVm;
