//! What [`pins`](super::pins) and the map are synchronised by: the standard library, or loom, which tries every
//! interleaving (`RUSTFLAGS="--cfg loom" cargo test -p cvm-core --release model`).

#[cfg(not(loom))]
pub(super) use std::sync::{
    Mutex,
    atomic::{AtomicUsize, Ordering},
};

#[cfg(loom)]
pub(super) use loom::sync::{
    Mutex,
    atomic::{AtomicUsize, Ordering},
};

use std::time::Instant;

/// The time; a model has none, and its deadlines never come.
pub(super) fn now() -> Instant {
    #[cfg(not(loom))]
    return Instant::now();
    #[cfg(loom)]
    {
        static BEGIN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        *BEGIN.get_or_init(Instant::now)
    }
}

/// Waits a moment for somebody else.
pub(super) fn pause() {
    #[cfg(not(loom))]
    std::thread::sleep(std::time::Duration::from_micros(20));
    #[cfg(loom)]
    loom::thread::yield_now();
}

/// Between two accesses that are sequentially consistent: loom takes them for less (see its documentation), and has to be
/// told that they are in one order for all.
pub(super) fn order() {
    #[cfg(loom)]
    loom::sync::atomic::fence(Ordering::SeqCst);
}
