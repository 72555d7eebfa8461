//! What the guest that measures I/O and its VMM agree on, and the built image.
//!
//! The boot page's arguments are whether payloads bounce (1) or buffers are shared (0), and a nonce. The guest shares a
//! page and names its frame by [`register::REPORT`]. Then it asks for a [`Case`] by reading [`register::OPERATION`],
//! gets ready, writes [`register::MARK`] when it begins and when all I/Os are done, leaves a [`Report`] in the page,
//! and asks for the next.

#![cfg_attr(target_os = "none", no_std)]

use cvm_core::doorbell::MAX_DEVICES;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The image, as `cargo xtask guest` built it.
#[cfg(not(target_os = "none"))]
pub const IMAGE: &[u8] = include_bytes!("../io-guest.elf");

/// How much memory the guest has.
pub const MEMORY: u64 = 32 << 20;
/// Where the VMM puts the boot page.
pub const BOOT_PAGE: u64 = 0x1000;
/// Where the VMM puts the page tables.
pub const PAGE_TABLES: u64 = 0x10000;

/// The device that the block device is.
pub const DISK: u16 = 0;
/// The device that the network card is.
pub const NET: u16 = 1;
/// The device that gives out cases and takes reports.
pub const CONTROL: u16 = MAX_DEVICES - 1;

/// Registers of [`CONTROL`], by their offset.
pub mod register {
    /// Write: the frame number of the page for reports.
    pub const REPORT: u16 = 0;
    /// Read: the next case's [`Operation`](super::Operation), or 0 if there is none.
    pub const OPERATION: u16 = 4;
    /// Read: how many bytes one I/O has.
    pub const SIZE: u16 = 8;
    /// Read: how many I/Os there are.
    pub const COUNT: u16 = 12;
    /// Read: a number that no other case of this guest has.
    pub const SEQUENCE: u16 = 16;
    /// Write: 1 when the case begins, 2 when its last I/O is done, 3 when it is reported.
    pub const MARK: u16 = 20;
}

/// The most requests to the disk that are in flight: the driver's queue has 16 entries, and a request takes three.
pub const DISK_DEPTH: usize = 5;
/// The most frames that are in flight, each way.
pub const NET_DEPTH: usize = 8;
/// The longest request to the disk.
pub const MAX_REQUEST: usize = 1 << 20;
/// The longest frame, without its virtio header: 9000 bytes of IP in Ethernet.
pub const MAX_FRAME: usize = 9014;
/// The shortest frame: it has a header, and room for two words.
pub const MIN_FRAME: usize = 64;

/// Sectors of a virtio block device (virtio 1.2, section 5.2.4).
pub const SECTOR: usize = 512;
/// The disk's length: what is read, and then as much that is written.
pub const DISK_LEN: usize = 32 << 20;
/// Where the part begins that is written.
pub const WRITTEN: usize = DISK_LEN / 2;

/// How many bytes of the last I/O the guest compares one by one; of what is beyond, a word in each page.
pub const COMPARED: usize = 16 << 10;

/// The header of a frame: to and from addresses that are locally administered, and EtherType 0x88b5, which IEEE 802
/// leaves for experiments.
pub const FRAME_HEADER: [u8; 14] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5];
/// Where a frame's payload begins: its words are aligned from here.
pub const FRAME_WORDS: usize = 16;
/// The guest's Ethernet address.
pub const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// The responder's Ethernet address.
pub const RESPONDER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The guest's IPv4 address, of a network of 24 bits (RFC 5737).
pub const GUEST_IP: [u8; 4] = [192, 0, 2, 2];
/// The responder's IPv4 address.
pub const RESPONDER_IP: [u8; 4] = [192, 0, 2, 1];
/// The UDP port that the responder echoes on (RFC 862).
pub const ECHO_PORT: u16 = 7;
/// The longest datagram of [`Operation::Exchange`].
pub const MAX_DATAGRAM: usize = 1400;

