//! A block: 256 KiB of a chunk, cut into slots of one size, or part of a run.
//!
//! Its bookkeeping is private and lock-free. One word says what the block is and how many of its slots are taken; a
//! bitmap says which are free. Whoever takes slots first counts them in the word, which only succeeds while the block
//! has the wanted size and so many slots, and then collects that many bits: they are there, or about to be. Whoever
//! gives a slot back sets its bit first and counts down after. So a block whose word counts none is nobody's, all its
//! bits are set, and one exchange of the word takes it over for another purpose.

use super::summary;
use crate::sync::{AtomicU64, Ordering, pause};
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering::Relaxed};

/// The unit that is given a slot size, in bytes.
pub(super) const BLOCK_LEN: usize = 1 << BLOCK_SHIFT;
pub(super) const BLOCK_SHIFT: u32 = 18;

/// The smallest slots have 256 bytes.
pub(super) const MIN_SHIFT: u32 = 8;

/// How many sizes of slots there are: the powers of two from 256 B to 256 KiB.
pub const CLASSES: usize = (BLOCK_SHIFT - MIN_SHIFT + 1) as usize;

const WORDS: usize = BLOCK_LEN >> MIN_SHIFT >> 6;

/// Instead of a class: the first block of a run.
pub(super) const RUN: usize = CLASSES;
/// Instead of a class: a block that no handle leads to.
const NONE: usize = CLASSES + 1;

/// What a block is: the upper half of its word. The lower half counts the slots that are taken.
mod kind {
    /// No memory is behind it.
    pub(super) const ABSENT: u64 = 0;
    /// Somebody is changing what it is.
    pub(super) const BUSY: u64 = 1;
    /// Free for any purpose.
    pub(super) const EMPTY: u64 = 2;
    /// In a run.
    pub(super) const RUN: u64 = 3;
    /// Plus the class: cut into slots.
    pub(super) const CLASS: u64 = 4;
}

/// How many bytes a slot of `class` has.
pub(super) const fn slot_len(class: usize) -> usize {
    1 << (class as u32 + MIN_SHIFT)
}

/// How many slots of `class` a block has.
pub(super) const fn slots(class: usize) -> u32 {
    (BLOCK_LEN >> MIN_SHIFT >> class) as u32
}

/// The class whose slots just hold `len` bytes, or [`CLASSES`] and more if none does.
#[inline]
pub(super) const fn class_of(len: usize) -> usize {
    // With the lowest bits set there is a highest one, for which processors have an instruction.
    ((len.saturating_sub(1) | ((1 << MIN_SHIFT) - 1)).ilog2() + 1 - MIN_SHIFT) as usize
}

/// What a block is used for, for whoever counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Absent,
    Empty,
    Run,
    Slots { class: usize, taken: u32 },
}

/// What every I/O reads, in a cache line that changes only when the block changes its purpose.
#[derive(Debug)]
#[repr(align(64))]
struct Place {
    /// Where the guest has it; null while it is absent.
    base: AtomicPtr<u8>,
    /// Where the host has it.
    gpa: AtomicU64Plain,
    /// The length of the one buffer in it that is too long for a handle to say.
    long: AtomicU64Plain,
    class: AtomicU32,
    /// How many blocks a run has that begins here.
    run: AtomicU32,
}

/// Never a matter of interleavings, so loom need not know.
type AtomicU64Plain = core::sync::atomic::AtomicU64;

/// What changes with refills and spills.
#[derive(Debug)]
#[repr(align(64))]
struct State {
    word: AtomicU64,
    summaries: [AtomicU64; summary::WORDS],
}

#[derive(Debug)]
#[repr(align(64))]
struct Line<T>(T);

/// The record of a block.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Block {
    place: Place,
    state: State,
    free: Line<[AtomicU64; WORDS]>,
}

const fn pack(kind: u64, taken: u32) -> u64 {
    kind << 32 | taken as u64
}

const fn taken(state: u64) -> u32 {
    state as u32
}

/// Whether any purpose may be given to a block with this word.
fn is_idle(state: u64) -> bool {
    taken(state) == 0 && (state >> 32 == kind::EMPTY || state >> 32 >= kind::CLASS)
}

