//! What a queue takes from its pool, and gives back: many slots at a time.

use super::{Placement, Queue};
use crate::pool::Refusal;
use crate::pool::block::{BLOCK_LEN, BLOCK_SHIFT, Block, CLASSES, MIN_SHIFT, class_of, slot_len};
use crate::pool::handle::{Owner, Raw};
use crate::pool::record::waiting;
use core::task::{Context, Poll};

impl Queue<'_> {
    pub(super) fn note_given(&mut self, bytes: u64) {
        self.usage.taken = self.usage.taken.saturating_sub(bytes);
        self.pool.note_given(bytes);
    }

    fn note_taken(&mut self, bytes: u64) {
        self.usage.taken += bytes;
        self.usage.high_water = self.usage.high_water.max(self.usage.taken);
        self.pool.note_taken(bytes);
    }

    /// Hears what was released from other CPUs.
    pub(super) fn hear(&mut self) {
        let bytes = self.record.collect();
        if bytes > 0 {
            self.note_given(bytes);
        }
    }

    /// How many bytes the queue may take yet.
    fn room(&self) -> u64 {
        self.limit.saturating_sub(self.usage.taken)
    }

    /// Gets slots of a class from the pool, of which there are none at hand.
    #[cold]
    #[inline(never)]
    pub(super) fn refill(&mut self, class: usize) -> Result<(), Refusal> {
        if slot_len(class) as u64 > self.limit {
            return Err(Refusal::Impossible);
        }
        self.hear();
        if self.take(class) || (self.trim() && self.take(class)) {
            self.usage.refills += 1;
            return Ok(());
        }
        Err(self.refuse(self.room() < slot_len(class) as u64))
    }

    fn take(&mut self, class: usize) -> bool {
        let mut room = self.room();
        let Some(mut window) = self.windows.get(class) else { return false };
        let (mut want, mut bytes, start) = (window.half().max(2), 0, window.turn());
        while want > 0 {
            let mut prefer = window.cursor.prefer;
            let (count, class) = self.pool.take((class, want), room, &mut prefer, start, |slot| window.push(slot));
            window.cursor.prefer = prefer;
            let more = u64::from(count) << MIN_SHIFT << class;
            (want, bytes, room) = (want - count, bytes + more, room - more);
            if count == 0 {
                break;
            }
        }
        if bytes > 0 {
            self.note_taken(bytes);
        }
        bytes > 0
    }

    fn refuse(&mut self, limited: bool) -> Refusal {
        if limited {
            self.usage.limited += 1;
            return Refusal::Limited;
        }
        self.usage.exhausted += 1;
        self.pool.note_exhausted();
        Refusal::Exhausted
    }

    /// Gives back the oldest slots of a class, until `keep` are left.
    pub(super) fn spill(&mut self, class: usize, keep: u32) {
        let (mut bytes, mut strays) = (0, 0);
        // Those in one word of one block go together.
        let mut together = ((0, 0, 0), 0u64);
        let pool = self.pool;
        let mut flush = |((block, class, word), bits): ((usize, usize, u32), u64)| {
            if bits != 0 {
                strays += bits.count_ones() - pool.give_slots(block, class, word, bits);
            }
        };
        let Some(mut window) = self.windows.get(class) else { return };
        while window.len() > keep {
            let offset = u64::from(window.pop()) << MIN_SHIFT;
            let index = (offset >> BLOCK_SHIFT) as usize;
            // A window may have larger slots than its own.
            let class = pool.block(index).map_or(class, Block::class);
            bytes += 1 << MIN_SHIFT << class;
            let slot = ((offset as usize % BLOCK_LEN) >> MIN_SHIFT >> class) as u32;
            if together.0 != (index, class, slot / 64) {
                flush(together);
                together = ((index, class, slot / 64), 0);
            }
            together.1 |= 1 << (slot % 64);
        }
        flush(together);
        (0..strays).for_each(|_| pool.stray());
        self.usage.spills += 1;
        self.note_given(bytes);
        pool.wake();
    }

    /// Gives everything back to the pool that is at hand; returns whether there was anything.
    ///
    /// A queue that goes idle should do so: what it has at hand is nobody else's, and a queue that waits for the pool only
    /// gets it when this one releases its next buffer.
    pub fn trim(&mut self) -> bool {
        let mut any = false;
        for class in 0..CLASSES {
            if self.windows.get(class).is_some_and(|window| !window.is_empty()) {
                self.spill(class, 0);
                any = true;
            }
        }
        any
    }

    #[cold]
    #[inline(never)]
    pub(super) fn map_run(&mut self, len: usize, placement: Placement) -> Result<Raw, Refusal> {
        let Placement { mask, low } = placement;
        let blocks = low.checked_add(len).map(|end| end.div_ceil(BLOCK_LEN)).filter(|_| mask < BLOCK_LEN);
        let blocks = blocks.filter(|blocks| *blocks <= self.pool.extent()).ok_or(Refusal::Impossible)?;
        let bytes = (blocks << BLOCK_SHIFT) as u64;
        if bytes > self.limit {
            return Err(Refusal::Impossible);
        }
        self.hear();
        let take = |queue: &Self| if bytes <= queue.room() { queue.pool.take_run(low, len) } else { None };
        let run = take(self).or_else(|| if self.trim() { take(self) } else { None });
        let Some(first) = run else { return Err(self.refuse(bytes > self.room())) };
        self.note_taken(bytes);
        self.usage.maps += 1;
        Ok(Raw::new((first << BLOCK_SHIFT) as u64 | low as u64, len, self.owner))
    }

    /// Whether there is room for a buffer of `len` bytes now; if not, `context` is woken when there may be.
    ///
    /// # Errors
    /// [`Refusal::Impossible`]: waiting will not help.
    pub fn poll_room(&mut self, len: usize, context: &mut Context<'_>) -> Poll<Result<(), Refusal>> {
        let mut registered = waiting::NOTHING;
        loop {
            let needed = match self.look_for_room(len) {
                Err(Refusal::Exhausted) => waiting::POOL,
                Err(Refusal::Limited) => waiting::LIMIT,
                answer => {
                    self.record.set_waiting(waiting::NOTHING, &self.pool.waiters.0);
                    return Poll::Ready(answer);
                }
            };
            // Who waits for the pool hears of his own buffers too.
            if needed <= registered {
                self.usage.waits += 1;
                self.keeps = Owner::NOBODY;
                return Poll::Pending;
            }
            registered = needed;
            self.record.wait(needed, context.waker(), &self.pool.waiters.0);
        }
    }

    fn look_for_room(&mut self, len: usize) -> Result<(), Refusal> {
        let class = class_of(len);
        match self.windows.get(class) {
            Some(window) if !window.is_empty() => Ok(()),
            Some(_) => self.refill(class),
            None => {
                let raw = self.map_run(len, Placement::ANY)?;
                self.usage.maps -= 1;
                self.pool.give(raw.offset()).into_iter().for_each(|bytes| self.note_given(bytes));
                Ok(())
            }
        }
    }
}
