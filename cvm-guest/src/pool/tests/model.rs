//! The allocator against a plain model of who has what.

use super::*;
use crate::{Error, Machine, Platform};
use cvm_core::Side;
use cvm_core::boot::{self, BootPage};
use cvm_core::doorbell::Transport;
use proptest::prelude::*;
use proptest::sample::Index;
use std::cell::RefCell;
use std::sync::atomic::AtomicU64;
use zerocopy::FromZeros;

const QUEUES: usize = 3;
const CHUNKS: usize = 3;

#[derive(Debug, Clone)]
enum Step {
    /// Makes a buffer: queue, length, bits of the mask, low bits.
    Map(usize, usize, u32, usize),
    /// Gives one back by its queue, or through the pool.
    Release(Index, bool),
    Receive(Index, usize),
    Lend(Index, usize, bool),
    Trim(usize),
    Grow(u64),
    Shrink,
    /// Drops a queue and makes it again.
    Renew(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop_oneof![4 => 0usize..600, 3 => 0usize..9000, 2 => 0usize..300_000, 1 => 0usize..3_000_000];
    prop_oneof![
        10 => (0..QUEUES, len, 0u32..20, any::<usize>()).prop_map(|(q, len, bits, low)| Step::Map(q, len, bits, low)),
        6 => (any::<Index>(), any::<bool>()).prop_map(|(which, here)| Step::Release(which, here)),
        2 => (any::<Index>(), 0usize..5000).prop_map(|(which, used)| Step::Receive(which, used)),
        2 => (any::<Index>(), 0usize..5000, any::<bool>()).prop_map(|(which, used, here)| Step::Lend(which, used, here)),
        1 => (0..QUEUES).prop_map(Step::Trim),
        1 => (0u64..4).prop_map(Step::Grow),
        1 => Just(Step::Shrink),
        1 => (0..QUEUES).prop_map(Step::Renew),
    ]
}

/// A host that converts whatever it is asked to, and remembers.
#[derive(Debug, Default)]
struct Host(RefCell<Vec<(GpaRange, Side)>>);

impl Machine for Host {
    unsafe fn write(&self, _: u16, _: u32) {}

    fn read(&self, _: u16) -> u32 {
        0
    }

