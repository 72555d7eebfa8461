//! What bouncing costs beside the copy that it cannot do without.
//!
//! | row | one iteration | floor |
//! |---|---|---|
//! | `map/N` | takes a buffer of N bytes and gives it back; nothing is copied | a copy of N bytes |
//! | `to_device/N` | the same, and copies N bytes into it | the same |
//! | `from_device/N` | takes a buffer, copies N bytes out of it and gives it back | the same |
//! | `lend/N` | takes a buffer, lends N bytes, reads a header of 64, and gives it back | the same |
//! | `ring/N` | sends a small packet by an in-order ring, and releases it | the same |
//! | `gather/N` | gathers pieces of 4 KiB into one buffer, and gives it back | copies of the pieces |
//! | `map-full-P/N`, `to_device-full-P/N` | as above, with P percent of the pool in use | as above |
//! | `to_device-depth-D/N` | as above, with D buffers in flight | as above |
//! | `to_device-dram/N` | as above, from 64 MiB of payloads one after the other | a copy of these |
//! | `to_device-zeroed/N`, `to_device-random/N` | as above, with these options of the pool | as above |
//! | `to_device-watched/N`, `from_device-watched/N`, `lend-watched/N` | as above, while another core reads or writes all of the pool | copies to or from memory that it reads or writes, too |
//! | `threads/two` | `map/4096` on each of two threads | on one |
//! | `across/4096` | takes a buffer here, which another CPU gives back | a copy of 4 KiB |
//!
//! Floors copy between private memory and as much plain memory as the queue's slots go round in. They take turns with what
//! is compared with them. `cargo xtask ratios` makes a table of the results.

#[path = "../paired/mod.rs"]
mod paired;
mod peer;
mod pool;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use cvm_guest::{CHUNK_LEN, Pool, PoolOptions, Queue, Ring};
use paired::Worker;
use peer::{Peer, Touch};
use pool::{Aligned, Rotation, buffer, fill, queue};
use std::hint::black_box;

/// From a small packet to what a block layer sends at once.
const SIZES: [usize; 7] = [64, 256, 1500, 4 << 10, 16 << 10, 64 << 10, 256 << 10];

const PIECE: usize = 4 << 10;

/// The rows of one pool.
struct Rows<'c, 'g, 'p> {
    group: &'c mut BenchmarkGroup<'g, WallTime>,
    queue: Queue<'p>,
    /// Behind the name of each row.
    suffix: String,
}

