//! The `Hal` of `virtio-drivers` on a bounce pool.

#![allow(unsafe_code, reason = "the trait is unsafe: its pointers go to drivers that keep their own rules")]

use crate::Queue;
use core::marker::PhantomData;
use core::ptr::NonNull;
use cvm_core::{Gpa, PAGE_SIZE};
use virtio_drivers::{BufferDirection, Hal, PhysAddr};

const PAGE: usize = PAGE_SIZE as usize;

/// Where a [`QueueHal`] finds its queue of a pool: a static of the guest's, since the functions of [`Hal`] have no `self`.
///
/// One for each device, behind a lock of the guest's choice: a driver of `virtio-drivers` is used by one CPU at a time,
/// so nobody ever waits for it. Only what ends a device's requests on another CPU than it begins them would, and takes
/// a [`Queue`] of its own rather than this.
///
/// Nothing here can wait for room, so size the pool for all that its drivers have in flight at once: for each virtqueue its
/// rings (up to three pages for 16 entries) and the payloads of as many requests as the driver keeps open, each rounded
/// up to a power of two of at least 256 bytes, and for each of these sizes up to 256 KiB more, and as much again as the
/// queue's window.
pub trait DeviceQueue {
    /// Has `work` done with the queue, always the same one.
    fn with<R>(work: impl FnOnce(&mut Queue<'static>) -> R) -> R;
}

/// A [`Hal`] that keeps rings in the pool and copies payloads through it.
///
/// Its functions cannot fail. When the pool is exhausted they return the address 0, which is a private page: allocation
/// of rings fails then, as for rings of more than 256 KiB, and of a payload the device can neither read nor write anything.
/// A device that is honest ends such a request with an error; from one that is not, the caller gets its own buffer back
/// unchanged, as if the device had chosen these bytes. [`QueueUse::exhausted`](crate::QueueUse::exhausted) counts.
///
/// `virtio-drivers` does not pass on how much the device says it has written, so the whole buffer is copied out. What an honest
/// device has not written is zero then, or what the caller had in a buffer for both directions: never the bytes of another
/// driver.
#[derive(Debug)]
pub struct QueueHal<Q>(PhantomData<Q>);

const EXHAUSTED: PhysAddr = 0;

fn device_writes(direction: BufferDirection) -> bool {
    matches!(direction, BufferDirection::DeviceToDriver | BufferDirection::Both)
}

fn driver_writes(direction: BufferDirection) -> bool {
    matches!(direction, BufferDirection::DriverToDevice | BufferDirection::Both)
}

// SAFETY: the pool hands out slots that do not overlap, aligned to pages where asked for, valid as long as the queue's
// pool lives; `dma_alloc` zeroes them. Only the driver has pointers into them, apart from the host, from whom no memory
// that is shared with it can be kept.
unsafe impl<Q: DeviceQueue> Hal for QueueHal<Q> {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let allocated = pages.checked_mul(PAGE).and_then(|len| Q::with(|queue| queue.allocate(len, PAGE)));
        allocated.map_or((EXHAUSTED, NonNull::dangling()), |(gpa, pointer)| (gpa.0, pointer))
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, _vaddr: NonNull<u8>, pages: usize) -> i32 {
        let freed = Q::with(|queue| queue.find(Gpa(paddr), pages * PAGE).map(|rings| queue.release(rings)));
        freed.map_or(-1, |()| 0)
    }

    unsafe fn mmio_phys_to_virt(_paddr: PhysAddr, _size: usize) -> NonNull<u8> {
        // Only the PCI transport asks, which a guest without MMIO cannot use.
        panic!("a protected guest has no mmio")
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        Q::with(|queue| {
            let gpa = if driver_writes(direction) {
                // SAFETY: the caller promises a valid buffer that nobody else accesses during the call.
                queue.bounce(unsafe { buffer.as_ref() })
            } else {
                queue.room_for(buffer.len())
            };
            gpa.map_or(EXHAUSTED, |gpa| gpa.0)
        })
    }

    unsafe fn unshare(paddr: PhysAddr, mut buffer: NonNull<[u8]>, direction: BufferDirection) {
        Q::with(|queue| {
            let Some(bounced) = queue.find(Gpa(paddr), buffer.len()) else { return };
            if device_writes(direction) {
                // Both have the same length, so nothing can be wrong with it.
                // SAFETY: the caller promises a valid buffer that nobody else accesses during the call.
                let _ = queue.receive(bounced, buffer.len(), unsafe { buffer.as_mut() });
            } else {
                queue.release(bounced);
            }
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::pool::tests::pool;
    use crate::{Pool, QueueOptions};
    use spin::{Mutex, Once};

    fn queue() -> &'static Mutex<Queue<'static>> {
        static QUEUE: Once<Mutex<Queue<'static>>> = Once::new();
        QUEUE.call_once(|| {
            let pool: &Pool = Box::leak(Box::new(pool(1, 1)));
            // One block: 64 pages.
            Mutex::new(pool.queue(QueueOptions { limit: 256 << 10, ..QueueOptions::default() }).unwrap())
        })
    }

    struct TestQueue;

    impl DeviceQueue for TestQueue {
        fn with<R>(work: impl FnOnce(&mut Queue<'static>) -> R) -> R {
            work(&mut queue().lock())
        }
    }

    type TestHal = QueueHal<TestQueue>;

    static DISK: Mutex<Option<Queue<'static>>> = Mutex::new(None);
    static NET: Mutex<Option<Queue<'static>>> = Mutex::new(None);

    struct Disk;

    impl DeviceQueue for Disk {
        fn with<R>(work: impl FnOnce(&mut Queue<'static>) -> R) -> R {
            work(DISK.lock().as_mut().unwrap())
        }
    }

    struct Net;

    impl DeviceQueue for Net {
        fn with<R>(work: impl FnOnce(&mut Queue<'static>) -> R) -> R {
            work(NET.lock().as_mut().unwrap())
        }
    }

    #[test]
    fn what_a_device_did_not_write_is_not_the_bytes_of_another_driver() {
        const COUNT: usize = 400;
        let pool: &Pool = Box::leak(Box::new(pool(1, 2)));
        *DISK.lock() = Some(pool.queue(QueueOptions::default()).unwrap());
        *NET.lock() = Some(pool.queue(QueueOptions::default()).unwrap());
        for len in [64, 4096, 256 << 10, 300_000] {
            // Another driver sends, and gives back what it has at hand.
            let mut frame = vec![b'S'; len];
            let buffer = NonNull::from(&mut frame[..]);
            let count = if len > 4096 { 1 } else { COUNT };
            for _ in 0..count {
                // SAFETY: the buffer is used by nobody else.
                unsafe {
                    let gpa = QueueHal::<Net>::share(buffer, BufferDirection::DriverToDevice);
                    assert_ne!(gpa, EXHAUSTED);
                    QueueHal::<Net>::unshare(gpa, buffer, BufferDirection::DriverToDevice);
                }
            }
            Net::with(|queue| queue.trim());
            for direction in [BufferDirection::DeviceToDriver, BufferDirection::Both] {
                for _ in 0..count {
                    let mut sector = vec![b'o'; len];
                    let buffer = NonNull::from(&mut sector[..]);
                    // SAFETY: as above.
                    unsafe {
                        let gpa = QueueHal::<Disk>::share(buffer, direction);
                        pool.write(pool.offset(Gpa(gpa)).unwrap(), b"device");
                        QueueHal::<Disk>::unshare(gpa, buffer, direction);
                    }
                    assert_eq!(&sector[..6], b"device");
                    let rest = if direction == BufferDirection::Both { b'o' } else { 0 };
                    assert!(sector[6..].iter().all(|byte| *byte == rest), "{len} bytes, {direction:?}");
                }
            }
            Disk::with(|queue| queue.trim());
        }
    }

    #[test]
    fn payloads_bounce_both_ways_and_an_exhausted_pool_yields_a_private_address() {
        let pool = queue().lock().pool();
        let mut payload = *b"payload";
        let offset = |gpa| pool.offset(Gpa(gpa)).unwrap();
        // SAFETY: the buffers live on this stack and are used by nobody else.
        unsafe {
            let buffer = NonNull::from(&mut payload[..]);
            let shared = TestHal::share(buffer, BufferDirection::Both);
            let mut seen = [0; 7];
            pool.read(offset(shared), &mut seen).unwrap();
            assert_eq!(&seen, b"payload");
            pool.write(offset(shared), b"changed");
            TestHal::unshare(shared, buffer, BufferDirection::DriverToDevice);
            assert_eq!(&payload, b"payload", "the device cannot change what it only reads");

            let buffer = NonNull::from(&mut payload[..]);
            let shared = TestHal::share(buffer, BufferDirection::DeviceToDriver);
            pool.write(offset(shared), b"changed");
            TestHal::unshare(shared, buffer, BufferDirection::DeviceToDriver);
            assert_eq!(&payload, b"changed");

            let (rings, pointer) = TestHal::dma_alloc(64, BufferDirection::Both);
            assert_eq!((rings % PAGE_SIZE, pointer.as_ptr().addr() % PAGE), (0, 0));
            assert_ne!(rings, EXHAUSTED);
            let buffer = NonNull::from(&mut payload[..]);
            assert_eq!(TestHal::share(buffer, BufferDirection::Both), EXHAUSTED);
            TestHal::unshare(EXHAUSTED, buffer, BufferDirection::Both);
            assert_eq!(TestHal::dma_alloc(1, BufferDirection::Both).0, EXHAUSTED);
            assert_eq!(TestHal::dma_dealloc(rings, pointer, 64), 0);
            assert_eq!(TestHal::dma_dealloc(EXHAUSTED, pointer, 1), -1);
            assert_eq!(TestHal::dma_alloc(65, BufferDirection::Both).0, EXHAUSTED);
        }
        let usage = queue().lock().usage();
        assert_eq!((usage.to_device, usage.from_device), (7, 7));
        assert_eq!((usage.taken, usage.ready), (256 << 10, 256 << 10), "{usage:?}");
    }
}
