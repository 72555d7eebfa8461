//! Bounce buffers.
//!
//! Memory that is shared with the host once and kept, in chunks of 2 MiB, and bookkeeping that is private. A device
//! queue owns a [`Queue`], which keeps some free slots at hand and so maps and releases without a lock or an atomic
//! read-modify-write; it gets slots from the [`Pool`] and gives them back many at a time. The pool is lock-free.
//!
//! ```text
//!  Queue   window of free slots for each size, FIFO      one owner, on every I/O
//!    |  refills and spills in batches
//!  Pool    blocks of 256 KiB, each cut into slots of one size (256 B to 256 KiB), or in a run of blocks
//!    |  grows and shrinks
//!  Host    chunks of 2 MiB that were converted to shared
//! ```
//!
//! Sending copies once, into the slot; a scatter list is gathered into one. Receiving copies nothing in, and out only
//! what the device says it wrote, after that number was compared with the buffer; or nothing at all, when the consumer
//! reads the slot itself through a [`Lent`]. Small packets that complete in order go fastest by a [`Ring`].
//!
//! What the host writes into a chunk is data, whatever it is: no number that the pool relies on is there.

#![allow(unsafe_code, reason = "shared memory is accessed by pointer")]

mod block;
#[cfg(feature = "virtio")]
mod by_address;
mod chunk;
mod handle;
mod lend;
mod queue;
mod record;
mod ring;
mod run;
mod summary;
#[cfg(all(test, not(loom)))]
pub(crate) mod tests;
mod usage;

pub use block::CLASSES;
pub use chunk::{CHUNK_LEN, ChunkRecord};
pub use handle::{Buffer, FromDevice, ToDevice};
pub use lend::Lent;
pub use queue::{Placement, Queue, QueueOptions};
pub use record::QueueRecord;
pub use ring::{Ring, Sent};
pub use usage::{ClassUse, PoolUse, QueueUse};

use crate::Error;
use crate::copy::{copy, zero};
use block::{BLOCK_LEN, BLOCK_SHIFT, Block, MIN_SHIFT, RUN, slot_len};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use cvm_core::Gpa;
use handle::Raw;

/// Why there is no buffer. All but the last may be otherwise later: see [`Queue::poll_room`].
///
/// As wide as a handle, because a result of both is then returned in registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[repr(u64)]
pub enum Refusal {
    /// Nothing that is long enough is free.
    #[error("the pool is exhausted")]
    Exhausted,
    /// The queue has as much as it may have.
    #[error("the queue has reached its limit")]
    Limited,
    /// No buffer of this length or placement can be, by the rules of the pool or this queue's limit.
    #[error("no buffer can be like that")]
    Impossible,
}

/// What a pool does beyond handing out memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct PoolOptions {
    /// Make a buffer's bytes zero when it is given back: for pools in which contents must not pass from one tenant's
    /// device to another's.
    pub zero_on_release: bool,
    /// Random numbers, for slots that a device cannot foretell: RDRAND in a guest. A slot is still not used again
    /// before half of its window was.
    pub random: Option<fn() -> u64>,
}

/// Shared memory for the buffers of devices.
///
/// Made of records that the guest keeps in statics, so it needs no allocator:
///
/// ```
/// use cvm_guest::{ChunkRecord, Pool, PoolOptions, QueueOptions, QueueRecord};
///
/// static CHUNKS: [ChunkRecord; 32] = [const { ChunkRecord::new() }; _]; // up to 64 MiB
/// static QUEUES: [QueueRecord; 4] = [const { QueueRecord::new() }; _];
/// static POOL: Pool = Pool::new(&CHUNKS, &QUEUES, PoolOptions { zero_on_release: false, random: None });
///
/// // ... `unsafe { POOL.grow(&platform, range) }` as often as there shall be 2 MiB more, and for each device queue:
/// let queue = POOL.queue(QueueOptions::default()).unwrap();
/// # assert_eq!(queue.usage().taken, 0);
/// ```
#[derive(Debug)]
pub struct Pool {
    blocks: &'static [Block],
    queues: &'static [QueueRecord],
    options: PoolOptions,
    /// How many queues wait for others to give something back. Every release looks here, so it changes seldom.
    waiters: Line<AtomicU32>,
    shelf: Line<Shelf>,
}

/// What changes with refills and spills.
#[derive(Debug)]
struct Shelf {
    /// How many bytes of slots and runs queues have, and the most that they had. What was released from another CPU
    /// counts until its queue's next refill.
    taken: AtomicU64,
    high_water: AtomicU64,
    /// How often something was refused because nothing was free.
    exhausted: AtomicU64,
    /// How many buffers were given back that were not taken, or belong to another pool.
    strays: AtomicU64,
}

#[derive(Debug)]
#[repr(align(128))]
struct Line<T>(T);

