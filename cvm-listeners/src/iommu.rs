//! Shared memory for devices that are passed through: what is shared is mapped for DMA, and nothing else.
//!
//! | the guest | the mapper |
//! |---|---|
//! | shares pages | maps them once they are shared |
//! | takes pages back | unmaps them before anything else happens, and refuses if that fails |
//! | takes back a part of a mapping | unmaps the mapping, maps the rest again |
//! | runs out of mappings | merges neighbours, if there are any; else refuses, and says which blocks to convert in |
//!
//! No mapping crosses a border of [`Limits::block`], so taking back a page touches no more than a block.
//!
//! **A mapping cannot be changed in place.** The kernel unmaps whole mappings only: in the third row, and when
//! neighbours are merged, pages that stay shared are unmapped for some microseconds, and a device that accesses
//! one of them meanwhile faults. So neighbours are not merged before mappings run out. A guest avoids all of this by
//! converting the blocks that it shared, whole; a VMM may call [`IommuMapper::compact`] when its devices are idle, and
//! sees in [`Usage::remapped`] how often it happened.
//!
//! Mapping pins pages, and they count against `RLIMIT_MEMLOCK`. To discard those that are mapped, as a
//! [balloon](crate::balloon) does, frees nothing and gives the guest other pages than the device: a VM that has both must
//! refuse one of them, by an error of the balloon's callback.

use crate::mapper::{Hindrance, Mapper};
use cvm_core::memory::{Backing, ConversionListener, Objection, SharedMemory};
use cvm_core::{GpaRange, PAGE_SIZE, Side};
use std::io;
use std::sync::Arc;

/// DMA mappings as a kernel makes them; I/O virtual addresses are guest physical addresses.
///
/// | | [`map`](DmaMap::map) | [`unmap`](DmaMap::unmap) |
/// |---|---|---|
/// | VFIO, `VFIO_TYPE1v2_IOMMU` (`include/uapi/linux/vfio.h`) | `VFIO_IOMMU_MAP_DMA`, `vaddr` from [`Backing::address`] | `VFIO_IOMMU_UNMAP_DMA`; the size that it returns must be all of it |
/// | iommufd (`include/uapi/linux/iommufd.h`) | `IOMMU_IOAS_MAP` with `IOMMU_IOAS_MAP_FIXED_IOVA`, or `IOMMU_IOAS_MAP_FILE` | `IOMMU_IOAS_UNMAP` |
pub trait DmaMap: Send + Sync {
    /// Lets devices read and write `range`, which overlaps no mapping, where it lies on the host.
    ///
    /// # Errors
    /// Of the system call. Nothing is mapped then.
    fn map(&self, range: GpaRange, backing: &Backing) -> io::Result<()>;

    /// Takes `range`, which was mapped at once, from devices: when it returns, none can access it any more.
    ///
    /// # Errors
    /// Of the system call. All of it is still mapped then.
    fn unmap(&self, range: GpaRange) -> io::Result<()>;
}

impl<D: DmaMap> DmaMap for Arc<D> {
    fn map(&self, range: GpaRange, backing: &Backing) -> io::Result<()> {
        (**self).map(range, backing)
    }

    fn unmap(&self, range: GpaRange) -> io::Result<()> {
        (**self).unmap(range)
    }
}

/// A mapping that could not be made or taken away.
#[derive(Debug, thiserror::Error)]
#[error("failed to {step} {range} for devices")]
pub struct DmaError {
    /// What failed: `map` or `unmap`.
    pub step: &'static str,
    /// Which pages.
    pub range: GpaRange,
    /// What the system said.
    pub source: io::Error,
}

/// What the mapper may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How many mappings, 1 or more. The kernel's limit for a VFIO container is the parameter `dma_entry_limit` of
    /// `vfio_iommu_type1`; what is left of it is `VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL`. Leave some for others, like BARs.
    pub mappings: u64,
    /// No mapping crosses a multiple of it: bytes, a power of two, at least a page.
    pub block: u64,
}

