//! What vCPUs are synchronised by: the core library, or loom, which tries every interleaving
//! (`RUSTFLAGS="--cfg loom" cargo test -p cvm-guest --release --lib model::`).

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Before another look for what another CPU is about to give back.
pub(crate) fn pause() {
    #[cfg(not(loom))]
    core::hint::spin_loop();
    #[cfg(loom)]
    loom::thread::yield_now();
}
