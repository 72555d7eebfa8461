//! What the page-state map, the shared view and the conversion engine cost by themselves, without a backend. `cargo xtask
//! ratios` makes a table of the results.
//!
//! | row | one iteration | floor |
//! |---|---|---|
//! | `read/view/N`, `write/view/N` | an access to N bytes through a pinned view | the same to `GuestMemoryMmap` |
//! | `read/pinned/N`, `write/pinned/N` | the same, with a pin for each | the same |
//! | `map/lookup/512` | the states of 512 pages of a mixed block | |
//! | `map/runs/2MiB` | all runs of 1 TiB on alternating sides, 2 MiB each | |
//! | `map/runs/4KiB` | all runs of 1 GiB on alternating sides, a page each | |
//! | `convert/4KiB`, `convert/2MiB` | a conversion there and back | |
//! | `convert/two/threads` | the same on each of two threads, of pages far apart, where the backend takes 20 us | on one |
//! | `convert/apart/threads` | the same with an engine for each: how far the machine goes | on one |
//!
//! Floors take turns with what is compared with them.

#[path = "paired/mod.rs"]
mod paired;

use criterion::{Criterion, Throughput};
use cvm::memory::{ConversionEngine, Converter, ConverterError, PageState, PageStateMap, Slots};
use cvm::{Answer, BoxError, ConversionRequest, Gpa, GpaRange, PAGE_SIZE, SharedMemory, Side};
use paired::{Worker, paired};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

/// A backend that takes so long for a conversion.
struct Takes(Duration);

const NOTHING: Takes = Takes(Duration::ZERO);

/// As long as the kernel takes for the cheapest conversion, of 4 KiB.
const CHEAPEST: Takes = Takes(Duration::from_micros(20));

impl Converter for Takes {
    fn convert(&self, _: u32, _: GpaRange, _: Side) -> Result<(), ConverterError> {
        if !self.0.is_zero() {
            let begin = Instant::now();
            while begin.elapsed() < self.0 {
                std::hint::spin_loop();
            }
        }
        Ok(())
    }

    fn poison(&self, _: u32, _: GpaRange) -> Result<(), BoxError> {
        Ok(())
    }

    fn most_runs(&self) -> u64 {
        u64::MAX
    }
}

/// An engine over so many bytes, all private. The memory is address space only, until somebody writes to it.
fn engine(bytes: u64, backend: Takes) -> ConversionEngine<Takes> {
    let slot = GpaRange::new(0, bytes).unwrap();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes as usize)]).unwrap();
    let map = Arc::new(PageStateMap::new(Slots::new(&[slot]).unwrap()).unwrap());
    ConversionEngine::new(backend, SharedMemory::new(memory, map).unwrap())
}

fn convert(engine: &ConversionEngine<Takes>, vcpu: u32, start: u64, bytes: u64, to: Side) {
    let request = ConversionRequest::from_guest(vcpu, start, bytes / PAGE_SIZE, to);
    engine.ask(request);
    assert_eq!(engine.convert(&request).answer(), Answer::Done);
}

fn there_and_back(engine: &ConversionEngine<Takes>, vcpu: u32, start: u64, bytes: u64) {
    convert(engine, vcpu, start, bytes, Side::Shared);
    convert(engine, vcpu, start, bytes, Side::Private);
}

/// One access for each size, at the same place: warm, so that what is compared is the way there.
fn accesses(criterion: &mut Criterion) {
    const BYTES: u64 = 64 << 20;
    let engine = engine(BYTES, NOTHING);
    convert(&engine, 0, 0, BYTES, Side::Shared);
    let memory = engine.memory().named("bench");
    let raw = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), BYTES as usize)]).unwrap();
    let at = GuestAddress(0x1_2340);
    for size in [8, 64, 4096] {
        let buffers = [(); 2].map(|()| vec![1u8; size]);
        raw.write_slice(&buffers[0], at).unwrap();
        memory.memory().write_slice(&buffers[0], at).unwrap();
        let view = memory.memory();
        let parameter = size.to_string();
        let mut row = |group: &str, name: &str, access: &mut dyn FnMut(&mut [u8]), floor: &mut dyn FnMut(&mut [u8])| {
            let [mut buffer, mut other] = buffers.clone();
            paired(
                &mut criterion.benchmark_group(group),
                (group, name, &parameter),
                |iterations| (0..iterations).for_each(|_| access(black_box(&mut buffer))),
                |iterations| (0..iterations).for_each(|_| floor(black_box(&mut other))),
            );
        };
        let read = &mut |buffer: &mut [u8]| raw.read_slice(buffer, at).unwrap();
        row("read", "view", &mut |buffer| view.read_slice(buffer, at).unwrap(), read);
        row("read", "pinned", &mut |buffer| memory.memory().read_slice(buffer, at).unwrap(), read);
        let write = &mut |buffer: &mut [u8]| raw.write_slice(buffer, at).unwrap();
        row("write", "view", &mut |buffer| view.write_slice(buffer, at).unwrap(), write);
        row("write", "pinned", &mut |buffer| memory.memory().write_slice(buffer, at).unwrap(), write);
    }
}

