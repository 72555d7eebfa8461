//! The windows through which a guest sees its memory.

#![allow(unsafe_code, reason = "mappings at fixed places cannot be made safely")]

use super::backing::Backing;
use super::layout::{Layout, Place};
use crate::Error;
use cvm_core::GpaRange;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::ptr::{NonNull, null_mut};

/// Address space of this process, one byte for each byte of a slot, in which each page shows one backing file or
/// nothing. KVM shows it to the guest; this process never reads or writes through it.
#[derive(Debug)]
pub(crate) struct Window {
    slot: GpaRange,
    base: NonNull<c_void>,
}

// SAFETY: the window owns its address space; it hands out no reference into it, and the kernel serialises mappings.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    /// A window for `slot` that shows nothing.
    pub(crate) fn new(slot: GpaRange) -> Result<Self, Errno> {
        let len = usize::try_from(slot.len()).map_err(|_| Errno::NOMEM)?;
        // SAFETY: without MAP_FIXED the kernel chooses an address where nothing is.
        let base =
            unsafe { mmap_anonymous(null_mut(), len, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE)? };
        Ok(Self { slot, base: NonNull::new(base).ok_or(Errno::NOMEM)? })
    }

    /// Where the window lies in this process.
    pub(crate) fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Makes the window slot `number` of `vm`, or with `bytes` of 0 removes the slot.
    ///
    /// # Safety
    /// The window must live for as long as vCPUs of the VM can reach the slot.
    pub(crate) unsafe fn register(&self, vm: &VmFd, number: u32, bytes: u64) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot: number,
            guest_phys_addr: self.slot.start().0,
            memory_size: bytes,
            userspace_addr: self.address(),
            flags: 0,
        };
        // SAFETY: the region is a window, which holds nothing but guest memory for as long as it lives; the caller promises
        // that it lives long enough.
        unsafe { vm.set_user_memory_region(region) }
    }

    /// The part of the window for `range`, which must lie in the slot.
    fn place(&self, range: GpaRange) -> Result<(*mut c_void, usize), Errno> {
        if !self.slot.contains_range(&range) {
            return Err(Errno::FAULT);
        }
        let offset = (range.start().0 - self.slot.start().0) as usize;
        Ok((self.base.as_ptr().wrapping_byte_add(offset), range.len() as usize))
    }

    /// Shows `backing` from `offset` on in the place of `range`.
    pub(crate) fn show(&self, range: GpaRange, backing: &Backing, offset: u64) -> Result<(), Errno> {
        let (at, len) = self.place(range)?;
        let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: `place` made sure that the mapping replaces nothing but a part of this window, to which there are no
        // references.
        unsafe { mmap(at, len, ProtFlags::READ | ProtFlags::WRITE, flags, backing.file(), offset)? };
        Ok(())
    }

    /// Shows nothing in the place of `range`.
    pub(crate) fn hide(&self, range: GpaRange) -> Result<(), Errno> {
        let (at, len) = self.place(range)?;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: as in `show`.
        unsafe { mmap_anonymous(at, len, ProtFlags::empty(), flags)? };
        Ok(())
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the window is this address range and nothing else is in it. A guest could still see it only while
        // one of its vCPUs runs, and each vCPU keeps the window alive.
        let unmapped = unsafe { munmap(self.base.as_ptr(), self.slot.len() as usize) };
        debug_assert!(unmapped.is_ok(), "a window could not be unmapped: {unmapped:?}");
    }
}

/// A window for each slot of a VM, in the order of the slots.
#[derive(Debug)]
pub(crate) struct Windows {
    layout: Layout,
    windows: Vec<Window>,
}

impl Windows {
    /// Windows that show nothing.
    pub(crate) fn new(layout: Layout) -> Result<Self, Error> {
        let reserve = |slot: &GpaRange| Window::new(*slot).map_err(Error::memory("reserve address space for", *slot));
        let windows = layout.slots().ranges().iter().map(reserve).collect::<Result<_, _>>()?;
        Ok(Self { layout, windows })
    }

    /// Windows that show all of `backing`.
    pub(crate) fn onto(backing: &Backing, layout: Layout) -> Result<Self, Error> {
        let windows = Self::new(layout)?;
        windows.slots().iter().try_for_each(|slot| windows.show(*slot, backing))?;
        Ok(windows)
    }

    /// How the slots lie in files.
    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The slots, as KVM numbers them.
    pub(crate) fn slots(&self) -> &[GpaRange] {
        self.layout.slots().ranges()
    }

    /// Makes the windows the memory of `vm`.
    ///
    /// # Safety
    /// The windows must live for as long as the VM has vCPUs.
    pub(crate) unsafe fn register(&self, vm: &VmFd) -> Result<(), Error> {
        for ((number, slot), window) in (0..).zip(self.slots()).zip(&self.windows) {
            // SAFETY: the caller promises it.
            unsafe { window.register(vm, number, slot.len()) }.map_err(Error::kvm("register a memory slot"))?;
        }
        Ok(())
    }

    /// Where `range` is, which must lie in one slot.
    pub(crate) fn find(&self, range: GpaRange) -> Result<Place, Error> {
        self.layout.find(range).ok_or(Errno::FAULT).map_err(Error::memory("find", range))
    }

    /// Where `range`, which must lie in one slot, is in this process.
    pub(crate) fn address(&self, range: GpaRange) -> Result<u64, Error> {
        let place = self.find(range)?;
        Ok(self.windows[place.slot].address() + place.in_slot)
    }

    /// Shows what `backing` has for `range`, which must lie in one slot.
    pub(crate) fn show(&self, range: GpaRange, backing: &Backing) -> Result<(), Error> {
        let place = self.find(range)?;
        self.windows[place.slot].show(range, backing, place.in_file).map_err(Error::memory("map", range))
    }

    /// Shows nothing in the place of `range`, which must lie in one slot.
    pub(crate) fn hide(&self, range: GpaRange) -> Result<(), Error> {
        self.windows[self.find(range)?.slot].hide(range).map_err(Error::memory("hide", range))
    }
}
