//! AMD SEV, SEV-ES and SEV-SNP guests on Linux with KVM.

#[allow(dead_code, reason = "launches will use it")]
mod command;
mod device;
mod error;
mod platform;
mod sev;

pub use device::PlatformKeys;
pub use error::Error;
pub use platform::{SevLoader, SevPlatform};
pub use sev::{InPlaceLoader, Owner, Session, SevOptions};
