//! Guests that convert while devices read and write, on threads of their own, over memory that both sides have in common:
//! what a device does to a page after it has become private shows.

use cvm_core::memory::{ConversionEngine, ConverterError, PageState, PageStateMap, SharedMemory, Sides, Slots};
use cvm_core::{Answer, BoxError, ConversionRequest, GpaRange, PAGE_SIZE, Side};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap, Le16, Le32};

/// How many guests there are, each with a device, and how many pages each has.
const GUESTS: u64 = 2;
const PAGES: u64 = 16;

/// What fills a page while it is private, in every word.
const PRIVATE: u64 = 0x5ec2_e75e_c2e7_5ec2;

/// How long a step may take before the test fails: far longer than a loaded machine needs.
const LIMIT: Duration = Duration::from_secs(300);

/// How long it goes on: `$CVM_STRESS_SECONDS`, or a moment.
fn length() -> Duration {
    let seconds = std::env::var("CVM_STRESS_SECONDS").ok();
    Duration::from_secs(seconds.map_or(2, |seconds| seconds.parse().expect("$CVM_STRESS_SECONDS is a number")))
}

/// One memory for both sides. The guest marks what is private as it takes it, and looks at its marks when it gives it up.
struct InPlace {
    memory: GuestMemoryMmap,
}

impl InPlace {
    fn words(range: GpaRange) -> impl Iterator<Item = GuestAddress> {
        (range.start().0..range.end().0).step_by(size_of::<u64>()).map(GuestAddress)
    }
}

impl Sides for InPlace {
    fn show(&self, range: GpaRange, side: Side) -> Result<(), ConverterError> {
        for at in Self::words(range) {
            match side {
                Side::Private => self.memory.write_obj(PRIVATE, at).unwrap(),
                Side::Shared => {
                    assert_eq!(self.memory.read_obj::<u64>(at).unwrap(), PRIVATE, "a device wrote to private memory");
                    self.memory.write_obj(0u64, at).unwrap();
                }
            }
        }
        Ok(())
    }

    fn discard(&self, _: GpaRange, _: Side) -> Result<(), BoxError> {
        Ok(())
    }

    fn poison(&self, range: GpaRange) -> Result<(), BoxError> {
        panic!("{range} is lost, and nothing failed");
    }

    fn most_runs(&self) -> u64 {
        u64::MAX
    }
}

type Engine = ConversionEngine<InPlace>;

fn engine() -> Engine {
    let all = GpaRange::from_pages(0, GUESTS * PAGES).unwrap();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), all.len() as usize)]).unwrap();
    let map = Arc::new(PageStateMap::new(Slots::new(&[all]).unwrap()).unwrap());
    let view = SharedMemory::new(memory.clone(), map).unwrap();
    InPlace::words(all).for_each(|at| memory.write_obj(PRIVATE, at).unwrap());
    ConversionEngine::new(InPlace { memory }, view)
}

fn convert(engine: &Engine, guest: u64, pages: GpaRange, to: Side) {
    let request = ConversionRequest::from_guest(guest as u32, pages.start().0, pages.pages(), to);
    // Devices hold the view for a moment at a time, but a loaded machine may leave them there for long.
    let start = Instant::now();
    while start.elapsed() < LIMIT {
        engine.ask(request);
        match engine.convert(&request) {
            conversion if conversion.answer() == Answer::Done => return,
            conversion => assert_eq!(conversion.answer(), Answer::Retry, "{:?}", conversion.cause()),
        }
    }
    panic!("{pages} could not be converted to {to}");
}

/// Where a guest's ring is: its first page, shared for as long as there are requests.
struct Ring {
    base: u64,
}

const QUEUE: u16 = 8;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;

impl Ring {
    fn queue(&self) -> Queue {
        let mut queue = Queue::new(QUEUE).unwrap();
        let address = |offset: u64| (Some((self.base + offset) as u32), Some(((self.base + offset) >> 32) as u32));
        let (low, high) = address(0);
        queue.set_desc_table_address(low, high);
        let (low, high) = address(AVAILABLE);
        queue.set_avail_ring_address(low, high);
        let (low, high) = address(USED);
        queue.set_used_ring_address(low, high);
        queue.set_ready(true);
        queue
    }
}

/// A device: for each notification it answers all requests, by adding up the words of the first buffer into the second.
fn serve(memory: SharedMemory, ring: Ring, notified: mpsc::Receiver<()>, done: mpsc::Sender<()>) {
    let mut queue = ring.queue();
    while notified.recv().is_ok() {
        loop {
            let view = memory.memory();
            let Some(mut chain) = queue.pop_descriptor_chain(&*view) else { break };
            let head = chain.head_index();
            let (question, answer) = (chain.next().unwrap(), chain.next().unwrap());
            let mut sum = 0u64;
            for at in (0..u64::from(question.len())).step_by(size_of::<u64>()) {
                let word: u64 = view.read_obj(GuestAddress(question.addr().0 + at)).unwrap();
                assert_ne!(word, PRIVATE, "a device saw private memory");
                sum = sum.wrapping_add(word);
            }
            view.write_obj(sum, answer.addr()).unwrap();
            queue.add_used(&*view, head, 8).unwrap();
        }
        done.send(()).unwrap();
    }
}

