//! The page-state map: two bits per page, one byte for each 2 MiB, read without a lock.

use super::slots::Slots;
use crate::{Error, Gpa, GpaRange, PAGE_SIZE, Side};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use zerocopy::FromZeros;

/// What is known of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u64)]
pub enum PageState {
    /// On the private side.
    Private = 0,
    /// On the shared side.
    Shared = 1,
    /// Between the sides: nobody may start to access it.
    Converting = 2,
    /// Lost to a conversion that could neither be finished nor undone: inaccessible to guest and host.
    Poisoned = 3,
}

impl PageState {
    fn from_bits(bits: u64) -> Self {
        match bits & 3 {
            0 => Self::Private,
            1 => Self::Shared,
            2 => Self::Converting,
            _ => Self::Poisoned,
        }
    }

    /// This state in every page of a word.
    fn pattern(self) -> u64 {
        (self as u64) * 0x5555_5555_5555_5555
    }
}

impl From<Side> for PageState {
    fn from(side: Side) -> Self {
        match side {
            Side::Private => Self::Private,
            Side::Shared => Self::Shared,
        }
    }
}

const PAGES_PER_WORD: u64 = 32;
/// A block is what a large page covers: 2 MiB.
const PAGES_PER_BLOCK: u64 = 512;
const WORDS_PER_BLOCK: usize = (PAGES_PER_BLOCK / PAGES_PER_WORD) as usize;

/// A block's summary: the state of all of its pages in the lowest bits, or that they differ; and whether somebody is
/// changing it.
mod summary {
    pub const STATE: u8 = 3;
    pub const MIXED: u8 = 1 << 2;
    pub const BUSY: u8 = 1 << 7;
}

/// The states of the pages of one slot, in blocks from its start on.
///
/// A block whose pages are all in one state has it in its summary, and its words mean nothing; else the words have two
/// bits for each page, the first page in the lowest bits of the first word. Readers look at the summary first. Whoever
/// changes a block holds its busy bit, fills the words before the summary leads to them, and what a reader finds in
/// words that a summary of a moment ago led to was true at that moment or is true now.
#[derive(Debug)]
struct Slot {
    range: GpaRange,
    summaries: Box<[AtomicU8]>,
    words: Box<[AtomicU64]>,
}

/// The bits of pages `from..to` of a word.
fn mask(from: u64, to: u64) -> u64 {
    (u64::MAX >> (64 - 2 * (to - from))) << (2 * from)
}

/// The words of pages `first..end`: index, mask of the bits that belong to them.
fn words(first: u64, end: u64) -> impl Iterator<Item = (usize, u64)> {
    (first / PAGES_PER_WORD..end.div_ceil(PAGES_PER_WORD)).map(move |word| {
        let base = word * PAGES_PER_WORD;
        (word as usize, mask(first.max(base) - base, end.min(base + PAGES_PER_WORD) - base))
    })
}

/// The parts of pages `first..end` that lie in a block each.
fn blocks(first: u64, end: u64) -> impl Iterator<Item = (usize, u64, u64)> {
    (first / PAGES_PER_BLOCK..end.div_ceil(PAGES_PER_BLOCK)).map(move |block| {
        let base = block * PAGES_PER_BLOCK;
        (block as usize, first.max(base), end.min(base + PAGES_PER_BLOCK))
    })
}

impl Slot {
    fn new(range: GpaRange) -> Result<Self, Error> {
        let blocks = range.pages().div_ceil(PAGES_PER_BLOCK) as usize;
        // Memory of zeros, which the system provides page by page as it is written: all private, and next to nothing.
        let summaries = FromZeros::new_box_zeroed_with_elems(blocks);
        let words = FromZeros::new_box_zeroed_with_elems(blocks * WORDS_PER_BLOCK);
        match (summaries, words) {
            (Ok(summaries), Ok(words)) => Ok(Self { range, summaries, words }),
            _ => Err(Error::Layout(format!("there is no memory for the page-state map of {range}"))),
        }
    }

    fn index(&self, gpa: Gpa) -> u64 {
        (gpa.0 - self.range.start().0) / PAGE_SIZE
    }

    fn gpa(&self, index: u64) -> Gpa {
        Gpa(self.range.start().0 + index * PAGE_SIZE)
    }

    /// The state of all pages of a block, if they have one.
    fn uniform(&self, block: usize) -> Option<PageState> {
        let summary = self.summaries[block].load(Ordering::SeqCst);
        (summary & summary::MIXED == 0).then(|| PageState::from_bits((summary & summary::STATE).into()))
    }