impl Default for Limits {
    /// 65535 mappings, the default of `dma_entry_limit` (`drivers/vfio/vfio_iommu_type1.c`), and blocks of 2 MiB.
    fn default() -> Self {
        Self { mappings: 65535, block: 2 << 20 }
    }
}

/// Why a mapper cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MapperError {
    /// The limits make no sense.
    #[error("{0:?} must have mappings, and blocks of a power of two of at least 4 KiB")]
    Limits(Limits),
    /// More is shared already than there may be mappings for.
    #[error("what is shared already takes more than the {most} mappings that there may be")]
    TooMany {
        /// [`Limits::mappings`].
        most: u64,
    },
    /// What is shared already could not be mapped.
    #[error(transparent)]
    Dma(DmaError),
}

/// What a mapper uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// How many mappings there are.
    pub mappings: u64,
    /// How many pages they cover.
    pub mapped: u64,
    /// How many shared pages are not mapped because the system refused; each conversion tries again.
    pub absent: u64,
    /// How many mappings were made anew for pages that stayed shared, while devices could have faulted.
    pub remapped: u64,
}

/// Maps the shared pages of a VM for devices. See the [module](self).
#[derive(Debug)]
pub struct IommuMapper<D> {
    name: String,
    mapper: Mapper<D>,
}

impl<D: DmaMap> IommuMapper<D> {
    /// A mapper that errors call `name`. What is shared already is mapped at once. No page may be converted between this
    /// and adding it to the VM's listeners.
    ///
    /// # Errors
    /// The limits make no sense, or what is shared cannot be mapped. Mappings may be left behind then.
    pub fn new(name: impl Into<String>, dma: D, memory: &SharedMemory, limits: Limits) -> Result<Self, MapperError> {
        if limits.mappings == 0 || !limits.block.is_power_of_two() || limits.block < PAGE_SIZE {
            return Err(MapperError::Limits(limits));
        }
        let name = name.into();
        let mapper = Mapper::new(dma, memory.named(&name), limits.mappings, limits.block);
        let mapper = mapper.map_err(|hindrance| match hindrance {
            Hindrance::NoRoom { .. } => MapperError::TooMany { most: limits.mappings },
            Hindrance::Failed(error) => MapperError::Dma(error),
        })?;
        Ok(Self { name, mapper })
    }

    /// What makes the mappings.
    pub fn dma(&self) -> &D {
        self.mapper.dma()
    }

    /// What is used now.
    pub fn usage(&self) -> Usage {
        let (mapped, absent) = self.mapper.areas();
        let pages = |areas: &[GpaRange]| areas.iter().map(GpaRange::pages).sum();
        Usage {
            mappings: mapped.len() as u64,
            mapped: pages(&mapped),
            absent: pages(&absent),
            remapped: self.mapper.remapped(),
        }
    }

    /// Maps the shared pages that could not be mapped before.
    ///
    /// # Errors
    /// The first one of the system's.
    pub fn mend(&self) -> Result<(), DmaError> {
        self.mapper.mend()
    }

    /// Merges mappings of neighbours within blocks. Devices may fault meanwhile, so they should be idle.
    ///
    /// # Errors
    /// The first one of the system's; what could not be mapped is tried again later.
    pub fn compact(&self) -> Result<(), DmaError> {
        self.mapper.compact()
    }

    fn objection(&self, hindrance: Hindrance) -> Objection {
        match hindrance {
            Hindrance::NoRoom { more, others } => {
                let (most, block) = (self.mapper.most(), self.mapper.block() >> 10);
                let reason = format!(
                    "it takes {more} more than the {most} DMA mappings that there may be; convert in blocks of {block} KiB"
                );
                if others { Objection::Wait(reason) } else { Objection::Refuse(reason) }
            }
            Hindrance::Failed(error) => Objection::Wait(explain(&error)),
        }
    }
}

/// An error with what the system said.
pub(crate) fn explain(error: &DmaError) -> String {
    format!("{error}: {}", error.source)
}

impl<D: DmaMap> ConversionListener for IommuMapper<D> {
    fn name(&self) -> &str {
        &self.name
    }

