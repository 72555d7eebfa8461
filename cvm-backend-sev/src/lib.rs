//! AMD SEV, SEV-ES and SEV-SNP: what a launch is measured as.
//!
//! | module | what is there |
//! |---|---|
//! | [`snp`] | the launch digest of SEV-SNP: of a [`Transcript`](cvm_core::Transcript), and of firmware as QEMU, EC2 and GCE load it |
//! | [`sev`] | the digest of SEV and SEV-ES, and the measurement that a guest's owner compares |
//! | [`owner`] | what a guest's owner shares with the firmware: keys, and secrets for the guest |
//! | [`digest`] | the chain of pages under the first |
//! | [`ovmf`], [`kernel`] | what firmware says of how it is launched, and the kernel beside it |
//! | [`igvm`] | what an IGVM file says: the launch digest, and what of it can be launched |
//! | [`id_block`] | what a launch is to be, signed by the guest's owner |
//! | [`vmsa`], [`vcpu`] | the initial state of vCPUs, and the processors that they are |
//! | [`policy`] | what a guest's owner allows |
//! | [`firmware`] | what the secure processor answers |
//! | `kvm` | launching and running such guests on Linux with KVM, on x86-64 |
//!
//! All but the last is arithmetic on bytes, for every operating system and architecture: who checks evidence needs no AMD
//! processor.

pub mod digest;
mod error;
pub mod firmware;
mod guid;
pub mod id_block;
pub mod igvm;
pub mod kernel;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod kvm;
pub mod ovmf;
pub mod owner;
pub mod policy;
pub mod sev;
pub mod snp;
pub mod vcpu;
pub mod vmsa;

pub use digest::{LaunchDigest, PageType};
pub use error::Error;
pub use firmware::FirmwareError;
pub use id_block::{IdAuth, IdBlock};
pub use kernel::KernelHashes;
pub use ovmf::Firmware;
pub use policy::{SevFlags, SevPolicy, SnpFlags, SnpPolicy};
pub use snp::{HostData, Vcpus};
pub use vcpu::CpuSignature;
pub use vmsa::{SevFeatures, Vmm, Vmsa};
