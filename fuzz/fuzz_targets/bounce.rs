//! Whatever drivers do with a bounce pool, against a plain model of it, while a host scribbles over all that is shared.
//!
//! A program runs on one of two pieces of shared memory. In the loud one the host writes as long as the program runs,
//! so that only what holds for any bytes can be checked. In the quiet one it writes when the program says so, and every
//! byte is known.

#![no_main]

#[path = "bounce/buffers.rs"]
mod buffers;
#[path = "bounce/memory.rs"]
mod memory;
#[path = "bounce/rings.rs"]
mod rings;

use cvm_core::boot::{self, BootPage};
use cvm_core::doorbell::Transport;
use cvm_core::{GpaRange, Side};
use cvm_guest::{
    CHUNK_LEN, ChunkRecord, Error, FromDevice, Lent, Machine, Platform, Pool, PoolOptions, Queue, QueueOptions,
    QueueRecord, Refusal, Ring, Sent, SharedRegion, ToDevice,
};
use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use memory::{LOUD, NEAR, Private, Shared, scribble};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, Waker};
use zerocopy::FromZeros;

const QUEUES: usize = 2;
/// How many chunks a pool may have, and how many there are to choose from: so there may be gaps.
const RECORDS: usize = 2;
const CHUNKS: usize = 3;
const MEMORY: usize = CHUNKS * CHUNK_LEN;
/// Where the host knows the memory.
const BASE: u64 = 0x4000_0000;
/// The most that a program sends or has room for at once.
const LONGEST: usize = 2 << 20;
/// The most steps of a program.
const STEPS: usize = 400;
/// The placements that a pool has.
const MOST_MASK: usize = 256 << 10;

/// What is there for all programs.
struct Stage {
    loud: Shared,
    quiet: Shared,
    /// What is in the quiet memory.
    expected: Vec<u8>,
    private: Private,
}

thread_local! {
    static STAGE: RefCell<Stage> = RefCell::new({
        let stage = Stage {
            loud: Shared::new(),
            quiet: Shared::new(),
            expected: vec![0; MEMORY],
            private: Private::new(LONGEST),
        };
        scribble(stage.loud);
        stage
    });
}

/// A host that converts whatever it is asked to.
struct Host;

impl Machine for Host {
    unsafe fn write(&self, _: u16, _: u32) {}

    fn read(&self, _: u16) -> u32 {
        0
    }

    unsafe fn convert(&self, _: GpaRange, _: Side) -> u64 {
        0
    }
}

static RANDOM: AtomicU64 = AtomicU64::new(0);

fn random() -> u64 {
    // SplitMix64.
    let mut x = RANDOM.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

enum Handle<'p> {
    Out(ToDevice),
    In(FromDevice),
    Lent(Lent<'p>),
}

/// A buffer in flight: of which queue, where, and what of it was not read yet.
struct Live<'p> {
    queue: usize,
    handle: Handle<'p>,
    place: Range<usize>,
    unread: Range<usize>,
}

/// A ring, and what it has in flight.
struct LiveRing<'p> {
    ring: Ring<'p>,
    place: Range<usize>,
    slot_len: usize,
    sent: usize,
    flying: VecDeque<(Sent, Range<usize>)>,
}

struct Program<'p, 'i> {
    given: Unstructured<'i>,
    pool: &'p Pool,
    zero_on_release: bool,
    options: [QueueOptions; QUEUES],
    queues: Vec<Queue<'p>>,
    live: Vec<Live<'p>>,
    rings: Vec<LiveRing<'p>>,
    /// Who has what: the end of each, by its beginning.
    extents: BTreeMap<usize, usize>,
    chunks: Vec<usize>,
    shared: Shared,
    private: &'i mut Private,
    /// Nothing if the host is loud.
    expected: Option<&'i mut [u8]>,
}

fn range(number: usize) -> GpaRange {
    GpaRange::new(BASE + (number * CHUNK_LEN) as u64, CHUNK_LEN as u64).unwrap()
}

