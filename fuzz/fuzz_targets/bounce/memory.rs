//! Memory with a fence on both sides, and a host that writes into what is shared.

use super::{CHUNK_LEN, CHUNKS, MEMORY};
use cvm_core::PAGE_SIZE;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};
use std::ops::Range;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;

/// Zeroed memory between two pages without access, mapped for good: whoever goes beyond either end, by assembly too, is
/// stopped by the processor.
pub fn fenced(len: usize) -> NonNull<u8> {
    let page = PAGE_SIZE as usize;
    assert!(len.is_multiple_of(page));
    // SAFETY: the mapping is new, and nobody knows it yet.
    unsafe {
        let base = mmap_anonymous(null_mut(), len + 2 * page, ProtFlags::empty(), MapFlags::PRIVATE).unwrap();
        let inside = base.add(page);
        mprotect(inside, len, MprotectFlags::READ | MprotectFlags::WRITE).unwrap();
        NonNull::new(inside.cast()).unwrap()
    }
}

/// What the host sees, never by reference: chunks whose addresses follow each other, with fences between them.
#[derive(Clone, Copy)]
pub struct Shared([NonNull<u8>; CHUNKS]);

// SAFETY: it is mapped for good, and accessed by copying.
unsafe impl Send for Shared {}

impl Shared {
    pub fn new() -> Self {
        Self([(); CHUNKS].map(|()| fenced(CHUNK_LEN)))
    }

    pub fn pointer(&self, at: usize) -> NonNull<u8> {
        // SAFETY: it is inside the chunk.
        unsafe { self.0[at / CHUNK_LEN].add(at % CHUNK_LEN) }
    }

    pub fn read(&self, range: Range<usize>) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(range.len());
        while bytes.len() < range.len() {
            let at = range.start + bytes.len();
            let (piece, end) = ((CHUNK_LEN - at % CHUNK_LEN).min(range.end - at), bytes.len());
            bytes.resize(end + piece, 0);
            // SAFETY: the piece is inside the chunk. Only quiet memory is read, in which nobody else writes.
            unsafe { self.pointer(at).as_ptr().copy_to_nonoverlapping(bytes[end..].as_mut_ptr(), piece) };
        }
        bytes
    }

    pub fn write(&self, at: usize, bytes: &[u8]) {
        for (at, byte) in (at..).zip(bytes) {
            // SAFETY: the pointer is to a byte of a chunk.
            unsafe { self.pointer(at).write_volatile(*byte) };
        }
    }
}

/// Whether the host writes at present, and where the guest was last.
pub static LOUD: AtomicBool = AtomicBool::new(false);
pub static NEAR: AtomicUsize = AtomicUsize::new(0);

/// How many bytes the host writes in one piece: now where the guest is, now all over.
const PIECE: usize = 1024;

/// Lets a host loose on `memory`, for as long as this process lives: it writes while [`LOUD`] says so.
pub fn scribble(memory: Shared) {
    thread::spawn(move || scribble_on(memory));
}

fn scribble_on(memory: Shared) -> ! {
    let (mut word, mut sweep) = (1u64, 0);
    loop {
        if !LOUD.load(Relaxed) {
            thread::yield_now();
            continue;
        }
        sweep = (sweep + PIECE) % MEMORY;
        for start in [NEAR.load(Relaxed), sweep, NEAR.load(Relaxed)] {
            let start = (start & !7).min(MEMORY - PIECE);
            for at in (start..start + PIECE).step_by(8) {
                word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(7) ^ at as u64;
                // Every other word might be a length.
                let value = if at & 8 == 0 { word } else { word % 9000 };
                // SAFETY: the word is inside a chunk, as it is at a multiple of eight.
                unsafe { memory.pointer(at).cast::<u64>().write_volatile(value) };
            }
        }
    }
}

/// What is in private memory that nothing was copied to.
const CANARY: u8 = 0xc5;
/// How far canaries are looked at.
const AROUND: usize = 64;

/// Private memory: for what is sent, of some patterns, and for what is received.
pub struct Private {
    sources: [&'static [u8]; 4],
    room: &'static mut [u8],
}

impl Private {
    pub fn new(len: usize) -> Self {
        // SAFETY: each is mapped for good, as long, and known to nobody else.
        let area = || unsafe { std::slice::from_raw_parts_mut(fenced(len).as_ptr(), len) };
        let source = |number: usize| {
            let bytes = area();
            bytes
                .iter_mut()
                .enumerate()
                .for_each(|(at, byte)| *byte = (at ^ (at >> 8) ^ (at >> 16) ^ (number << 6)) as u8);
            &*bytes
        };
        let room = area();
        room.fill(CANARY);
        Self { sources: [0, 1, 2, 3].map(source), room }
    }

    /// Bytes that end or begin at a fence.
    pub fn source(&self, number: usize, len: usize, at_end: bool) -> &'static [u8] {
        let source = self.sources[number % self.sources.len()];
        if at_end { &source[source.len() - len..] } else { &source[..len] }
    }

    /// Has `copy` receive into `len` bytes that end or begin at a fence, and say how many it was to write; those come
    /// back, and no others may have changed.
    pub fn receive(&mut self, len: usize, at_end: bool, copy: impl FnOnce(&mut [u8]) -> usize) -> Vec<u8> {
        let start = if at_end { self.room.len() - len } else { 0 };
        let written = copy(&mut self.room[start..start + len]);
        assert!(written <= len);
        let (before, after) = (start.saturating_sub(AROUND), (start + len + AROUND).min(self.room.len()));
        let others = self.room[before..start].iter().chain(&self.room[start + written..after]);
        assert!(others.into_iter().all(|byte| *byte == CANARY), "more was written than was valid");
        let bytes = self.room[start..start + written].to_vec();
        self.room[start..start + written].fill(CANARY);
        bytes
    }
}