/// A guest: shares its pages, has a device add up what it wrote, takes them back, all over again.
fn guest(engine: &Engine, guest: u64, until: Instant, roamed: &AtomicBool, requests: &AtomicU64) {
    let base = guest * PAGES * PAGE_SIZE;
    let all = GpaRange::from_pages(base, PAGES).unwrap();
    let memory = &engine.converter().memory;
    let mut round = 0u64;
    while Instant::now() < until || !roamed.load(Ordering::Relaxed) && Instant::now() < until + LIMIT {
        convert(engine, guest, all, Side::Shared);
        let (notify, notified) = mpsc::channel();
        let (done, is_done) = mpsc::channel();
        let view = engine.memory().named(format!("device {guest}"));
        std::thread::scope(|scope| {
            scope.spawn(move || serve(view, Ring { base }, notified, done));
            for index in 0..8u16 {
                round += 1;
                let (question, answer) = (base + (2 + round % 8) * PAGE_SIZE, base + 12 * PAGE_SIZE);
                let words = PAGE_SIZE / 8;
                (0..words).for_each(|at| memory.write_obj(round + at, GuestAddress(question + at * 8)).unwrap());
                let descriptor = |addr, len, flags, next| RawDescriptor::from(Descriptor::new(addr, len, flags, next));
                memory.write_obj(descriptor(question, PAGE_SIZE as u32, 1, 1), GuestAddress(base)).unwrap();
                memory.write_obj(descriptor(answer, 8, 2, 0), GuestAddress(base + 16)).unwrap();
                let entry = base + AVAILABLE + 4 + u64::from(index % QUEUE) * 2;
                memory.write_obj(Le16::from(0), GuestAddress(entry)).unwrap();
                memory.write_obj(Le16::from(index + 1), GuestAddress(base + AVAILABLE + 2)).unwrap();
                notify.send(()).unwrap();
                is_done.recv_timeout(LIMIT).expect("a request was lost");
                let used: Le16 = memory.read_obj(GuestAddress(base + USED + 2)).unwrap();
                let head: Le32 = memory.read_obj(GuestAddress(base + USED + 4 + u64::from(index % QUEUE) * 8)).unwrap();
                assert_eq!((used.to_native(), head.to_native()), (index + 1, 0));
                let sum: u64 = memory.read_obj(GuestAddress(answer)).unwrap();
                assert_eq!(sum, words * round + words * (words - 1) / 2, "the device added up something else");
                requests.fetch_add(1, Ordering::Relaxed);
                // Pages that no request uses come and go meanwhile.
                let spare = GpaRange::from_pages(base + 13 * PAGE_SIZE, 1 + round % 3).unwrap();
                convert(engine, guest, spare, Side::Private);
                convert(engine, guest, spare, Side::Shared);
            }
            drop(notify);
        });
        convert(engine, guest, all, Side::Private);
    }
}

/// A device that reads and writes wherever it can. It sets `roamed` once it has seen a page and was refused another.
fn roam(engine: &Engine, stop: &AtomicBool, roamed: &AtomicBool) {
    let memory = engine.memory().named("roaming device");
    let (mut seen, mut refused, mut at) = (false, false, 0u64);
    while !stop.load(Ordering::Relaxed) {
        // Spare pages only, as others are somebody's requests.
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (guest, page, word) = ((at >> 33) % GUESTS, 13 + (at >> 40) % 3, (at >> 50) % 512);
        let address = GuestAddress((guest * PAGES + page) * PAGE_SIZE + word * 8);
        let view = memory.memory();
        match view.read_obj::<u64>(address) {
            Ok(found) => {
                assert_ne!(found, PRIVATE, "a device saw private memory");
                // The page cannot become private now, but a conversion that waits for this may have taken it out of the view.
                let _ = view.write_obj(at | 1, address);
                seen = true;
            }
            Err(_) => refused = true,
        }
        roamed.fetch_or(seen && refused, Ordering::Relaxed);
    }
}

#[test]
fn no_device_sees_or_changes_what_is_private_and_no_request_is_lost() {
    let engine = engine();
    let (stop, roamed, requests) = (AtomicBool::new(false), AtomicBool::new(false), AtomicU64::new(0));
    let until = Instant::now() + length();
    std::thread::scope(|scope| {
        let roaming = scope.spawn(|| roam(&engine, &stop, &roamed));
        let guests: Vec<_> = (0..GUESTS)
            .map(|number| {
                let (engine, roamed, requests) = (&engine, &roamed, &requests);
                scope.spawn(move || guest(engine, number, until, roamed, requests))
            })
            .collect();
        let guests: Vec<_> = guests.into_iter().map(|guest| guest.join()).collect();
        stop.store(true, Ordering::Relaxed);
        assert!(guests.iter().all(Result::is_ok), "a guest has failed");
        roaming.join().unwrap();
    });
    assert!(requests.into_inner() > 0 && roamed.into_inner(), "the roaming device saw no page, or was never refused");
    assert_eq!(engine.memory().map().count(PageState::Private), GUESTS * PAGES);
    let all = GpaRange::from_pages(0, GUESTS * PAGES).unwrap();
    let kept = |at| engine.converter().memory.read_obj::<u64>(at).unwrap() == PRIVATE;
    assert!(InPlace::words(all).all(kept), "private memory was changed");
}