impl<'p> Program<'p, '_> {
    fn len(&mut self) -> Result<usize> {
        let most = *self.given.choose(&[64, 600, 600, 9000, 9000, 300_000, 1 << 20])?;
        self.given.int_in_range(0..=most)
    }

    /// A length that a device claims to have written.
    fn used(&mut self, len: usize) -> Result<usize> {
        Ok(match self.given.int_in_range(0u8..=7)? {
            0 => usize::MAX,
            1 => len + 1,
            2 => len,
            3 => 1 << self.given.int_in_range(0u8..=63)?,
            4 => len.saturating_sub(1),
            _ => self.given.int_in_range(0..=len)?,
        })
    }

    fn queue(&mut self) -> Result<usize> {
        self.given.int_in_range(0..=QUEUES - 1)
    }

    /// One of the buffers in flight.
    fn pick(&mut self) -> Result<Option<Live<'p>>> {
        if self.live.is_empty() {
            return Ok(None);
        }
        let index = self.given.choose_index(self.live.len())?;
        Ok(Some(self.live.swap_remove(index)))
    }

    /// Where in the memory an address is; the buffer has to be in one chunk, or in chunks that follow each other.
    fn place(&self, gpa: u64, len: usize) -> Range<usize> {
        let start = gpa.checked_sub(BASE).expect("an address below the pool") as usize;
        let place = start..start + len;
        for chunk in start / CHUNK_LEN..place.end.div_ceil(CHUNK_LEN).max(start / CHUNK_LEN + 1) {
            assert!(self.chunks.contains(&chunk), "{place:x?} is not in the pool");
        }
        place
    }

    /// Notes who has what, which nobody else may have.
    fn take(&mut self, place: &Range<usize>) {
        // A buffer of no bytes has an address of its own.
        let end = place.end.max(place.start + 1);
        let before = self.extents.range(..end).next_back();
        assert!(before.is_none_or(|(_, before)| *before <= place.start), "{place:x?} overlaps {before:x?}");
        self.extents.insert(place.start, end);
        NEAR.store(place.start, Relaxed);
    }

    /// Notes that a place is nobody's any more.
    fn give(&mut self, place: &Range<usize>) {
        assert!(self.extents.remove(&place.start).is_some());
        if let (true, Some(expected)) = (self.zero_on_release, &mut self.expected) {
            expected[place.clone()].fill(0);
        }
        self.look_around(place);
    }

    /// Notes what was copied to a place.
    fn sent(&mut self, place: &Range<usize>, parts: &[&[u8]]) {
        if let Some(expected) = &mut self.expected {
            expected[place.clone()].copy_from_slice(&parts.concat());
        }
        self.look_around(place);
    }

    /// Compares a place and what is next to it with what ought to be there.
    fn look_around(&self, place: &Range<usize>) {
        if let Some(expected) = &self.expected {
            let around = place.start.saturating_sub(64)..(place.end + 64).min(MEMORY);
            assert!(self.shared.read(around.clone()) == expected[around], "around {place:x?}");
        }
    }

    /// The host writes, whatever the program does.
    fn host_writes(&mut self, at: usize, bytes: &[u8]) {
        self.shared.write(at, bytes);
        if let Some(expected) = &mut self.expected {
            expected[at..at + bytes.len()].copy_from_slice(bytes);
        }
    }

    fn grow(&mut self) -> Result<()> {
        let number = self.given.int_in_range(0..=CHUNKS - 1)?;
        if self.chunks.contains(&number) {
            return Ok(());
        }
        // SAFETY: the memory is mapped for good and has no references into it.
        let region = |range| unsafe { SharedRegion::mapped_at(self.shared.pointer(number * CHUNK_LEN), range) };
        let half = GpaRange::new(range(number).start().0, CHUNK_LEN as u64 / 2).unwrap();
        assert_eq!(self.pool.add(region(half)), Err(Error::NotAChunk(half)));
        match self.pool.add(region(range(number))) {
            Ok(()) => self.chunks.push(number),
            Err(error) => assert_eq!((error, self.chunks.len()), (Error::PoolFull, RECORDS)),
        }
        Ok(())
    }

    /// Returns whether a chunk was taken out.
    fn shrink(&mut self) -> bool {
        let boot = BootPage { magic: boot::MAGIC, transport: Transport::Hypercall as u32, ..BootPage::new_zeroed() };
        let platform = Platform::new(&boot, Host, |_| false).unwrap();
        // SAFETY: there is one pool here.
        let Some(gone) = unsafe { self.pool.shrink(&platform) }.unwrap() else {
            return false;
        };
        let place = self.chunks.iter().position(|number| range(*number) == gone).expect("a chunk of the pool");
        let number = self.chunks.swap_remove(place);
        let chunk = number * CHUNK_LEN..(number + 1) * CHUNK_LEN;
        assert!(self.extents.range(chunk.clone()).next().is_none(), "{chunk:x?} is in use");
        true
    }

    fn wait(&mut self) -> Result<()> {
        let (queue, len) = (self.queue()?, self.len()?);
        match self.queues[queue].poll_room(len, &mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(())) => {
                let buffer = self.queues[queue].from_device(len).expect("there is room");
                let place = self.place(self.pool.gpa(&buffer).0, len);
                self.take(&place);
                self.queues[queue].release(buffer);
                self.give(&place);
            }
            Poll::Ready(Err(refusal)) => {
                let most = self.options[queue].limit.min((RECORDS * CHUNK_LEN) as u64);
                assert!(refusal == Refusal::Impossible && len as u64 > most);
            }
            Poll::Pending => {}
        }
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        match self.given.int_in_range(0u8..=31)? {
            0..=10 => self.map()?,
            11..=15 => {
                if let Some(buffer) = self.pick()? {
                    self.release(buffer)?;
                }
            }
            16..=18 => self.receive()?,
            19..=21 => self.lend()?,
            22..=24 => self.use_ring()?,
            25 => self.make_ring()?,
            26 => {
                let queue = self.queue()?;
                self.queues[queue].trim();
                assert_eq!(self.queues[queue].usage().ready, 0);
            }
            27 => self.grow()?,
            28 => {
                self.shrink();
            }
            29 => self.wait()?,
            30 => {
                // The other one has its number, so this one gets its own again.
                let queue = self.queue()?;
                drop(self.queues.remove(queue));
                self.queues.insert(queue, self.pool.queue(self.options[queue]).unwrap());
            }
            _ => {
                let (at, len) = (self.given.int_in_range(0..=MEMORY - 4096)?, self.given.int_in_range(0..=4096)?);
                let bytes = self.private.source(3, len, false);
                self.host_writes(at, bytes);
            }
        }
        Ok(())
    }

    fn check(&self) {
        let usage = self.pool.usage();
        let taken: u64 = self.queues.iter().map(|queue| queue.usage().taken).sum();
        let in_flight: usize = self.extents.iter().map(|(start, end)| end - start).sum();
        assert_eq!((usage.taken, usage.strays, usage.chunks), (taken, 0, self.chunks.len()), "{usage:?}");
        assert!(in_flight as u64 <= usage.taken && usage.taken <= usage.high_water, "{usage:?}");
        for (queue, options) in self.queues.iter().zip(&self.options) {
            assert!(queue.usage().taken <= options.limit);
        }
    }

    /// Gives everything back: nobody may have anything then.
    fn end(mut self) {
        while let Some(live) = self.live.pop() {
            self.release(live).unwrap();
        }
        while let Some(LiveRing { ring, place, .. }) = self.rings.pop() {
            drop(ring);
            self.give(&place);
        }
        // Those who take the numbers of queues hear of what came back after these were gone.
        self.queues.clear();
        self.queues.extend(self.options.map(|options| self.pool.queue(options).unwrap()));
        self.queues.clear();
        let usage = self.pool.usage();
        assert_eq!((usage.empty, usage.bytes), (usage.bytes, (self.chunks.len() * CHUNK_LEN) as u64), "{usage:?}");
        assert_eq!((usage.taken, usage.waiting, usage.strays), (0, 0, 0), "{usage:?}");
        while self.shrink() {}
        assert!(self.chunks.is_empty() && self.extents.is_empty() && self.pool.chunks() == 0);
        if let Some(expected) = &self.expected {
            assert!(self.shared.read(0..MEMORY) == **expected, "somebody wrote where nothing is");
        }
    }
}

