//! Small packets that complete in the order in which they were sent.

use super::handle::Raw;
use super::{Pool, Queue, Refusal};
use crate::copy::copy;
use core::ptr::NonNull;
use cvm_core::Gpa;

/// Slots of one size in one buffer, which are used and released in turn: for the sending side of a device that
/// completes in order (`VIRTIO_F_IN_ORDER`, virtio 1.2, section 6), or whose driver reorders completions.
///
/// It has a buffer of its queue's pool as long as it lives, and gives it back by [`Pool::release`] when it is dropped: the
/// device must be done with all packets then.
#[derive(Debug)]
pub struct Ring<'p> {
    pool: &'p Pool,
    raw: Raw,
    base: NonNull<u8>,
    gpa: u64,
    /// A slot has `1 << shift` bytes.
    shift: u32,
    mask: u32,
    /// How many packets were sent and released since the beginning, modulo 2^32.
    sent: u32,
    released: u32,
    bytes: u64,
}

// SAFETY: the buffer behind `base` is this ring's, shared memory that is only accessed by copies; the rest is `Send`.
unsafe impl Send for Ring<'_> {}

/// A packet in a [`Ring`]: eight bytes, which cannot be copied.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a packet that is dropped holds up its ring for good"]
pub struct Sent {
    number: u32,
    len: u32,
}

impl<'p> Ring<'p> {
    /// A ring of `slots` packets of up to `slot_len` bytes. Both are rounded up to a power of two, a slot to at least 64
    /// bytes; together they can have 256 KiB.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn new(queue: &mut Queue<'p>, slots: usize, slot_len: usize) -> Result<Self, Refusal> {
        let power = |number: usize, least: usize| number.max(least).checked_next_power_of_two();
        let (Some(slots), Some(slot_len)) = (power(slots, 1), power(slot_len, 64)) else {
            return Err(Refusal::Impossible);
        };
        let len = slots.checked_mul(slot_len).filter(|len| *len <= super::BLOCK_LEN).ok_or(Refusal::Impossible)?;
        let (pool, buffer) = (queue.pool(), queue.from_device(len)?);
        let gpa = pool.gpa(&buffer).0;
        let span = pool.span(buffer.0.offset()).and_then(|(base, _)| NonNull::new(base));
        let Some(base) = span else {
            queue.release(buffer);
            return Err(Refusal::Impossible);
        };
        let (shift, mask) = (slot_len.ilog2(), slots as u32 - 1);
        Ok(Self { pool, raw: buffer.0, base, gpa, shift, mask, sent: 0, released: 0, bytes: 0 })
    }

    #[inline]
    fn offset(&self, number: u32) -> usize {
        ((number & self.mask) << self.shift) as usize
    }

    /// Copies a packet into the next slot.
    ///
    /// # Errors
    /// [`Refusal::Exhausted`] while all slots are in flight, [`Refusal::Impossible`] for a packet that is too long.
    #[inline]
    pub fn send(&mut self, packet: &[u8]) -> Result<Sent, Refusal> {
        if packet.len() > 1 << self.shift {
            return Err(Refusal::Impossible);
        }
        if self.in_flight() > self.mask {
            return Err(Refusal::Exhausted);
        }
        let sent = Sent { number: self.sent, len: packet.len() as u32 };
        // SAFETY: the slot is in the buffer, which is the ring's as long as it lives, and has as many bytes.
        unsafe { copy(packet.as_ptr(), self.base.as_ptr().add(self.offset(self.sent)), packet.len()) };
        self.sent = self.sent.wrapping_add(1);
        self.bytes += packet.len() as u64;
        Ok(sent)
    }

    /// Where the device finds a packet, and its length.
    #[inline]
    pub fn segment(&self, sent: &Sent) -> (Gpa, u32) {
        (Gpa(self.gpa + self.offset(sent.number) as u64), sent.len)
    }

    /// Gives the slot of the oldest packet back: the device must be done with it.
    ///
    /// # Errors
    /// A packet that is not the oldest one is returned.
    #[inline]
    pub fn release(&mut self, sent: Sent) -> Result<(), Sent> {
        if sent.number != self.released || self.in_flight() == 0 {
            return Err(sent);
        }
        self.released = self.released.wrapping_add(1);
        Ok(())
    }

    /// How many packets are sent and not released.
    #[inline]
    pub fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.released)
    }

    /// How many bytes were copied into it.
    pub fn copied(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Ring<'_> {
    fn drop(&mut self) {
        self.pool.release_raw(&self.raw);
    }
}
