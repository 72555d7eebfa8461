//! Where payloads are: bounced through the pool, or in shared memory from the start. All that knows the pool is here.

#![allow(unsafe_code, reason = "the hal of virtio-drivers is an unsafe trait, and memory is shared by its address")]

use core::marker::PhantomData;
use core::ops::Sub;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use cvm_core::GpaRange;
use cvm_guest::virtio::{DeviceQueue, FrameHal, HEADER_LEN, QueueFrames, QueueHal};
use cvm_guest::{
    CHUNK_LEN, ChunkRecord, Error, Machine, Platform, Pool, PoolOptions, Queue, QueueOptions, QueueRecord,
};
use io_guest::{Report, SECTOR};
use spin::{Mutex, Once};
use virtio_drivers::{BufferDirection, Hal, PhysAddr, Result};

/// How many chunks the pool has. The disk has up to 5 MiB in flight, each MiB in one piece; the rest is that there is a
/// piece whatever blocks smaller slots are in.
const CHUNKS: usize = 6;
/// How many bytes at the end of memory are the pool.
pub const POOL_LEN: u64 = (CHUNKS * CHUNK_LEN) as u64;

static RECORDS: [ChunkRecord; CHUNKS] = [const { ChunkRecord::new() }; _];
static QUEUES: [QueueRecord; 2] = [const { QueueRecord::new() }; _];
static POOL: Pool = Pool::new(&RECORDS, &QUEUES, PoolOptions { zero_on_release: false, random: None });
static BOUNCE: AtomicBool = AtomicBool::new(true);

/// A device's queue of the pool, and what of its copies is no payload. One vCPU counts, so that a load and a store do.
pub struct Lane {
    queue: Once<Mutex<Queue<'static>>>,
    copies: AtomicU64,
    headers_to_device: AtomicU64,
    headers_from_device: AtomicU64,
}

impl Lane {
    const fn new() -> Self {
        let [copies, headers_to_device, headers_from_device] = [const { AtomicU64::new(0) }; _];
        Self { queue: Once::new(), copies, headers_to_device, headers_from_device }
    }

    /// Counts a copy of `len` bytes, of which `header` bytes are no payload.
    fn count(&self, headers: &AtomicU64, len: usize, header: usize) {
        let add = |counter: &AtomicU64, number| counter.store(counter.load(Relaxed) + number as u64, Relaxed);
        add(headers, header.min(len));
        if len > header {
            add(&self.copies, 1);
        }
    }
}

/// A device of this guest's.
pub trait Device: DeviceQueue {
    /// How its payloads bounce.
    type Bounce: Hal;
    /// Whether all of a buffer is copied out when the driver gets it back, and not only what the device has written.
    const COPIES_ALL: bool;
    /// Its queue.
    const LANE: &'static Lane;

    /// How many of a buffer's bytes are no payload.
    fn header(len: usize) -> usize;
}

/// The disk: whatever is shorter than a sector is a header or an answer.
pub struct DiskDevice;
/// The network card.
pub struct NetDevice;

static DISK: Lane = Lane::new();
static NET: Lane = Lane::new();

impl Device for DiskDevice {
    type Bounce = QueueHal<Self>;
    const COPIES_ALL: bool = true;
    const LANE: &'static Lane = &DISK;

    fn header(len: usize) -> usize {
        if len < SECTOR { len } else { 0 }
    }
}

impl Device for NetDevice {
    type Bounce = QueueFrames<Self>;
    const COPIES_ALL: bool = false;
    const LANE: &'static Lane = &NET;

    fn header(_len: usize) -> usize {
        HEADER_LEN
    }
}

