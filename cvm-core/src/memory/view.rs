//! The shared side, as device models see it.

use super::map::{PageState, PageStateMap};
use super::pins::{Holder, Pin, Pins};
use crate::{Error, Gpa, GpaRange};
use std::io;
use std::iter::FusedIterator;
use std::ops::Deref;
use std::sync::Arc;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    FileOffset, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, MmapRegion, Permissions, VolatileMemory, VolatileSlice,
};

/// Where the shared side of a range lies on the host.
#[derive(Debug, Clone)]
pub struct Backing {
    /// The address in this process.
    pub address: u64,
    /// The file, and the offset of the range in it; nothing for anonymous memory.
    pub file: Option<FileOffset>,
}

/// Why the shared view refuses an access: the first address that it cannot reach, and what is there.
///
/// It is the source of the `vm-memory` error: [`ViewError::of`] finds it there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum ViewError {
    /// The page there is private.
    #[error("guest address {0} is private")]
    Private(Gpa),
    /// The page there is poisoned.
    #[error("guest address {0} is inaccessible since a conversion failed")]
    Poisoned(Gpa),
    /// The guest has no memory there.
    #[error("guest address {0} lies outside the guest's memory")]
    OutsideMemory(Gpa),
}

impl ViewError {
    /// Why the view has refused an access that failed with `error`; nothing if the view did not.
    pub fn of(error: &GuestMemoryError) -> Option<Self> {
        let GuestMemoryError::IOError(error) = error else { return None };
        error.get_ref()?.downcast_ref().copied()
    }

    /// The first address that the view cannot reach.
    pub fn gpa(&self) -> Gpa {
        let (Self::Private(gpa) | Self::Poisoned(gpa) | Self::OutsideMemory(gpa)) = self;
        *gpa
    }
}

impl From<ViewError> for GuestMemoryError {
    fn from(error: ViewError) -> Self {
        // Its own variant for an invalid address has no place for a reason.
        Self::IOError(io::Error::new(io::ErrorKind::PermissionDenied, error))
    }
}

/// A handle to the shared side of a VM's memory, for devices to keep.
///
/// [`memory`](GuestAddressSpace::memory) pins it; what the pinned view implements is `vm-memory`'s [`GuestMemory`], so
/// `virtio-queue` and other crates that are generic over it work unchanged. An access that touches a page which is not
/// shared fails whole, with the first such address and what is there: a [`ViewError`].
///
/// Hold a pin for one batch of accesses, not longer: a conversion to private waits for it, and answers the guest with
/// [`Answer::Retry`](crate::Answer::Retry) when it waits in vain, with an error that names who held it up.
///
/// Each handle counts its own pins, so that devices with a handle each do not slow down each other.
#[derive(Debug)]
pub struct SharedMemory {
    holder: Holder<Arc<SharedView>>,
}

impl Clone for SharedMemory {
    /// Another handle of the same name.
    fn clone(&self) -> Self {
        self.named(self.holder.name())
    }
}

impl SharedMemory {
    /// The view of `backing` through `map`.
    ///
    /// `backing` must map every slot of `map`, and nothing in it may ever show a private page.
    ///
    /// # Errors
    /// [`Error::Layout`] if a slot has no backing.
    pub fn new(backing: GuestMemoryMmap, map: Arc<PageStateMap>) -> Result<Self, Error> {
        let region_of = |slot: &GpaRange| {
            let start = GuestAddress(slot.start().0);
            let len = usize::try_from(slot.len()).unwrap_or(usize::MAX);
            if !GuestMemoryBackend::check_range(&backing, start, len) {
                return Err(Error::Layout(format!("{slot} has no shared backing")));
            }
            let (region, at) = backing.to_region_addr(start).ok_or_else(|| Error::Layout(slot.to_string()))?;
            Ok(Region { memory: region.get_mmap(), offset: at.0 })
        };
        let regions = map.slots().ranges().iter().map(region_of).collect::<Result<_, _>>()?;
        let view = Arc::new(SharedView { backing, regions, map });
        Ok(Self { holder: Holder::new(&Arc::default(), "vmm".into(), view) })
    }

    /// A handle for somebody whom errors call `name`: a device, a thread.
    pub fn named(&self, name: impl Into<String>) -> Self {
        Self { holder: Holder::new(self.holder.pins(), name.into(), Arc::clone(self.holder.value())) }
    }

    /// The page-state map that this view obeys.
    pub fn map(&self) -> &Arc<PageStateMap> {
        &self.holder.value().map
    }