    fn prepare(&self, range: GpaRange, to: Side) -> Result<(), Objection> {
        self.mapper.prepare(range, to).map_err(|hindrance| self.objection(hindrance))
    }

    fn committed(&self, range: GpaRange, to: Side) {
        self.mapper.end(range, to == Side::Shared);
    }

    fn aborted(&self, range: GpaRange, to: Side) {
        self.mapper.end(range, to == Side::Private);
    }

    fn poisoned(&self, range: GpaRange) {
        self.mapper.end(range, false);
    }
}

#[cfg(any(test, feature = "test-double"))]
mod limited {
    use super::{Backing, DmaMap, GpaRange};
    use std::collections::{BTreeMap, VecDeque};
    use std::io;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    /// An IOMMU in memory that accepts and refuses what `vfio_iommu_type1` version 2 does, for tests: mappings do not
    /// overlap (`EEXIST`), there are so many (`ENOSPC`), and unmapping must not cut one (`EINVAL`) and unmaps something
    /// (`ENOENT`, as iommufd). A [`GpaRange`] is aligned to 4 KiB by itself.
    #[derive(Debug)]
    pub struct LimitedIommu {
        most: u64,
        state: Mutex<State>,
    }

    #[derive(Debug, Default)]
    struct State {
        /// By start.
        mappings: BTreeMap<u64, GpaRange>,
        failures: VecDeque<bool>,
        refused: u64,
        calls: u64,
    }

    impl LimitedIommu {
        /// An IOMMU that has at most `most` mappings.
        pub fn new(most: u64) -> Self {
            Self { most, state: Mutex::default() }
        }

        /// Which of the next calls fail with `EIO`, without doing anything; those after them do not. It replaces what
        /// was said before.
        pub fn fail(&self, next: impl IntoIterator<Item = bool>) {
            self.lock().failures = next.into_iter().collect();
        }

        /// The mappings, by address.
        pub fn mappings(&self) -> Vec<GpaRange> {
            self.lock().mappings.values().copied().collect()
        }

        /// Whether devices can access a page of `range`.
        pub fn reaches(&self, range: GpaRange) -> bool {
            self.lock().mappings.values().any(|mapping| mapping.intersection(&range).is_some())
        }

        /// How many calls a kernel would have refused.
        pub fn refused(&self) -> u64 {
            self.lock().refused
        }

        /// How many calls there were.
        pub fn calls(&self) -> u64 {
            self.lock().calls
        }

        fn lock(&self) -> MutexGuard<'_, State> {
            self.state.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    impl State {
        fn begin(&mut self) -> io::Result<()> {
            self.calls += 1;
            match self.failures.pop_front() {
                Some(true) => Err(io::Error::from_raw_os_error(5)),
                _ => Ok(()),
            }
        }

        fn refuse(&mut self, errno: i32) -> io::Result<()> {
            self.refused += 1;
            Err(io::Error::from_raw_os_error(errno))
        }
    }

    impl DmaMap for LimitedIommu {
        fn map(&self, range: GpaRange, _backing: &Backing) -> io::Result<()> {
            let mut state = self.lock();
            state.begin()?;
            if state.mappings.values().any(|mapping| mapping.intersection(&range).is_some()) {
                return state.refuse(17);
            }
            if state.mappings.len() as u64 >= self.most {
                return state.refuse(28);
            }
            state.mappings.insert(range.start().0, range);
            Ok(())
        }

        fn unmap(&self, range: GpaRange) -> io::Result<()> {
            let mut state = self.lock();
            state.begin()?;
            let hit = state.mappings.values().filter(|mapping| mapping.intersection(&range).is_some());
            let hit: Vec<_> = hit.copied().collect();
            if hit.is_empty() {
                return state.refuse(2);
            }
            if !hit.iter().all(|mapping| range.contains_range(mapping)) {
                return state.refuse(22);
            }
            for mapping in hit {
                state.mappings.remove(&mapping.start().0);
            }
            Ok(())
        }
    }
}

#[cfg(any(test, feature = "test-double"))]
pub use limited::LimitedIommu;

#[cfg(all(test, target_os = "linux"))]
mod tests;
