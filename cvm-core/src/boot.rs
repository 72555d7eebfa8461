//! The boot page: what the VMM tells a guest that has no firmware to ask.
//!
//! It is a measured page. The first vCPU state passes its GPA in RSI, and the vCPU's index in RDI.

use crate::doorbell::{Doorbell, Transport};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The first field of a boot page: "CVMBOOT1" in ASCII, little endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"CVMBOOT1");

/// The most ranges of memory that a boot page can name.
pub const MAX_RANGES: usize = 8;

/// [`BootPage::accepted`] of a guest that need not accept memory.
pub const ALL_ACCEPTED: u64 = u64::MAX;

/// How a guest's exits reach its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Exits {
    /// By themselves: the host sees the operands of the instruction.
    Direct = 0,
    /// By the guest-hypervisor communication block of AMD SEV-ES: the guest says what it wants to exit for (AMD publication
    /// 56421).
    Ghcb = 1,
}

/// What a guest has to know of the platform that it runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interface {
    /// How it asks for conversions.
    pub transport: Transport,
    /// How its exits reach the host.
    pub exits: Exits,
    /// The bit of a page-table entry that makes private what it leads to; nothing where the guest's tables do not decide.
    pub private_bit: Option<u8>,
    /// Whether it has to accept memory that was not loaded.
    pub acceptance: bool,
    /// Whether the trusted entity gives it a page of secrets and one of CPUID leaves.
    pub vouched_pages: bool,
}

impl From<Transport> for Interface {
    /// That of plain KVM.
    fn from(transport: Transport) -> Self {
        Self { transport, exits: Exits::Direct, private_bit: None, acceptance: false, vouched_pages: false }
    }
}

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
    /// An [`Exits`].
    pub exits: u32,
    /// What to add to the address of a page to reach it while it is shared; 0 where one address serves both sides.
    pub shared_at: u64,
    /// The guest has to accept memory from this address on before it uses it as private; [`ALL_ACCEPTED`] if it need not
    /// accept any.
    pub accepted: u64,
    /// Where the page is that the trusted entity has filled with secrets; 0 if there is none.
    pub secrets: u64,
    /// Where the page is in which the trusted entity vouches for what the processor says of itself; 0 if there is none.
    pub cpuid: u64,
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
        let transports = [Transport::Doorbell, Transport::Hypercall, Transport::PageState];
        transports.into_iter().find(|transport| *transport as u32 == self.transport)
    }

    /// The first address behind all memory; 0 if there is none.
    pub fn end_of_memory(&self) -> u64 {
        self.memory.iter().map(|range| range.start.wrapping_add(range.len)).max().unwrap_or(0)
    }

    /// The way of exits, if the number stands for one.
    pub fn exits(&self) -> Option<Exits> {
        [Exits::Direct, Exits::Ghcb].into_iter().find(|exits| *exits as u32 == self.exits)
    }
}

const _: () = assert!(size_of::<BootPage>() <= crate::PAGE_SIZE as usize);
