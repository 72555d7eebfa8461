//! Runs: adjacent blocks, for buffers that are longer than the largest slot.

use super::block::{BLOCK_LEN, Block};
use super::{Pool, copy};
use crate::Error;

impl Pool {
    /// Takes adjacent blocks for `len` bytes that begin `low` bytes into the first; returns its number.
    pub(super) fn take_run(&self, low: usize, len: usize) -> Option<usize> {
        let count = low.checked_add(len)?.div_ceil(BLOCK_LEN);
        let mut first = 0;
        while first + count <= self.extent() {
            match self.claim_run(first, count) {
                Ok(head) => {
                    head.open_run(count as u32, len);
                    return Some(first);
                }
                Err(obstacle) => first = obstacle,
            }
        }
        None
    }

    /// Claims `count` blocks from `first` on, or none; then it says where to look next.
    fn claim_run(&self, first: usize, count: usize) -> Result<&Block, usize> {
        let adjacent = |at: usize| {
            let (before, block) = (self.block(at.wrapping_sub(1)), self.block(at));
            let gpa = |block: Option<&Block>| block.map(Block::gpa);
            at == first || gpa(before).map(|gpa| gpa + BLOCK_LEN as u64) == gpa(block)
        };
        for at in first..first + count {
            let claimed = self.block(at).is_some_and(Block::claim);
            if claimed && adjacent(at) {
                continue;
            }
            let end = if claimed { at + 1 } else { at };
            (first..end).for_each(|at| self.unclaim(at));
            return Err(if claimed { at } else { at + 1 });
        }
        (first + 1..first + count).filter_map(|at| self.block(at)).for_each(Block::follow);
        self.block(first).ok_or(first + 1)
    }

    /// Gives back the run that begins at a block; returns how many bytes it has.
    pub(super) fn give_run(&self, first: usize) -> Option<u64> {
        let head = self.block(first)?;
        let count = head.close_run() as usize;
        if count == 0 {
            return None;
        }
        // The first one last: from it on the run may be taken again.
        (first..first + count).rev().for_each(|at| self.unclaim(at));
        Some((count * BLOCK_LEN) as u64)
    }

    /// [`Pool::write`] across blocks.
    #[cold]
    pub(super) fn write_run(&self, mut offset: u64, mut data: &[u8]) {
        while let Some((to, left)) = self.span(offset).filter(|_| !data.is_empty()) {
            let (piece, rest) = data.split_at(data.len().min(left));
            // SAFETY: there are as many bytes behind the pointer, and `data` is private memory.
            unsafe { copy(piece.as_ptr(), to, piece.len()) };
            (offset, data) = (offset + piece.len() as u64, rest);
        }
    }

    /// [`Pool::read`] across blocks.
    ///
    /// # Safety
    /// `to` must be valid for writes of `len` bytes of private memory.
    #[cold]
    pub(super) unsafe fn read_run(&self, mut offset: u64, mut to: *mut u8, mut len: usize) -> Result<(), Error> {
        while let Some((from, left)) = self.span(offset).filter(|_| len > 0) {
            let piece = len.min(left);
            // SAFETY: there are as many bytes behind both pointers, and `to` is private memory.
            unsafe { copy(from, to, piece) };
            // SAFETY: the piece is part of what the caller promises.
            to = unsafe { to.add(piece) };
            (offset, len) = (offset + piece as u64, len - piece);
        }
        if len == 0 { Ok(()) } else { Err(Error::ForeignBuffer) }
    }
}
