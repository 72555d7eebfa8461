//! Handles: what stands for a buffer, in eight bytes.

use core::fmt;

const OFFSET_BITS: u32 = 34;
const LEN_BITS: u32 = 18;
const LEN_SHIFT: u32 = 12;
const OFFSET_SHIFT: u32 = LEN_SHIFT + LEN_BITS;

/// How much memory handles can name: 16 GiB.
pub(super) const POOL_LIMIT: u64 = 1 << OFFSET_BITS;

/// From this length on the block knows it: only one such buffer is in a block.
pub(super) const LONG: usize = (1 << LEN_BITS) - 1;

/// How many queues handles can tell apart.
pub(super) const QUEUE_LIMIT: usize = 1 << QUEUE_BITS;
const QUEUE_BITS: u32 = 8;

/// The queue that a buffer was taken by, and four bits of its pool: the lower bits of a handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner(u64);

impl Owner {
    /// Of no handle.
    pub(super) const NOBODY: Self = Self(u64::MAX);

    pub(super) const fn new(pool: u8, queue: usize) -> Self {
        Self(((pool as u64) << QUEUE_BITS) | (queue as u64 % QUEUE_LIMIT as u64))
    }

    /// The queue's number, if it is one of this pool's.
    pub(super) fn queue_of(self, pool: u8) -> Option<usize> {
        let queue = self.0 as usize % QUEUE_LIMIT;
        (self == Self::new(pool, queue)).then_some(queue)
    }
}

/// Offset in the pool (34 bits, the upper ones, from which a block is one shift away), length (18), owner (12). Only the type
/// of a handle makes it one; it is in nobody's hands.
#[derive(PartialEq, Eq)]
pub(crate) struct Raw(u64);

impl Raw {
    #[inline]
    pub(crate) const fn new(offset: u64, len: usize, owner: Owner) -> Self {
        let len = if len < LONG { len } else { LONG };
        Self((offset << OFFSET_SHIFT) | ((len as u64) << LEN_SHIFT) | owner.0)
    }

    #[inline]
    pub(super) const fn offset(&self) -> u64 {
        self.0 >> OFFSET_SHIFT
    }

    /// The same handle, for whoever looks at it or has forgotten the first.
    #[inline]
    pub(super) const fn again(&self) -> Self {
        Self(self.0)
    }

    /// The length if it is below [`LONG`], and otherwise that.
    #[inline]
    pub(super) const fn short_len(&self) -> usize {
        (self.0 >> LEN_SHIFT) as usize & LONG
    }

    #[inline]
    pub(super) const fn owner(&self) -> Owner {
        Owner(self.0 % (1 << LEN_SHIFT))
    }
}

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.offset(), self.short_len())
    }
}

/// A buffer with data on its way to a device: eight bytes, which cannot be copied.
///
/// Give it back when the device is done, by [`Queue::release`](super::Queue::release) on the CPU that has the queue or
/// by [`Pool::release`](super::Pool::release) on another. Dropped, it leaks its slot.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a buffer that is dropped is lost to its pool"]
pub struct ToDevice(pub(super) Raw);

/// Room for data from a device: eight bytes, which cannot be copied.
///
/// When the device is done, it is used up by [`Queue::receive`](super::Queue::receive) or
/// [`Queue::lend`](super::Queue::lend), or given back unread as a [`ToDevice`] is. Dropped, it leaks its slot.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a buffer that is dropped is lost to its pool"]
pub struct FromDevice(pub(super) Raw);

/// A buffer of a pool: [`ToDevice`], [`FromDevice`] or [`Lent`](super::Lent).
pub trait Buffer: Sealed {}

/// Nobody else makes buffers.
pub trait Sealed {
    #[doc(hidden)]
    #[allow(private_interfaces, reason = "the trait is sealed")]
    fn raw(&self) -> Raw;
}

macro_rules! buffer {
    ($handle:ty) => {
        impl Buffer for $handle {}

        impl Sealed for $handle {
            #[inline]
            #[allow(private_interfaces, reason = "the trait is sealed")]
            fn raw(&self) -> Raw {
                self.0.again()
            }
        }
    };
}

buffer!(ToDevice);
buffer!(FromDevice);

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn handles_and_their_absence_fit_a_register_pair() {
        assert_eq!((size_of::<ToDevice>(), size_of::<FromDevice>()), (8, 8));
        assert_eq!(size_of::<Result<ToDevice, super::super::Refusal>>(), 16);
    }

    proptest! {
        #[test]
        fn a_handle_says_what_it_was_made_of(
            offset in 0..POOL_LIMIT, len in 0..2 * LONG, pool in 0u8..16, queue in 0..QUEUE_LIMIT,
        ) {
            let raw = Raw::new(offset, len, Owner::new(pool, queue));
            prop_assert_eq!((raw.offset(), raw.short_len()), (offset, len.min(LONG)));
            prop_assert_eq!(raw.owner().queue_of(pool), Some(queue));
            prop_assert_eq!(raw.owner().queue_of((pool + 1) % 16), None);
        }
    }
}
