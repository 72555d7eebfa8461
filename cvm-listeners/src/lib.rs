//! Who must know when pages of a confidential VM change sides: three
//! [`ConversionListener`](cvm_core::ConversionListener)s for VMMs to add to a VM.
//!
//! | module | for whom | what it sees to |
//! |---|---|---|
//! | [`iommu`] | devices that are passed through | what is shared is mapped for DMA, and nothing else |
//! | [`vhost_user`] (Linux) | devices that other processes serve | what is shared is in the backend's memory, and nothing else |
//! | [`balloon`] | the host's memory | what the guest does not use is freed, if the guest has shared it |
//!
//! What they must not have they give up before a page becomes private; if they cannot, they object, and the guest hears
//! that its request is not done. What becomes shared they hand on afterwards; if that fails, they try again with each
//! conversion, and let no other page become shared before.
//!
//! ```
//! use cvm_core::memory::{Backing, SharedMemory};
//! use cvm_core::{ConversionListener, GpaRange};
//! use cvm_listeners::balloon::Balloon;
//! use cvm_listeners::iommu::{DmaMap, IommuMapper, Limits, MapperError};
//! use std::io;
//! use std::sync::Arc;
//!
//! /// An I/O address space.
//! struct Ioas;
//!
//! impl DmaMap for Ioas {
//!     fn map(&self, range: GpaRange, backing: &Backing) -> io::Result<()> {
//!         // VFIO_IOMMU_MAP_DMA: iova `range.start()`, size `range.len()`, vaddr `backing.address`.
//!         # let _ = (range, backing);
//!         Ok(())
//!     }
//!
//!     fn unmap(&self, range: GpaRange) -> io::Result<()> {
//!         // VFIO_IOMMU_UNMAP_DMA: iova `range.start()`, size `range.len()`.
//!         # let _ = range;
//!         Ok(())
//!     }
//! }
//!
//! /// Call it with `vm.memory()` before the guest runs, and give each to `vm.add_listener`.
//! fn listeners(memory: &SharedMemory) -> Result<[Arc<dyn ConversionListener>; 2], MapperError> {
//!     let iommu = IommuMapper::new("iommu", Ioas, memory, Limits::default())?;
//!     // The device's pages are pinned, so there is nothing to discard.
//!     let balloon = Balloon::new(memory, |_| Err(io::ErrorKind::Unsupported.into()));
//!     Ok([Arc::new(iommu), Arc::new(balloon)])
//! }
//! # use cvm_core::memory::{PageStateMap, Slots};
//! # let slots = Slots::new(&[GpaRange::new(0, 0x10000)?])?;
//! # let backing = vm_memory::GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 0x10000)])?;
//! # let memory = SharedMemory::new(backing, Arc::new(PageStateMap::new(slots)?))?;
//! # assert_eq!(listeners(&memory)?.map(|listener| listener.name().to_owned()), ["iommu", "balloon"]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The feature `test-double` adds `iommu::LimitedIommu`, an IOMMU in memory that refuses what the kernel's does.

#![forbid(unsafe_code)]

pub mod balloon;
pub mod iommu;
mod mapper;
mod ranges;
#[cfg(target_os = "linux")]
pub mod vhost_user;

#[cfg(all(test, target_os = "linux"))]
mod tests;