fn map(criterion: &mut Criterion) {
    let engine = engine(1 << 40, NOTHING);
    let map = Arc::clone(engine.memory().map());
    let mut group = criterion.benchmark_group("map");
    convert(&engine, 0, 0x1000, 0x1000, Side::Shared);
    let pages: Vec<_> = (0..512).map(|page| Gpa(page * 7 % 512 * PAGE_SIZE)).collect();
    group.throughput(Throughput::Elements(pages.len() as u64));
    group.bench_function("lookup/512", |bencher| {
        bencher.iter(|| pages.iter().filter(|gpa| map.get(**gpa) == Some(PageState::Shared)).count());
    });
    convert(&engine, 0, 0x1000, 0x1000, Side::Private);

    let runs =
        |range: GpaRange| map.runs(range).map(|(run, _)| run.pages()).fold(0, |count, pages| count + pages.min(1));
    let all = GpaRange::new(0, 1 << 40).unwrap();
    (0..1 << 40).step_by(4 << 20).for_each(|start| convert(&engine, 0, start, 2 << 20, Side::Shared));
    assert_eq!(runs(all), 1 << 19);
    group.throughput(Throughput::Elements(all.pages()));
    group.bench_function("runs/2MiB", |bencher| bencher.iter(|| runs(all)));

    let some = GpaRange::new(0, 1 << 30).unwrap();
    (0..1 << 30).step_by(2 << 20).for_each(|start| convert(&engine, 0, start, 2 << 20, Side::Private));
    (0..1 << 30).step_by(2 * PAGE_SIZE as usize).for_each(|start| convert(&engine, 0, start, PAGE_SIZE, Side::Shared));
    assert_eq!(runs(some), some.pages());
    group.throughput(Throughput::Elements(some.pages()));
    group.bench_function("runs/4KiB", |bencher| bencher.iter(|| runs(some)));
}

fn conversions(criterion: &mut Criterion) {
    let engine = engine(4 << 30, NOTHING);
    let mut group = criterion.benchmark_group("convert");
    group.bench_function("4KiB", |bencher| bencher.iter(|| there_and_back(&engine, 0, 0x5000, 4 << 10)));
    group.bench_function("2MiB", |bencher| bencher.iter(|| there_and_back(&engine, 0, 2 << 20, 2 << 20)));
    let run = |engine: &ConversionEngine<Takes>, thread: u32, iterations| {
        let start = u64::from(thread) << 30;
        (0..iterations).for_each(|_| there_and_back(engine, thread, start, PAGE_SIZE));
    };
    let ours = Arc::new(self::engine(4 << 30, CHEAPEST));
    let apart = Arc::new(self::engine(4 << 30, CHEAPEST));
    for (name, theirs) in [("two", Arc::clone(&ours)), ("apart", apart)] {
        let worker = Worker::new(move |iterations| run(&theirs, 1, iterations));
        let both = |iterations| {
            worker.start(iterations);
            run(&ours, 0, iterations);
            worker.wait();
        };
        paired(&mut group, ("convert", name, "threads"), both, |iterations| run(&ours, 0, iterations));
    }
}

fn main() {
    let criterion = Criterion::default().sample_size(50).warm_up_time(Duration::from_millis(300));
    let mut criterion = criterion.measurement_time(Duration::from_secs(2)).configure_from_args();
    accesses(&mut criterion);
    map(&mut criterion);
    conversions(&mut criterion);
    criterion.final_summary();
}