/// The lowest `count` bits of those that are set, or all of them.
fn lowest(bits: u64, count: u32) -> u64 {
    if bits.count_ones() <= count {
        return bits;
    }
    let rest = (0..count).fold(bits, |rest, _| rest & (rest - 1));
    bits & !rest
}

impl Place {
    const fn new() -> Self {
        Self {
            base: AtomicPtr::new(core::ptr::null_mut()),
            gpa: AtomicU64Plain::new(0),
            long: AtomicU64Plain::new(0),
            class: AtomicU32::new(NONE as u32),
            run: AtomicU32::new(0),
        }
    }
}

impl Block {
    #[cfg(not(loom))]
    pub(super) const fn new() -> Self {
        let state = State { word: AtomicU64::new(0), summaries: [const { AtomicU64::new(0) }; _] };
        Self { place: Place::new(), state, free: Line([const { AtomicU64::new(0) }; _]) }
    }

    #[cfg(loom)]
    pub(super) fn new() -> Self {
        let summaries = core::array::from_fn(|_| AtomicU64::new(0));
        let state = State { word: AtomicU64::new(0), summaries };
        Self { place: Place::new(), state, free: Line(core::array::from_fn(|_| AtomicU64::new(0))) }
    }

    /// Where the guest has it; null while there is no memory behind it.
    #[inline]
    pub(super) fn base(&self) -> *mut u8 {
        self.place.base.load(Relaxed)
    }

    /// Where the host has it.
    #[inline]
    pub(super) fn gpa(&self) -> u64 {
        self.place.gpa.load(Relaxed)
    }

    /// Its class, [`RUN`], or something else if no handle leads here. It stays as long as a slot is taken.
    #[inline]
    pub(super) fn class(&self) -> usize {
        self.place.class.load(Relaxed) as usize
    }

    /// The length of the buffer in it that is too long for its handle.
    pub(super) fn long(&self) -> usize {
        self.place.long.load(Relaxed) as usize
    }

    /// Notes the length of the buffer that has all of it.
    pub(super) fn set_long(&self, len: usize) {
        self.place.long.store(len as u64, Relaxed);
    }

    pub(super) fn purpose(&self) -> Purpose {
        let state = self.state.word.load(Ordering::Acquire);
        match state >> 32 {
            kind::ABSENT | kind::BUSY => Purpose::Absent,
            kind::RUN => Purpose::Run,
            _ if is_idle(state) => Purpose::Empty,
            class => Purpose::Slots { class: (class - kind::CLASS) as usize, taken: taken(state) },
        }
    }

    /// A word that [`summary`] keeps here.
    pub(super) fn summary(&self, number: usize) -> &AtomicU64 {
        &self.state.summaries[number]
    }

    /// Whether it has free slots of a class, or is free for any purpose.
    pub(super) fn has(&self, what: usize) -> bool {
        let state = self.state.word.load(Ordering::SeqCst);
        match what {
            summary::EMPTY => is_idle(state),
            class => state >> 32 == kind::CLASS + class as u64 && taken(state) < slots(class),
        }
    }

    /// Whether it has memory, or somebody is about to put some behind it.
    pub(super) fn is_present(&self) -> bool {
        self.state.word.load(Relaxed) >> 32 != kind::ABSENT
    }

    /// Counts up to `want` slots of `class` as taken, which [`Block::collect`] has to find then; returns how many.
    pub(super) fn reserve(&self, class: usize, want: u32) -> u32 {
        let mut state = self.state.word.load(Ordering::SeqCst);
        loop {
            if state >> 32 != kind::CLASS + class as u64 {
                return 0;
            }
            let count = want.min(slots(class).saturating_sub(taken(state)));
            if count == 0 {
                return 0;
            }
            let more = state + u64::from(count);
            match self.state.word.compare_exchange_weak(state, more, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return count,
                Err(now) => state = now,
            }
        }
    }