    unsafe fn convert(&self, range: GpaRange, to: Side) -> u64 {
        self.0.borrow_mut().push((range, to));
        0
    }
}

fn platform(host: &Host) -> Platform<&Host> {
    let boot = BootPage { magic: boot::MAGIC, transport: Transport::Hypercall as u32, ..BootPage::new_zeroed() };
    Platform::new(&boot, host, |_| false).unwrap()
}

/// A buffer in flight.
struct Live {
    queue: usize,
    handle: FromDevice,
    len: usize,
    /// What it holds, unless a device was let loose on it.
    seed: u8,
}

fn contents(seed: u8, len: usize) -> Vec<u8> {
    vec![seed; len]
}

/// Chunks that one case after the other uses, each of them only once in a case.
#[derive(Default)]
struct Memory {
    chunks: Vec<NonNull<u8>>,
    used: usize,
}

impl Memory {
    fn region(&mut self, number: u64) -> SharedRegion {
        if self.used == self.chunks.len() {
            self.chunks.push(memory());
        }
        // SAFETY: the memory is there for good, and nobody uses it: the cases before are over.
        let region = unsafe { SharedRegion::mapped_at(self.chunks[self.used], range(number)) };
        self.used += 1;
        region.zero(0, CHUNK_LEN).unwrap();
        region
    }
}

thread_local! {
    static MEMORY: RefCell<Memory> = RefCell::default();
}

/// The bytes of the slot or run that a buffer has for itself.
fn extent(pool: &Pool, live: &Live) -> std::ops::Range<u64> {
    let offset = live.handle.0.offset();
    match pool.block_at(offset).unwrap().class() {
        RUN => {
            let first = offset >> BLOCK_SHIFT << BLOCK_SHIFT;
            first..(offset + live.len as u64).next_multiple_of(BLOCK_LEN as u64)
        }
        class => {
            let first = offset & !(slot_len(class) as u64 - 1);
            assert!(offset + live.len as u64 <= first + slot_len(class) as u64, "a buffer leaves its slot");
            first..first + slot_len(class) as u64
        }
    }
}

fn random() -> u64 {
    static STATE: AtomicU64 = AtomicU64::new(1);
    // SplitMix64.
    let mut x = STATE.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What every state must have in common.
fn check(pool: &Pool, queues: &[Queue<'_>], live: &[Live], limits: &[u64]) {
    let mut extents: Vec<_> = live.iter().map(|live| extent(pool, live)).collect();
    extents.sort_by_key(|extent| extent.start);
    for pair in extents.windows(2) {
        assert!(pair[0].end <= pair[1].start, "{pair:x?} overlap");
    }
    let usage = pool.usage();
    let cut: u64 = usage.classes.iter().map(|class| class.slots * class.slot_len as u64).sum();
    assert_eq!(usage.bytes, usage.empty + usage.runs + cut);
    assert_eq!(usage.bytes, usage.chunks as u64 * CHUNK);
    let taken: u64 = usage.classes.iter().map(|class| class.taken * class.slot_len as u64).sum();
    let in_flight: u64 = extents.iter().map(|extent| extent.end - extent.start).sum();
    // A window of one class may have a few larger slots, which `ready` takes for its own.
    let ready: u64 = queues.iter().map(|queue| queue.usage().ready).sum();
    assert!(taken + usage.runs >= in_flight + ready, "{usage:?}");
    let counted: u64 = queues.iter().map(|queue| queue.usage().taken).sum();
    assert_eq!(usage.taken, counted);
    assert!(usage.taken >= taken + usage.runs, "what was released from elsewhere counts until it is heard of");
    assert!(usage.high_water >= usage.taken && usage.strays == 0 && usage.waiting == 0);
    for (queue, limit) in queues.iter().zip(limits) {
        assert!(queue.usage().taken <= *limit);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]
    #[test]
    fn nothing_overlaps_nothing_is_lost_and_all_is_accounted_for(
        steps in prop::collection::vec(step(), 1..120),
        window in prop::sample::select(vec![0usize, 4096, 65536, 512 << 10]),
        limits in prop::array::uniform3(prop::sample::select(vec![64u64 << 10, 1 << 20, u64::MAX])),
        zero_on_release: bool,
        randomise: bool,
    ) {
        let random = randomise.then_some(random as fn() -> u64);
        let pool = bare(CHUNKS, QUEUES, PoolOptions { zero_on_release, random });
        let host = Host::default();
        let platform = platform(&host);
        let options = |queue: usize| QueueOptions { limit: limits[queue], window };
        let mut queues: Vec<_> = (0..QUEUES).map(|queue| pool.queue(options(queue)).unwrap()).collect();
        let mut live: Vec<Live> = Vec::new();
        let mut seed = 0u8;
        let mut memory = MEMORY.take();
        memory.used = 0;
        pool.add(memory.region(0)).unwrap();
        for step in steps {
            match step {
                Step::Map(queue, len, bits, low) => {
                    let mask = (1 << bits) - 1;
                    match queues[queue].from_device_at(len, Placement::offset(mask, low)) {
                        Ok(handle) => {
                            let gpa = pool.gpa(&handle).0;
                            prop_assert_eq!(gpa as usize & mask, low & mask);
                            prop_assert_eq!(pool.len(&handle), len);
                            if zero_on_release {
                                prop_assert!(seen(&pool, &handle).iter().all(|byte| *byte == 0));
                            }
                            seed = seed.wrapping_add(37);
                            put(&pool, &handle, &contents(seed, len));
                            live.push(Live { queue, handle, len, seed });
                        }
                        Err(Refusal::Impossible) => {
                            let least = (len + (low & mask)).max(mask + 1);
                            prop_assert!(mask >= BLOCK_LEN || least as u64 > limits[queue].min(1 << 20));
                        }
                        Err(Refusal::Limited) => prop_assert!(limits[queue] < u64::MAX),
                        Err(Refusal::Exhausted) => {}
                    }
                }
                Step::Release(which, here) if !live.is_empty() => {
                    let Live { queue, handle, len, seed } = live.swap_remove(which.index(live.len()));
                    prop_assert!(seen(&pool, &handle) == contents(seed, len));
                    if here { queues[queue].release(handle) } else { pool.release(handle) }
                }
                Step::Receive(which, used) if !live.is_empty() => {
                    let Live { queue, handle, len, seed } = live.swap_remove(which.index(live.len()));
                    let mut data = vec![0xcc; 5000];
                    let received = queues[queue].receive(handle, used, &mut data);
                    let copied = if used <= len { used } else { 0 };
                    prop_assert_eq!(received.is_ok(), used <= len);
                    prop_assert_eq!(&data[..copied], &contents(seed, copied)[..]);
                    prop_assert!(data[copied..].iter().all(|byte| *byte == 0xcc));
                }
                Step::Lend(which, used, here) if !live.is_empty() => {
                    let Live { queue, handle, len, seed } = live.swap_remove(which.index(live.len()));
                    match queues[queue].lend(handle, used) {
                        Ok(mut lent) => {
                            prop_assert_eq!(lent.remaining(), used);
                            let (skip, mut data) = (used / 3, vec![0; used - used / 3]);
                            lent.skip(skip).unwrap();
                            lent.read(&mut data).unwrap();
                            prop_assert_eq!(&data[..], &contents(seed, used)[skip..]);
                            prop_assert!(lent.read(&mut [0]).is_err());
                            if here { queues[queue].release(lent) }
                        }
                        Err(error) => {
                            prop_assert_eq!(error, Error::OutOfBounds { offset: 0, len: used, limit: len });
                        }
                    }
                }
                Step::Trim(queue) => {
                    queues[queue].trim();
                    prop_assert_eq!(queues[queue].usage().ready, 0);
                }
                Step::Grow(number) => {
                    let full = pool.chunks() == CHUNKS;
                    prop_assert_eq!(pool.add(memory.region(number)).is_err(), full);
                }
                Step::Shrink => {
                    let before = pool.usage();
                    // SAFETY: there is one pool here.
                    let range = unsafe { pool.shrink(&platform) }.unwrap();
                    let range = range.map(|range| (range, Side::Private));
                    prop_assert_eq!(range, host.0.borrow_mut().pop());
                    let gone = if range.is_some() { CHUNK } else { 0 };
                    prop_assert_eq!(pool.usage().bytes + gone, before.bytes);
                    prop_assert_eq!(pool.usage().empty + gone, before.empty);
                }
                Step::Renew(queue) => {
                    // The others have numbers of their own, so this one gets its own again.
                    let old = queues.remove(queue);
                    let taken = old.usage().taken - old.usage().ready;
                    drop(old);
                    queues.insert(queue, pool.queue(options(queue)).unwrap());
                    prop_assert!(queues[queue].usage().taken <= taken);
                }
                _ => {}
            }
            check(&pool, &queues, &live, &limits);
        }
        for Live { queue, handle, .. } in live {
            queues[queue].release(handle);
        }
        drop(queues);
        MEMORY.set(memory);
        let usage = pool.usage();
        prop_assert_eq!((usage.empty, usage.taken, usage.strays), (usage.bytes, 0, 0));
    }
}

#[test]
fn growing_shares_a_chunk_and_shrinking_makes_it_private() {
    let pool = bare(1, 1, PoolOptions::default());
    let host = Host::default();
    let platform = platform(&host);
    let (first, second) = (range(0), range(1));
    let odd = GpaRange::new(first.start().0 + PAGE_SIZE, CHUNK).unwrap();
    // SAFETY: nothing is ever mapped there, and nothing is accessed.
    unsafe {
        assert_eq!(pool.grow(&platform, odd), Err(Error::NotAChunk(odd)));
        pool.grow(&platform, first).unwrap();
        assert_eq!(pool.grow(&platform, second), Err(Error::PoolFull));
        assert_eq!(*host.0.borrow(), [(first, Side::Shared)]);
        let mut queue = pool.queue(QueueOptions::default()).unwrap();
        let buffer = queue.from_device(100).unwrap();
        assert_eq!(pool.shrink(&platform), Ok(None), "a slot is in use");
        queue.release(buffer);
        assert_eq!(pool.shrink(&platform), Ok(None), "slots are at hand");
        queue.trim();
        assert_eq!(pool.shrink(&platform), Ok(Some(first)));
        assert_eq!(queue.from_device(100), Err(Refusal::Exhausted));
        assert_eq!(host.0.borrow_mut().pop(), Some((first, Side::Private)));
        pool.grow(&platform, second).unwrap();
        assert_eq!(pool.chunks(), 1);
    }
}

/// A host that refuses.
#[derive(Debug)]
struct Refuser;

impl Machine for Refuser {
    unsafe fn write(&self, _: u16, _: u32) {}

    fn read(&self, _: u16) -> u32 {
        0
    }

    unsafe fn convert(&self, _: GpaRange, _: Side) -> u64 {
        22
    }
}

#[test]
fn a_chunk_that_the_host_refuses_is_none_and_its_record_is_free_again() {
    let pool = bare(1, 1, PoolOptions::default());
    let boot = BootPage { magic: boot::MAGIC, transport: Transport::Hypercall as u32, ..BootPage::new_zeroed() };
    let platform = Platform::new(&boot, Refuser, |_| false).unwrap();
    // SAFETY: nothing is accessed.
    let refused = unsafe { pool.grow(&platform, range(0)) };
    assert!(matches!(refused, Err(Error::NotConverted { .. })));
    assert_eq!(pool.usage(), bare(1, 1, PoolOptions::default()).usage());
    pool.add(region(0)).unwrap();
    // SAFETY: there is one pool here.
    assert!(unsafe { pool.shrink(&platform) }.is_err());
    assert_eq!(pool.chunks(), 0, "a chunk that may be shared is not used again");
}
