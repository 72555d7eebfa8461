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
use std::sync::{Arc, Condvar, PoisonError};
use std::time::{Duration, Instant};

/// When a conversion gives up waiting.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(Option<Instant>);

impl Deadline {
    pub(super) const NEVER: Self = Self(None);

    /// `patience` from now.
    pub(super) fn after(patience: Duration) -> Self {
        Self(now().checked_add(patience))
    }

    pub(super) fn is_over(self) -> bool {
        self.0.is_some_and(|end| now() >= end)
    }
}

fn now() -> Instant {
    #[cfg(test)]
    if let Some(now) = clock::now() {
        return now;
    }
    Instant::now()
}

/// Waits a moment for another thread.
pub(super) fn pause() {
    #[cfg(test)]
    if clock::advance(PAUSE) {
        return;
    }
    #[cfg(not(loom))]
    std::thread::sleep(PAUSE);
    #[cfg(loom)]
    loom::thread::yield_now();
}

const PAUSE: Duration = Duration::from_micros(20);

/// Waits until `condvar` is notified, or until `deadline`. `guard` is of `mutex`.
pub(super) fn wait<'a, T>(
    mutex: &'a std::sync::Mutex<T>,
    condvar: &Condvar,
    guard: std::sync::MutexGuard<'a, T>,
    deadline: Deadline,
) -> std::sync::MutexGuard<'a, T> {
    #[cfg(test)]
    if clock::now().is_some() {
        drop(guard);
        pause();
        return mutex.lock().unwrap_or_else(PoisonError::into_inner);
    }
    let _ = mutex;
    match deadline.0 {
        None => condvar.wait(guard).unwrap_or_else(PoisonError::into_inner),
        Some(end) => {
            let left = end.saturating_duration_since(now());
            condvar.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0
        }
    }
}

/// A clock for tests, which only waits move: what waits too long is seen without waiting.
#[cfg(test)]
pub(super) mod clock {
    use std::cell::RefCell;
    use std::time::{Duration, Instant};

    type Event = (Duration, Box<dyn FnOnce()>);

    struct Clock {
        begin: Instant,
        elapsed: Duration,
        events: Vec<Event>,
    }

    thread_local!(static CLOCK: RefCell<Option<Clock>> = const { RefCell::new(None) });

    /// Runs `test` on this thread by the clock; each event happens in the wait that reaches its time. Returns how long it took.
    pub fn run(events: Vec<Event>, test: impl FnOnce()) -> Duration {
        CLOCK.set(Some(Clock { begin: Instant::now(), elapsed: Duration::ZERO, events }));
        test();
        CLOCK.take().map_or(Duration::ZERO, |clock| clock.elapsed)
    }

    pub fn now() -> Option<Instant> {
        CLOCK.with_borrow(|clock| clock.as_ref().map(|clock| clock.begin + clock.elapsed))
    }

    /// Whether there is such a clock, which goes on by `time`.
    pub fn advance(time: Duration) -> bool {
        let due = CLOCK.with_borrow_mut(|clock| {
            let clock = clock.as_mut()?;
            clock.elapsed += time;
            Some(clock.events.extract_if(.., |(at, _)| *at <= clock.elapsed).collect::<Vec<_>>())
        });
        due.map(|due| due.into_iter().for_each(|(_, happen)| happen())).is_some()
    }
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
