//! Sets of pages.

use cvm_core::GpaRange;
use std::ops::Range;

/// A set of pages, kept as its longest runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RangeSet(rangemap::RangeSet<u64>);

fn addresses(range: GpaRange) -> Range<u64> {
    range.start().0..range.end().0
}

impl RangeSet {
    pub(crate) fn insert(&mut self, range: GpaRange) {
        self.0.insert(addresses(range));
    }

    pub(crate) fn remove(&mut self, range: GpaRange) {
        self.0.remove(addresses(range));
    }

    /// Whether a page of `range` is in the set.
    pub(crate) fn intersects(&self, range: GpaRange) -> bool {
        self.0.overlaps(&addresses(range))
    }

    /// Whether every page of `range` is in the set.
    pub(crate) fn contains(&self, range: GpaRange) -> bool {
        self.0.gaps(&addresses(range)).next().is_none()
    }

    pub(crate) fn runs(&self) -> impl Iterator<Item = GpaRange> + '_ {
        self.0.iter().filter_map(|run| GpaRange::new(run.start, run.end - run.start).ok())
    }

    pub(crate) fn pages(&self) -> u64 {
        self.runs().map(|run| run.pages()).sum()
    }
}