    /// Where the shared side of `range` lies on the host, for [`ConversionListener`](super::ConversionListener)s that
    /// hand it to others: an IOMMU, a vhost-user backend. Nothing if `range` is not in one slot.
    ///
    /// It says nothing of which side the pages are on. What is handed on must be taken back in
    /// [`prepare`](super::ConversionListener::prepare).
    pub fn backing(&self, range: GpaRange) -> Option<Backing> {
        let slots = self.map().slots();
        slots.find(range.start()).filter(|slot| slots.ranges()[*slot].contains_range(&range))?;
        let region = self.holder.value().backing.find_region(GuestAddress(range.start().0))?;
        let offset = range.start().0.checked_sub(region.start_addr().0)?;
        if region.len() - offset < range.len() {
            return None;
        }
        let file = region.file_offset();
        Some(Backing {
            address: region.as_ptr() as u64 + offset,
            file: file.map(|file| FileOffset::from_arc(Arc::clone(file.arc()), file.start() + offset)),
        })
    }

    pub(super) fn pins(&self) -> &Pins<Arc<SharedView>> {
        self.holder.pins()
    }
}

impl GuestAddressSpace for SharedMemory {
    type M = SharedView;
    type T = Pinned;

    #[inline]
    fn memory(&self) -> Pinned {
        Pinned { pin: self.holder.pin() }
    }
}

/// The shared view for as long as nothing in it can go private.
#[derive(Debug, Clone)]
pub struct Pinned {
    pin: Pin<Arc<SharedView>>,
}

impl Deref for Pinned {
    type Target = SharedView;

    #[inline]
    fn deref(&self) -> &SharedView {
        self.pin.value()
    }
}

/// The shared side of a VM's memory. Only a [`Pinned`] leads to it.
#[derive(Debug)]
pub struct SharedView {
    backing: GuestMemoryMmap,
    /// Where each slot of the map begins in the backing.
    regions: Vec<Region>,
    map: Arc<PageStateMap>,
}

#[derive(Debug)]
struct Region {
    memory: Arc<MmapRegion>,
    offset: u64,
}

impl SharedView {
    /// These bytes, if one look at the map is enough to know that they are shared, and one slice has them all.
    #[inline]
    fn plain_slice(&self, addr: GuestAddress, count: usize) -> Option<VolatileSlice<'_>> {
        let (slot, offset) = self.map.plainly_shared(Gpa(addr.0), count as u64)?;
        let region = &self.regions[slot];
        region.memory.get_slice((region.offset + offset) as usize, count).ok()
    }

    /// These bytes, wherever they are.
    #[cold]
    fn checked_slices(
        &self,
        addr: GuestAddress,
        count: usize,
    ) -> Result<impl GuestMemorySliceIterator<'_, ()>, GuestMemoryError> {
        match self.first_unshared(addr, count) {
            None => Ok(GuestMemoryBackend::get_slices(&self.backing, addr, count)),
            Some(first) => Err(self.refusal(first).into()),
        }
    }

    /// The first address of `addr..addr + count` that is not on the shared side.
    fn first_unshared(&self, addr: GuestAddress, count: usize) -> Option<Gpa> {
        if count == 0 {
            return None;
        }
        let Some(pages) = GpaRange::covering(addr.0, count as u64) else { return Some(Gpa(addr.0)) };
        self.map.first_not_in(pages, PageState::Shared).map(|gpa| Gpa(gpa.0.max(addr.0)))
    }

    fn refusal(&self, gpa: Gpa) -> ViewError {
        match self.map.get(gpa) {
            // A page that has become shared meanwhile was private.
            Some(PageState::Private | PageState::Shared) => ViewError::Private(gpa),
            Some(PageState::Poisoned) => ViewError::Poisoned(gpa),
            None => ViewError::OutsideMemory(gpa),
        }
    }
}

/// The slices of an access: one where its bytes follow each other in one region, else those that the backing makes.
struct Slices<'a, M> {
    one: Option<VolatileSlice<'a>>,
    many: Option<M>,
}

impl<'a, M: Iterator<Item = Result<VolatileSlice<'a>, GuestMemoryError>>> Iterator for Slices<'a, M> {
    type Item = M::Item;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        match self.one.take() {
            Some(one) => Some(Ok(one)),
            None => self.many.as_mut()?.next(),
        }
    }
}

impl<'a, M: GuestMemorySliceIterator<'a, ()>> FusedIterator for Slices<'a, M> {}
impl<'a, M: GuestMemorySliceIterator<'a, ()>> GuestMemorySliceIterator<'a, ()> for Slices<'a, M> {}

impl GuestMemory for SharedView {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    #[inline]
    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        self.map.plainly_shared(Gpa(addr.0), count as u64).is_some() || self.first_unshared(addr, count).is_none()
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        _access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>, GuestMemoryError> {
        let one = self.plain_slice(addr, count);
        let many = match one {
            Some(_) => None,
            None => Some(self.checked_slices(addr, count)?),
        };
        Ok(Slices { one, many })
    }

    // `physical_memory` stays at nothing: it would lead around the check.
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_SIZE;
    use crate::memory::Slots;
    use vm_memory::Bytes;