impl Rows<'_, '_, '_> {
    fn row(&mut self, name: &str, size: usize, contender: impl FnMut(&mut Queue<'_>, u64), floor: impl FnMut(u64)) {
        let (mut contender, queue) = (contender, &mut self.queue);
        self.group.throughput(Throughput::Bytes(size as u64));
        let function = format!("{name}{}", self.suffix);
        let name = ("bounce", &function[..], &size.to_string()[..]);
        paired::paired(self.group, name, |iterations| contender(queue, iterations), floor);
    }

    /// A plain copy of `size` bytes into a slot like the queue's.
    fn copy(&mut self, size: usize) -> impl FnMut(u64) + use<> {
        let payload = Aligned::new(size);
        let mut rotation = Rotation::like(&mut self.queue, size);
        move |iterations| (0..iterations).for_each(|_| rotation.next()[..size].copy_from_slice(black_box(&payload[..])))
    }

    /// A plain copy of `size` bytes out of such a slot.
    fn copy_out(&mut self, size: usize) -> impl FnMut(u64) + use<> {
        let mut private = Aligned::new(size);
        let mut rotation = Rotation::like(&mut self.queue, size);
        move |iterations| {
            (0..iterations).for_each(|_| black_box(&mut private[..]).copy_from_slice(&rotation.next()[..size]));
        }
    }

    fn map(&mut self, size: usize) {
        let floor = self.copy(size);
        self.row("map", size, |queue, iterations| maps(queue, size, iterations), floor);
    }

    fn send(&mut self, size: usize) {
        let (payload, floor) = (Aligned::new(size), self.copy(size));
        self.row("to_device", size, |queue, iterations| sends(queue, &payload, iterations), floor);
    }

    fn receive(&mut self, size: usize) {
        let (mut private, floor) = (Aligned::new(size), self.copy_out(size));
        self.row("from_device", size, |queue, iterations| receives(queue, &mut private, iterations), floor);
    }

    fn lend(&mut self, size: usize) {
        let floor = self.copy_out(size);
        self.row("lend", size, |queue, iterations| lends(queue, size, iterations), floor);
    }

    fn ring(&mut self, size: usize) {
        const SLOTS: usize = 256;
        let mut ring = Ring::new(&mut self.queue, SLOTS, size).expect("there is room");
        let payload = Aligned::new(size);
        let mut rotation = Rotation::new(size, SLOTS);
        let send = |_: &mut Queue<'_>, iterations| {
            for _ in 0..iterations {
                let sent = ring.send(black_box(&payload[..])).expect("the last one was released");
                black_box(ring.segment(&sent));
                ring.release(sent).expect("it is the oldest");
            }
        };
        let copy = |iterations| {
            (0..iterations).for_each(|_| rotation.next()[..size].copy_from_slice(black_box(&payload[..])));
        };
        self.row("ring", size, send, copy);
    }

    fn gather(&mut self, pieces: usize) {
        let size = pieces * PIECE;
        let parts: Vec<_> = (0..pieces).map(|_| Aligned::new(PIECE)).collect();
        let list: Vec<&[u8]> = parts.iter().map(|part| &part[..]).collect();
        let mut rotation = Rotation::like(&mut self.queue, size);
        let gather = |queue: &mut Queue<'_>, iterations| {
            for _ in 0..iterations {
                let buffer = queue.gather(black_box(&list)).expect("there is room");
                black_box(queue.pool().gpa(&buffer));
                queue.release(buffer);
            }
        };
        let copy = |iterations| {
            for _ in 0..iterations {
                let slot = rotation.next();
                for (to, part) in slot.chunks_exact_mut(PIECE).zip(black_box(&list)) {
                    to.copy_from_slice(part);
                }
            }
        };
        self.row("gather", size, gather, copy);
    }

    fn send_at_depth(&mut self, size: usize, depth: usize) {
        self.suffix = format!("-depth-{depth}");
        let (payload, floor) = (Aligned::new(size), self.copy(size));
        let mut flight = Vec::with_capacity(depth);
        let send = |queue: &mut Queue<'_>, iterations: u64| {
            let mut left = iterations as usize;
            while left > 0 {
                let some = left.min(depth);
                for _ in 0..some {
                    let buffer = queue.to_device(black_box(&payload[..])).expect("there is room");
                    black_box(queue.pool().gpa(&buffer));
                    flight.push(buffer);
                }
                flight.drain(..).for_each(|buffer| queue.release(buffer));
                left -= some;
            }
        };
        self.row("to_device", size, send, floor);
    }

    fn send_from_dram(&mut self, size: usize) {
        /// Far more than any cache of one core.
        const PAYLOADS: usize = 64 << 20;
        self.suffix = "-dram".into();
        let mut rotation = Rotation::like(&mut self.queue, size);
        let [mut ours, mut theirs] = [0; 2].map(|_: i32| Rotation::new(size, PAYLOADS / size));
        let send = |queue: &mut Queue<'_>, iterations| (0..iterations).for_each(|_| sends(queue, ours.next(), 1));
        let copy = |iterations| (0..iterations).for_each(|_| rotation.next()[..size].copy_from_slice(theirs.next()));
        self.row("to_device", size, send, copy);
    }
}

fn maps(queue: &mut Queue<'_>, size: usize, iterations: u64) {
    for _ in 0..iterations {
        let buffer = buffer(queue, black_box(size));
        black_box(queue.pool().gpa(&buffer));
        queue.release(buffer);
    }
}

fn sends(queue: &mut Queue<'_>, payload: &[u8], iterations: u64) {
    for _ in 0..iterations {
        let buffer = queue.to_device(black_box(payload)).expect("there is room");
        black_box(queue.pool().gpa(&buffer));
        queue.release(buffer);
    }
}

fn receives(queue: &mut Queue<'_>, private: &mut [u8], iterations: u64) {
    for _ in 0..iterations {
        let buffer = buffer(queue, private.len());
        black_box(queue.pool().gpa(&buffer));
        queue.receive(buffer, black_box(private.len()), black_box(private)).expect("it is as long");
    }
}

fn lends(queue: &mut Queue<'_>, size: usize, iterations: u64) {
    for _ in 0..iterations {
        let buffer = buffer(queue, size);
        black_box(queue.pool().gpa(&buffer));
        let mut lent = queue.lend(buffer, black_box(size)).expect("it is as long");
        black_box(lent.read_value::<[u8; 64]>().expect("it is as long"));
        queue.release(lent);
    }
}

fn rows<'c, 'g>(
    group: &'c mut BenchmarkGroup<'g, WallTime>,
    pool: &'static Pool,
    suffix: &str,
) -> Rows<'c, 'g, 'static> {
    Rows { group, queue: queue(pool), suffix: suffix.into() }
}

fn alone(group: &mut BenchmarkGroup<'_, WallTime>) {
    let (pool, _) = pool::pool(1, PoolOptions::default());
    let mut rows = rows(group, pool, "");
    for size in SIZES {
        rows.map(size);
        rows.send(size);
        rows.receive(size);
        rows.lend(size);
    }
    [64, 256].into_iter().for_each(|size| rows.ring(size));
    rows.gather(16);
    for depth in [1, 8, 32] {
        [1500, 4 << 10].into_iter().for_each(|size| rows.send_at_depth(size, depth));
    }
    [4 << 10, 64 << 10].into_iter().for_each(|size| rows.send_from_dram(size));
}

