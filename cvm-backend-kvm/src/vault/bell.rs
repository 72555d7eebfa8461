//! How one end of a page tells the other that there is something new, and how the other waits for it.

use rustix::event::Timespec;
use rustix::thread::futex;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::{Duration, Instant};

/// A number that both ends see, and that one of them can sleep on.
pub(super) trait Word {
    fn load(&self) -> u32;
    fn store(&self, value: u32);
    /// Sleeps until it is woken or `at_most` is over, unless the number is not `value` any more; may return for no reason.
    fn sleep(&self, value: u32, at_most: Option<Duration>);
    fn wake(&self);
    /// What this thread has stored is seen by whoever stores, passes this and loads after it.
    fn settle();
}

impl Word for AtomicU32 {
    fn load(&self) -> u32 {
        AtomicU32::load(self, Ordering::Acquire)
    }

    fn store(&self, value: u32) {
        AtomicU32::store(self, value, Ordering::Release);
    }

    fn sleep(&self, value: u32, at_most: Option<Duration>) {
        let at_most = at_most.and_then(|at_most| Timespec::try_from(at_most).ok());
        // Whatever ends it, the caller looks again.
        let _ = futex::wait(self, futex::Flags::empty(), value, at_most.as_ref());
    }

    fn wake(&self) {
        // It can fail only for arguments that make no sense.
        let _ = futex::wake(self, futex::Flags::empty(), u32::MAX);
    }

    fn settle() {
        fence(Ordering::SeqCst);
    }
}

/// A wait for the other end took too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Overdue;

/// How long the VMM waits for its vault at a time.
const SLICE: Duration = Duration::from_secs(1);

/// What is left of a time within which the vault has to do something, while the VMM waits.
///
/// It runs out only as the VMM is there to see it: a slice counts as no longer than it was to be. Where the VMM and its vault
/// are stopped together, as by a container that is paused, the vault is not late afterwards.
#[derive(Debug)]
pub(super) struct Patience {
    left: Duration,
    slice: Option<(Instant, Duration)>,
}

impl Patience {
    pub(super) fn new(limit: Duration) -> Self {
        Self { left: limit, slice: None }
    }

    /// How long to wait from `now` on before this is asked again.
    pub(super) fn slice(&mut self, now: Instant) -> Result<Duration, Overdue> {
        if let Some((since, at_most)) = self.slice.take() {
            self.left = self.left.saturating_sub(now.saturating_duration_since(since).min(at_most));
        }
        if self.left.is_zero() {
            return Err(Overdue);
        }
        let slice = self.left.min(SLICE);
        self.slice = Some((now, slice));
        Ok(slice)
    }
}

/// What is rung for each message in one direction: its number, and whether the other end may be sleeping.
#[derive(Debug)]
pub(super) struct Bell<'a, W> {
    pub(super) number: &'a W,
    pub(super) sleeps: &'a W,
}

impl<W: Word> Bell<'_, W> {
    /// Tells the other end that the message with this number is there.
    pub(super) fn ring(&self, number: u32) {
        self.number.store(number);
        W::settle();
        // Only the other end clears its flag: it may have set it for the next message already, without sleeping yet.
        if self.sleeps.load() != 0 {
            self.number.wake();
        }
    }

    /// Waits for a number other than `last`: looks for it so many times, and then sleeps. Before each sleep `limit` says how
    /// long it may take at most, or that the wait is over.
    pub(super) fn wait(
        &self,
        last: u32,
        looks: u32,
        mut limit: impl FnMut() -> Result<Option<Duration>, Overdue>,
    ) -> Result<u32, Overdue> {
        for _ in 0..looks {
            let now = self.number.load();
            if now != last {
                return Ok(now);
            }
            std::hint::spin_loop();
        }
        self.sleeps.store(1);
        loop {
            W::settle();
            let now = self.number.load();
            if now != last {
                self.sleeps.store(0);
                return Ok(now);
            }
            self.number.sleep(last, limit()?);
        }
    }
}

/// Every interleaving of two ends, within loom's bounds.
#[cfg(test)]
mod tests {
    use super::*;
    use loom::sync::atomic::AtomicU32 as Number;
    use loom::sync::{Arc, Condvar, Mutex};
    use loom::thread;

    /// A number with what a kernel has for those who sleep on it.
    struct Modelled {
        number: Number,
        kernel: Mutex<()>,
        sleepers: Condvar,
    }

    impl Modelled {
        fn new() -> Self {
            Self { number: Number::new(0), kernel: Mutex::new(()), sleepers: Condvar::new() }
        }
    }

    impl Word for Modelled {
        fn load(&self) -> u32 {
            self.number.load(Ordering::Acquire)
        }

        fn store(&self, value: u32) {
            self.number.store(value, Ordering::Release);
        }

        fn sleep(&self, value: u32, at_most: Option<Duration>) {
            assert_eq!(at_most, None, "the model has no clock");
            let kernel = self.kernel.lock().unwrap();
            if self.number.load(Ordering::SeqCst) == value {
                drop(self.sleepers.wait(kernel).unwrap());
            }
        }

        fn wake(&self) {
            let _kernel = self.kernel.lock().unwrap();
            self.sleepers.notify_all();
        }

        fn settle() {
            loom::sync::atomic::fence(Ordering::SeqCst);
        }
    }

    fn every_number_is_heard(looks: u32) {
        let mut model = loom::model::Builder::new();
        // More than the two that it takes to fall asleep late.
        model.preemption_bound = Some(3);
        model.check(move || {
            let words = Arc::new((Modelled::new(), Modelled::new()));
            let theirs = Arc::clone(&words);
            let waits = thread::spawn(move || {
                let bell = Bell { number: &theirs.0, sleeps: &theirs.1 };
                let mut last = 0;
                while last < 2 {
                    last = bell.wait(last, looks, || Ok(None)).unwrap();
                }
            });
            let bell = Bell { number: &words.0, sleeps: &words.1 };
            bell.ring(1);
            bell.ring(2);
            // A number that is slept through leaves this waiting, which loom reports as a deadlock.
            waits.join().unwrap();
        });
    }

    #[test]
    fn time_in_which_the_vmm_was_stopped_does_not_count() {
        let mut patience = Patience::new(3 * SLICE);
        let mut now = Instant::now();
        for _ in 0..3 {
            assert_eq!(patience.slice(now), Ok(SLICE));
            now += 1000 * SLICE;
        }
        assert_eq!(patience.slice(now), Err(Overdue));
    }

    #[test]
    fn time_that_passes_in_part_of_a_slice_counts() {
        let mut patience = Patience::new(SLICE);
        let begin = Instant::now();
        assert_eq!(patience.slice(begin), Ok(SLICE));
        assert_eq!(patience.slice(begin + SLICE / 4), Ok(SLICE * 3 / 4));
        assert_eq!(patience.slice(begin + SLICE), Err(Overdue));
    }

    #[test]
    fn no_number_is_slept_through() {
        every_number_is_heard(0);
    }

    #[test]
    fn no_number_is_slept_through_by_who_looks_before() {
        every_number_is_heard(1);
    }
}
