//! Ranges under conversion: conversions with a page in common run one after the other, in the order that they came in.

use super::ConversionListener;
use crate::GpaRange;
use crate::memory::sync::{self, Deadline};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The listeners, in the order that they were added.
pub(super) type Listeners = Arc<[Arc<dyn ConversionListener>]>;

/// The ranges under conversion, and those that wait for them.
#[derive(Default)]
pub(super) struct Claims {
    queue: Mutex<Queue>,
    released: Condvar,
}

#[derive(Default)]
struct Queue {
    /// How many claims there have been.
    count: u64,
    /// The claims by number, in the order that they came in.
    claims: Vec<(u64, GpaRange)>,
    waiting: usize,
    listeners: Option<Listeners>,
}

impl Queue {
    fn must_wait(&self, number: u64, range: GpaRange) -> bool {
        let mut earlier = self.claims.iter().take_while(|(other, _)| *other != number);
        earlier.any(|(_, theirs)| theirs.intersection(&range).is_some())
    }
}

impl Claims {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // A thread that panics leaves the queue in order.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no earlier claim has a page of `range`; later claims wait for this one. Returns nothing if an earlier claim
    /// is still there at the deadline.
    pub(super) fn claim(&self, range: GpaRange, deadline: Deadline) -> Option<Claim<'_>> {
        let mut queue = self.lock();
        queue.count += 1;
        let number = queue.count;
        queue.claims.push((number, range));
        let mut claim = Claim { claims: self, number, listeners: None };
        while queue.must_wait(number, range) {
            if deadline.is_over() {
                // The claim locks the queue when it is dropped.
                drop(queue);
                return None;
            }
            queue.waiting += 1;
            queue = sync::wait(&self.queue, &self.released, queue, deadline);
            queue.waiting -= 1;
        }
        // A listener that was added while this waited hears of this conversion.
        claim.listeners = queue.listeners.clone();
        Some(claim)
    }

    /// Adds a listener, for claims to come. `all` claims everything, so no other conversion is under way.
    pub(super) fn add_listener(&self, all: &Claim<'_>, listener: Arc<dyn ConversionListener>) {
        let listeners: Vec<_> = all.listeners().iter().cloned().chain([listener]).collect();
        self.lock().listeners = Some(listeners.into());
    }
}

/// A range that no other conversion changes.
pub(super) struct Claim<'a> {
    claims: &'a Claims,
    number: u64,
    listeners: Option<Listeners>,
}

impl Claim<'_> {
    /// The listeners that hear of the conversion.
    pub(super) fn listeners(&self) -> &[Arc<dyn ConversionListener>] {
        self.listeners.as_deref().unwrap_or_default()
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut queue = self.claims.lock();
        queue.claims.retain(|(number, _)| *number != self.number);
        // Waking nobody is a system call too, and conversions of other pages do not wait.
        if queue.waiting > 0 {
            self.claims.released.notify_all();
        }
    }
}