fn run(stage: &mut Stage, bytes: &[u8]) -> Result<()> {
    let mut given = Unstructured::new(bytes);
    let (loud, zero_on_release, random_slots): (bool, bool, bool) = given.arbitrary()?;
    RANDOM.store(0, Relaxed);
    let mut option = || -> Result<QueueOptions> {
        let limit = *given.choose(&[u64::MAX, 64 << 10, 1 << 20])?;
        Ok(QueueOptions { limit, window: *given.choose(&[0, 4096, 64 << 10, 512 << 10])? })
    };
    let options = [option()?, option()?];
    let chunks: *mut [ChunkRecord] = Box::into_raw(Box::new([const { ChunkRecord::new() }; RECORDS]));
    let queues: *mut [QueueRecord] = Box::into_raw(Box::new([const { QueueRecord::new() }; QUEUES]));
    {
        let of_pool = PoolOptions { zero_on_release, random: random_slots.then_some(random as fn() -> u64) };
        // SAFETY: they are there until the pool and all that is made of it are gone, below.
        let pool = unsafe { Pool::new(&*chunks, &*queues, of_pool) };
        let mut program = Program {
            given,
            pool: &pool,
            zero_on_release,
            options,
            queues: options.iter().map(|options| pool.queue(*options).unwrap()).collect(),
            live: vec![],
            rings: vec![],
            extents: BTreeMap::new(),
            chunks: vec![],
            shared: if loud { stage.loud } else { stage.quiet },
            private: &mut stage.private,
            expected: (!loud).then_some(&mut stage.expected),
        };
        LOUD.store(loud, Relaxed);
        program.grow()?;
        for _ in 0..STEPS {
            if program.given.is_empty() || program.step().is_err() {
                break;
            }
            program.check();
        }
        program.end();
        LOUD.store(false, Relaxed);
    }
    // SAFETY: they were boxes, and nobody refers to them any more.
    unsafe { drop((Box::from_raw(chunks), Box::from_raw(queues))) };
    Ok(())
}

fuzz_target!(|bytes: &[u8]| {
    // What ends amid a decision is no program, or one that ends there.
    let _ = STAGE.with_borrow_mut(|stage| run(stage, bytes));
});
