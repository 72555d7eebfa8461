//! Sets of pages.

use cvm_core::GpaRange;
use std::collections::BTreeMap;

/// A set of pages, kept as its longest runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RangeSet {
    /// Where each run begins, and where it ends.
    runs: BTreeMap<u64, u64>,
}

impl RangeSet {
    pub(crate) fn insert(&mut self, range: GpaRange) {
        let (mut start, mut end) = (range.start().0, range.end().0);
        while let Some((first, last)) = self.runs.range(..=end).next_back().map(|(first, last)| (*first, *last))
            && last >= start
        {
            self.runs.remove(&first);
            (start, end) = (start.min(first), end.max(last));
        }
        self.runs.insert(start, end);
    }

    pub(crate) fn remove(&mut self, range: GpaRange) {
        let (start, end) = (range.start().0, range.end().0);
        while let Some((first, last)) = self.runs.range(..end).next_back().map(|(first, last)| (*first, *last))
            && last > start
        {
            self.runs.remove(&first);
            if last > end {
                self.runs.insert(end, last);
            }
            if first < start {
                self.runs.insert(first, start);
            }
        }
    }

    /// Whether a page of `range` is in the set.
    pub(crate) fn intersects(&self, range: GpaRange) -> bool {
        self.runs.range(..range.end().0).next_back().is_some_and(|(_, last)| *last > range.start().0)
    }

    /// Whether every page of `range` is in the set.
    pub(crate) fn contains(&self, range: GpaRange) -> bool {
        self.runs.range(..=range.start().0).next_back().is_some_and(|(_, last)| *last >= range.end().0)
    }

    pub(crate) fn runs(&self) -> impl Iterator<Item = GpaRange> + '_ {
        self.runs.iter().filter_map(|(start, end)| GpaRange::new(*start, end - start).ok())
    }

    pub(crate) fn pages(&self) -> u64 {
        self.runs().map(|run| run.pages()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cvm_core::PAGE_SIZE;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn a_set_of_ranges_agrees_with_a_set_of_pages(
            steps in prop::collection::vec((any::<bool>(), 0u64..60, 1u64..12), 0..60),
            asked in (0u64..60, 1u64..12),
        ) {
            let range = |start: u64, pages| GpaRange::from_pages(start * PAGE_SIZE, pages).unwrap();
            let (mut set, mut model) = (RangeSet::default(), BTreeSet::new());
            for (insert, start, pages) in steps {
                if insert {
                    set.insert(range(start, pages));
                    model.extend(start..start + pages);
                } else {
                    set.remove(range(start, pages));
                    model.retain(|page| !(start..start + pages).contains(page));
                }
            }
            let mut pages = asked.0..asked.0 + asked.1;
            prop_assert_eq!(set.contains(range(asked.0, asked.1)), pages.clone().all(|page| model.contains(&page)));
            prop_assert_eq!(set.intersects(range(asked.0, asked.1)), pages.any(|page| model.contains(&page)));
            let listed = |run: GpaRange| run.start().0 / PAGE_SIZE..run.end().0 / PAGE_SIZE;
            prop_assert_eq!(set.runs().flat_map(listed).collect::<BTreeSet<_>>(), model);
            let runs: Vec<_> = set.runs().collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].start()), "{:?}", runs);
            prop_assert_eq!(set.pages(), runs.iter().map(|run| run.pages()).sum::<u64>());
        }
    }
}
