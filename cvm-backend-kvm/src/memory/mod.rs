//! A VM's memory, of either kind that KVM has for it.

mod backing;
mod files;
mod gmem;
mod window;

pub(crate) use backing::Backing;
pub(crate) use files::FilesMemory;
pub(crate) use gmem::GmemMemory;
pub(crate) use window::Window;

use crate::host::setting;
use cvm_core::memory::{Allocated, Converter, ConverterError, PageStateMap, SharedMemory, Slots};
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
}

impl GuestMemory {
    /// The shared side, as devices see it.
    pub(crate) fn shared_view(&self) -> Result<SharedMemory, BoxError> {
        match self {
            Self::Files(memory) => {
                let (backing, slots) = memory.shared();
                shared_view(backing, slots)
            }
            Self::Gmem(memory) => {
                let (backing, slots) = memory.shared();
                shared_view(backing, slots)
            }
        }
    }

    pub(crate) fn allocated(&self) -> io::Result<Allocated> {
        match self {
            Self::Files(memory) => memory.allocated(),
            Self::Gmem(memory) => memory.allocated(),
        }
    }
}

/// How many mappings a process may have, if the kernel does not say (Linux include/linux/mm.h, DEFAULT_MAX_MAP_COUNT).
const DEFAULT_MAX_MAPPINGS: u64 = 65_530;

/// How many runs of pages a VM may have: each takes a mapping, and half of those of a process are for the rest of it.
fn most_runs() -> u64 {
    let limit = setting("/proc/sys/vm/max_map_count");
    limit.and_then(|text| text.parse().ok()).unwrap_or(DEFAULT_MAX_MAPPINGS) / 2
}

/// The view of `backing`, in which each of `slots` begins at an offset.
fn shared_view(backing: &Backing, slots: impl Iterator<Item = (GpaRange, u64)>) -> Result<SharedMemory, BoxError> {
    let slots: Vec<_> = slots.collect();
    let ranges: Vec<_> = slots.iter().map(|(range, _)| *range).collect();
    let regions = slots.into_iter().map(|(range, offset)| {
        let file = FileOffset::new(backing.file().try_clone()?, offset);
        let len = usize::try_from(range.len()).map_err(io::Error::other)?;
        Ok((GuestAddress(range.start().0), len, Some(file)))
    });
    let mapped = GuestMemoryMmap::from_ranges_with_files(regions.collect::<io::Result<Vec<_>>>()?)?;
    Ok(SharedMemory::new(mapped, Arc::new(PageStateMap::new(Slots::new(&ranges)?)))?)
}

impl Converter for GuestMemory {
    fn convert(&self, range: GpaRange, to: Side) -> Result<(), ConverterError> {
        match self {
            Self::Files(memory) => memory.convert(range, to),
            Self::Gmem(memory) => memory.convert(range, to),
        }
    }

    fn discard(&self, range: GpaRange, losing: Side) -> Result<(), BoxError> {
        match self {
            Self::Files(memory) => memory.discard(range, losing),
            Self::Gmem(memory) => memory.discard(range, losing),
        }
    }

    fn poison(&self, range: GpaRange) -> Result<(), BoxError> {
        match self {
            Self::Files(memory) => memory.poison(range),
            Self::Gmem(memory) => memory.poison(range),
        }
    }

    fn most_runs(&self) -> u64 {
        match self {
            Self::Files(memory) => memory.most_runs(),
            Self::Gmem(memory) => memory.most_runs(),
        }
    }
}
