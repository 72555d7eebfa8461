//! A protected guest of a few tens of KiB.
//!
//! It keeps a secret in private memory, shares a bounce pool, and uses a virtio block device through it. Further vCPUs
//! share pages and take them back meanwhile. In the end it reports to its VMM and tries what is not allowed.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod disk;
#[cfg(target_os = "none")]
mod guest;

#[cfg(not(target_os = "none"))]
fn main() -> std::process::ExitCode {
    eprintln!("this program runs inside a vm: `cargo run --example boot_tiny_guest` boots its built image");
    std::process::ExitCode::FAILURE
}
