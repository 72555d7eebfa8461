//! AMD SEV, SEV-ES and SEV-SNP guests on Linux with KVM.
//!
//! [`SevPlatform`] launches them through the contract of `cvm-core`; what is particular to a launch is in [`SnpOptions`]
//! and [`SevOptions`].
//! [`Resources`] says how many such guests the host can have.
//!
//! Upstream KVM has neither restricted nor alternate injection: the host can inject whatever it likes, whenever the guest
//! has interrupts on. The interrupt guard is this library's, so it protects from device models, not from a host; a guest has
//! to be written for interrupts that come without reason.

mod certificates;
mod command;
mod cpuid;
mod device;
mod error;
mod exits;
mod export;
mod options;
mod platform;
mod probe;
mod resources;
mod sev;
mod snp;

pub use cpuid::CpuidCorrection;
pub use cvm_backend_kvm::backend::{LocalVcpu as SevVcpu, LocalVm as SevVm};
pub use device::PlatformKeys;
pub use error::Error;
pub use export::Receiving;
pub use options::SnpOptions;
pub use platform::{SevLoader, SevPlatform};
pub use resources::{Asids, Resources};
pub use sev::{Owner, Session, SevOptions};
