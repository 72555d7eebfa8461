//! A guest that measures its disk and its network card.
//!
//! With bounce buffers its memory is private but for a pool; without, the buffers of its devices are shared from the
//! start, and it trusts its host as a guest does that nothing protects.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod disk;
#[cfg(target_os = "none")]
mod exchange;
#[cfg(target_os = "none")]
mod guest;
#[cfg(target_os = "none")]
mod hal;
#[cfg(target_os = "none")]
mod net;
#[cfg(target_os = "none")]
mod ring3;

#[cfg(not(target_os = "none"))]
fn main() -> std::process::ExitCode {
    eprintln!("this program runs inside a vm: `cargo run --example io_overhead` boots its built image");
    std::process::ExitCode::FAILURE
}
