//! The block device, through the bounce pool.

#![allow(unsafe_code, reason = "the hal of virtio-drivers is an unsafe trait")]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use cvm_guest::virtio::{DeviceQueue, QueueHal};
use cvm_guest::{ChunkRecord, Error, Pool, PoolOptions, Queue, QueueOptions, QueueRecord, SharedRegion};
use spin::{Mutex, Once};
use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::transport::Transport;
use virtio_drivers::{BufferDirection, Hal, PhysAddr, Result};

static CHUNKS: [ChunkRecord; 1] = [const { ChunkRecord::new() }; _];
static QUEUES: [QueueRecord; 1] = [const { QueueRecord::new() }; _];
static POOL: Pool = Pool::new(&CHUNKS, &QUEUES, PoolOptions { zero_on_release: false, random: None });

static QUEUE: Once<Mutex<Queue<'static>>> = Once::new();
/// Whether the next sector-sized payload goes to the device as it is, from private memory.
static FORGET_TO_BOUNCE: AtomicBool = AtomicBool::new(false);

/// Has payloads bounce through a chunk.
pub fn use_chunk(region: SharedRegion) -> core::result::Result<(), Error> {
    POOL.add(region)?;
    let queue = POOL.queue(QueueOptions::default())?;
    QUEUE.call_once(|| Mutex::new(queue));
    Ok(())
}

/// How many bytes went to and came from the device.
pub fn bounced() -> (u64, u64) {
    let usage = QUEUE.wait().lock().usage();
    (usage.to_device, usage.from_device)
}

pub struct DiskQueue;

impl DeviceQueue for DiskQueue {
    fn with<R>(work: impl FnOnce(&mut Queue<'static>) -> R) -> R {
        work(&mut QUEUE.wait().lock())
    }
}

type BounceHal = QueueHal<DiskQueue>;

/// A [`QueueHal`] that can be told to make a driver's worst mistake.
pub struct ForgetfulHal;

// SAFETY: it passes on to a `Hal` that keeps the rules. A payload that is not bounced is the caller's own buffer.
unsafe impl Hal for ForgetfulHal {
    fn dma_alloc(pages: usize, direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        BounceHal::dma_alloc(pages, direction)
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, vaddr: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: passed on from the caller.
        unsafe { BounceHal::dma_dealloc(paddr, vaddr, pages) }
    }

    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, size: usize) -> NonNull<u8> {
        // SAFETY: passed on from the caller.
        unsafe { BounceHal::mmio_phys_to_virt(paddr, size) }
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        if buffer.len() >= tiny_guest::SECTOR && FORGET_TO_BOUNCE.swap(false, Relaxed) {
            // The guest's memory is mapped to its own addresses.
            return buffer.cast::<u8>().as_ptr().expose_provenance() as PhysAddr;
        }
        // SAFETY: passed on from the caller.
        unsafe { BounceHal::share(buffer, direction) }
    }

    unsafe fn unshare(paddr: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        // SAFETY: passed on from the caller; an address outside the pool is left alone there.
        unsafe { BounceHal::unshare(paddr, buffer, direction) }
    }
}

/// Asks the device to write from private memory into the first sector; returns whether it refused.
pub fn refuses_private_descriptors<T: Transport>(disk: &mut VirtIOBlk<ForgetfulHal, T>) -> bool {
    FORGET_TO_BOUNCE.store(true, Relaxed);
    let written: Result = disk.write_blocks(0, &[0xee; tiny_guest::SECTOR]);
    written.is_err() && !FORGET_TO_BOUNCE.load(Relaxed)
}
