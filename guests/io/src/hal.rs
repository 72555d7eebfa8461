//! Where payloads are: bounced through the pool, or in shared memory from the start. All that knows the pool is here.

#![allow(unsafe_code, reason = "the hal of virtio-drivers is an unsafe trait, and memory is shared by its address")]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use cvm_core::GpaRange;
use cvm_guest::virtio::{FrameHal, HEADER_LEN, PoolFrames, PoolHal, StaticPool};
use cvm_guest::{GRANULE, Machine, Platform, Pool};
use io_guest::{Report, SECTOR};
use spin::{Mutex, MutexGuard, Once};
use virtio_drivers::{BufferDirection, Hal, PhysAddr, Result};

/// How many bytes at the end of memory are the pool.
pub const POOL_LEN: u64 = 8 << 20;

static POOL: Once<Pool> = Once::new();
static POOL_BITS: Mutex<[u64; POOL_LEN as usize / GRANULE / 64]> = Mutex::new([0; _]);
static BOUNCE: AtomicBool = AtomicBool::new(true);

/// Counters of what is copied. One vCPU writes them, so that a load and a store do.
static TO_DEVICE: AtomicU64 = AtomicU64::new(0);
static FROM_DEVICE: AtomicU64 = AtomicU64::new(0);
static COPIES: AtomicU64 = AtomicU64::new(0);
static HEADERS: AtomicU64 = AtomicU64::new(0);

/// Shares the pool in `range`, and says whether payloads bounce.
pub fn set_up<M: Machine>(
    platform: &Platform<M>,
    range: GpaRange,
    bounce: bool,
) -> core::result::Result<(), cvm_guest::Error> {
    // SAFETY: all memory is mapped to its own addresses, and nothing else of the guest is in `range`.
    let region = unsafe { platform.share(range)? };
    let bits: &mut [u64; _] = MutexGuard::leak(POOL_BITS.lock());
    let pool = Pool::new(region, bits)?;
    POOL.call_once(|| pool);
    BOUNCE.store(bounce, Relaxed);
    Ok(())
}

/// Puts the counters into `report`, and sets them to 0.
pub fn report(report: &mut Report) {
    report.copied_to_device = TO_DEVICE.swap(0, Relaxed);
    report.copied_from_device = FROM_DEVICE.swap(0, Relaxed);
    report.copies = COPIES.swap(0, Relaxed);
    report.headers_copied = HEADERS.swap(0, Relaxed);
}

/// How much of the pool is free.
pub fn free() -> u64 {
    ThePool::pool().free() as u64
}

fn add(counter: &AtomicU64, number: usize) {
    counter.store(counter.load(Relaxed) + number as u64, Relaxed);
}

/// Counts a copy of `len` bytes, of which `header` bytes are no payload.
fn count(counter: &AtomicU64, len: usize, header: usize) {
    add(&HEADERS, header.min(len));
    if len > header {
        add(counter, len - header);
        add(&COPIES, 1);
    }
}

/// Counts the copies that [`PoolHal`] makes at one end of a buffer's way.
fn count_bounce(at_start: bool, direction: BufferDirection, len: usize, header: usize) {
    if at_start && direction != BufferDirection::DeviceToDriver {
        count(&TO_DEVICE, len, header);
    }
    if !at_start && direction != BufferDirection::DriverToDevice {
        count(&FROM_DEVICE, len, header);
    }
}

/// The guest's memory is mapped to its own addresses, so this is where the host finds a buffer.
fn own_address(buffer: NonNull<[u8]>) -> PhysAddr {
    buffer.cast::<u8>().as_ptr().expose_provenance() as PhysAddr
}

/// The pool of both devices.
pub struct ThePool;

impl StaticPool for ThePool {
    fn pool() -> &'static Pool {
        POOL.wait()
    }
}

/// For the disk: whatever is shorter than a sector is a header or an answer.
pub struct DiskHal;

// SAFETY: with bounce buffers it passes on to a `Hal` that keeps the rules. Without, buffers are where the device finds
// them, and that it keeps off them after it has used them is what a guest without protection believes of its host.
unsafe impl Hal for DiskHal {
    fn dma_alloc(pages: usize, direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        PoolHal::<ThePool>::dma_alloc(pages, direction)
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, vaddr: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: passed on from the caller.
        unsafe { PoolHal::<ThePool>::dma_dealloc(paddr, vaddr, pages) }
    }

    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, size: usize) -> NonNull<u8> {
        // SAFETY: passed on from the caller.
        unsafe { PoolHal::<ThePool>::mmio_phys_to_virt(paddr, size) }
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        if !BOUNCE.load(Relaxed) {
            return own_address(buffer);
        }
        count_bounce(true, direction, buffer.len(), if buffer.len() < SECTOR { buffer.len() } else { 0 });
        // SAFETY: passed on from the caller.
        unsafe { PoolHal::<ThePool>::share(buffer, direction) }
    }

    unsafe fn unshare(paddr: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        if BOUNCE.load(Relaxed) {
            count_bounce(false, direction, buffer.len(), if buffer.len() < SECTOR { buffer.len() } else { 0 });
            // SAFETY: passed on from the caller.
            unsafe { PoolHal::<ThePool>::unshare(paddr, buffer, direction) }
        }
    }
}

/// For the network card.
pub struct NetHal;

// SAFETY: as for `DiskHal`.
unsafe impl Hal for NetHal {
    fn dma_alloc(pages: usize, direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        PoolHal::<ThePool>::dma_alloc(pages, direction)
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, vaddr: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: passed on from the caller.
        unsafe { PoolHal::<ThePool>::dma_dealloc(paddr, vaddr, pages) }
    }

    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, size: usize) -> NonNull<u8> {
        // SAFETY: passed on from the caller.
        unsafe { PoolHal::<ThePool>::mmio_phys_to_virt(paddr, size) }
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        if !BOUNCE.load(Relaxed) {
            return own_address(buffer);
        }
        count_bounce(true, direction, buffer.len(), HEADER_LEN);
        // SAFETY: passed on from the caller.
        unsafe { PoolFrames::<ThePool>::share(buffer, direction) }
    }

    unsafe fn unshare(paddr: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        if BOUNCE.load(Relaxed) {
            // SAFETY: passed on from the caller.
            unsafe { PoolFrames::<ThePool>::unshare(paddr, buffer, direction) }
        }
    }
}

impl FrameHal for NetHal {
    unsafe fn take(buffer: &mut [u8], len: usize) -> Result {
        if !BOUNCE.load(Relaxed) {
            return if len <= buffer.len() { Ok(()) } else { Err(virtio_drivers::Error::IoError) };
        }
        count(&FROM_DEVICE, len.min(buffer.len()), HEADER_LEN);
        // SAFETY: passed on from the caller.
        unsafe { PoolFrames::<ThePool>::take(buffer, len) }
    }
}
