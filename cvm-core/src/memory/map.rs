//! The page-state map: a bit per page, one byte for each 2 MiB, read without a lock.

mod snapshot;

pub use snapshot::Snapshot;

use super::slots::Slots;
use crate::{Error, Gpa, GpaRange, PAGE_SIZE, Side};
use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use zerocopy::FromZeros;

/// What is known of a page.
///
/// A page on its way to the private side is private from the beginning, and one on its way to the shared side until its
/// end: at no time does the map promise devices more than is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PageState {
    /// On the private side, or between the sides.
    Private = 0,
    /// On the shared side.
    Shared = 1,
    /// Lost to a conversion that could neither be finished nor undone: inaccessible to guest and host.
    Poisoned = 2,
}

impl From<Side> for PageState {
    fn from(side: Side) -> Self {
        match side {
            Side::Private => Self::Private,
            Side::Shared => Self::Shared,
        }
    }
}

const PAGES_PER_WORD: u64 = 64;
/// A block is what a large page covers: 2 MiB.
const PAGES_PER_BLOCK: u64 = 512;
const WORDS_PER_BLOCK: usize = (PAGES_PER_BLOCK / PAGES_PER_WORD) as usize;

/// A block's summary: the state of all of its pages in the lowest bits, or that they differ; and whether somebody is
/// changing it.
mod summary {
    pub const STATE: u8 = 3;
    pub const MIXED: u8 = 1 << 2;
    /// Some pages of a mixed block are poisoned.
    pub const POISON: u8 = 1 << 3;
    pub const BUSY: u8 = 1 << 7;
}

/// The state that a summary has for all pages of its block.
#[inline]
fn uniform(summary: u8) -> Option<PageState> {
    match summary & (summary::STATE | summary::MIXED) {
        0 => Some(PageState::Private),
        1 => Some(PageState::Shared),
        2 => Some(PageState::Poisoned),
        _ => None,
    }
}

/// The states of the pages of one slot, in blocks from its start on.
///
/// A block whose pages are all in one state has it in its summary, and its bits mean nothing; else there are bits for
/// each page, the first page in the lowest bit of the first word. Readers look at the summary first. Whoever changes a
/// block holds its busy bit, fills the words before the summary leads to them, and what a reader finds in words that a
/// summary of a moment ago led to was true at that moment or is true now.
#[derive(Debug)]
struct Slot {
    start: Gpa,
    pages: u64,
    summaries: Box<[AtomicU8]>,
    shared: Box<[AtomicU64]>,
    /// Looked at where a summary says so only, so that it takes memory in blocks with poisoned pages only.
    poisoned: Box<[AtomicU64]>,
}

/// The bits of pages `from..to` of a word.
fn mask(from: u64, to: u64) -> u64 {
    (u64::MAX >> (PAGES_PER_WORD - (to - from))) << from
}

/// The words of `pages`: index, mask of the bits that belong to them.
fn words(pages: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    (pages.start / PAGES_PER_WORD..pages.end.div_ceil(PAGES_PER_WORD)).map(move |word| {
        let base = word * PAGES_PER_WORD;
        (word as usize, mask(pages.start.max(base) - base, pages.end.min(base + PAGES_PER_WORD) - base))
    })
}

/// The parts of `pages` that lie in a block each.
fn blocks(pages: Range<u64>) -> impl Iterator<Item = (usize, Range<u64>)> {
    (pages.start / PAGES_PER_BLOCK..pages.end.div_ceil(PAGES_PER_BLOCK)).map(move |block| {
        let base = block * PAGES_PER_BLOCK;
        (block as usize, pages.start.max(base)..pages.end.min(base + PAGES_PER_BLOCK))
    })
}

fn block_of(page: u64) -> usize {
    (page / PAGES_PER_BLOCK) as usize
}

impl Slot {
    fn new(range: GpaRange) -> Result<Self, Error> {
        let blocks = range.pages().div_ceil(PAGES_PER_BLOCK) as usize;
        // Memory of zeros, which the system provides page by page as it is written: all private, and next to nothing.
        let summaries = FromZeros::new_box_zeroed_with_elems(blocks);
        let bits = || FromZeros::new_box_zeroed_with_elems(blocks * WORDS_PER_BLOCK);
        match (summaries, bits(), bits()) {
            (Ok(summaries), Ok(shared), Ok(poisoned)) => {
                Ok(Self { start: range.start(), pages: range.pages(), summaries, shared, poisoned })
            }
            _ => Err(Error::Layout(format!("there is no memory for the page-state map of {range}"))),
        }
    }

