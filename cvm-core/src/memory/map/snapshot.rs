//! What a page-state map said at one moment.

use super::PageState;
use crate::GpaRange;

/// A page-state map at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    pub(super) runs: Vec<(GpaRange, PageState)>,
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
