//! What one device queue has of a pool.

mod supply;

use super::block::{Block, CLASSES, MIN_SHIFT, class_of};
use super::handle::{LONG, Owner, QUEUE_LIMIT, Raw};
use super::record::{QueueRecord, Windows, waiting};
use super::{Buffer, FromDevice, Lent, Pool, QueueUse, Refusal, ToDevice};
use crate::Error;
use core::sync::atomic::Ordering::Relaxed;

/// How much a queue may have, and how much of it stays at hand.
#[derive(Debug, Clone, Copy)]
pub struct QueueOptions {
    /// The most that the queue may have of the pool at once, in bytes of slots: in buffers and at hand.
    pub limit: u64,
    /// The most free slots of each size at hand, in bytes; at least two slots and at most 256. Slots are used again in
    /// the order in which they came back. So a larger window keeps the host's writes to one buffer further from its next
    /// use, and a smaller one stays in the processor's cache.
    pub window: usize,
}

impl Default for QueueOptions {
    /// No limit, and 512 KiB at hand: a quarter of a core's second-level cache where that was measured.
    fn default() -> Self {
        Self { limit: u64::MAX, window: 512 << 10 }
    }
}

/// Where in a slot a buffer begins.
#[derive(Debug, Clone, Copy)]
pub struct Placement {
    /// The bits of an address that are given, a power of two less one.
    mask: usize,
    low: usize,
}

impl Placement {
    /// Anywhere: at a multiple of the slot's size.
    pub const ANY: Self = Self { mask: 0, low: 0 };

    /// At a multiple of `align`, rounded up to a power of two; 256 KiB is the most that can be.
    pub const fn aligned(align: usize) -> Self {
        Self::offset(align.saturating_sub(1), 0)
    }

    /// At an address with the same low bits as `address`, as far as `mask` has them. NVMe needs that with the mask 4095.
    /// The slot is larger than the mask, whose bits below the highest one all count.
    pub const fn offset(mask: usize, address: usize) -> Self {
        let mask = if mask == 0 { 0 } else { usize::MAX >> mask.leading_zeros() };
        Self { mask, low: address & mask }
    }
}

/// The buffers of one device queue. Whoever drives the queue owns it; what `&mut self` does is for one CPU at a time.
#[derive(Debug)]
pub struct Queue<'p> {
    pool: &'p Pool,
    record: &'p QueueRecord,
    windows: &'p mut Windows,
    owner: Owner,
    /// Whose buffers a release just keeps: the queue's own, or nobody's while there is more to do.
    keeps: Owner,
    random: Option<fn() -> u64>,
    limit: u64,
    usage: QueueUse,
}

impl Pool {
    /// A queue of this pool.
    ///
    /// A number that a queue had before goes with what it had in flight when it was dropped: that counts for the new
    /// one until it is released.
    ///
    /// # Errors
    /// [`Error::NoQueue`] if every record is in use.
    pub fn queue(&self, options: QueueOptions) -> Result<Queue<'_>, Error> {
        let mut records = self.queues.iter().take(QUEUE_LIMIT).enumerate();
        let claimed = records.find_map(|(number, record)| Some((number, record, record.claim()?)));
        let (number, record, (windows, taken)) = claimed.ok_or(Error::NoQueue)?;
        windows.set_most(options.window);
        let owner = Owner::new(self.tag(), number);
        Ok(Queue {
            pool: self,
            record,
            windows,
            owner,
            keeps: self.keeps(owner),
            random: self.options.random,
            limit: options.limit,
            usage: QueueUse { taken, high_water: taken, ..QueueUse::default() },
        })
    }
}