    /// Which of its pages `gpa` lies in.
    #[inline]
    fn index(&self, gpa: Gpa) -> Option<u64> {
        let index = gpa.0.wrapping_sub(self.start.0) / PAGE_SIZE;
        (index < self.pages).then_some(index)
    }

    fn gpa(&self, index: u64) -> Gpa {
        Gpa(self.start.0 + index * PAGE_SIZE)
    }

    #[inline]
    fn summary(&self, block: usize) -> u8 {
        self.summaries[block].load(Ordering::Acquire)
    }

    /// The bits of a word's pages that are in `state`, in a mixed block with this summary.
    #[inline]
    fn bits(&self, summary: u8, word: usize, state: PageState) -> u64 {
        let poisoned = match summary & summary::POISON {
            0 => 0,
            _ => self.poisoned[word].load(Ordering::Acquire),
        };
        match state {
            PageState::Private => !self.shared[word].load(Ordering::Acquire) & !poisoned,
            PageState::Shared => self.shared[word].load(Ordering::Acquire) & !poisoned,
            PageState::Poisoned => poisoned,
        }
    }

    #[inline]
    fn page(&self, index: u64) -> PageState {
        let summary = self.summary(block_of(index));
        let is_in = |bits: &[AtomicU64]| {
            // No index that panics, which would take two instructions more.
            let word = bits.get((index / PAGES_PER_WORD) as usize).map_or(0, |word| word.load(Ordering::Acquire));
            word >> (index % PAGES_PER_WORD) & 1 == 1
        };
        // What the summary of a mixed block mostly is takes one comparison.
        if summary != summary::MIXED {
            if let Some(all) = uniform(summary) {
                return all;
            }
            if summary & summary::POISON != 0 && is_in(&self.poisoned) {
                return PageState::Poisoned;
            }
        }
        if is_in(&self.shared) { PageState::Shared } else { PageState::Private }
    }

    /// The first of `pages` that is not in `state`.
    fn first_other(&self, pages: Range<u64>, state: PageState) -> Option<u64> {
        blocks(pages).find_map(|(block, pages)| {
            let summary = self.summary(block);
            match uniform(summary) {
                Some(all) => (all != state).then_some(pages.start),
                None => words(pages).find_map(|(word, mask)| {
                    let other = !self.bits(summary, word, state) & mask;
                    (other != 0).then(|| word as u64 * PAGES_PER_WORD + u64::from(other.trailing_zeros()))
                }),
            }
        })
    }

    /// The run of pages in one state that `pages` begins with.
    fn first_run(&self, pages: Range<u64>) -> Option<(GpaRange, PageState)> {
        let Range { start, end } = pages;
        let state = self.page(start);
        // The page may change while we look: a run has one page at least.
        let next = self.first_other(pages, state).unwrap_or(end).max(start + 1);
        Some((GpaRange::from_pages(self.gpa(start).0, next - start).ok()?, state))
    }

    fn count(&self, state: PageState) -> u64 {
        let in_block = |(block, pages): (usize, Range<u64>)| {
            let summary = self.summary(block);
            match uniform(summary) {
                Some(all) if all == state => pages.end - pages.start,
                Some(_) => 0,
                None => words(pages)
                    .map(|(word, mask)| u64::from((self.bits(summary, word, state) & mask).count_ones()))
                    .sum(),
            }
        };
        blocks(0..self.pages).map(in_block).sum()
    }

    fn pages_of(&self, block: usize) -> Range<u64> {
        let first = block as u64 * PAGES_PER_BLOCK;
        first..(first + PAGES_PER_BLOCK).min(self.pages)
    }

    /// Takes the right to change a block.
    fn take(&self, block: usize) {
        while self.summaries[block].fetch_or(summary::BUSY, Ordering::Acquire) & summary::BUSY != 0 {
            // Whoever has it is done in a few hundred instructions, unless he was interrupted.
            std::thread::yield_now();
        }
    }

    /// Gives the right back, with what there is to say of the block now.
    fn give_back(&self, block: usize, summary: u8) {
        self.summaries[block].store(summary & !summary::BUSY, Ordering::Release);
    }

