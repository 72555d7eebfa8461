//! A VM's memory, of any kind that KVM has for it.

mod backing;
mod files;
mod gmem;
mod layout;
mod pinned;
mod window;

pub(crate) use backing::Backing;
pub(crate) use files::FilesMemory;
pub(crate) use gmem::GmemMemory;
pub(crate) use layout::Layout;
pub(crate) use pinned::PinnedMemory;
pub(crate) use window::Window;

use cvm_core::memory::{Allocated, ConverterError, PageStateMap, SharedMemory, Sides};
use cvm_core::{BoxError, GpaRange, Side};
use std::io;
use std::sync::Arc;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

/// The memory of one VM.
#[derive(Debug)]
pub(crate) enum GuestMemory {
    /// Two files of this process.
    Files(FilesMemory),
    /// Private memory that no process can map.
    Gmem(GmemMemory),
    /// One file for both sides, pinned.
    Pinned(PinnedMemory),
}

impl GuestMemory {
    /// The shared side, as devices see it.
    pub(crate) fn shared_view(&self) -> Result<SharedMemory, BoxError> {
        match self {
            Self::Files(memory) => shared_view(memory.shared(), memory.layout()),
            Self::Gmem(memory) => shared_view(memory.shared(), memory.layout()),
            Self::Pinned(memory) => shared_view(memory.backing(), memory.layout()),
        }
    }

    pub(crate) fn allocated(&self) -> io::Result<Allocated> {
        match self {
            Self::Files(memory) => memory.allocated(),
            Self::Gmem(memory) => memory.allocated(),
            Self::Pinned(memory) => memory.allocated(),
        }
    }
}

/// The view of `backing`, in which the slots lie as `layout` says.
pub(crate) fn shared_view(backing: &Backing, layout: &Layout) -> Result<SharedMemory, BoxError> {
    let regions = layout.iter().map(|(range, offset)| {
        let file = FileOffset::new(backing.file().try_clone()?, offset);
        let len = usize::try_from(range.len()).map_err(io::Error::other)?;
        Ok((GuestAddress(range.start().0), len, Some(file)))
    });
    let mapped = GuestMemoryMmap::from_ranges_with_files(regions.collect::<io::Result<Vec<_>>>()?)?;
    Ok(SharedMemory::new(mapped, Arc::new(PageStateMap::new(layout.slots().clone())?))?)
}

impl Sides for GuestMemory {
    fn show(&self, range: GpaRange, side: Side) -> Result<(), ConverterError> {
        match self {
            Self::Files(memory) => memory.show(range, side),
            Self::Gmem(memory) => memory.show(range, side),
            Self::Pinned(memory) => memory.show(range, side),
        }
    }

    fn discard(&self, range: GpaRange, losing: Side) -> Result<(), BoxError> {
        match self {
            Self::Files(memory) => memory.discard(range, losing),
            Self::Gmem(memory) => memory.discard(range, losing),
            Self::Pinned(memory) => memory.discard(range, losing),
        }
    }

    fn poison(&self, range: GpaRange) -> Result<(), BoxError> {
        match self {
            Self::Files(memory) => memory.poison(range),
            Self::Gmem(memory) => memory.poison(range),
            Self::Pinned(memory) => memory.poison(range),
        }
    }

    fn most_runs(&self) -> u64 {
        match self {
            Self::Files(memory) => memory.most_runs(),
            Self::Gmem(memory) => memory.most_runs(),
            Self::Pinned(memory) => memory.most_runs(),
        }
    }
}
