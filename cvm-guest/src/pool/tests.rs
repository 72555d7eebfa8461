//! Tests of the whole pool.

use super::*;
use crate::SharedRegion;
use core::ptr::NonNull;
use cvm_core::{GpaRange, PAGE_SIZE};

mod attacks;
mod model;
mod threads;
mod use_cases;

const CHUNK: u64 = CHUNK_LEN as u64;

/// 2 MiB that are there for good.
fn memory() -> NonNull<u8> {
    #[derive(Clone)]
    #[repr(align(4096))]
    struct Page {
        _bytes: [u8; 4096],
    }
    NonNull::from(vec![Page { _bytes: [0; 4096] }; CHUNK_LEN / PAGE_SIZE as usize].leak()).cast()
}

/// The addresses of the chunk with this number.
fn range(number: u64) -> GpaRange {
    GpaRange::new(0x4000_0000 + number * CHUNK, CHUNK).unwrap()
}

/// Memory of the test's own, as the chunk with this number.
pub(crate) fn region(number: u64) -> SharedRegion {
    // SAFETY: the memory is there for good, it is pages, and there are no references to it.
    unsafe { SharedRegion::mapped_at(memory(), range(number)) }
}

/// A pool without chunks.
pub(crate) fn bare(chunks: usize, queues: usize, options: PoolOptions) -> Pool {
    let chunks: Vec<_> = (0..chunks).map(|_| ChunkRecord::new()).collect();
    let queues: Vec<_> = (0..queues).map(|_| QueueRecord::new()).collect();
    Pool::new(chunks.leak(), queues.leak(), options)
}

/// A pool of so many chunks that follow each other.
pub(crate) fn pool(chunks: usize, queues: usize) -> Pool {
    let pool = bare(chunks, queues, PoolOptions::default());
    (0..chunks).for_each(|number| pool.add(region(number as u64)).unwrap());
    pool
}

/// The bytes that a device sees in a buffer.
fn seen<B: Buffer>(pool: &Pool, buffer: &B) -> Vec<u8> {
    let mut bytes = vec![0; pool.len(buffer)];
    pool.read(buffer.raw().offset(), &mut bytes).unwrap();
    bytes
}

/// Lets a device write into a buffer.
fn put<B: Buffer>(pool: &Pool, buffer: &B, bytes: &[u8]) {
    assert!(bytes.len() <= pool.len(buffer));
    pool.write(buffer.raw().offset(), bytes);
}
