//! AMD SEV, SEV-ES and SEV-SNP guests on Linux with KVM.

#[allow(dead_code, reason = "launches will use it")]
mod command;
mod error;

pub use error::Error;