    fn page(&self, index: u64) -> PageState {
        self.uniform((index / PAGES_PER_BLOCK) as usize).unwrap_or_else(|| {
            let word = self.words[(index / PAGES_PER_WORD) as usize].load(Ordering::SeqCst);
            PageState::from_bits(word >> (2 * (index % PAGES_PER_WORD)))
        })
    }

    /// The first page in `first..end` that is not in `state`.
    fn first_other(&self, first: u64, end: u64, state: PageState) -> Option<u64> {
        blocks(first, end).find_map(|(block, first, end)| match self.uniform(block) {
            Some(all) => (all != state).then_some(first),
            None => words(first, end).find_map(|(word, mask)| {
                let other = (self.words[word].load(Ordering::SeqCst) ^ state.pattern()) & mask;
                (other != 0).then(|| word as u64 * PAGES_PER_WORD + u64::from(other.trailing_zeros()) / 2)
            }),
        })
    }

    fn count(&self, state: PageState) -> u64 {
        let in_block = |(block, first, end): (usize, u64, u64)| match self.uniform(block) {
            Some(all) if all == state => end - first,
            Some(_) => 0,
            None => words(first, end)
                .map(|(word, mask)| {
                    let other = (self.words[word].load(Ordering::SeqCst) ^ state.pattern()) & mask;
                    let pages = mask.count_ones() / 2;
                    u64::from(pages - ((other | other >> 1) & 0x5555_5555_5555_5555).count_ones())
                })
                .sum(),
        };
        blocks(0, self.range.pages()).map(in_block).sum()
    }

    /// Takes the right to change a block; returns its summary.
    fn take(&self, block: usize) -> u8 {
        loop {
            let before = self.summaries[block].fetch_or(summary::BUSY, Ordering::SeqCst);
            if before & summary::BUSY == 0 {
                return before;
            }
            // Whoever has it is done in a few hundred instructions, unless he was interrupted.
            std::thread::yield_now();
        }
    }

    /// Puts pages `first..end`, all of them in `block`, into `state`.
    fn set(&self, block: usize, first: u64, end: u64, state: PageState) {
        let base = block as u64 * PAGES_PER_BLOCK;
        let block_end = (base + PAGES_PER_BLOCK).min(self.range.pages());
        let before = self.take(block);
        if (first, end) == (base, block_end) {
            self.summaries[block].store(state as u8, Ordering::SeqCst);
            return;
        }
        if before & summary::MIXED == 0 {
            let pattern = PageState::from_bits(before.into()).pattern();
            words(base, base + PAGES_PER_BLOCK).for_each(|(word, _)| self.words[word].store(pattern, Ordering::SeqCst));
        }
        for (word, mask) in words(first, end) {
            let old = self.words[word].load(Ordering::SeqCst);
            self.words[word].store(old & !mask | state.pattern() & mask, Ordering::SeqCst);
        }
        let same = |(word, mask): (usize, u64)| (self.words[word].load(Ordering::SeqCst) ^ state.pattern()) & mask == 0;
        let summary = if words(base, block_end).all(same) { state as u8 } else { summary::MIXED };
        self.summaries[block].store(summary, Ordering::SeqCst);
    }
}

/// The state of every page of a VM.
///
/// A page takes a quarter of a byte, and each 2 MiB one byte more: 64.5 MiB for 1 TiB if every 2 MiB of it have been
/// mixed once, and half a MiB as long as none has. Everyone reads it without a lock; only the conversion engine
/// writes it.
#[derive(Debug)]
pub struct PageStateMap {
    slots: Slots,
    states: Vec<Slot>,
}

impl PageStateMap {
    /// A map of the pages in `slots`, all of them private.
    ///
    /// # Errors
    /// [`Error::Layout`] if there is not enough memory.
    pub fn new(slots: Slots) -> Result<Self, Error> {
        let states = slots.ranges().iter().map(|range| Slot::new(*range)).collect::<Result<_, _>>()?;
        Ok(Self { states, slots })
    }