/// What the guest does in a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Operation {
    /// Read blocks of the disk, one after the other.
    ReadSequential = 1,
    /// Read blocks of the disk in an order that looks random.
    ReadRandom = 2,
    /// Write blocks, one after the other.
    WriteSequential = 3,
    /// Write blocks in an order that looks random.
    WriteRandom = 4,
    /// Send frames, which the VMM sinks.
    Send = 5,
    /// Receive frames that the VMM makes.
    Receive = 6,
    /// Send frames and get them back.
    Echo = 7,
    /// Send UDP datagrams by a network stack, and get them back.
    Exchange = 8,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::ReadSequential,
        Self::ReadRandom,
        Self::WriteSequential,
        Self::WriteRandom,
        Self::Send,
        Self::Receive,
        Self::Echo,
        Self::Exchange,
    ];

    /// The operation that a number stands for.
    pub fn from_u32(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| *operation as u32 == number)
    }

    /// Whether the disk does it, and not the network card.
    pub fn is_disk(self) -> bool {
        self <= Self::WriteRandom
    }

    /// Whether it writes to the disk.
    pub fn is_write(self) -> bool {
        matches!(self, Self::WriteSequential | Self::WriteRandom)
    }
}

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// What to do.
    pub operation: Operation,
    /// How many bytes one I/O has.
    pub size: u32,
    /// How many I/Os there are.
    pub count: u32,
    /// A number that no other case of this guest has.
    pub sequence: u32,
}

impl Case {
    /// The offset on the disk of the I/O with this index.
    pub fn offset(&self, index: u32) -> usize {
        let blocks = (WRITTEN / self.size as usize) as u32;
        let block = match self.operation {
            // Knuth's multiplicative hash for 32 bits, without the bits that vary least.
            Operation::ReadRandom | Operation::WriteRandom => index.wrapping_mul(2_654_435_761) >> 7,
            _ => index,
        };
        let start = if self.operation.is_write() { WRITTEN } else { 0 };
        start + (block % blocks) as usize * self.size as usize
    }

    /// What marks the block at `offset` on the disk, or the frame `offset`, as this case's.
    pub fn stamp(&self, offset: usize) -> u64 {
        u64::from(self.sequence) << 40 | offset as u64
    }
}

/// A word of what is read, written and sent, as the nonce determines it. A stamp takes the place of the first.
pub fn word(nonce: u64, index: usize) -> u64 {
    // An odd constant, 2^64 divided by the golden ratio: neighbours have nothing in common.
    (index as u64 ^ nonce).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// How a case went, as the guest knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Report {
    /// 0, or the [`failure`] that ended the case.
    pub failure: u64,
    /// How many I/Os were done.
    pub ios: u64,
    /// How many bytes of payload they had.
    pub bytes: u64,
    /// How many cycles of the time-stamp counter they took.
    pub cycles: u64,
    /// How many bytes of payload were copied to shared memory.
    pub copied_to_device: u64,
    /// How many bytes of payload were copied from shared memory.
    pub copied_from_device: u64,
    /// How many copies that were.
    pub copies: u64,
    /// How many bytes of headers and answers were copied.
    pub headers_copied: u64,
    /// How many bytes of payload were compared with what they should be.
    pub compared: u64,
    /// How many bytes of the pool are in use, in slots, with nothing in flight but buffers for frames to come.
    pub pool_used: u64,
}

/// What can go wrong with a case.
pub mod failure {
    /// A case that makes no sense.
    pub const CASE: u64 = 1;
    /// The driver says that the device failed, or broke the protocol.
    pub const DEVICE: u64 = 2;
    /// The device did not answer.
    pub const TIMEOUT: u64 = 3;
    /// What came is not what should have come.
    pub const CONTENTS: u64 = 4;
}

/// The codes that the guest ends with.
pub mod code {
    /// A panic.
    pub const PANIC: u32 = 101;
    /// The boot page or the platform is not what the guest knows, or the VMM did not share memory.
    pub const PLATFORM: u32 = 102;
    /// A device is none that the guest has a driver for.
    pub const DEVICE: u32 = 103;
}