    /// Finds `count` slots of `class` that were reserved, from the `start`th on, and passes on their numbers.
    pub(super) fn collect(&self, class: usize, mut count: u32, start: u32, mut found: impl FnMut(u32)) {
        let words = (slots(class) / 64).max(1);
        let mut word = start / 64 % words;
        loop {
            for _ in 0..words {
                let free = &self.free.0[word as usize];
                let wanted = lowest(free.load(Relaxed), count);
                if wanted != 0 {
                    let mut got = free.fetch_and(!wanted, Ordering::AcqRel) & wanted;
                    count -= got.count_ones();
                    while got != 0 {
                        found(word * 64 + got.trailing_zeros());
                        got &= got - 1;
                    }
                }
                if count == 0 {
                    return;
                }
                word = (word + 1) % words;
            }
            // Somebody else got what we saw, and left us what has come back behind our eyes.
            pause();
        }
    }

    /// Gives slots back, as bits of a word; returns how many of them were taken.
    pub(super) fn give(&self, word: u32, slots: u64) -> u32 {
        let Some(free) = self.free.0.get(word as usize) else { return 0 };
        // The slots' next users find what their last ones left there, so that zeroes stay.
        let count = (slots & !free.fetch_or(slots, Ordering::AcqRel)).count_ones();
        // In one order with the look for who waits that follows.
        self.state.word.fetch_sub(count.into(), Ordering::SeqCst);
        count
    }

    /// Takes the block over, if nobody has anything of it.
    pub(super) fn claim(&self) -> bool {
        let state = self.state.word.load(Ordering::SeqCst);
        is_idle(state) && self.exchange(state, pack(kind::BUSY, 0))
    }

    fn exchange(&self, from: u64, to: u64) -> bool {
        self.state.word.compare_exchange(from, to, Ordering::SeqCst, Ordering::Relaxed).is_ok()
    }

    /// Cuts a claimed block into slots of `class`, of which up to `want` are reserved; returns how many.
    pub(super) fn open(&self, class: usize, want: u32) -> u32 {
        let (slots, mut rest) = (slots(class), slots(class));
        for word in &self.free.0 {
            word.store(lowest(u64::MAX, rest), Relaxed);
            rest = rest.saturating_sub(64);
        }
        self.place.class.store(class as u32, Relaxed);
        let count = want.min(slots);
        self.state.word.store(pack(kind::CLASS + class as u64, count), Ordering::SeqCst);
        count
    }

    /// Makes a claimed block the first of a run of so many, which has a buffer of `len` bytes.
    pub(super) fn open_run(&self, blocks: u32, len: usize) {
        self.place.run.store(blocks, Relaxed);
        self.set_long(len);
        self.place.class.store(RUN as u32, Relaxed);
        self.state.word.store(pack(kind::RUN, 1), Ordering::SeqCst);
    }

    /// Makes a claimed block a further one of a run.
    pub(super) fn follow(&self) {
        self.place.class.store(NONE as u32, Relaxed);
        self.state.word.store(pack(kind::RUN, 0), Ordering::SeqCst);
    }

    /// Takes back the run that begins here; returns how many blocks it has, or 0 if there is none.
    pub(super) fn close_run(&self) -> u32 {
        let was_run = self.exchange(pack(kind::RUN, 1), pack(kind::BUSY, 0));
        if was_run { self.place.run.load(Relaxed) } else { 0 }
    }

    /// Lets go of a block that was claimed or is further back in a run.
    pub(super) fn unclaim(&self) {
        self.place.class.store(NONE as u32, Relaxed);
        self.state.word.store(pack(kind::EMPTY, 0), Ordering::SeqCst);
    }

    /// Makes an absent block one that somebody is about to put memory behind.
    pub(super) fn claim_absent(&self) -> bool {
        self.exchange(pack(kind::ABSENT, 0), pack(kind::BUSY, 0))
    }

    /// Puts memory behind a block that was claimed; it is nobody's until [`Block::unclaim`].
    pub(super) fn put(&self, base: *mut u8, gpa: u64) {
        self.place.gpa.store(gpa, Relaxed);
        self.place.base.store(base, Relaxed);
    }

    /// Takes the memory of a claimed block away.
    pub(super) fn vacate(&self) {
        self.place.class.store(NONE as u32, Relaxed);
        self.put(core::ptr::null_mut(), 0);
        self.state.word.store(pack(kind::ABSENT, 0), Ordering::SeqCst);
    }
}

#[cfg(all(test, loom))]
mod model;
#[cfg(all(test, not(loom)))]
mod tests;