    /// Where memory is.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    fn slot(&self, gpa: Gpa) -> Option<&Slot> {
        self.states.get(self.slots.find(gpa)?)
    }

    /// The state of the page that `gpa` lies in; nothing outside every slot.
    pub fn get(&self, gpa: Gpa) -> Option<PageState> {
        let slot = self.slot(gpa)?;
        Some(slot.page(slot.index(gpa)))
    }

    /// The first page of `range` that is not in `state`, or not in any slot.
    pub fn first_not_in(&self, range: GpaRange, state: PageState) -> Option<Gpa> {
        let mut next = range.start();
        while next < range.end() {
            let Some(slot) = self.slot(next) else { return Some(next) };
            let end = slot.range.end().min(range.end());
            let pages = (end.0 - slot.range.start().0) / PAGE_SIZE;
            if let Some(other) = slot.first_other(slot.index(next), pages, state) {
                return Some(slot.gpa(other));
            }
            next = end;
        }
        None
    }

    /// The longest runs of pages in one state within `range`, in order; what lies outside every slot is left out, and
    /// a run ends where its slot does.
    pub fn runs(&self, range: GpaRange) -> impl Iterator<Item = (GpaRange, PageState)> + '_ {
        let parts = self.states.iter().filter_map(move |slot| Some((slot, slot.range.intersection(&range)?)));
        parts.flat_map(|(slot, part)| {
            let mut next = slot.index(part.start());
            let end = next + part.pages();
            std::iter::from_fn(move || {
                if next >= end {
                    return None;
                }
                let first = next;
                let state = slot.page(first);
                // The page may change while we look: a run has one page at least.
                next = slot.first_other(first, end, state).unwrap_or(end).max(first + 1);
                let run = GpaRange::from_pages(slot.gpa(first).0, next - first).ok()?;
                Some((run, state))
            })
        })
    }

    /// How many pages of all slots are in `state`.
    pub fn count(&self, state: PageState) -> u64 {
        self.states.iter().map(|slot| slot.count(state)).sum()
    }

    /// What it says now, page runs in order. Conversions under way meanwhile may be in it in part.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot { runs: self.slots.ranges().iter().flat_map(|slot| self.runs(*slot)).collect() }
    }

    /// Puts the pages of `range` that lie in a slot into `state`.
    pub(super) fn set(&self, range: GpaRange, state: PageState) {
        for slot in &self.states {
            let Some(part) = slot.range.intersection(&range) else { continue };
            let first = slot.index(part.start());
            for (block, first, end) in blocks(first, first + part.pages()) {
                slot.set(block, first, end, state);
            }
        }
    }
}

/// A page-state map at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    runs: Vec<(GpaRange, PageState)>,
}

impl Snapshot {
    /// The longest runs of pages in one state, in the order of their addresses; a run ends where its slot does.
    pub fn runs(&self) -> &[(GpaRange, PageState)] {
        &self.runs
    }

