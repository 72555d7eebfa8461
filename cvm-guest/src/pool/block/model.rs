//! Every interleaving of few CPUs on one block.

use super::*;
use loom::sync::Arc;
use loom::sync::atomic::AtomicUsize;
use loom::thread;

/// A block of two or four slots, and who has each quarter of it.
struct Owned {
    block: Block,
    owners: [AtomicUsize; 4],
}

/// Two slots, and four.
const TWO: usize = CLASSES - 2;
const FOUR: usize = CLASSES - 3;

impl Owned {
    fn new() -> Arc<Self> {
        let block = Block::new();
        block.claim_absent();
        block.unclaim();
        Arc::new(Self { block, owners: core::array::from_fn(|_| AtomicUsize::new(0)) })
    }

    fn quarters(&self, class: usize, slot: u32) -> impl Iterator<Item = &AtomicUsize> {
        let width = 4 / slots(class) as usize;
        self.owners.iter().skip(slot as usize * width).take(width)
    }

    /// What was taken belongs to nobody else.
    fn take(&self, class: usize, count: u32) -> Vec<u32> {
        let mut taken = vec![];
        self.block.collect(class, count, 0, |slot| {
            for quarter in self.quarters(class, slot) {
                assert_eq!(quarter.swap(1, Ordering::Relaxed), 0, "slot {slot} has two owners");
            }
            taken.push(slot);
        });
        assert_eq!(taken.len(), count as usize);
        taken
    }

    fn give(&self, class: usize, slot: u32) {
        self.quarters(class, slot).for_each(|quarter| quarter.store(0, Ordering::Relaxed));
        assert_eq!(self.block.give(0, 1 << slot), 1);
    }

    fn is_empty(&self) -> bool {
        self.block.purpose() == Purpose::Empty
    }
}

#[test]
fn a_release_from_another_cpu_meets_a_refill() {
    loom::model(|| {
        let owned = Owned::new();
        assert!(owned.block.claim());
        let first = owned.block.open(TWO, 2);
        let slots = owned.take(TWO, first);
        let other = thread::spawn({
            let owned = Arc::clone(&owned);
            move || slots.into_iter().for_each(|slot| owned.give(TWO, slot))
        });
        let count = owned.block.reserve(TWO, 2);
        owned.take(TWO, count).into_iter().for_each(|slot| owned.give(TWO, slot));
        other.join().unwrap();
        assert!(owned.is_empty());
    });
}

#[test]
fn a_release_from_another_cpu_meets_a_reclaim_for_another_class() {
    loom::model(|| {
        let owned = Owned::new();
        assert!(owned.block.claim());
        owned.block.open(TWO, 1);
        let slots = owned.take(TWO, 1);
        let other = thread::spawn({
            let owned = Arc::clone(&owned);
            move || slots.into_iter().for_each(|slot| owned.give(TWO, slot))
        });
        if owned.block.claim() {
            let count = owned.block.open(FOUR, 3);
            owned.take(FOUR, count).into_iter().for_each(|slot| owned.give(FOUR, slot));
        }
        other.join().unwrap();
        assert!(owned.is_empty());
    });
}

#[test]
fn two_refills_meet_a_reclaim_and_nobody_gets_anothers_slots() {
    let mut model = loom::model::Builder::new();
    // Each turn of a refill or reclaim takes one at most; more of them only repeat what was seen.
    model.preemption_bound = Some(3);
    model.check(|| {
        let owned = Owned::new();
        assert!(owned.block.claim());
        owned.block.open(TWO, 1);
        let slots = owned.take(TWO, 1);
        let refill = thread::spawn({
            let owned = Arc::clone(&owned);
            move || {
                let count = owned.block.reserve(TWO, 1);
                owned.take(TWO, count).into_iter().for_each(|slot| owned.give(TWO, slot));
            }
        });
        let reclaim = thread::spawn({
            let owned = Arc::clone(&owned);
            move || {
                if owned.block.claim() {
                    let count = owned.block.open(FOUR, 1);
                    owned.take(FOUR, count).into_iter().for_each(|slot| owned.give(FOUR, slot));
                }
            }
        });
        slots.into_iter().for_each(|slot| owned.give(TWO, slot));
        refill.join().unwrap();
        reclaim.join().unwrap();
        assert!(owned.is_empty());
    });
}
