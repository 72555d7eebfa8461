//! The page-state map: two bits per page, read without a lock.

use super::slots::Slots;
use crate::{Gpa, GpaRange, PAGE_SIZE, Side};
use std::sync::atomic::{AtomicU64, Ordering};

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

/// The states of the pages of one slot, the first page in the lowest bits of the first word.
#[derive(Debug)]
struct Slot {
    range: GpaRange,
    words: Box<[AtomicU64]>,
}

impl Slot {
    fn index(&self, gpa: Gpa) -> u64 {
        (gpa.0 - self.range.start().0) / PAGE_SIZE
    }

    /// The words that hold pages `first..end` of this slot: index, mask of the bits that belong to them.
    fn words(&self, first: u64, end: u64) -> impl Iterator<Item = (usize, u64)> + use<> {
        (first / PAGES_PER_WORD..end.div_ceil(PAGES_PER_WORD)).map(move |word| {
            let base = word * PAGES_PER_WORD;
            let (from, to) = (first.max(base) - base, end.min(base + PAGES_PER_WORD) - base);
            let bits = 2 * (to - from);
            (word as usize, (u64::MAX >> (64 - bits)) << (2 * from))
        })
    }

    /// The first page in `first..end` that is not in `state`.
    fn first_other(&self, first: u64, end: u64, state: PageState) -> Option<u64> {
        self.words(first, end).find_map(|(word, mask)| {
            let other = (self.words[word].load(Ordering::SeqCst) ^ state.pattern()) & mask;
            (other != 0).then(|| word as u64 * PAGES_PER_WORD + u64::from(other.trailing_zeros()) / 2)
        })
    }

    fn gpa(&self, index: u64) -> Gpa {
        Gpa(self.range.start().0 + index * PAGE_SIZE)
    }
}

/// The state of every page of a VM, a quarter of a byte each: 64 MiB for 1 TiB.
///
/// Everyone reads it without a lock; only the conversion engine writes it.
#[derive(Debug)]
pub struct PageStateMap {
    slots: Slots,
    states: Vec<Slot>,
}

impl PageStateMap {
    /// A map of the pages in `slots`, all of them private.
    pub fn new(slots: Slots) -> Self {
        let state = |range: &GpaRange| {
            let words = range.pages().div_ceil(PAGES_PER_WORD);
            Slot { range: *range, words: (0..words).map(|_| AtomicU64::new(0)).collect() }
        };
        Self { states: slots.ranges().iter().map(state).collect(), slots }
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
        let index = slot.index(gpa);
        let word = slot.words.get((index / PAGES_PER_WORD) as usize)?.load(Ordering::SeqCst);
        Some(PageState::from_bits(word >> (2 * (index % PAGES_PER_WORD))))
    }

    /// The first page of `range` that is not in `state`, or not in any slot.
    pub fn first_not_in(&self, range: GpaRange, state: PageState) -> Option<Gpa> {
        let mut next = range.start();
        while next < range.end() {
            let Some(slot) = self.slot(next) else { return Some(next) };
            let end = slot.range.end().min(range.end());
            let pages = end.0.div_ceil(PAGE_SIZE) - slot.range.start().0 / PAGE_SIZE;
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
        self.states.iter().filter_map(move |slot| slot.range.intersection(&range).map(|part| (slot, part))).flat_map(
            |(slot, part)| {
                let end = slot.index(part.start()) + part.pages();
                let mut next = slot.index(part.start());
                std::iter::from_fn(move || {
                    if next >= end {
                        return None;
                    }
                    let first = next;
                    let word = slot.words[(first / PAGES_PER_WORD) as usize].load(Ordering::SeqCst);
                    let state = PageState::from_bits(word >> (2 * (first % PAGES_PER_WORD)));
                    // The page may change while we look: a run has one page at least.
                    next = slot.first_other(first, end, state).unwrap_or(end).max(first + 1);
                    let run = GpaRange::from_pages(slot.gpa(first).0, next - first).ok()?;
                    Some((run, state))
                })
            },
        )
    }

    /// How many pages of all slots are in `state`.
    pub fn count(&self, state: PageState) -> u64 {
        self.states
            .iter()
            .flat_map(|slot| slot.words(0, slot.range.pages()).map(|(word, mask)| (&slot.words[word], mask)))
            .map(|(word, mask)| {
                let other = (word.load(Ordering::SeqCst) ^ state.pattern()) & mask;
                let pages = mask.count_ones() / 2;
                u64::from(pages - ((other | other >> 1) & 0x5555_5555_5555_5555).count_ones())
            })
            .sum()
    }

    /// Puts the pages of `range` that lie in a slot into `state`.
    pub(super) fn set(&self, range: GpaRange, state: PageState) {
        for slot in &self.states {
            let Some(part) = slot.range.intersection(&range) else { continue };
            let first = slot.index(part.start());
            for (word, mask) in slot.words(first, first + part.pages()) {
                let bits = state.pattern() & mask;
                // Neighbours of these pages may be set at the same time, so the word must change at once.
                let _ =
                    slot.words[word].fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| Some(old & !mask | bits));
            }
        }
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

    /// Slots of odd sizes, one gap, and enough pages for several words.
    fn layout() -> Vec<GpaRange> {
        vec![range(3, 70), range(73, 1), range(80, 129)]
    }

    proptest! {
        #[test]
        fn the_map_agrees_with_a_plain_list(
            changes in prop::collection::vec((0u64..220, 1u64..100, 0usize..4), 0..40),
            asked in (0u64..220, 1u64..220),
        ) {
            let map = PageStateMap::new(Slots::new(&layout()).unwrap());
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
            for page in 0..230 {
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
}
