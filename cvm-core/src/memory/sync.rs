//! What [`pins`](super::pins) are synchronised by: the standard library, or loom, which tries every interleaving
//! (`RUSTFLAGS="--cfg loom" cargo test -p cvm-core --release model`).

#[cfg(not(loom))]
pub(super) use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicUsize, Ordering, fence},
};

#[cfg(loom)]
pub(super) use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicUsize, Ordering, fence},
};

use std::ops::Deref;
use std::sync::Arc;
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

/// A full fence, for a thread whose last change of an atomic was to read and write it in one: it has counted or locked.
///
/// On x86-64 that change is a full fence by itself, so that only the compiler has to be told (Intel SDM, volume 3, "Loads and
/// Stores Are Not Reordered with Locked Instructions"; AMD64 Architecture Programmer's Manual, volume 2, section 7.2).
#[inline]
pub(super) fn full_fence() {
    #[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
    std::sync::atomic::compiler_fence(Ordering::SeqCst);
    #[cfg(not(all(target_arch = "x86_64", not(any(loom, miri)))))]
    fence(Ordering::SeqCst);
}

/// Something that counts who shares it: an [`Arc`], whose count a model counts once more, with the orderings that `Arc` has,
/// to see what loom thinks of them.
#[derive(Debug)]
pub(super) struct Counted<T> {
    shared: Arc<Inner<T>>,
}

#[derive(Debug)]
struct Inner<T> {
    value: T,
    #[cfg(loom)]
    count: AtomicUsize,
}

impl<T> Counted<T> {
    /// The first one.
    pub(super) fn new(value: T) -> Self {
        let inner = Inner {
            value,
            #[cfg(loom)]
            count: AtomicUsize::new(1),
        };
        Self { shared: Arc::new(inner) }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        #[cfg(not(loom))]
        return Arc::strong_count(&self.shared);
        #[cfg(loom)]
        self.shared.count.load(Ordering::Relaxed)
    }
}

impl<T> Clone for Counted<T> {
    fn clone(&self) -> Self {
        #[cfg(loom)]
        self.shared.count.fetch_add(1, Ordering::Relaxed);
        Self { shared: Arc::clone(&self.shared) }
    }
}

#[cfg(loom)]
impl<T> Drop for Counted<T> {
    fn drop(&mut self) {
        self.shared.count.fetch_sub(1, Ordering::Release);
    }
}

impl<T> Deref for Counted<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.shared.value
    }
}
