use cvm_core::{Error, GpaRange, memory::Slots};

/// Where each slot lies in a file that has all of them, one after the other in the order of their addresses.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    slots: Slots,
}

impl Layout {
    /// The layout of `slots`, in whatever order.
    pub(crate) fn new(slots: &[GpaRange]) -> Result<Self, Error> {
        Ok(Self { slots: Slots::new(slots)? })
    }

    pub(crate) fn slots(&self) -> &Slots {
        &self.slots
    }

    /// How large the file is, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.slots.ranges().iter().map(GpaRange::len).sum()
    }

    /// Each slot with where it begins in the file.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (GpaRange, u64)> + '_ {
        self.slots.ranges().iter().scan(0, |end, slot| {
            let begin = *end;
            *end += slot.len();
            Some((*slot, begin))
        })
    }

    /// Where `range` begins in the file, if it lies in one slot.
    pub(crate) fn offset(&self, range: GpaRange) -> Option<u64> {
        let (slot, begin) = self.iter().find(|(slot, _)| slot.contains_range(&range))?;
        Some(begin + (range.start().0 - slot.start().0))
    }
}
