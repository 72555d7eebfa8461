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

    /// Where `range` lies, if it lies in one slot.
    pub(crate) fn find(&self, range: GpaRange) -> Option<Place> {
        let mut slots = self.iter().enumerate();
        let (slot, (whole, begin)) = slots.find(|(_, (slot, _))| slot.contains_range(&range))?;
        let in_slot = range.start().0 - whole.start().0;
        Some(Place { slot, in_slot, in_file: begin + in_slot })
    }

    /// Each slot with where it begins in the file.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (GpaRange, u64)> + '_ {
        self.slots.ranges().iter().scan(0, |end, slot| {
            let begin = *end;
            *end += slot.len();
            Some((*slot, begin))
        })
    }
}

/// Where a range of guest memory begins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// In which slot, by its number.
    pub(crate) slot: usize,
    /// How many bytes from that slot's start.
    pub(crate) in_slot: u64,
    /// How many bytes from the file's.
    pub(crate) in_file: u64,
}
