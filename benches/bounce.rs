//! What bouncing costs beside the copy that it cannot do without.
//!
//! | row | one iteration |
//! |---|---|
//! | `map/N` | takes a buffer of N bytes and gives it back; nothing is copied |
//! | `to_device/N` | the same, and copies N bytes into it |
//! | `from_device/N` | takes a buffer, copies N bytes out of it and gives it back |
//! | `lend/N` | takes a buffer, lends N bytes, reads a header of 64, and gives it back |
//! | `ring/64` | sends a small packet by an in-order ring, and releases it |
//! | `gather/N` | gathers a list of pieces of 4 KiB into one buffer, and gives it back |
//! | `memcpy/N` | the floor: a plain copy between private memory and as much memory as the queue's window goes round in |
//!
//! `cargo xtask ratios` makes a table of the results.

#![allow(unsafe_code, reason = "the pool's memory is given by pointer, as in a guest")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use cvm::{GpaRange, PAGE_SIZE};
use cvm_guest::{
    CHUNK_LEN, ChunkRecord, FromDevice, Pool, PoolOptions, Queue, QueueOptions, QueueRecord, Ring, SharedRegion,
};
use std::hint::black_box;
use std::ptr::NonNull;

/// From a small packet to what a block layer sends at once.
const SIZES: [usize; 7] = [64, 256, 1500, 4 << 10, 16 << 10, 64 << 10, 256 << 10];

const PIECE: usize = 4 << 10;

fn pool() -> Pool {
    let chunks = vec![ChunkRecord::new()].leak();
    let queues = vec![QueueRecord::new()].leak();
    let pool = Pool::new(chunks, queues, PoolOptions::default());
    // Leaked, because a pool's memory is there for good.
    let memory = vec![Page { _bytes: [0; _] }; CHUNK_LEN / PAGE_SIZE as usize].leak();
    let range = GpaRange::new(0x20_0000, CHUNK_LEN as u64).expect("a chunk is whole pages");
    // SAFETY: the memory is pages, it is leaked, so it lives long enough, and the only reference to it ended above.
    let region = unsafe { SharedRegion::mapped_at(NonNull::from(memory).cast(), range) };
    pool.add(region).expect("there is a record for a chunk");
    pool
}

#[derive(Clone)]
#[repr(align(4096))]
struct Page {
    _bytes: [u8; PAGE_SIZE as usize],
}

/// Plain memory in which a copy goes round as in a queue's window.
struct Rotation {
    slots: Vec<Vec<u8>>,
    next: usize,
}

impl Rotation {
    /// As many slots as `queue` goes through before it comes back to the first.
    fn like(queue: &mut Queue<'_>, size: usize) -> Self {
        let mut take = || {
            let buffer = queue.from_device(size).expect("nothing else is in use");
            let gpa = queue.pool().gpa(&buffer);
            queue.release(buffer);
            gpa
        };
        let first = take();
        let count = 1 + (0..).take_while(|_| take() != first).count();
        Self { slots: vec![vec![0; size.next_power_of_two()]; count], next: 0 }
    }

    fn next(&mut self) -> &mut [u8] {
        self.next = if self.next + 1 == self.slots.len() { 0 } else { self.next + 1 };
        &mut self.slots[self.next]
    }
}

fn buffer(queue: &mut Queue<'_>, size: usize) -> FromDevice {
    queue.from_device(size).expect("nothing else is in use")
}

fn bounce(criterion: &mut Criterion) {
    let pool = pool();
    let queue = &mut pool.queue(QueueOptions::default()).expect("there is a record for a queue");
    let mut group = criterion.benchmark_group("bounce");
    for size in SIZES {
        let payload = vec![0xa5u8; size];
        let mut private = vec![0u8; size];
        let mut rotation = Rotation::like(queue, size);
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_with_input(BenchmarkId::new("memcpy", size), &size, |bencher, _| {
            bencher.iter(|| rotation.next()[..size].copy_from_slice(black_box(&payload)));
        });
        group.bench_with_input(BenchmarkId::new("map", size), &size, |bencher, _| {
            bencher.iter(|| {
                let buffer = buffer(queue, black_box(size));
                black_box(pool.gpa(&buffer));
                queue.release(buffer);
            });
        });
        group.bench_with_input(BenchmarkId::new("to_device", size), &size, |bencher, _| {
            bencher.iter(|| {
                let buffer = queue.to_device(black_box(&payload)).expect("nothing else is in use");
                black_box(pool.gpa(&buffer));
                queue.release(buffer);
            });
        });
        group.bench_with_input(BenchmarkId::new("from_device", size), &size, |bencher, _| {
            bencher.iter(|| {
                let buffer = buffer(queue, size);
                black_box(pool.gpa(&buffer));
                queue.receive(buffer, black_box(size), &mut private)
            });
        });
        group.bench_with_input(BenchmarkId::new("lend", size), &size, |bencher, _| {
            bencher.iter(|| {
                let buffer = buffer(queue, size);
                black_box(pool.gpa(&buffer));
                let mut lent = queue.lend(buffer, black_box(size)).expect("it is as long");
                let header: [u8; 64] = lent.read_value().expect("it is as long");
                queue.release(lent);
                header
            });
        });
    }
    for size in [64, 256] {
        let mut ring = Ring::new(queue, 256, 256).expect("nothing else is in use");
        let payload = vec![0xa5u8; size];
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_with_input(BenchmarkId::new("ring", size), &size, |bencher, _| {
            bencher.iter(|| {
                let sent = ring.send(black_box(&payload)).expect("the last one was released");
                black_box(ring.segment(&sent));
                ring.release(sent)
            });
        });
    }
    let pieces = vec![vec![0xa5u8; PIECE]; 16];
    let list: Vec<&[u8]> = pieces.iter().map(|piece| &piece[..]).collect();
    group.throughput(Throughput::Bytes((16 * PIECE) as u64));
    group.bench_with_input(BenchmarkId::new("gather", 16 * PIECE), &list, |bencher, list| {
        bencher.iter(|| {
            let buffer = queue.gather(black_box(list)).expect("nothing else is in use");
            black_box(pool.gpa(&buffer));
            queue.release(buffer);
        });
    });
    group.finish();
}

criterion_group!(benches, bounce);
criterion_main!(benches);