    /// Where the two differ: pages, what this one says of them, and what the other one does; nothing for pages that it
    /// does not have.
    pub fn differences(&self, other: &Self) -> Vec<(GpaRange, Option<PageState>, Option<PageState>)> {
        let borders = self.runs.iter().chain(&other.runs).flat_map(|(run, _)| [run.start(), run.end()]);
        let mut borders: Vec<_> = borders.collect();
        borders.sort();
        borders.dedup();
        let state = |runs: &[(GpaRange, PageState)], gpa| {
            let after = runs.partition_point(|(run, _)| run.end() <= gpa);
            runs.get(after).filter(|(run, _)| run.contains(gpa)).map(|(_, state)| *state)
        };
        let between = borders.windows(2).filter_map(|pair| {
            let (ours, theirs) = (state(&self.runs, pair[0]), state(&other.runs, pair[0]));
            let range = GpaRange::new(pair[0].0, pair[1].0 - pair[0].0).ok()?;
            (ours != theirs).then_some((range, ours, theirs))
        });
        between.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn range(start: u64, pages: u64) -> GpaRange {
        GpaRange::from_pages(start * PAGE_SIZE, pages).unwrap()
    }

    const STATES: [PageState; 4] = [PageState::Private, PageState::Shared, PageState::Converting, PageState::Poisoned];

    /// Slots of odd sizes, one gap, and enough pages for several words and blocks.
    fn layout() -> Vec<GpaRange> {
        vec![range(3, 70), range(73, 1), range(80, 1290)]
    }

    proptest! {
        #[test]
        fn the_map_agrees_with_a_plain_list(
            changes in prop::collection::vec((0u64..1400, prop_oneof![1u64..100, 400u64..1400], 0usize..4), 0..40),
            asked in (0u64..1400, 1u64..1400),
        ) {
            let map = PageStateMap::new(Slots::new(&layout()).unwrap()).unwrap();
            let mut model: BTreeMap<u64, PageState> = layout()
                .iter()
                .flat_map(|slot| slot.start().0 / PAGE_SIZE..slot.end().0 / PAGE_SIZE)
                .map(|page| (page, PageState::Private))
                .collect();
            for (start, pages, state) in changes {
                map.set(range(start, pages), STATES[state]);
                for (_, old) in model.range_mut(start..start + pages) {
                    *old = STATES[state];
                }
            }
            for page in 0..1400 {
                prop_assert_eq!(map.get(Gpa(page * PAGE_SIZE + page)), model.get(&page).copied());
            }
            let asked = range(asked.0, asked.1);
            let pages = || asked.start().0 / PAGE_SIZE..asked.end().0 / PAGE_SIZE;
            for state in STATES {
                prop_assert_eq!(map.count(state), model.values().filter(|s| **s == state).count() as u64);
                let expected = pages().find(|page| model.get(page) != Some(&state)).map(|page| Gpa(page * PAGE_SIZE));
                prop_assert_eq!(map.first_not_in(asked, state), expected);
            }
            let listed: Vec<_> = map
                .runs(asked)
                .flat_map(|(run, state)| (0..run.pages()).map(move |page| (run.start().0 / PAGE_SIZE + page, state)))
                .collect();
            let expected: Vec<_> = pages().filter_map(|page| model.get(&page).map(|state| (page, *state))).collect();
            prop_assert_eq!(listed, expected);
            let runs: Vec<_> = map.runs(asked).collect();
            for pair in runs.windows(2) {
                let border = layout().iter().any(|slot| slot.start() == pair[1].0.start());
                prop_assert!(border || pair[0].1 != pair[1].1, "two runs that are one: {pair:?}");
            }
        }
    }

    /// What it occupies of memory, as far as the system has provided it, in bytes.
    fn resident() -> u64 {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * PAGE_SIZE
    }

    #[test]
    fn a_block_is_uniform_again_when_its_last_page_joins_the_others() {
        let map = PageStateMap::new(Slots::new(&[range(0, 1000)]).unwrap()).unwrap();
        let mixed = |block: usize| map.states[0].uniform(block).is_none();
        map.set(range(1, 510), PageState::Shared);
        assert!(mixed(0) && !mixed(1));
        map.set(range(0, 1), PageState::Shared);
        assert!(mixed(0));
        map.set(range(511, 489), PageState::Shared);
        assert_eq!(
            [0, 1].map(|block| map.states[0].uniform(block)),
            [Some(PageState::Shared); 2],
            "a short last block"
        );
        map.set(range(600, 1), PageState::Private);
        assert_eq!(map.get(Gpa(599 * PAGE_SIZE)), Some(PageState::Shared), "words of an earlier time came back");
    }

    #[test]
    fn a_tebibyte_in_one_state_takes_next_to_no_memory() {
        let before = resident();
        let map = PageStateMap::new(Slots::new(&[range(0, (1 << 40) / PAGE_SIZE)]).unwrap()).unwrap();
        map.set(range(0, (1 << 40) / PAGE_SIZE), PageState::Shared);
        map.set(range(5, 3), PageState::Private);
        assert_eq!(map.count(PageState::Private), 3);
        // Other tests use memory at the same time.
        assert!(resident().saturating_sub(before) < 32 << 20, "a whole map would be 64 MiB");
    }

    #[test]
    fn snapshots_tell_where_two_maps_differ() {
        let map = PageStateMap::new(Slots::new(&layout()).unwrap()).unwrap();
        let before = map.snapshot();
        assert!(before.differences(&before).is_empty());
        map.set(range(70, 20), PageState::Shared);
        let (private, shared) = (Some(PageState::Private), Some(PageState::Shared));
        let expected =
            [(range(70, 3), private, shared), (range(73, 1), private, shared), (range(80, 10), private, shared)];
        assert_eq!(before.differences(&map.snapshot()), expected);
        let elsewhere = PageStateMap::new(Slots::new(&[range(3, 70)]).unwrap()).unwrap().snapshot();
        assert_eq!(before.differences(&elsewhere), [(range(73, 1), private, None), (range(80, 1290), private, None)]);
    }

    #[test]
    fn threads_that_change_neighbours_do_not_disturb_each_other_or_readers() {
        let map = PageStateMap::new(Slots::new(&[range(0, 512)]).unwrap()).unwrap();
        std::thread::scope(|scope| {
            for (first, pages) in [(0, 100), (100, 1), (101, 300), (401, 111)] {
                let map = &map;
                scope.spawn(move || {
                    for round in 0..2000u64 {
                        let state = STATES[(round % 2) as usize];
                        map.set(range(first, pages), state);
                        assert_eq!(map.first_not_in(range(first, pages), state), None, "round {round}");
                    }
                });
            }
        });
        assert_eq!(map.count(PageState::Shared), 512);
    }
}