impl<'p> Queue<'p> {
    /// The pool.
    pub fn pool(&self) -> &'p Pool {
        self.pool
    }

    /// What it has done and has.
    pub fn usage(&self) -> QueueUse {
        QueueUse { ready: self.windows.bytes(), ..self.usage }
    }

    #[cfg(feature = "virtio")]
    pub(super) fn owner(&self) -> Owner {
        self.owner
    }

    // Part of the few functions that use it, rather than called by them: what it returns stays in registers.
    #[inline(always)]
    fn map(&mut self, len: usize, placement: Placement) -> Result<Raw, Refusal> {
        let Placement { mask, low } = placement;
        let class = class_of(low.saturating_add(len).max(mask.saturating_add(1)));
        if self.random.is_none()
            && len < LONG
            && let Some(mut window) = self.windows.get(class)
            && !window.is_empty()
        {
            self.usage.maps += 1;
            return Ok(Raw::new((u64::from(window.pop()) << MIN_SHIFT) | low as u64, len, self.owner));
        }
        self.map_slowly(class, len, placement)
    }

    #[cold]
    #[inline(never)]
    fn map_slowly(&mut self, class: usize, len: usize, placement: Placement) -> Result<Raw, Refusal> {
        if self.windows.get(class).is_some_and(|window| window.is_empty()) {
            self.refill(class)?;
        }
        if let Some(random) = self.random {
            self.windows.shuffle(class, random);
        }
        let Some(mut window) = self.windows.get(class) else { return self.map_run(len, placement) };
        let offset = (u64::from(window.pop()) << MIN_SHIFT) | placement.low as u64;
        self.usage.maps += 1;
        if len >= LONG {
            self.pool.block_at(offset).inspect(|block| block.set_long(len));
        }
        Ok(Raw::new(offset, len, self.owner))
    }

    /// A buffer with a copy of `data`, for a device to read.
    ///
    /// # Errors
    /// [`Refusal`], as from all that make buffers.
    #[inline]
    pub fn to_device(&mut self, data: &[u8]) -> Result<ToDevice, Refusal> {
        self.to_device_at(data, Placement::ANY)
    }

    /// The same, placed as the device needs it.
    #[inline]
    pub fn to_device_at(&mut self, data: &[u8], placement: Placement) -> Result<ToDevice, Refusal> {
        let raw = self.map(data.len(), placement)?;
        self.pool.write(raw.offset(), data);
        self.usage.to_device += data.len() as u64;
        Ok(ToDevice(raw))
    }

    /// A buffer with all of `parts`, one behind the other: a scatter list becomes one descriptor.
    #[inline]
    pub fn gather(&mut self, parts: &[&[u8]]) -> Result<ToDevice, Refusal> {
        let len = parts.iter().fold(0usize, |len, part| len.saturating_add(part.len()));
        let raw = self.map(len, Placement::ANY)?;
        self.pool.write_all(raw.offset(), parts, len);
        self.usage.to_device += len as u64;
        Ok(ToDevice(raw))
    }

    /// A buffer of `len` bytes for a device to write. What the guest has is not copied into it, and what was in its slot
    /// before stays there: it may be bytes of another queue, which the host has seen. So copy out only what the device says
    /// that it has written.
    #[inline]
    pub fn from_device(&mut self, len: usize) -> Result<FromDevice, Refusal> {
        self.from_device_at(len, Placement::ANY)
    }

    /// The same, placed as the device needs it.
    #[inline]
    pub fn from_device_at(&mut self, len: usize, placement: Placement) -> Result<FromDevice, Refusal> {
        self.map(len, placement).map(FromDevice)
    }

    /// Copies out the `used` bytes that the device says it has written, and gives the buffer back.
    ///
    /// Read that number from shared memory once, and pass on what was read: it is compared with the buffer here.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`] if the buffer or `data` has less, [`Error::ForeignBuffer`]. The buffer is given back all
    /// the same, and nothing is copied.
    #[inline]
    pub fn receive(&mut self, buffer: FromDevice, used: usize, data: &mut [u8]) -> Result<(), Error> {
        let copied = self.copy_out(&buffer.0, used, data);
        self.release(buffer);
        copied?;
        self.usage.from_device += used as u64;
        Ok(())
    }

    /// Lends the `used` bytes that the device says it has written to a consumer, who reads them where they are.
    ///
    /// # Errors
    /// As for [`Queue::receive`]; the buffer is given back then.
    #[inline]
    pub fn lend(&mut self, buffer: FromDevice, used: usize) -> Result<Lent<'p>, Error> {
        if let Err(error) = self.check_used(&buffer.0, used) {
            self.release(buffer);
            return Err(error);
        }
        self.usage.lent += used as u64;
        Ok(Lent::new(self.pool, buffer.0, used))
    }

    /// Whether a buffer is this pool's and has as many bytes.
    #[inline]
    fn check_used(&self, raw: &Raw, used: usize) -> Result<(), Error> {
        // What is too long for its handle to say has at least as much as that says.
        if raw.owner() == self.owner && used <= raw.short_len() {
            return Ok(());
        }
        self.pool.check_used(raw, used)
    }

    #[inline]
    fn copy_out(&self, raw: &Raw, used: usize, data: &mut [u8]) -> Result<(), Error> {
        self.check_used(raw, used)?;
        let limit = data.len();
        let data = data.get_mut(..used).ok_or(Error::OutOfBounds { offset: 0, len: used, limit })?;
        self.pool.read(raw.offset(), data)
    }

    /// Gives a buffer back: the device must be done with it.
    ///
    /// It stays at hand, if it is this queue's and there is room for it.
    #[inline]
    pub fn release<B: Buffer>(&mut self, buffer: B) {
        let raw = buffer.raw();
        core::mem::forget(buffer);
        let class = self.pool.block_at(raw.offset()).map_or(CLASSES, Block::class);
        if raw.owner() == self.keeps
            && let Some(mut window) = self.windows.get(class)
            && !window.is_full()
            && self.pool.waiters.0.load(Relaxed) == 0
        {
            window.push(slot_of(&raw, class));
        } else {
            self.release_slowly(raw, class);
        }
    }

    #[cold]
    #[inline(never)]
    fn release_slowly(&mut self, raw: Raw, class: usize) {
        if raw.owner() != self.owner {
            return self.pool.release_raw(&raw);
        }
        if self.pool.options.zero_on_release {
            self.pool.scrub(&raw);
        }
        if let Some(window) = self.windows.get(class) {
            if window.is_full() {
                let keep = window.half();
                self.spill(class, keep);
            }
            self.windows.get(class).into_iter().for_each(|mut window| window.push(slot_of(&raw, class)));
        } else if let Some(bytes) = self.pool.give(raw.offset()) {
            self.note_given(bytes);
            self.pool.wake();
        } else {
            self.pool.stray();
        }
        if self.pool.waiters.0.load(Relaxed) != 0 {
            self.trim();
        }
        // Should this queue itself wait, there is something for it now.
        self.record.wake(&self.pool.waiters.0);
        self.keeps = self.pool.keeps(self.owner);
    }
}

/// The slot of a class that a buffer is in, in units of 256 bytes.
#[inline]
fn slot_of(raw: &Raw, class: usize) -> u32 {
    ((raw.offset() >> MIN_SHIFT) as u32) >> class << class
}

impl Drop for Queue<'_> {
    /// Gives back what is at hand. Buffers in flight can still be released, through the pool.
    fn drop(&mut self) {
        self.record.set_waiting(waiting::NOTHING, &self.pool.waiters.0);
        self.trim();
        self.hear();
        // SAFETY: this queue has claimed it, and ends here.
        unsafe { self.record.unclaim(self.usage.taken) };
    }
}

impl Pool {
    /// Whose buffers a queue just keeps when they are released.
    fn keeps(&self, owner: Owner) -> Owner {
        if self.options.zero_on_release { Owner::NOBODY } else { owner }
    }

    #[cold]
    #[inline(never)]
    fn check_used(&self, raw: &Raw, used: usize) -> Result<(), Error> {
        let limit = self.len_of(raw);
        if raw.owner().queue_of(self.tag()).is_none() {
            return Err(Error::ForeignBuffer);
        }
        if used > limit { Err(Error::OutOfBounds { offset: 0, len: used, limit }) } else { Ok(()) }
    }
}
