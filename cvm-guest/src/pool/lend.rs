//! Reading a buffer where it is.

use super::handle::{Raw, Sealed};
use super::{Buffer, Pool};
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
    /// What is not read yet: where in the pool, and how much.
    at: u64,
    left: usize,
}

impl<'p> Lent<'p> {
    pub(super) fn new(pool: &'p Pool, raw: Raw, used: usize) -> Self {
        let at = raw.offset();
        Self { pool, raw, at, left: used }
    }

    /// How many bytes can still be read.
    #[inline]
    pub fn remaining(&self) -> usize {
        self.left
    }

    #[inline]
    fn advance(&mut self, len: usize) -> Result<u64, Error> {
        let at = self.at;
        let left = self.left.checked_sub(len);
        self.left = left.ok_or(Error::OutOfBounds { offset: 0, len, limit: self.left })?;
        self.at += len as u64;
        Ok(at)
    }

    /// Reads the next `data.len()` bytes.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`] if there are fewer; none is read then.
    #[inline]
    pub fn read(&mut self, data: &mut [u8]) -> Result<(), Error> {
        let at = self.advance(data.len())?;
        if self.pool.read(at, data) { Ok(()) } else { Err(Error::ForeignBuffer) }
    }

    /// Reads a header, say: the next bytes, as a value of the caller's own.
    ///
    /// # Errors
    /// As for [`Lent::read`].
    #[inline]
    pub fn read_value<T: FromBytes>(&mut self) -> Result<T, Error> {
        let mut value = MaybeUninit::<T>::zeroed();
        // SAFETY: it is that long, and every byte of it is set. Only padding may lose its value, and it is not read.
        let bytes = unsafe { core::slice::from_raw_parts_mut(value.as_mut_ptr().cast::<u8>(), size_of::<T>()) };
        self.read(bytes)?;
        // SAFETY: any bytes are a `T`.
        Ok(unsafe { value.assume_init() })
    }

    /// Passes over the next `len` bytes.
    ///
    /// # Errors
    /// As for [`Lent::read`].
    pub fn skip(&mut self, len: usize) -> Result<(), Error> {
        self.advance(len).map(|_| ())
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
