//! The block device, through the bounce pool.

#![allow(unsafe_code, reason = "the hal of virtio-drivers is an unsafe trait")]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use cvm_guest::Pool;
use cvm_guest::virtio::{PoolHal, StaticPool};
use spin::Once;
use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::transport::Transport;
use virtio_drivers::{BufferDirection, Hal, PhysAddr, Result};

static POOL: Once<Pool> = Once::new();
static TO_DEVICE: AtomicU64 = AtomicU64::new(0);
static FROM_DEVICE: AtomicU64 = AtomicU64::new(0);
/// Whether the next sector-sized payload goes to the device as it is, from private memory.
static FORGET_TO_BOUNCE: AtomicBool = AtomicBool::new(false);

/// Sets the pool that payloads bounce through.
pub fn use_pool(pool: Pool) {
    POOL.call_once(|| pool);
}

/// How many bytes went to and came from the device.
pub fn bounced() -> (u64, u64) {
    (TO_DEVICE.load(Relaxed), FROM_DEVICE.load(Relaxed))
}

struct DiskPool;

impl StaticPool for DiskPool {
    fn pool() -> &'static Pool {
        POOL.wait()
    }
}

/// A [`PoolHal`] that counts, and that can be told to make a driver's worst mistake.
pub struct CountingHal;

// SAFETY: it passes on to a `Hal` that keeps the rules. A payload that is not bounced is the caller's own buffer.
unsafe impl Hal for CountingHal {
    fn dma_alloc(pages: usize, direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        PoolHal::<DiskPool>::dma_alloc(pages, direction)
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, vaddr: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: passed on from the caller.
        unsafe { PoolHal::<DiskPool>::dma_dealloc(paddr, vaddr, pages) }
    }

    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, size: usize) -> NonNull<u8> {
        // SAFETY: passed on from the caller.
        unsafe { PoolHal::<DiskPool>::mmio_phys_to_virt(paddr, size) }
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        if buffer.len() >= tiny_guest::SECTOR && FORGET_TO_BOUNCE.swap(false, Relaxed) {
            // The guest's memory is mapped to its own addresses.
            return buffer.cast::<u8>().as_ptr().expose_provenance() as PhysAddr;
        }
        if direction != BufferDirection::DeviceToDriver {
            TO_DEVICE.fetch_add(buffer.len() as u64, Relaxed);
        }
        // SAFETY: passed on from the caller.
        unsafe { PoolHal::<DiskPool>::share(buffer, direction) }
    }

    unsafe fn unshare(paddr: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        if direction != BufferDirection::DriverToDevice {
            FROM_DEVICE.fetch_add(buffer.len() as u64, Relaxed);
        }
        // SAFETY: passed on from the caller; an address outside the pool is left alone there.
        unsafe { PoolHal::<DiskPool>::unshare(paddr, buffer, direction) }
    }
}

/// Asks the device to write from private memory into the first sector; returns whether it refused.
pub fn refuses_private_descriptors<T: Transport>(disk: &mut VirtIOBlk<CountingHal, T>) -> bool {
    FORGET_TO_BOUNCE.store(true, Relaxed);
    let written: Result = disk.write_blocks(0, &[0xee; tiny_guest::SECTOR]);
    written.is_err() && !FORGET_TO_BOUNCE.load(Relaxed)
}