    /// Two slots that touch, four pages each; pages 2..6 are shared, so the border of the slots is inside.
    fn shared_memory() -> SharedMemory {
        let slots = [GpaRange::from_pages(0, 4).unwrap(), GpaRange::from_pages(4 * PAGE_SIZE, 4).unwrap()];
        let map = Arc::new(PageStateMap::new(Slots::new(&slots).unwrap()).unwrap());
        for start in [2, 4] {
            map.set(GpaRange::from_pages(start * PAGE_SIZE, 2).unwrap(), PageState::Shared);
        }
        let regions = slots.map(|slot| (GuestAddress(slot.start().0), slot.len() as usize));
        SharedMemory::new(GuestMemoryMmap::from_ranges(&regions).unwrap(), map).unwrap()
    }

    #[test]
    fn shared_pages_read_back_what_was_written_across_slots() {
        let memory = shared_memory().memory();
        let data: Vec<u8> = (0..3 * PAGE_SIZE as usize).map(|i| i as u8).collect();
        memory.write_slice(&data, GuestAddress(2 * PAGE_SIZE + 7)).unwrap();
        let mut back = vec![0; data.len()];
        memory.read_slice(&mut back, GuestAddress(2 * PAGE_SIZE + 7)).unwrap();
        assert_eq!(back, data);
    }

    #[test]
    fn an_access_that_straddles_into_private_memory_fails_whole_and_names_the_first_private_address() {
        let memory = shared_memory().memory();
        let before = [0xaau8; 16];
        memory.write_slice(&before, GuestAddress(6 * PAGE_SIZE - 16)).unwrap();
        let error = memory.write_slice(&[0u8; 32], GuestAddress(6 * PAGE_SIZE - 16)).unwrap_err();
        assert_eq!(ViewError::of(&error), Some(ViewError::Private(Gpa(6 * PAGE_SIZE))));
        let mut after = [0; 16];
        memory.read_slice(&mut after, GuestAddress(6 * PAGE_SIZE - 16)).unwrap();
        assert_eq!(after, before);

        let error = memory.read_slice(&mut after, GuestAddress(PAGE_SIZE + 3)).unwrap_err();
        assert_eq!(ViewError::of(&error), Some(ViewError::Private(Gpa(PAGE_SIZE + 3))));
    }

    #[test]
    fn an_error_says_in_words_where_an_access_fails_and_what_is_there() {
        let shared = shared_memory();
        let memory = shared.memory();
        shared.map().set(GpaRange::from_pages(7 * PAGE_SIZE, 1).unwrap(), PageState::Poisoned);
        let said = |page: u64, len| {
            let error = memory.read_slice(&mut vec![0; len], GuestAddress(page * PAGE_SIZE + 0x10)).unwrap_err();
            let reason = ViewError::of(&error).unwrap();
            assert!(error.to_string().ends_with(&reason.to_string()), "{error}");
            reason.to_string()
        };
        assert_eq!(said(1, 1), "guest address 0x1010 is private");
        assert_eq!(said(5, 0x1000), "guest address 0x6000 is private");
        assert_eq!(said(7, 1), "guest address 0x7010 is inaccessible since a conversion failed");
        assert_eq!(said(8, 1), "guest address 0x8010 lies outside the guest's memory");
    }

    #[test]
    fn the_backing_of_a_range_is_told_within_one_slot_only() {
        let memory = shared_memory();
        let range = |start: u64, pages| GpaRange::from_pages(start * PAGE_SIZE, pages).unwrap();
        let [first, third] = [0, 2].map(|page| memory.backing(range(page, 2)).unwrap());
        assert_eq!(third.address - first.address, 2 * PAGE_SIZE);
        assert!(first.file.is_none());
        assert!(memory.backing(range(3, 2)).is_none() && memory.backing(range(7, 2)).is_none());
        assert!(memory.backing(range(8, 1)).is_none());
    }

    #[test]
    fn what_lies_outside_memory_or_wraps_around_is_refused() {
        let memory = shared_memory().memory();
        for addr in [8 * PAGE_SIZE, 1 << 52, u64::MAX, u64::MAX - 3] {
            let error = memory.read_obj::<u64>(GuestAddress(addr)).unwrap_err();
            assert_eq!(ViewError::of(&error), Some(ViewError::OutsideMemory(Gpa(addr))));
            assert!(!memory.check_range(GuestAddress(addr), 8, Permissions::Read));
        }
    }

    #[test]
    fn a_slot_without_backing_is_refused() {
        let map = Arc::new(PageStateMap::new(Slots::new(&[GpaRange::from_pages(0, 4).unwrap()]).unwrap()).unwrap());
        let backing = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x3000)]).unwrap();
        assert!(matches!(SharedMemory::new(backing, map), Err(Error::Layout(_))));
    }
}
