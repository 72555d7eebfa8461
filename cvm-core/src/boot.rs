//! The boot page: what the VMM tells a guest that has no firmware to ask.
//!
//! It is a measured page. The first vCPU state passes its GPA in RSI, and the vCPU's index in RDI.

use crate::doorbell::{Doorbell, Transport};
use zerocopy::{FromBytes, Immutable, KnownLayout, TryFromBytes, try_transmute};

/// The first field of a boot page: "CVMBOOT1" in ASCII, little endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"CVMBOOT1");

/// The most ranges of memory that a boot page can name.
pub const MAX_RANGES: usize = 8;

/// [`BootPage::accepted`] of a guest that can use all memory as it finds it.
pub const ALL_ACCEPTED: u64 = u64::MAX;

/// How a guest's exits reach its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, TryFromBytes)]
#[repr(u32)]
pub enum Exits {
    /// By themselves: the host sees the operands of the instruction.
    Direct = 0,
    /// By the guest-hypervisor communication block of AMD SEV-ES: the guest says what it wants to exit for (AMD publication
    /// 56421).
    Ghcb = 1,
}

/// What fresh memory contains: private memory that nobody has written to since it became private. That is memory which was
/// not loaded, once it is accepted where that is necessary, and memory which was shared and has become private.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, TryFromBytes)]
#[repr(u64)]
pub enum FreshMemory {
    /// Zeros.
    Zero = 0,
    /// Anything: the guest has to write before it reads. Where memory is encrypted by a key of the guest's, it decrypts what
    /// nobody has encrypted.
    Undefined = 1,
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
    /// Whether it has to accept memory that was not loaded, by an instruction without which it cannot use it.
    pub acceptance: bool,
    /// What fresh memory contains.
    pub fresh_memory: FreshMemory,
    /// Whether the trusted entity gives it a page of secrets and one of CPUID leaves.
    pub vouched_pages: bool,
}

impl From<Transport> for Interface {
    /// That of plain KVM.
    fn from(transport: Transport) -> Self {
        Self {
            transport,
            exits: Exits::Direct,
            private_bit: None,
            acceptance: false,
            fresh_memory: FreshMemory::Zero,
            vouched_pages: false,
        }
    }
}

impl Interface {
    /// Whether memory that was not loaded is usable as it is, and zero.
    pub fn is_all_accepted(&self) -> bool {
        !self.acceptance && self.fresh_memory == FreshMemory::Zero
    }
}

/// A range of guest memory: private when the guest starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MemoryRange {
    /// Its first address.
    pub start: u64,
    /// Its length in bytes; 0 for an unused entry.
    pub len: u64,
}

/// The boot page's contents; the rest of the page is zero.
///
/// A guest reads it from memory as it is. What a launch loads and measures are the bytes of [`BootPage::to_bytes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, Immutable, KnownLayout)]
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
    /// Nothing was loaded from this address on: the guest has to accept that memory before it uses it as private, and to write
    /// before it reads, as [`Interface::acceptance`] and [`BootPage::fresh_memory`] have it. Below, what was not loaded is zero.
    /// [`ALL_ACCEPTED`] if it need do neither anywhere.
    pub accepted: u64,
    /// Where the page is that the trusted entity has filled with secrets; 0 if there is none.
    pub secrets: u64,
    /// Where the page is in which the trusted entity vouches for what the processor says of itself; 0 if there is none.
    pub cpuid: u64,
    /// Where memory is.
    pub memory: [MemoryRange; MAX_RANGES],
    /// Whatever VMM and guest agreed on; not interpreted here.
    pub argument: [u64; 4],
    /// A [`FreshMemory`].
    pub fresh_memory: u64,
    /// The digest of the launch configuration: a `ConfigDigest` of the module `launch`. It is here so that whatever measures
    /// this page measures the configuration.
    pub config: [u8; 48],
}

/// How many bytes a boot page has contents in.
pub const BOOT_PAGE_LEN: usize = size_of::<BootPage>();

impl BootPage {
    /// The doorbell, if the number stands for one.
    pub fn doorbell(&self) -> Option<Doorbell> {
        try_transmute!(self.doorbell).ok()
    }

    /// The transport of conversions, if the number stands for one.
    pub fn transport(&self) -> Option<Transport> {
        try_transmute!(self.transport).ok()
    }

    /// What fresh memory contains, if the number stands for that.
    pub fn fresh_memory(&self) -> Option<FreshMemory> {
        try_transmute!(self.fresh_memory).ok()
    }

    /// Its bytes as guests on x86-64 find them: little endian, on hosts of either byte order.
    pub fn to_bytes(&self) -> [u8; BOOT_PAGE_LEN] {
        // No `..` here: a field that is added has to be written too.
        let Self {
            magic,
            vcpus,
            doorbell,
            transport,
            exits,
            shared_at,
            accepted,
            secrets,
            cpuid,
            memory,
            argument,
            fresh_memory,
            config,
        } = self;
        let mut bytes = [0; BOOT_PAGE_LEN];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&magic.to_le_bytes());
        [vcpus, doorbell, transport, exits].iter().for_each(|number| put(&number.to_le_bytes()));
        [shared_at, accepted, secrets, cpuid].iter().for_each(|number| put(&number.to_le_bytes()));
        memory.iter().flat_map(|range| [range.start, range.len]).for_each(|number| put(&number.to_le_bytes()));
        argument.iter().chain([fresh_memory]).for_each(|number| put(&number.to_le_bytes()));
        put(config);
        bytes
    }

    /// The first address behind all memory; 0 if there is none.
    pub fn end_of_memory(&self) -> u64 {
        self.memory.iter().map(|range| range.start.wrapping_add(range.len)).max().unwrap_or(0)
    }

    /// The way of exits, if the number stands for one.
    pub fn exits(&self) -> Option<Exits> {
        try_transmute!(self.exits).ok()
    }
}

const _: () = assert!(BOOT_PAGE_LEN <= crate::PAGE_SIZE as usize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_a_boot_page_are_its_fields_at_their_offsets_in_little_endian() {
        let mut memory = [MemoryRange::default(); MAX_RANGES];
        memory[7] = MemoryRange { start: 0x1000, len: 0x2000 };
        let page = BootPage {
            magic: MAGIC,
            vcpus: 0x0403_0201,
            doorbell: 1,
            transport: 2,
            exits: 1,
            shared_at: 5,
            accepted: 6,
            secrets: 7,
            cpuid: 8,
            memory,
            argument: [9, 10, 11, 12],
            fresh_memory: 1,
            config: [0xcc; 48],
        };
        let mut expected = [0; 272];
        expected[..24].copy_from_slice(b"CVMBOOT1\x01\x02\x03\x04\x01\0\0\0\x02\0\0\0\x01\0\0\0");
        for (at, value) in [(24, 5), (32, 6), (40, 7), (48, 8), (184, 9), (192, 10), (200, 11), (208, 12), (216, 1)] {
            expected[at] = value;
        }
        (expected[169], expected[177]) = (0x10, 0x20);
        expected[224..].fill(0xcc);
        assert_eq!(page.to_bytes(), expected);
        #[cfg(target_endian = "little")]
        assert_eq!(BootPage::read_from_bytes(&expected), Ok(page), "a guest reads other fields than were written");
    }
}
