//! The first code in a guest whose private memory the host cannot write.
//!
//! It runs from a staging area that the host removes before the guest itself starts. It copies pages from there into
//! private memory, writes the SHA-384 of each as it then stands in private memory into the staging area, and ends by the
//! port doorbell: a halt would stay in a kernel that has an interrupt controller. `cvm-backend-kvm/src/local/staging.rs` is its other half.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod stub;

#[cfg(not(target_os = "none"))]
fn main() -> std::process::ExitCode {
    eprintln!("this program runs inside a vm, before its guest: cvm-backend-kvm has its built image");
    std::process::ExitCode::FAILURE
}
