//! Who converts which range, one after the other where ranges overlap.

use super::ConversionListener;
use crate::GpaRange;
use crate::memory::padded::Padded;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Those who want to hear of conversions, in the order that they came in.
pub(super) type Listeners = Arc<[Arc<dyn ConversionListener>]>;

/// In how many places claims are kept, so that vCPUs which convert at once rarely wait for each other's memory: each 2 MiB
/// block of addresses has its place.
pub(super) const SHARDS: u64 = 16;
const BLOCK: u64 = 2 << 20;

/// The ranges under conversion, and those that wait for them.
#[derive(Default)]
pub(super) struct Claims {
    shards: [Padded<Shard>; SHARDS as usize],
    /// Held by those who enter several shards, so that they come in the same order everywhere.
    several: Mutex<()>,
}

/// The claims of some blocks.
#[derive(Default)]
struct Shard {
    queue: Mutex<Queue>,
    left: Condvar,
}

#[derive(Default)]
struct Queue {
    next: u64,
    /// In the order that they came in; padded, as the allocator may put others' memory right beside.
    claims: Vec<Padded<(Number, GpaRange)>>,
    waiting: usize,
    /// The same in each shard, and counted in each for itself; nothing is faster to hand out than none.
    listeners: Option<Listeners>,
}

impl Queue {
    /// Puts a claim at the end; it gets a number if it has none from another shard.
    fn enter(&mut self, shard: u64, number: Option<Number>, range: GpaRange) -> Number {
        let number = number.unwrap_or_else(|| {
            self.next += 1;
            (shard, self.next)
        });
        self.claims.push(Padded((number, range)));
        number
    }
}

/// Names a claim: its first shard, and how many that has had before.
type Number = (u64, u64);

impl Shard {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing in here panics half-way.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The shards of a range: a bit for each.
#[derive(Clone, Copy)]
struct Set(u64);

impl Set {
    fn of(range: GpaRange) -> Self {
        let (first, last) = (range.start().0 / BLOCK, (range.end().0 - 1) / BLOCK);
        // Spread by a multiplication (Knuth, The Art of Computer Programming, volume 3, section 6.4), since vCPUs may well
        // work at distances that are powers of two.
        let shard = |block: u64| block.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - SHARDS.ilog2());
        match last - first {
            few if few < SHARDS => Self((first..=last).fold(0, |set, block| set | 1 << shard(block))),
            _ => Self((1 << SHARDS) - 1),
        }
    }

    fn first(self) -> u64 {
        u64::from(self.0.trailing_zeros()) % SHARDS
    }

    fn is_one(self) -> bool {
        self.0.is_power_of_two()
    }

    fn iter(self) -> impl Iterator<Item = u64> {
        let mut left = self.0;
        std::iter::from_fn(move || {
            let first = (left != 0).then(|| u64::from(left.trailing_zeros()))?;
            left &= left - 1;
            Some(first)
        })
    }
}

impl Claims {
    fn shard(&self, number: u64) -> &Shard {
        &self.shards[number as usize].0
    }

    /// Waits until nobody who came before claims a page of `range`, and keeps out those who come after.
    pub(super) fn claim(&self, range: GpaRange) -> Claim<'_> {
        let shards = Set::of(range);
        let first = shards.first();
        let (number, listeners) = if shards.is_one() {
            let mut queue = self.shard(first).lock();
            let number = queue.enter(first, None, range);
            (number, self.wait(first, queue, number, range))
        } else {
            let order = self.several.lock().unwrap_or_else(PoisonError::into_inner);
            let enter = |number, shard| Some(self.shard(shard).lock().enter(shard, number, range));
            let number = shards.iter().fold(None, enter).unwrap_or_default();
            drop(order);
            // Whoever comes to hear of conversions while this waits, hears of this one.
            let wait = |shard| self.wait(shard, self.shard(shard).lock(), number, range);
            (number, shards.iter().map(wait).last().flatten())
        };
        Claim { claims: self, shards, number, listeners }
    }

    fn wait(&self, shard: u64, mut queue: MutexGuard<'_, Queue>, number: Number, range: GpaRange) -> Option<Listeners> {
        let shard = self.shard(shard);
        let must_wait = |queue: &Queue| {
            let mut earlier = queue.claims.iter().take_while(|Padded((other, _))| *other != number);
            earlier.any(|Padded((_, theirs))| theirs.intersection(&range).is_some())
        };
        while must_wait(&queue) {
            queue.waiting += 1;
            queue = shard.left.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.waiting -= 1;
        }
        queue.listeners.clone()
    }

    /// Adds a listener, for claims to come. There must be none at the moment, so `all` claims everything.
    pub(super) fn add_listener(&self, all: &Claim<'_>, listener: Arc<dyn ConversionListener>) {
        let listeners: Vec<_> = all.listeners().iter().cloned().chain([listener]).collect();
        for Padded(shard) in &self.shards {
            shard.lock().listeners = Some(listeners.clone().into());
        }
    }
}

/// A range that nobody else converts.
pub(super) struct Claim<'a> {
    claims: &'a Claims,
    shards: Set,
    number: Number,
    listeners: Option<Listeners>,
}

impl Claim<'_> {
    /// Those who must hear of its conversion.
    pub(super) fn listeners(&self) -> &[Arc<dyn ConversionListener>] {
        self.listeners.as_deref().unwrap_or_default()
    }

    /// The number of a shard that it is in: who counts something by it shares no memory with those in others.
    pub(super) fn shard(&self) -> usize {
        self.shards.first() as usize
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        for number in self.shards.iter() {
            let shard = self.claims.shard(number);
            let mut queue = shard.lock();
            queue.claims.retain(|Padded((number, _))| *number != self.number);
            let somebody_waits = queue.waiting > 0;
            drop(queue);
            // To wake nobody is a system call too.
            if somebody_waits {
                shard.left.notify_all();
            }
        }
    }
}
