//! A number that many threads change all the time, and some compare with a limit that is far away.

use super::claims::SHARDS;
use crate::memory::padded::Padded;
use std::sync::atomic::{AtomicI64, Ordering};

/// How far a shard's part of the number goes before it is added to the sum.
const MOST_APART: i64 = 64;

/// A count in parts, so that those who count in different shards do not wait for each other's memory.
#[derive(Debug)]
pub(super) struct Tally {
    /// All of it but what is in the parts.
    sum: Padded<AtomicI64>,
    parts: [Padded<AtomicI64>; SHARDS as usize],
}

impl Tally {
    pub(super) fn new(count: u64) -> Self {
        Self { sum: Padded(AtomicI64::new(count.cast_signed())), parts: Default::default() }
    }

    /// Adds `more` in `shard`.
    pub(super) fn add(&self, shard: usize, more: i64) {
        let part = &self.parts[shard].0;
        let now = part.fetch_add(more, Ordering::Relaxed) + more;
        if now.abs() > MOST_APART {
            self.sum.0.fetch_add(part.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// The count, but for what others add meanwhile.
    pub(super) fn get(&self) -> u64 {
        let parts = self.parts.iter().chain([&self.sum]).map(|part| part.0.load(Ordering::Relaxed));
        parts.sum::<i64>().max(0).cast_unsigned()
    }

    /// Whether the count and `more` are at most `limit`.
    pub(super) fn has_room(&self, more: i64, limit: u64) -> bool {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let at_most = self.sum.0.load(Ordering::Relaxed) + MOST_APART * SHARDS as i64;
        at_most.saturating_add(more) <= limit || self.get().saturating_add_signed(more).cast_signed() <= limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_threads_add_in_any_shard_is_counted_once_and_compared_exactly() {
        let tally = Tally::new(5);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let tally = &tally;
                scope.spawn(move || {
                    (0..10_000).for_each(|round| tally.add((round + thread) % 16, 2 - thread as i64 % 2))
                });
            }
        });
        let count = 5 + 2 * 10_000 * 2 + 2 * 10_000;
        assert_eq!(tally.get(), count);
        assert!(tally.has_room(3, count + 3) && !tally.has_room(4, count + 3));
        (0..1000).for_each(|round| tally.add(round % 16, -60));
        assert_eq!(tally.get(), 5);
        assert!(tally.has_room(0, u64::MAX) && tally.has_room(-1, 4) && !tally.has_room(0, 4));
    }
}