    /// Fills the words of a block that had no bits of its own.
    fn fill(bits: &[AtomicU64], block: usize, with: bool) {
        let pattern = if with { u64::MAX } else { 0 };
        let words = block * WORDS_PER_BLOCK..(block + 1) * WORDS_PER_BLOCK;
        bits[words].iter().for_each(|word| word.store(pattern, Ordering::Release));
    }

    /// Puts `pages`, all of them in `block`, which is taken, into `state`; returns the block's summary.
    fn set_in(&self, block: usize, pages: Range<u64>, state: PageState) -> u8 {
        let whole = self.pages_of(block);
        if pages == whole {
            return state as u8;
        }
        let before = self.summary(block);
        let all = uniform(before);
        let mut poison = before & summary::POISON;
        if let Some(all) = all {
            Self::fill(&self.shared, block, all == PageState::Shared);
            poison = 0;
        }
        if poison == 0 && (state == PageState::Poisoned || all == Some(PageState::Poisoned)) {
            Self::fill(&self.poisoned, block, all == Some(PageState::Poisoned));
            poison = summary::POISON;
        }
        let put = |bits: &[AtomicU64], word: usize, mask: u64, on: bool| {
            let old = bits[word].load(Ordering::Relaxed);
            bits[word].store(if on { old | mask } else { old & !mask }, Ordering::Release);
        };
        for (word, mask) in words(pages) {
            put(&self.shared, word, mask, state == PageState::Shared);
            if poison != 0 {
                put(&self.poisoned, word, mask, state == PageState::Poisoned);
            }
        }
        let is_whole = words(whole).all(|(word, mask)| !self.bits(poison, word, state) & mask == 0);
        if is_whole { state as u8 } else { summary::MIXED | poison }
    }

    /// How many more runs of pages there are when `pages`, all of them in one state, are in state `to`.
    fn more_runs(&self, pages: &Range<u64>, to: PageState) -> i64 {
        let from = self.page(pages.start);
        let border = |neighbour: u64| {
            let neighbour = self.page(neighbour);
            i64::from(neighbour != to) - i64::from(neighbour != from)
        };
        let before = pages.start.checked_sub(1).map_or(0, border);
        let after = if pages.end < self.pages { border(pages.end) } else { 0 };
        before + after
    }

    /// Puts `pages` into `state`; returns how many more runs there are, if they were all in one state before.
    fn set(&self, pages: Range<u64>, state: PageState) -> i64 {
        // The neighbours too, so that nobody changes them while the borders are counted. All in ascending order, so that
        // nobody waits for somebody who waits for him.
        let last = pages.end.min(self.pages - 1);
        let taken = block_of(pages.start.saturating_sub(1))..block_of(last) + 1;
        taken.clone().for_each(|block| self.take(block));
        let more = self.more_runs(&pages, state);
        for block in taken {
            let whole = self.pages_of(block);
            let part = pages.start.max(whole.start)..pages.end.min(whole.end);
            let summary = if part.is_empty() { self.summary(block) } else { self.set_in(block, part, state) };
            self.give_back(block, summary);
        }
        more
    }
}

/// The state of every page of a VM.
///
/// A page takes a bit, and each 2 MiB one byte more: 32.5 MiB for 1 TiB if every 2 MiB of it have been mixed once, and
/// half a MiB as long as none has; another bit for each page of the 2 MiB around poisoned ones. Everyone reads it
/// without a lock; only the conversion engine writes it.
#[derive(Debug)]
pub struct PageStateMap {
    slots: Slots,
    /// Not with the others, so that what is looked up in most VMs is two loads nearer.
    first: Slot,
    more: Vec<Slot>,
}

impl PageStateMap {
    /// A map of the pages in `slots`, all of them private.
    ///
    /// # Errors
    /// [`Error::Layout`] if there is not enough memory.
    pub fn new(slots: Slots) -> Result<Self, Error> {
        let mut more = slots.ranges().iter().map(|range| Slot::new(*range)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { first: more.remove(0), more, slots })
    }

    /// Where memory is.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// The slot that `gpa` lies in, its number, and which of its pages.
    #[inline]
    fn find(&self, gpa: Gpa) -> Option<(usize, &Slot, u64)> {
        let within = |number: usize| {
            let slot = if number == 0 { &self.first } else { self.more.get(number - 1)? };
            Some((number, slot, slot.index(gpa)?))
        };
        // Most VMs have a slot or two: to look there takes half the time of a search.
        within(0).or_else(|| within(1)).or_else(|| within(self.slots.find(gpa)?))
    }

