//! Memory that the host can read and write at any time.

#![allow(
    unsafe_code,
    reason = "shared memory is accessed by pointer: a reference would promise that nobody else writes"
)]

use crate::Error;
use crate::copy::{copy, zero};
use core::ptr::NonNull;
use cvm_core::{Gpa, GpaRange};

/// A shared range of guest memory, accessed by copying only.
///
/// A copy of 1, 2, 4 or 8 bytes is one access. A longer one may copy some bytes twice, and decides nothing by them. What
/// two reads of the same place return may differ, since the host writes when it likes.
#[derive(Debug)]
pub struct SharedRegion {
    base: NonNull<u8>,
    range: GpaRange,
}

// SAFETY: the region is only accessed by copies that may race with anybody: they yield whatever bytes are there.
unsafe impl Send for SharedRegion {}
// SAFETY: as above.
unsafe impl Sync for SharedRegion {}

impl SharedRegion {
    /// The shared range, mapped `offset` above its own addresses.
    ///
    /// # Safety
    /// As [`Platform::share`](crate::Platform::share).
    ///
    /// # Errors
    /// [`Error::NoPointer`] for a range that is mapped to address 0 or does not fit the address space.
    pub(crate) unsafe fn new(range: GpaRange, offset: u64) -> Result<Self, Error> {
        let at = |gpa: Gpa| usize::try_from(gpa.0.checked_add(offset)?).ok();
        let base = at(range.start()).zip(at(range.end()));
        let base = base.and_then(|(start, _)| NonNull::new(core::ptr::with_exposed_provenance_mut(start)));
        Ok(Self { base: base.ok_or(Error::NoPointer(range))?, range })
    }

    /// A region at `base` that the host knows as `range`.
    ///
    /// # Safety
    /// `base` must be valid for reads and writes of `range.len()` bytes for as long as the region lives, and aligned to
    /// [`PAGE_SIZE`](cvm_core::PAGE_SIZE), and nobody may have references into it. `range` must be the same memory: safe
    /// code may take the region back by [`Platform::unshare`](crate::Platform::unshare), which discards the contents of
    /// `range`, and tells the host of addresses in it. So nothing else of the guest may be in `range`, and no other region
    /// that lives on after this one was taken back.
    pub unsafe fn mapped_at(base: NonNull<u8>, range: GpaRange) -> Self {
        Self { base, range }
    }

    /// Where it is in guest physical memory.
    pub fn range(&self) -> GpaRange {
        self.range
    }

    /// How many bytes it has.
    #[allow(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> usize {
        self.range.len() as usize
    }

    /// The address by which the host knows the byte at `offset`.
    pub fn gpa(&self, offset: usize) -> Gpa {
        Gpa(self.range.start().0 + offset as u64)
    }

    /// A pointer to the byte at `offset`, which must be below [`SharedRegion::len`], for code that keeps the rules of
    /// shared memory itself.
    pub(crate) fn pointer(&self, offset: usize) -> NonNull<u8> {
        debug_assert!(offset < self.len());
        // SAFETY: the offset is within the region.
        unsafe { self.base.add(offset) }
    }

    fn check(&self, offset: usize, len: usize) -> Result<(), Error> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len() => Ok(()),
            _ => Err(Error::OutOfBounds { offset, len, limit: self.len() }),
        }
    }

    /// Copies `data` into the region at `offset`: the host sees it.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`]; nothing is copied then.
    pub fn write(&self, offset: usize, data: &[u8]) -> Result<(), Error> {
        self.check(offset, data.len())?;
        // SAFETY: `check` has compared offset and length with the region.
        let to = unsafe { self.base.add(offset) };
        // SAFETY: as above, and `data` is the caller's, so it is no part of the region.
        unsafe { copy(data.as_ptr(), to.as_ptr(), data.len()) };
        Ok(())
    }

    /// Copies from the region at `offset` into `data`: whatever the host has put there.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`]; nothing is copied then.
    pub fn read(&self, offset: usize, data: &mut [u8]) -> Result<(), Error> {
        self.check(offset, data.len())?;
        // SAFETY: `check` has compared offset and length with the region.
        let from = unsafe { self.base.add(offset) };
        // SAFETY: as in `write`.
        unsafe { copy(from.as_ptr(), data.as_mut_ptr(), data.len()) };
        Ok(())
    }

    /// Makes `len` bytes at `offset` zero.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`]; nothing is written then.
    pub fn zero(&self, offset: usize, len: usize) -> Result<(), Error> {
        self.check(offset, len)?;
        // SAFETY: `check` has compared offset and length with the region.
        unsafe { zero(self.base.add(offset).as_ptr(), len) };
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A region over memory of the test's own.
    pub(crate) fn region(pages: u64) -> SharedRegion {
        #[derive(Clone)]
        #[repr(align(4096))]
        struct Page {
            _bytes: [u8; 4096],
        }
        let memory = vec![Page { _bytes: [0; 4096] }; pages as usize].leak();
        let base = NonNull::new(memory.as_mut_ptr().cast()).unwrap();
        // SAFETY: the memory is leaked, so it lives long enough, it is pages, and the only reference to it is gone.
        unsafe { SharedRegion::mapped_at(base, GpaRange::from_pages(0x10_0000, pages).unwrap()) }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_and_nothing_around_it_changes(
            offset in 0usize..5000,
            data in prop::collection::vec(1u8.., 0..5000),
        ) {
            let region = region(2);
            let fits = offset + data.len() <= region.len();
            prop_assert_eq!(region.write(offset, &data).is_ok(), fits);
            let mut all = vec![0xff; region.len()];
            region.read(0, &mut all).unwrap();
            let mut expected = vec![0; region.len()];
            let mut back = vec![0; data.len()];
            prop_assert_eq!(region.read(offset, &mut back).is_ok(), fits);
            if fits {
                expected[offset..offset + data.len()].copy_from_slice(&data);
                prop_assert_eq!(back, &data[..]);
                region.zero(offset, data.len()).unwrap();
                let mut zeros = vec![1; data.len()];
                region.read(offset, &mut zeros).unwrap();
                prop_assert!(zeros.iter().all(|byte| *byte == 0));
            }
            prop_assert!(all == expected);
        }
    }

    #[test]
    fn offsets_that_wrap_around_are_refused() {
        let region = region(1);
        assert!(region.write(usize::MAX, &[0; 2]).is_err());
        assert!(region.read(usize::MAX - 1, &mut [0; 4]).is_err());
        assert!(region.zero(4095, 2).is_err());
        assert_eq!(region.gpa(16), Gpa(0x10_0010));
    }
}
