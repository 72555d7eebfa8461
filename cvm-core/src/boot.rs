//! The boot page: what the VMM tells a guest that has no firmware to ask.
//!
//! It is a measured page. The first vCPU state passes its GPA in RSI, and the vCPU's index in RDI.

use crate::doorbell::{Doorbell, Transport};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The first field of a boot page: "CVMBOOT1" in ASCII, little endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"CVMBOOT1");

/// The most ranges of memory that a boot page can name.
pub const MAX_RANGES: usize = 8;

/// A range of guest memory: private when the guest starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MemoryRange {
    /// Its first address.
    pub start: u64,
    /// Its length in bytes; 0 for an unused entry.
    pub len: u64,
}

/// The boot page's contents; the rest of the page is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BootPage {
    /// [`MAGIC`].
    pub magic: u64,
    /// How many vCPUs there are.
    pub vcpus: u32,
    /// A [`Doorbell`].
    pub doorbell: u32,
    /// A [`Transport`].
    pub transport: u32,
    /// Zero.
    pub reserved: u32,
    /// Where memory is.
    pub memory: [MemoryRange; MAX_RANGES],
    /// Whatever VMM and guest agreed on; not interpreted here.
    pub argument: [u64; 4],
}

impl BootPage {
    /// The doorbell, if the number stands for one.
    pub fn doorbell(&self) -> Option<Doorbell> {
        [Doorbell::Port, Doorbell::Msr].into_iter().find(|d| *d as u32 == self.doorbell)
    }

    /// The transport of conversions, if the number stands for one.
    pub fn transport(&self) -> Option<Transport> {
        [Transport::Doorbell, Transport::Hypercall].into_iter().find(|t| *t as u32 == self.transport)
    }
}

const _: () = assert!(size_of::<BootPage>() <= crate::PAGE_SIZE as usize);