    /// The state of the page that `gpa` lies in; nothing outside every slot.
    #[inline]
    pub fn get(&self, gpa: Gpa) -> Option<PageState> {
        let (_, slot, page) = self.find(gpa)?;
        Some(slot.page(page))
    }

    /// The number of the slot that all of these bytes lie in, and where in it they begin, if one look is enough to know
    /// that they are shared. If it is not, they may be nevertheless.
    #[inline]
    pub(super) fn plainly_shared(&self, gpa: Gpa, len: u64) -> Option<(usize, u64)> {
        let (number, slot, first) = self.find(gpa)?;
        let offset = gpa.0 - slot.start.0;
        let last = offset.checked_add(len.checked_sub(1)?)? / PAGE_SIZE;
        if last >= slot.pages {
            return None;
        }
        let summary = slot.summary(block_of(first));
        let is_shared = match uniform(summary) {
            Some(state) => state == PageState::Shared && block_of(first) == block_of(last),
            None => {
                let word = first / PAGES_PER_WORD;
                word == last / PAGES_PER_WORD && {
                    let mask = mask(first % PAGES_PER_WORD, last % PAGES_PER_WORD + 1);
                    !slot.bits(summary, word as usize, PageState::Shared) & mask == 0
                }
            }
        };
        is_shared.then_some((number, offset))
    }

    /// The first page of `range` that is not in `state`, or not in any slot.
    pub fn first_not_in(&self, range: GpaRange, state: PageState) -> Option<Gpa> {
        let mut next = range.start();
        while next < range.end() {
            let Some((_, slot, first)) = self.find(next) else { return Some(next) };
            let end = slot.pages.min(first + (range.end().0 - next.0) / PAGE_SIZE);
            if let Some(other) = slot.first_other(first..end, state) {
                return Some(slot.gpa(other));
            }
            next = slot.gpa(end);
        }
        None
    }

    fn states(&self) -> impl Iterator<Item = &Slot> {
        std::iter::once(&self.first).chain(&self.more)
    }

    /// The parts of `range` in the slots, page numbers within each.
    fn parts(&self, range: GpaRange) -> impl Iterator<Item = (&Slot, Range<u64>)> {
        self.slots.ranges().iter().zip(self.states()).filter_map(move |(whole, slot)| {
            let part = whole.intersection(&range)?;
            let first = (part.start().0 - whole.start().0) / PAGE_SIZE;
            Some((slot, first..first + part.pages()))
        })
    }

    /// The longest runs of pages in one state within `range`, in order; what lies outside every slot is left out, and
    /// a run ends where its slot does.
    pub fn runs(&self, range: GpaRange) -> impl Iterator<Item = (GpaRange, PageState)> + '_ {
        self.parts(range).flat_map(|(slot, Range { start: mut next, end })| {
            std::iter::from_fn(move || {
                let (run, state) = if next < end { slot.first_run(next..end)? } else { return None };
                next += run.pages();
                Some((run, state))
            })
        })
    }

    /// The first of these runs; nothing if `range` begins outside every slot.
    pub(super) fn first_run(&self, range: GpaRange) -> Option<(GpaRange, PageState)> {
        let (_, slot, first) = self.find(range.start())?;
        slot.first_run(first..slot.pages.min(first + range.pages()))
    }

    /// How many pages of all slots are in `state`.
    pub fn count(&self, state: PageState) -> u64 {
        self.states().map(|slot| slot.count(state)).sum()
    }

    /// What it says now, page runs in order. Conversions under way meanwhile may be in it in part.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot { runs: self.slots.ranges().iter().flat_map(|slot| self.runs(*slot)).collect() }
    }

    /// How many more runs of pages there are when `range`, all of it in one slot and one state, is in state `to`.
    pub(super) fn more_runs(&self, range: GpaRange, to: PageState) -> i64 {
        self.find(range.start()).map_or(0, |(_, slot, first)| slot.more_runs(&(first..first + range.pages()), to))
    }

    /// Puts `range`, all of it in one slot, into `state`; returns how many more runs there are now, if it was in one state
    /// before.
    pub(super) fn set(&self, range: GpaRange, state: PageState) -> i64 {
        self.find(range.start()).map_or(0, |(_, slot, first)| slot.set(first..first + range.pages(), state))
    }
}

#[cfg(test)]
mod tests;
