//! The `Hal` of `virtio-drivers` on a bounce pool.

#![allow(unsafe_code, reason = "the trait is unsafe: its pointers go to drivers that keep their own rules")]

use crate::Pool;
use core::marker::PhantomData;
use core::ptr::NonNull;
use cvm_core::{Gpa, PAGE_SIZE};
use virtio_drivers::{BufferDirection, Hal, PhysAddr};

const PAGE: usize = PAGE_SIZE as usize;

/// Where a [`PoolHal`] finds its pool: a static of the guest's, since the functions of [`Hal`] have no `self`.
///
/// Size it for the sum of what its drivers have in flight at once: for each queue, its rings (up to three pages for 16
/// entries) and the payloads of as many requests as the driver keeps open, each rounded up to
/// [`GRANULE`](crate::GRANULE).
pub trait StaticPool {
    /// The pool, always the same one.
    fn pool() -> &'static Pool;
}

/// A [`Hal`] that keeps rings in the pool and copies payloads through it.
///
/// Its functions cannot fail. When the pool is exhausted they return the address 0, which is a private page: allocation
/// of rings fails then, and of a payload the device can neither read nor write anything. A device that is honest ends
/// such a request with an error; from one that is not, the caller gets its own buffer back unchanged, as if the device
/// had chosen these bytes.
#[derive(Debug)]
pub struct PoolHal<P>(PhantomData<P>);

const EXHAUSTED: PhysAddr = 0;

fn device_writes(direction: BufferDirection) -> bool {
    matches!(direction, BufferDirection::DeviceToDriver | BufferDirection::Both)
}

fn driver_writes(direction: BufferDirection) -> bool {
    matches!(direction, BufferDirection::DriverToDevice | BufferDirection::Both)
}

// SAFETY: the pool hands out runs that do not overlap, aligned as asked for, valid as long as the static pool lives;
// `dma_alloc` zeroes them. Only the driver has pointers into them, apart from the host, from whom no memory that is
// shared with it can be kept.
unsafe impl<P: StaticPool> Hal for PoolHal<P> {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let pool = P::pool();
        let allocated = pages.checked_mul(PAGE).and_then(|len| {
            let offset = pool.allocate(len, PAGE).ok()?;
            pool.region().zero(offset, len).ok()?;
            Some((pool.region().gpa(offset).0, pool.pointer(offset)))
        });
        allocated.unwrap_or((EXHAUSTED, NonNull::dangling()))
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, _vaddr: NonNull<u8>, pages: usize) -> i32 {
        let pool = P::pool();
        match pool.offset(Gpa(paddr)) {
            Some(offset) => {
                pool.release(offset, pages * PAGE);
                0
            }
            None => -1,
        }
    }

    unsafe fn mmio_phys_to_virt(_paddr: PhysAddr, _size: usize) -> NonNull<u8> {
        // Only the PCI transport asks, which a guest without MMIO cannot use.
        panic!("a protected guest has no mmio")
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        let pool = P::pool();
        let Ok(offset) = pool.allocate(buffer.len(), 1) else { return EXHAUSTED };
        if driver_writes(direction) {
            // SAFETY: the caller promises a valid buffer that nobody else accesses during the call.
            let data = unsafe { buffer.as_ref() };
            if pool.region().write(offset, data).is_err() {
                pool.release(offset, buffer.len());
                return EXHAUSTED;
            }
        }
        pool.region().gpa(offset).0
    }

    unsafe fn unshare(paddr: PhysAddr, mut buffer: NonNull<[u8]>, direction: BufferDirection) {
        let pool = P::pool();
        let Some(offset) = pool.offset(Gpa(paddr)) else { return };
        if device_writes(direction) {
            // SAFETY: the caller promises a valid buffer that nobody else accesses during the call.
            let data = unsafe { buffer.as_mut() };
            // The run is as long as the buffer that it was allocated for.
            let _ = pool.region().read(offset, data);
        }
        pool.release(offset, buffer.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::tests::region;
    use spin::Once;

    struct TestPool;

    impl StaticPool for TestPool {
        fn pool() -> &'static Pool {
            static POOL: Once<Pool> = Once::new();
            POOL.call_once(|| Pool::new(region(4), vec![0; 1].leak()).unwrap())
        }
    }

    type TestHal = PoolHal<TestPool>;

    #[test]
    fn payloads_bounce_both_ways_and_an_exhausted_pool_yields_a_private_address() {
        let pool = TestPool::pool();
        let mut payload = *b"payload";
        // SAFETY: the buffers live on this stack and are used by nobody else.
        unsafe {
            let buffer = NonNull::from(&mut payload[..]);
            let shared = TestHal::share(buffer, BufferDirection::Both);
            let offset = pool.offset(Gpa(shared)).unwrap();
            let mut seen = [0; 7];
            pool.region().read(offset, &mut seen).unwrap();
            assert_eq!(&seen, b"payload");
            pool.region().write(offset, b"changed").unwrap();
            TestHal::unshare(shared, buffer, BufferDirection::DriverToDevice);
            assert_eq!(&payload, b"payload", "the device cannot change what it only reads");

            let buffer = NonNull::from(&mut payload[..]);
            let shared = TestHal::share(buffer, BufferDirection::DeviceToDriver);
            pool.region().write(pool.offset(Gpa(shared)).unwrap(), b"changed").unwrap();
            TestHal::unshare(shared, buffer, BufferDirection::DeviceToDriver);
            assert_eq!(&payload, b"changed");

            let (rings, pointer) = TestHal::dma_alloc(4, BufferDirection::Both);
            assert_ne!(rings, EXHAUSTED);
            let buffer = NonNull::from(&mut payload[..]);
            assert_eq!(TestHal::share(buffer, BufferDirection::Both), EXHAUSTED);
            TestHal::unshare(EXHAUSTED, buffer, BufferDirection::Both);
            assert_eq!(TestHal::dma_alloc(1, BufferDirection::Both).0, EXHAUSTED);
            assert_eq!(TestHal::dma_dealloc(rings, pointer, 4), 0);
        }
        assert_eq!(pool.free(), pool.region().len());
    }
}
