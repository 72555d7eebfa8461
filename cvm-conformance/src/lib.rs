//! What every backend of the contract has to do, whatever protects its guests.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod faults;