impl DeviceQueue for DiskDevice {
    fn with<R>(work: impl FnOnce(&mut Queue<'static>) -> R) -> R {
        work(&mut DISK.queue.wait().lock())
    }
}

impl DeviceQueue for NetDevice {
    fn with<R>(work: impl FnOnce(&mut Queue<'static>) -> R) -> R {
        work(&mut NET.queue.wait().lock())
    }
}

/// Shares the pool in `range`, and says whether payloads bounce.
pub fn set_up<M: Machine>(
    platform: &Platform<M>,
    range: GpaRange,
    bounce: bool,
) -> core::result::Result<(), cvm_guest::Error> {
    for chunk in 0..CHUNKS as u64 {
        let start = range.start().0 + chunk * CHUNK_LEN as u64;
        let chunk = GpaRange::new(start, CHUNK_LEN as u64).map_err(|_| Error::NotAChunk(range))?;
        // SAFETY: all memory is mapped to its own addresses, and nothing else of the guest is in `range`.
        unsafe { POOL.grow(platform, chunk)? };
    }
    for lane in [&DISK, &NET] {
        let queue = POOL.queue(QueueOptions::default())?;
        lane.queue.call_once(|| Mutex::new(queue));
    }
    BOUNCE.store(bounce, Relaxed);
    Ok(())
}

/// What was copied since the start.
#[derive(Clone, Copy)]
pub struct Copied {
    to_device: u64,
    from_device: u64,
    copies: u64,
    headers: u64,
}

impl Copied {
    /// Until now: how many bytes, as the queues know, and what of them was payload.
    pub fn now() -> Self {
        let mut sum = Self { to_device: 0, from_device: 0, copies: 0, headers: 0 };
        for lane in [&DISK, &NET] {
            let usage = lane.queue.wait().lock().usage();
            let (to, from) = (lane.headers_to_device.load(Relaxed), lane.headers_from_device.load(Relaxed));
            sum.to_device += usage.to_device.wrapping_sub(to);
            sum.from_device += usage.from_device.wrapping_sub(from);
            sum.copies += lane.copies.load(Relaxed);
            sum.headers += to + from;
        }
        sum
    }

    /// Puts it into `report`.
    pub fn report(self, report: &mut Report) {
        report.copied_to_device = self.to_device;
        report.copied_from_device = self.from_device;
        report.copies = self.copies;
        report.headers_copied = self.headers;
    }
}

impl Sub for Copied {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            to_device: self.to_device.wrapping_sub(before.to_device),
            from_device: self.from_device.wrapping_sub(before.from_device),
            copies: self.copies - before.copies,
            headers: self.headers - before.headers,
        }
    }
}

/// Gives back what the queues have at hand, for whatever size the next case needs. Returns how many bytes of the pool
/// stay in use, in slots.
pub fn trim() -> u64 {
    let in_use = |lane: &Lane| {
        let mut queue = lane.queue.wait().lock();
        queue.trim();
        queue.usage().taken
    };
    in_use(&DISK) + in_use(&NET)
}

/// The guest's memory is mapped to its own addresses, so this is where the host finds a buffer.
fn own_address(buffer: NonNull<[u8]>) -> PhysAddr {
    buffer.cast::<u8>().as_ptr().expose_provenance() as PhysAddr
}

/// A [`Hal`] that has payloads bounce or not, and counts.
pub struct GuestHal<D>(PhantomData<D>);

// SAFETY: with bounce buffers it passes on to a `Hal` that keeps the rules. Without, buffers are where the device finds
// them, and that it keeps off them after it has used them is what a guest without protection believes of its host.
unsafe impl<D: Device> Hal for GuestHal<D> {
    fn dma_alloc(pages: usize, direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        D::Bounce::dma_alloc(pages, direction)
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, vaddr: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: passed on from the caller.
        unsafe { D::Bounce::dma_dealloc(paddr, vaddr, pages) }
    }

    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, size: usize) -> NonNull<u8> {
        // SAFETY: passed on from the caller.
        unsafe { D::Bounce::mmio_phys_to_virt(paddr, size) }
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        if !BOUNCE.load(Relaxed) {
            return own_address(buffer);
        }
        if direction != BufferDirection::DeviceToDriver {
            D::LANE.count(&D::LANE.headers_to_device, buffer.len(), D::header(buffer.len()));
        }
        // SAFETY: passed on from the caller.
        unsafe { D::Bounce::share(buffer, direction) }
    }

    unsafe fn unshare(paddr: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        if !BOUNCE.load(Relaxed) {
            return;
        }
        if direction != BufferDirection::DriverToDevice && D::COPIES_ALL {
            D::LANE.count(&D::LANE.headers_from_device, buffer.len(), D::header(buffer.len()));
        }
        // SAFETY: passed on from the caller.
        unsafe { D::Bounce::unshare(paddr, buffer, direction) }
    }
}

impl FrameHal for GuestHal<NetDevice> {
    unsafe fn take(buffer: &mut [u8], len: usize) -> Result {
        if !BOUNCE.load(Relaxed) {
            return if len <= buffer.len() { Ok(()) } else { Err(virtio_drivers::Error::IoError) };
        }
        // SAFETY: passed on from the caller.
        unsafe { QueueFrames::<NetDevice>::take(buffer, len)? };
        NET.count(&NET.headers_from_device, len, HEADER_LEN);
        Ok(())
    }
}
