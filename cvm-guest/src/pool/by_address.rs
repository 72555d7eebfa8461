//! Buffers by their addresses, for drivers that keep nothing else of them.

use super::handle::Raw;
use super::{BLOCK_LEN, BLOCK_SHIFT, Block, FromDevice, Placement, Pool, Queue, ToDevice};
use core::ptr::NonNull;
use cvm_core::Gpa;

impl Pool {
    /// The offset of an address in the pool.
    pub(crate) fn offset(&self, gpa: Gpa) -> Option<u64> {
        let holds = |block: &Block| !block.base().is_null() && gpa.0.wrapping_sub(block.gpa()) < BLOCK_LEN as u64;
        let index = (0..self.extent()).find(|index| self.block(*index).is_some_and(holds))?;
        Some((index << BLOCK_SHIFT) as u64 | (gpa.0 % BLOCK_LEN as u64))
    }
}

impl Queue<'_> {
    /// A buffer with a copy of `data`.
    pub(crate) fn bounce(&mut self, data: &[u8]) -> Option<Gpa> {
        self.to_device(data).ok().map(|ToDevice(raw)| self.pool().gpa_of(&raw))
    }

    /// A buffer for a device to write. Its bytes are zero, since all of it is copied out even if the device writes less: what
    /// was in it may have been another driver's.
    pub(crate) fn room_for(&mut self, len: usize) -> Option<Gpa> {
        let FromDevice(raw) = self.from_device(len).ok()?;
        self.pool().scrub(&raw);
        Some(self.pool().gpa_of(&raw))
    }

    /// Zeroed memory in one piece, at a multiple of `align`, and a pointer to it.
    pub(crate) fn allocate(&mut self, len: usize, align: usize) -> Option<(Gpa, NonNull<u8>)> {
        // What is longer may be in pieces for the guest.
        if len > BLOCK_LEN {
            return None;
        }
        let FromDevice(raw) = self.from_device_at(len, Placement::aligned(align)).ok()?;
        self.pool().scrub(&raw);
        let (pointer, _) = self.pool().span(raw.offset())?;
        Some((self.pool().gpa_of(&raw), NonNull::new(pointer)?))
    }

    /// The buffer at an address, which was made with this length and has not been given back.
    pub(crate) fn find(&self, gpa: Gpa, len: usize) -> Option<FromDevice> {
        self.pool().offset(gpa).map(|offset| FromDevice(Raw::new(offset, len, self.owner())))
    }
}