fn with_others_in_the_pool(group: &mut BenchmarkGroup<'_, WallTime>) {
    for percent in [50, 90] {
        for size in [1500, 4 << 10, 64 << 10, 256 << 10] {
            let (pool, _) = pool::pool(8, PoolOptions::default());
            fill(pool, size, percent);
            let mut rows = rows(group, pool, &format!("-full-{percent}"));
            rows.map(size);
            rows.send(size);
        }
    }
}

fn with_options(group: &mut BenchmarkGroup<'_, WallTime>) {
    // As fast as an instruction that makes random numbers is at best; a guest's may take longer.
    fn random() -> u64 {
        use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
        static STATE: AtomicU64 = AtomicU64::new(1);
        let next = STATE.load(Relaxed).wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        STATE.store(next, Relaxed);
        next >> 17
    }
    let zeroed = PoolOptions { zero_on_release: true, ..PoolOptions::default() };
    let shuffled = PoolOptions { random: Some(random), ..PoolOptions::default() };
    for (options, suffix) in [(zeroed, "-zeroed"), (shuffled, "-random")] {
        let (pool, _) = pool::pool(1, options);
        let mut rows = rows(group, pool, suffix);
        [1500, 4 << 10, 64 << 10].into_iter().for_each(|size| rows.send(size));
    }
}

fn with_a_host(group: &mut BenchmarkGroup<'_, WallTime>) {
    const SIZE: usize = 4 << 10;
    let (pool, chunks) = pool::pool(1, PoolOptions::default());
    let [floor] = pool::chunks();
    let mut at = 0;
    let mut next = || {
        at = (at + SIZE) % (CHUNK_LEN / 4);
        at
    };
    let mut private = Aligned::new(SIZE);
    let payload = Aligned::new(SIZE);
    let mut rows = rows(group, pool, "-watched");
    {
        let _reads = Peer::new([chunks[0], floor], Touch::Read);
        let memory = floor.region();
        let send = |queue: &mut Queue<'_>, iterations| sends(queue, &payload, iterations);
        let copy = |iterations| (0..iterations).for_each(|_| memory.write(next(), &payload).expect("it is inside"));
        rows.row("to_device", SIZE, send, copy);
    }
    let _writes = Peer::new([chunks[0], floor], Touch::Write);
    let memory = floor.region();
    let mut copied = Aligned::new(SIZE);
    let receive = |queue: &mut Queue<'_>, iterations| receives(queue, &mut private, iterations);
    let copy = |iterations| (0..iterations).for_each(|_| memory.read(next(), &mut copied).expect("it is inside"));
    rows.row("from_device", SIZE, receive, copy);
    let copy = |iterations| (0..iterations).for_each(|_| memory.read(next(), &mut copied).expect("it is inside"));
    rows.row("lend", SIZE, |queue, iterations| lends(queue, SIZE, iterations), copy);
}

fn with_threads(group: &mut BenchmarkGroup<'_, WallTime>) {
    const SIZE: usize = 4 << 10;
    const HANDED_OVER: usize = 256;
    let (pool, _) = pool::pool(4, PoolOptions::default());
    group.throughput(Throughput::Elements(1));
    {
        let [mut ours, mut alone, theirs] = [0; 3].map(|_: i32| queue(pool));
        let mut theirs = theirs;
        let worker = Worker::new(move |iterations| maps(&mut theirs, SIZE, iterations));
        let two = |iterations| {
            worker.start(iterations);
            maps(&mut ours, SIZE, iterations);
            worker.wait();
        };
        let one = |iterations| maps(&mut alone, SIZE, iterations);
        paired::paired(group, ("bounce", "threads", "two"), two, one);
    }
    let mut rows = rows(group, pool, "");
    let floor = rows.copy(SIZE);
    let handed: &_ = Box::leak(Box::new(std::sync::Mutex::new(Vec::with_capacity(HANDED_OVER))));
    let lock = || handed.lock().expect("nobody panics");
    let worker = Worker::new(move |_| {
        handed.lock().expect("nobody panics").drain(..).for_each(|buffer| pool.release(buffer));
    });
    let across = |queue: &mut Queue<'_>, iterations: u64| {
        let mut left = iterations as usize;
        while left > 0 {
            let some = left.min(HANDED_OVER);
            lock().extend((0..some).map(|_| buffer(queue, SIZE)));
            worker.start(1);
            worker.wait();
            left -= some;
        }
    };
    rows.row("across", SIZE, across, floor);
}

fn bounce(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("bounce");
    alone(&mut group);
    with_others_in_the_pool(&mut group);
    with_options(&mut group);
    with_a_host(&mut group);
    with_threads(&mut group);
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(std::time::Duration::from_millis(100))
        .measurement_time(std::time::Duration::from_millis(600));
    targets = bounce
}
criterion_main!(benches);
