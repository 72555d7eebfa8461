//! Where memory is.

use crate::{Error, Gpa, GpaRange};

/// Ranges of guest memory that do not overlap, in the order of their addresses; at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slots(Vec<GpaRange>);

impl Slots {
    /// These ranges, in whatever order.
    ///
    /// # Errors
    /// [`Error::Layout`] if there is none or two of them overlap.
    pub fn new(ranges: &[GpaRange]) -> Result<Self, Error> {
        let mut sorted = ranges.to_vec();
        sorted.sort();
        if sorted.is_empty() {
            return Err(Error::Layout("there is no memory".into()));
        }
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0].intersection(&pair[1]).is_some()) {
            return Err(Error::Layout(format!("{} and {} overlap", pair[0], pair[1])));
        }
        Ok(Self(sorted))
    }

    /// The ranges.
    pub fn ranges(&self) -> &[GpaRange] {
        &self.0
    }

    /// From the first address to the last, gaps included.
    pub fn span(&self) -> GpaRange {
        // There is one at least, and they are sorted.
        self.0.iter().skip(1).fold(self.0[0], |all, slot| all.hull(slot))
    }

    /// The number of the slot that `gpa` lies in.
    pub fn find(&self, gpa: Gpa) -> Option<usize> {
        let after = self.0.partition_point(|slot| slot.end() <= gpa);
        self.0.get(after).filter(|slot| slot.contains(gpa)).map(|_| after)
    }

    /// Sees to it that every page of `range` lies in a slot.
    ///
    /// # Errors
    /// [`Error::OutsideMemory`] with the first address that lies in none.
    pub fn check(&self, range: GpaRange) -> Result<(), Error> {
        let mut next = range.start();
        while next < range.end() {
            let Some(slot) = self.find(next) else { return Err(Error::OutsideMemory { gpa: next }) };
            next = self.0[slot].end();
        }
        Ok(())
    }

    /// The parts of `range` that lie in a slot each.
    ///
    /// # Errors
    /// As [`Slots::check`].
    pub fn split(&self, range: GpaRange) -> Result<Vec<GpaRange>, Error> {
        self.check(range)?;
        Ok(self.0.iter().filter_map(|slot| slot.intersection(&range)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_SIZE;

    fn range(start: u64, pages: u64) -> GpaRange {
        GpaRange::from_pages(start * PAGE_SIZE, pages).unwrap()
    }

    #[test]
    fn a_layout_without_memory_or_with_overlaps_is_refused() {
        assert!(matches!(Slots::new(&[]), Err(Error::Layout(_))));
        assert!(matches!(Slots::new(&[range(0, 5), range(4, 2)]), Err(Error::Layout(_))));
        assert!(matches!(Slots::new(&[range(4, 2), range(0, 50)]), Err(Error::Layout(_))));
        assert!(Slots::new(&[range(5, 2), range(0, 5)]).is_ok());
    }

    #[test]
    fn a_range_that_straddles_two_slots_is_split_at_the_border() {
        let slots = Slots::new(&[range(0, 5), range(5, 5), range(12, 2)]).unwrap();
        assert_eq!(slots.split(range(3, 4)).unwrap(), [range(3, 2), range(5, 2)]);
        let Err(Error::OutsideMemory { gpa }) = slots.split(range(8, 5)) else { panic!("not refused") };
        assert_eq!(gpa, Gpa(10 * PAGE_SIZE));
    }
}