impl Pool {
    /// A pool without memory, for as many chunks as there are records (8192 at most count) and as many queues (256).
    pub const fn new(chunks: &'static [ChunkRecord], queues: &'static [QueueRecord], options: PoolOptions) -> Self {
        let shelf = Shelf {
            taken: AtomicU64::new(0),
            high_water: AtomicU64::new(0),
            exhausted: AtomicU64::new(0),
            strays: AtomicU64::new(0),
        };
        // What follows no handle leads to.
        let most = handle::POOL_LIMIT as usize / CHUNK_LEN;
        let chunks = if chunks.len() > most { chunks.split_at(most).0 } else { chunks };
        let blocks = ChunkRecord::blocks(chunks);
        Self { blocks, queues, options, waiters: Line(AtomicU32::new(0)), shelf: Line(shelf) }
    }

    /// Four bits by which handles of different pools are mostly told apart: from where the records are.
    fn tag(&self) -> u8 {
        (self.blocks.as_ptr().addr() / size_of::<ChunkRecord>() % 16) as u8
    }

    #[inline]
    fn block(&self, index: usize) -> Option<&'static Block> {
        self.blocks.get(index)
    }

    /// The block that a handle leads to.
    #[inline]
    fn block_at(&self, offset: u64) -> Option<&'static Block> {
        self.block((offset >> BLOCK_SHIFT) as usize)
    }

    /// How many blocks there may be.
    fn extent(&self) -> usize {
        self.blocks.len()
    }

    /// Takes up to `want` slots of `class`, of at most `limit` bytes, and passes on where they begin, in units of 256
    /// bytes; returns how many, and of which class.
    ///
    /// From the block `prefer` if it has some, then from one that is cut like this, then from one that is free, and else
    /// one larger slot: its block says what it is, so it is given back as what it is.
    fn take(
        &self,
        (class, want): (usize, u32),
        limit: u64,
        prefer: &mut u32,
        start: u32,
        mut found: impl FnMut(u32),
    ) -> (u32, usize) {
        let want = u64::from(want).min(limit >> MIN_SHIFT >> class) as u32;
        if want == 0 {
            return (0, class);
        }
        let reserve = |index: usize, class, want| {
            let count = self.block(index).map_or(0, |block| block.reserve(class, want));
            (count > 0).then_some((index, count))
        };
        let mut collect = |index: usize, class: usize, count: u32| {
            if let Some(block) = self.block(index) {
                let first = (index as u32) << (BLOCK_SHIFT - MIN_SHIFT);
                block.collect(class, count, start, |slot| found(first + (slot << class)));
            }
            (count, class)
        };
        let near = *prefer as usize;
        let some = reserve(near, class, want).or_else(|| self.seek(class, near, |index| reserve(index, class, want)));
        if let Some((index, count)) = some {
            *prefer = index as u32;
            return collect(index, class, count);
        }
        let empty = |index| self.block(index).filter(|block| block.claim()).map(|block| (index, block));
        if let Some((index, block)) = self.seek(summary::EMPTY, near, empty) {
            *prefer = index as u32;
            let count = block.open(class, want);
            self.announce(index, class);
            return collect(index, class, count);
        }
        for larger in (class + 1..CLASSES).take_while(|larger| slot_len(*larger) as u64 <= limit) {
            if let Some((index, count)) = self.seek(larger, near, |index| reserve(index, larger, 1)) {
                return collect(index, larger, count);
            }
        }
        (0, class)
    }

    fn seek<R>(&self, what: usize, near: usize, attempt: impl FnMut(usize) -> Option<R>) -> Option<R> {
        summary::seek(self.blocks, what, near, attempt, || self.wake())
    }

    fn announce(&self, index: usize, what: usize) {
        summary::announce(self.blocks, index, what);
    }

    /// Lets go of a block that was claimed or is further back in a run.
    fn unclaim(&self, index: usize) {
        if let Some(block) = self.block(index) {
            block.unclaim();
            self.announce(index, summary::EMPTY);
        }
    }

    /// Gives back slots of a block, as bits of a word; returns how many of them were taken.
    fn give_slots(&self, index: usize, class: usize, word: u32, slots: u64) -> u32 {
        let Some(block) = self.block(index) else { return 0 };
        let count = block.give(word, slots);
        self.announce(index, class);
        if block.has(summary::EMPTY) {
            self.announce(index, summary::EMPTY);
        }
        count
    }

    /// Gives back the slot or run that `offset` lies in; returns how many bytes that were.
    fn give(&self, offset: u64) -> Option<u64> {
        let block = self.block_at(offset)?;
        let class = block.class();
        if class < CLASSES {
            let slot = (offset as usize % BLOCK_LEN / slot_len(class)) as u32;
            let index = (offset >> BLOCK_SHIFT) as usize;
            let was_taken = self.give_slots(index, class, slot / 64, 1 << (slot % 64)) == 1;
            was_taken.then_some(slot_len(class) as u64)
        } else if class == RUN {
            self.give_run((offset >> BLOCK_SHIFT) as usize)
        } else {
            None
        }
    }

    fn stray(&self) {
        self.shelf.0.strays.fetch_add(1, Relaxed);
    }

    fn note_exhausted(&self) {
        self.shelf.0.exhausted.fetch_add(1, Relaxed);
    }

    fn note_taken(&self, bytes: u64) {
        let taken = self.shelf.0.taken.fetch_add(bytes, Relaxed) + bytes;
        if taken > self.shelf.0.high_water.load(Relaxed) {
            self.shelf.0.high_water.fetch_max(taken, Relaxed);
        }
    }

    fn note_given(&self, bytes: u64) {
        self.shelf.0.taken.fetch_sub(bytes, Relaxed);
    }

    /// Gives a buffer back from any CPU. Its queue's owner does so faster by [`Queue::release`].
    ///
    /// One of another pool is refused, leaked and counted in [`PoolUse::strays`]; four bits and the state of the slot
    /// tell, so that a mix-up shows in any test but is not excluded.
    pub fn release<B: Buffer>(&self, buffer: B) {
        let raw = buffer.raw();
        core::mem::forget(buffer);
        self.release_raw(&raw);
    }

    fn release_raw(&self, raw: &Raw) {
        let record = raw.owner().queue_of(self.tag()).and_then(|queue| self.queues.get(queue));
        let Some(record) = record else { return self.stray() };
        if self.options.zero_on_release {
            self.scrub(raw);
        }
        match self.give(raw.offset()) {
            Some(bytes) => record.credit(bytes, &self.waiters.0),
            None => self.stray(),
        }
        self.wake();
    }

    /// Wakes whoever waits for what others give back.
    #[inline]
    fn wake(&self) {
        // In one order with the changes of the blocks before: either this sees who waits, or he sees what is free.
        if self.waiters.0.load(SeqCst) != 0 {
            self.wake_all();
        }
    }

    #[cold]
    fn wake_all(&self) {
        self.queues.iter().for_each(|record| record.wake_for_pool(&self.waiters.0));
    }

    /// Where a device finds a buffer; 0, which is no buffer's address, for one of another pool.
    #[inline]
    pub fn gpa<B: Buffer>(&self, buffer: &B) -> Gpa {
        self.gpa_of(&buffer.raw())
    }

    #[inline]
    fn gpa_of(&self, raw: &Raw) -> Gpa {
        let offset = raw.offset();
        Gpa(self.block_at(offset).map_or(0, |block| block.gpa() + offset % BLOCK_LEN as u64))
    }

    /// How many bytes a buffer has, as they were asked for.
    #[inline]
    pub fn len<B: Buffer>(&self, buffer: &B) -> usize {
        self.len_of(&buffer.raw())
    }

    #[inline]
    fn len_of(&self, raw: &Raw) -> usize {
        match raw.short_len() {
            handle::LONG => self.block_at(raw.offset()).map_or(0, Block::long),
            len => len,
        }
    }

    /// A pointer to the byte at `offset`, and how many there are from there to the end of its block.
    #[inline]
    fn span(&self, offset: u64) -> Option<(*mut u8, usize)> {
        let base = self.block_at(offset)?.base();
        let at = offset as usize % BLOCK_LEN;
        // SAFETY: a block with a pointer has `BLOCK_LEN` bytes there, as it was added with them.
        (!base.is_null()).then(|| (unsafe { base.add(at) }, BLOCK_LEN - at))
    }

    /// Copies `data` to `offset`, which is in a buffer with so many bytes left.
    #[inline]
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        match self.span(offset) {
            // SAFETY: there are as many bytes behind the pointer, and `data` is private memory.
            Some((to, left)) if data.len() <= left => unsafe { copy(data.as_ptr(), to, data.len()) },
            _ => self.write_run(offset, data),
        }
    }

    /// Copies `parts`, which have `len` bytes, to `offset`, one behind the other.
    #[inline]
    fn write_all(&self, mut offset: u64, parts: &[&[u8]], len: usize) {
        match self.span(offset) {
            Some((mut to, left)) if len <= left => {
                for part in parts {
                    // SAFETY: there are `len` bytes behind the first pointer, which is what all parts have together, and
                    // they are private memory.
                    unsafe {
                        copy(part.as_ptr(), to, part.len());
                        to = to.add(part.len());
                    }
                }
            }
            _ => {
                for part in parts {
                    self.write_run(offset, part);
                    offset += part.len() as u64;
                }
            }
        }
    }

    /// Copies from `offset` on, in a buffer with so many bytes left.
    ///
    /// # Errors
    /// [`Error::ForeignBuffer`] if there is no memory.
    #[inline]
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        match self.span(offset) {
            Some((from, left)) if data.len() <= left => {
                // SAFETY: there are as many bytes behind the pointer, and `data` is private memory.
                unsafe { copy(from, data.as_mut_ptr(), data.len()) };
                Ok(())
            }
            // SAFETY: it is as long.
            _ => unsafe { self.read_run(offset, data.as_mut_ptr(), data.len()) },
        }
    }

    /// Makes the bytes of a buffer zero.
    fn scrub(&self, raw: &Raw) {
        let (mut offset, mut len) = (raw.offset(), self.len_of(raw));
        while let Some((to, left)) = self.span(offset).filter(|_| len > 0) {
            let piece = len.min(left);
            // SAFETY: there are as many bytes behind the pointer.
            unsafe { zero(to, piece) };
            (offset, len) = (offset + piece as u64, len - piece);
        }
    }
}
