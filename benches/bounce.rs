//! What bouncing costs beside the copy that it cannot do without.
//!
//! `bounce/to_device/N` takes a buffer of the pool, copies N bytes into it and gives it back; `bounce/from_device/N`
//! copies them out of it. `bounce/memcpy/N` is the floor: a plain copy of N bytes between private memory and memory
//! like the pool's. `cargo xtask ratios` makes a table of the results.

#![allow(unsafe_code, reason = "the pool's memory is given by pointer, as in a guest")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use cvm::{GpaRange, PAGE_SIZE};
use cvm_guest::{GRANULE, Pool, SharedRegion};
use std::hint::black_box;
use std::ptr::NonNull;

/// From a small packet to what a block layer sends at once.
const SIZES: [usize; 7] = [64, 256, 1500, 4 << 10, 16 << 10, 64 << 10, 256 << 10];

/// One chunk, as a guest shares it.
const POOL_LEN: usize = 2 << 20;

fn pool() -> Pool {
    // Leaked, because a pool's memory is there for good.
    let memory = vec![Page { _bytes: [0; _] }; POOL_LEN / PAGE_SIZE as usize].leak();
    let bits = vec![0u64; POOL_LEN / GRANULE / 64].leak();
    let base = NonNull::from(memory).cast();
    let range = GpaRange::new(0x10_0000, POOL_LEN as u64).expect("a pool is whole pages");
    // SAFETY: the memory is pages, it is leaked, so it lives long enough, and the only reference to it ended above.
    let region = unsafe { SharedRegion::mapped_at(base, range) };
    Pool::new(region, bits).expect("there is a bit for each granule")
}

#[derive(Clone)]
#[repr(align(4096))]
struct Page {
    _bytes: [u8; PAGE_SIZE as usize],
}

fn bounce(criterion: &mut Criterion) {
    let pool = pool();
    let mut group = criterion.benchmark_group("bounce");
    for size in SIZES {
        let payload = vec![0xa5u8; size];
        let mut private = vec![0u8; size];
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_with_input(BenchmarkId::new("memcpy", size), &size, |bencher, _| {
            bencher.iter(|| private.copy_from_slice(black_box(&payload)));
        });
        group.bench_with_input(BenchmarkId::new("to_device", size), &size, |bencher, _| {
            bencher.iter(|| pool.to_device(black_box(&payload)).map(|buffer| buffer.gpa()));
        });
        group.bench_with_input(BenchmarkId::new("from_device", size), &size, |bencher, _| {
            bencher.iter(|| {
                let buffer = pool.from_device(size)?;
                black_box(buffer.gpa());
                buffer.read(&mut private)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, bounce);
criterion_main!(benches);
