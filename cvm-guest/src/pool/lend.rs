//! Reading a buffer where it is.

use super::handle::{Raw, Sealed};
use super::{Buffer, Pool, copy};
use crate::Error;
use core::mem::MaybeUninit;
use zerocopy::FromBytes;

/// What a device has written, lent to whoever consumes it: on any CPU, and without a copy of what is not looked at.
///
/// The host may change every byte at any time. So each can be read once, in order, into private memory: what was read is
/// the reader's own, and nothing that he decided by it can be changed behind his back. There are no references.
///
/// Dropped, it gives the buffer back by [`Pool::release`]; [`Queue::release`](super::Queue::release) is faster.
#[derive(Debug)]
pub struct Lent<'p> {
    pool: &'p Pool,
    raw: Raw,
    /// The first byte that is not read yet, or null if the bytes are in several blocks.
    from: *const u8,
    /// How many are not read yet, and where they end in the pool.
    left: usize,
    end: u64,
}

// SAFETY: the pointer leads to shared memory, which is only accessed by copies; a pool may be shared by threads.
unsafe impl Send for Lent<'_> {}
// SAFETY: as above.
unsafe impl Sync for Lent<'_> {}

impl<'p> Lent<'p> {
    #[inline]
    pub(super) fn new(pool: &'p Pool, raw: Raw, used: usize) -> Self {
        let offset = raw.offset();
        let from = pool.span(offset).filter(|(_, left)| used <= *left).map_or(core::ptr::null(), |(from, _)| from);
        Self { pool, raw, from, left: used, end: offset + used as u64 }
    }

    /// How many bytes can still be read.
    #[inline]
    pub fn remaining(&self) -> usize {
        self.left
    }

    #[inline]
    fn advance(&mut self, len: usize) -> Result<(), Error> {
        if len > self.left {
            return Err(self.too_short(len));
        }
        if !self.from.is_null() {
            // SAFETY: there are `left` bytes from there on in the block, as `new` saw.
            self.from = unsafe { self.from.add(len) };
        }
        self.left -= len;
        Ok(())
    }

    // Made out of the way, because a result that is an error in pieces has its values put together from pieces too.
    #[cold]
    #[inline(never)]
    fn too_short(&self, len: usize) -> Error {
        Error::OutOfBounds { offset: 0, len, limit: self.left }
    }

    /// Copies the next `len` bytes to `to`.
    ///
    /// # Safety
    /// `to` must be valid for writes of `len` bytes of private memory.
    #[inline]
    unsafe fn copy_to(&mut self, to: *mut u8, len: usize) -> Result<(), Error> {
        let (from, at) = (self.from, self.end - self.left as u64);
        self.advance(len)?;
        if !from.is_null() {
            // SAFETY: `advance` has compared the length with what is left behind the pointer, in a block that stays
            // where it is as long as this buffer is in it; the rest is the caller's promise.
            unsafe { copy(from, to, len) };
            return Ok(());
        }
        // SAFETY: passed on to the caller.
        unsafe { self.pool.read_run(at, to, len) }
    }

    /// Reads the next `data.len()` bytes.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`] if there are fewer; none is read then.
    #[inline]
    pub fn read(&mut self, data: &mut [u8]) -> Result<(), Error> {
        // SAFETY: it is as long, and the caller's own.
        unsafe { self.copy_to(data.as_mut_ptr(), data.len()) }
    }

    /// Reads a header, say: the next bytes, as a value of the caller's own.
    ///
    /// # Errors
    /// As for [`Lent::read`].
    #[inline]
    pub fn read_value<T: FromBytes>(&mut self) -> Result<T, Error> {
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: it is that long, and private.
        unsafe { self.copy_to(value.as_mut_ptr().cast(), size_of::<T>()) }?;
        // SAFETY: all of it was written, and any bytes are a `T`.
        Ok(unsafe { value.assume_init() })
    }

    /// Passes over the next `len` bytes.
    ///
    /// # Errors
    /// As for [`Lent::read`].
    #[inline]
    pub fn skip(&mut self, len: usize) -> Result<(), Error> {
        self.advance(len)
    }
}

impl Buffer for Lent<'_> {}

impl Sealed for Lent<'_> {
    #[inline]
    #[allow(private_interfaces, reason = "the trait is sealed")]
    fn raw(&self) -> Raw {
        self.raw.again()
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.pool.release_raw(&self.raw);
    }
}
