//! What the tiny guest and its VMM agree on, and the built image.
//!
//! The VMM passes a [`Task`] and a nonce as the boot page's arguments. The guest answers with a [`Report`] in a shared
//! page, whose frame number it writes to the doorbell register [`REPORT`].

#![cfg_attr(target_os = "none", no_std)]

use cvm_core::doorbell::{MAX_DEVICES, device_base};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The image, as `cargo xtask guest` built it.
#[cfg(not(target_os = "none"))]
pub const IMAGE: &[u8] = include_bytes!("../tiny-guest.elf");

/// The most vCPUs that the guest has stacks for.
pub const MAX_VCPUS: u32 = 16;

/// The least memory that the guest needs, in bytes: 2 MiB below the image, 2 for the image and the pages that it shares,
/// and 2 for its pool.
pub const MIN_MEMORY: u64 = 6 << 20;

/// What the guest writes into the page that it shares for [`Task::Hello`].
pub const GREETING: &[u8; 27] = b"hello from protected memory";

/// Where the VMM puts the boot page.
pub const BOOT_PAGE: u64 = 0x1000;

/// Where the VMM puts the page tables.
pub const PAGE_TABLES: u64 = 0x10000;

/// The device that the block device is.
pub const BLOCK_DEVICE: u16 = 0;

/// The device that takes reports: the last one.
pub const REPORT_DEVICE: u16 = MAX_DEVICES - 1;

/// The doorbell register for the frame number of a [`Report`].
pub const REPORT: u16 = device_base(REPORT_DEVICE);

/// The doorbell register by which the guest says that the next thing vCPU 0 does is to read from [`MMIO`].
pub const TRYING_MMIO: u16 = REPORT + 4;

/// The doorbell register by which the guest names the frame of a private page that it is about to read:
/// [`Task::ReadReplaced`].
pub const PRIVATE_FRAME: u16 = REPORT + 8;

/// An address where there is no memory as long as it ends below.
pub const MMIO: u64 = 0xd000_0000;

/// How many bytes the guest shares for its bounce pool: one chunk, the last that lies in its memory.
pub const POOL_LEN: u64 = 2 << 20;

/// How many bytes the secret has: a page full.
pub const SECRET_LEN: usize = 4096;

/// How many bytes of the disk the guest reads with one request.
pub const READ_LEN: usize = 8192;

/// How many sectors the guest writes.
pub const WRITTEN_SECTORS: usize = 4;

/// Sectors of a virtio block device (virtio 1.2, section 5.2.4).
pub const SECTOR: usize = 512;

/// How often each vCPU but the first shares pages and takes them back.
pub const ROUNDS: u64 = 4;

/// How many pages each vCPU but the first shares and takes back.
pub const VCPU_PAGES: u64 = 4;

/// How many bytes a report of SEV-SNP has.
pub const ATTESTATION_LEN: usize = 1184;

/// What the guest is to do; the first argument of the boot page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Task {
    /// Use the disk, report, and then try MMIO, on which it is refused.
    Work = 0,
    /// Spin forever.
    Spin = 1,
    /// Crash by a triple fault.
    TripleFault = 2,
    /// Ring a doorbell that does not exist.
    UnknownDoorbell = 3,
    /// Ask to convert what cannot be converted, and end with the number of requests that were refused.
    BadConversions = 4,
    /// Panic.
    Panic = 5,
    /// Say hello on the console, share a page with [`GREETING`], tell the VMM its frame number by [`REPORT`], and end.
    Hello = 6,
    /// Execute CPUID, which guests of SEV-ES and SEV-SNP have to ask for by their GHCB.
    StrayCpuid = 7,
    /// Tell the VMM of a private page by [`PRIVATE_FRAME`], read it then, and end with [`code::UNCHANGED`] if its contents
    /// are there still.
    ReadReplaced = 8,
    /// Have vCPU 1 start anew from a state that the guest has made, and end when that vCPU has done its part.
    StartVcpu = 9,
}

impl Task {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Work,
        Self::Spin,
        Self::TripleFault,
        Self::UnknownDoorbell,
        Self::BadConversions,
        Self::Panic,
        Self::Hello,
        Self::StrayCpuid,
        Self::ReadReplaced,
        Self::StartVcpu,
    ];

    /// The task that a number stands for.
    pub fn from_u64(number: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|task| *task as u64 == number)
    }
}

/// The codes that the guest ends with.
pub mod code {
    /// A panic.
    pub const PANIC: u32 = 101;
    /// The boot page or the platform is not what the guest knows.
    pub const PLATFORM: u32 = 102;
    /// The disk does not work.
    pub const DISK: u32 = 103;
    /// The other vCPUs did not finish.
    pub const VCPUS: u32 = 104;
    /// MMIO was not refused.
    pub const MMIO: u32 = 105;
    /// [`Task::StrayCpuid`](super::Task::StrayCpuid) had no effect.
    pub const CPUID: u32 = 106;
    /// [`Task::ReadReplaced`](super::Task::ReadReplaced) found its page as it was.
    pub const UNCHANGED: u32 = 107;
    /// [`Task::ReadReplaced`](super::Task::ReadReplaced) found a page with other contents, and nothing has told it so.
    pub const CHANGED: u32 = 108;
    /// [`Task::BadConversions`](super::Task::BadConversions): plus the number of refused requests.
    pub const REFUSED: u32 = 200;
}

/// How many requests [`Task::BadConversions`] makes.
pub const BAD_CONVERSIONS: u32 = 3;

/// What the guest did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Report {
    /// SHA-256 of the whole disk, before the guest wrote to it.
    pub sha256: [u8; 32],
    /// The disk's length in bytes, as the device told.
    pub disk_len: u64,
    /// The first sector that the guest wrote.
    pub written_at: u64,
    /// Whether the guest read back what it had written; 1 if so.
    pub read_back: u32,
    /// Whether the device refused a descriptor with a private address; 1 if so.
    pub private_descriptor_refused: u32,
    /// Where the secret is.
    pub secret: u64,
    /// How many bytes were copied into the pool.
    pub bounced_to_device: u64,
    /// How many bytes were copied out of the pool.
    pub bounced_from_device: u64,
    /// How many pages each further vCPU shared and took back, in sum.
    pub converted_by_others: u64,
    /// How many vCPUs were done, this one included.
    pub vcpus: u32,
    /// Whether it has a report; 1 if so.
    pub attested: u32,
    /// How many bytes of memory it used that was not loaded.
    pub accepted: u64,
    /// What SEV-SNP's secure processor says of the guest, with [`report_data`] of the nonce in it.
    pub attestation: [u8; ATTESTATION_LEN],
}

/// What the guest has the secure processor sign besides the measurement.
pub fn report_data(nonce: u64) -> [u8; 64] {
    let mut data = [0; 64];
    data[..8].copy_from_slice(&nonce.to_le_bytes());
    data
}

/// A byte of the secret, or of what is written to the disk, as the nonce determines it. It is in no image.
pub fn pattern(nonce: u64, stream: u64, index: usize) -> u8 {
    // SplitMix64's output function, whose constants spread every input bit over the result.
    let mut x = nonce ^ stream.rotate_left(32) ^ (index as u64 / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)).to_le_bytes()[index % 8]
}

/// The stream of [`pattern`] that the secret is.
pub const SECRET_STREAM: u64 = 1;

/// The stream of [`pattern`] that is written to the disk.
pub const DISK_STREAM: u64 = 2;
