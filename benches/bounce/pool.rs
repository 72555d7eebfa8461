//! Pools to measure, and plain memory to compare them with.

#![allow(unsafe_code, reason = "the pool's memory is given by pointer, as in a guest")]

use cvm::{GpaRange, PAGE_SIZE};
use cvm_guest::{
    CHUNK_LEN, ChunkRecord, FromDevice, Placement, Pool, PoolOptions, Queue, QueueOptions, QueueRecord, Refusal,
    SharedRegion,
};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Memory of a chunk's size, whose pages are there.
#[derive(Debug, Clone, Copy)]
pub struct Chunk {
    base: NonNull<Page>,
    range: GpaRange,
}

// SAFETY: all that can be done with it is to make a region of it, which any thread may have.
unsafe impl Send for Chunk {}

#[derive(Clone)]
#[repr(align(4096))]
struct Page {
    _bytes: [u8; PAGE_SIZE as usize],
}

impl Chunk {
    pub fn region(&self) -> SharedRegion {
        // SAFETY: the memory is pages, it is leaked, so it lives long enough, and nobody has references to it.
        unsafe { SharedRegion::mapped_at(self.base.cast(), self.range) }
    }
}

/// So many chunks, one behind the other for the host.
pub fn chunks<const N: usize>() -> [Chunk; N] {
    std::array::from_fn(|chunk| {
        let memory = vec![Page { _bytes: [1; _] }; CHUNK_LEN / PAGE_SIZE as usize].leak();
        let range = GpaRange::new((1 + chunk as u64) * CHUNK_LEN as u64, CHUNK_LEN as u64);
        Chunk { base: NonNull::from(&mut *memory).cast(), range: range.expect("a chunk is whole pages") }
    })
}

/// A pool of so many chunks, at most eight.
pub fn pool(count: usize, options: PoolOptions) -> (&'static Pool, [Chunk; 8]) {
    // Leaked, as a guest has them in statics.
    let records = (0..count).map(|_| ChunkRecord::new()).collect::<Vec<_>>().leak();
    let queues = (0..4).map(|_| QueueRecord::new()).collect::<Vec<_>>().leak();
    let pool = Box::leak(Box::new(Pool::new(records, queues, options)));
    let chunks = chunks();
    for chunk in &chunks[..count] {
        pool.add(chunk.region()).expect("there is a record for each chunk");
    }
    (pool, chunks)
}

pub fn queue(pool: &Pool) -> Queue<'_> {
    pool.queue(QueueOptions::default()).expect("there are records for four queues")
}

pub fn buffer(queue: &mut Queue<'_>, size: usize) -> FromDevice {
    queue.from_device(size).expect("there is room")
}

/// Takes so much of a pool, in percent, by buffers of one size all over it; they are leaked.
pub fn fill(pool: &Pool, size: usize, percent: usize) {
    let mut queue = queue(pool);
    let mut taken = Vec::new();
    loop {
        match queue.from_device_at(size, Placement::ANY) {
            Ok(buffer) => taken.push(buffer),
            Err(Refusal::Exhausted) => break,
            Err(other) => panic!("{other}"),
        }
    }
    // Every slot has its turn, so what stays is spread evenly.
    for (at, buffer) in taken.into_iter().enumerate() {
        if at * 37 % 100 >= percent {
            queue.release(buffer);
        }
    }
}

/// Plain memory that begins at a page, as a pool's does: how both ends of a copy lie to each other decides about some of
/// its speed.
pub struct Aligned {
    memory: Vec<u8>,
    begin: usize,
    len: usize,
}

impl Aligned {
    pub fn new(len: usize) -> Self {
        let memory = vec![1; len + PAGE_SIZE as usize];
        Self { begin: memory.as_ptr().align_offset(PAGE_SIZE as usize), memory, len }
    }
}

impl Deref for Aligned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.begin..self.begin + self.len]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.begin..self.begin + self.len]
    }
}

/// Plain memory that a copy goes round in.
pub struct Rotation {
    memory: Aligned,
    slot: usize,
    next: usize,
}

impl Rotation {
    /// As many slots, as far from each other, as `queue` goes through before it comes back to the first.
    pub fn like(queue: &mut Queue<'_>, size: usize) -> Self {
        let mut take = || {
            let buffer = buffer(queue, size);
            let gpa = queue.pool().gpa(&buffer);
            queue.release(buffer);
            gpa
        };
        let first = take();
        let count = 1 + (0..).take_while(|_| take() != first).count();
        Self::new(size.next_power_of_two().max(256), count)
    }

    /// `count` slots.
    pub fn new(slot: usize, count: usize) -> Self {
        Self { memory: Aligned::new(slot * count), slot, next: 0 }
    }

    /// The next slot.
    #[inline]
    pub fn next(&mut self) -> &mut [u8] {
        let at = self.next;
        self.next = if at + self.slot == self.memory.len() { 0 } else { at + self.slot };
        &mut self.memory[at..at + self.slot]
    }
}
