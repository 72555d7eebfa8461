//! Whatever drivers do with a bounce pool, against a plain model of it, while a host scribbles over all that is shared.
//!
//! A program runs on one of two pieces of shared memory. In the loud one the host writes as long as the program runs, so
//! that only what holds for any bytes can be checked. In the quiet one it writes when the program says so, and every
//! byte is known.

#![no_main]

#[path = "bounce/memory.rs"]
mod memory;

use cvm_core::boot::{self, BootPage};
use cvm_core::doorbell::Transport;
use cvm_core::{GpaRange, Side};
use cvm_guest::{
    CHUNK_LEN, ChunkRecord, Error, FromDevice, Lent, Machine, Placement, Platform, Pool, PoolOptions, Queue,
    QueueOptions, QueueRecord, Refusal, Ring, Sent, SharedRegion, ToDevice,
};
use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use memory::{LOUD, NEAR, Private, Shared, scribble};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::hint::black_box;
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
            loud: Shared::new(MEMORY),
            quiet: Shared::new(MEMORY),
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
    fn write(&self, _: u16, _: u32) {}

    fn read(&self, _: u16) -> u32 {
        0
    }

    fn convert(&self, _: GpaRange, _: Side) -> u64 {
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

fn out_of_bounds<T>(result: core::result::Result<T, Error>) -> bool {
    matches!(result, Err(Error::OutOfBounds { .. }))
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

    /// Where in the memory an address is; all of the buffer has to be in one chunk, or in chunks that follow each other.
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

    fn map(&mut self) -> Result<()> {
        let (pool, queue, kind) = (self.pool, self.queue()?, self.given.int_in_range(0u8..=5)?);
        let (mut len, at_end) = (self.len()?, self.given.arbitrary()?);
        let bits = if self.given.ratio(1, 3)? { self.given.int_in_range(0u32..=20)? } else { 0 };
        let (mask, low) = ((1usize << bits) - 1, if bits == 0 { 0 } else { self.given.arbitrary::<usize>()? });
        let placement = Placement::offset(mask, low);
        let mut parts: Vec<&[u8]> = vec![];
        let made = match kind {
            0..=1 => {
                parts.push(self.private.source(queue, len, at_end));
                self.queues[queue].to_device_at(parts[0], placement).map(Handle::Out)
            }
            2 if bits == 0 => {
                let most = len;
                len = 0;
                for number in 0..self.given.int_in_range(0..=5)? {
                    let part = self.given.int_in_range(0..=most - len)?;
                    parts.push(self.private.source(number, part, number % 2 == 0));
                    len += part;
                }
                self.queues[queue].gather(&parts).map(Handle::Out)
            }
            _ => {
                len = if self.given.ratio(1, 30)? { usize::MAX - self.given.int_in_range(0..=CHUNK_LEN)? } else { len };
                self.queues[queue].from_device_at(len, placement).map(Handle::In)
            }
        };
        let handle = match made {
            Ok(handle) => handle,
            Err(refusal) => {
                let least = len.saturating_add(low & mask).max(mask + 1) as u64;
                match refusal {
                    Refusal::Impossible => assert!(
                        mask >= MOST_MASK || least > self.options[queue].limit.min((RECORDS * CHUNK_LEN) as u64),
                        "{len:#x} bytes at {mask:#x}"
                    ),
                    Refusal::Limited => assert!(self.options[queue].limit < u64::MAX),
                    Refusal::Exhausted => {}
                }
                return Ok(());
            }
        };
        let (gpa, known) = match &handle {
            Handle::Out(buffer) => (pool.gpa(buffer), pool.len(buffer)),
            Handle::In(buffer) => (pool.gpa(buffer), pool.len(buffer)),
            Handle::Lent(_) => unreachable!("nothing was lent"),
        };
        assert_eq!((gpa.0 as usize & mask, known), (low & mask, len));
        let place = self.place(gpa.0, len);
        self.take(&place);
        match &handle {
            Handle::Out(_) => self.sent(&place, &parts),
            _ => self.look_around(&place),
        }
        self.live.push(Live { queue, handle, unread: place.clone(), place });
        Ok(())
    }

    /// Gives a buffer back in one of all ways.
    fn release(&mut self, buffer: Live<'p>) -> Result<()> {
        let how = self.given.int_in_range(0u8..=4)?;
        let queue = if how == 0 { 1 - buffer.queue } else { buffer.queue };
        match (buffer.handle, how) {
            (Handle::Out(buffer), 1) => self.pool.release(buffer),
            (Handle::Out(buffer), _) => self.queues[queue].release(buffer),
            (Handle::In(buffer), 1) => self.pool.release(buffer),
            (Handle::In(buffer), _) => self.queues[queue].release(buffer),
            (Handle::Lent(buffer), 1) => self.pool.release(buffer),
            (Handle::Lent(buffer), 2) => drop(buffer),
            (Handle::Lent(buffer), _) => self.queues[queue].release(buffer),
        }
        self.give(&buffer.place);
        Ok(())
    }

    fn receive(&mut self) -> Result<()> {
        let Some(Live { queue, handle, place, unread }) = self.pick()? else { return Ok(()) };
        let Handle::In(buffer) = handle else {
            return self.release(Live { queue, handle, place, unread });
        };
        NEAR.store(place.start, Relaxed);
        let used = self.used(place.len())?;
        // The private buffer may be shorter than what the device has written.
        let room = match self.given.int_in_range(0u8..=3)? {
            0 => self.given.int_in_range(0..=place.len())?,
            _ => used.min(place.len()) + self.given.int_in_range(0..=100usize)?,
        };
        let by = if self.given.ratio(1, 4)? { 1 - queue } else { queue };
        let fits = used <= place.len() && used <= room;
        let (at_end, queue) = (self.given.arbitrary()?, &mut self.queues[by]);
        let received = self.private.receive(room.min(LONGEST), at_end, |data| {
            let received = queue.receive(buffer, used, data);
            assert_eq!((received.is_ok(), out_of_bounds(received)), (fits, !fits));
            if fits { used } else { 0 }
        });
        if let Some(expected) = &self.expected {
            assert!(received == expected[place.start..][..received.len()]);
        }
        self.give(&place);
        Ok(())
    }

    fn lend(&mut self) -> Result<()> {
        let Some(Live { queue, handle, place, unread }) = self.pick()? else { return Ok(()) };
        let Handle::In(buffer) = handle else {
            self.live.push(Live { queue, handle, place, unread });
            return self.read_lent();
        };
        let used = self.used(place.len())?;
        let lent = self.queues[queue].lend(buffer, used);
        match lent {
            Ok(lent) => {
                assert_eq!((lent.remaining(), self.pool.len(&lent)), (used, place.len()));
                assert!(used <= place.len());
                let unread = place.start..place.start + used;
                self.live.push(Live { queue, handle: Handle::Lent(lent), place, unread });
                self.read_lent()
            }
            Err(error) => {
                assert_eq!(error, Error::OutOfBounds { offset: 0, len: used, limit: place.len() });
                assert!(used > place.len());
                self.give(&place);
                Ok(())
            }
        }
    }

    /// Reads some of what was lent last, if that was the last thing that happened.
    fn read_lent(&mut self) -> Result<()> {
        let Some(mut live) = self.live.pop() else { return Ok(()) };
        if let Handle::Lent(lent) = &mut live.handle {
            NEAR.store(live.unread.start, Relaxed);
            for _ in 0..self.given.int_in_range(0..=4)? {
                match self.given.int_in_range(0u8..=4)? {
                    0 => {
                        let len = self.used(live.unread.len())?;
                        let skipped = lent.skip(len);
                        assert_eq!((skipped.is_ok(), out_of_bounds(skipped)), valid(len, &live.unread));
                        if skipped.is_ok() {
                            live.unread.start += len;
                        }
                    }
                    1 => self.read_value::<1>(lent, &mut live.unread)?,
                    2 => self.read_value::<12>(lent, &mut live.unread)?,
                    3 => self.read_value::<64>(lent, &mut live.unread)?,
                    _ => {
                        let len = self.used(live.unread.len())?;
                        self.read(lent, &mut live.unread, len)?;
                    }
                }
                assert_eq!(lent.remaining(), live.unread.len());
            }
        }
        self.live.push(live);
        Ok(())
    }

    fn read(&mut self, lent: &mut Lent<'p>, unread: &mut Range<usize>, len: usize) -> Result<()> {
        // There is no more private memory than that.
        let len = len.min(LONGEST);
        let at_end = self.given.arbitrary()?;
        let read = self.private.receive(len, at_end, |data| {
            let read = lent.read(data);
            assert_eq!((read.is_ok(), out_of_bounds(read)), valid(len, unread));
            if read.is_ok() { len } else { 0 }
        });
        if let Some(expected) = &self.expected {
            assert!(read == expected[unread.start..][..read.len()]);
        }
        unread.start += read.len();
        Ok(())
    }

    /// Reads a header, which the host changes at once; and then as much as the header says.
    fn read_value<const N: usize>(&mut self, lent: &mut Lent<'p>, unread: &mut Range<usize>) -> Result<()> {
        let value = lent.read_value::<[u8; N]>();
        assert_eq!((value.is_ok(), out_of_bounds(value)), valid(N, unread));
        let Ok(value) = value else { return Ok(()) };
        let kept = black_box(value);
        if let Some(expected) = &self.expected {
            assert_eq!(value, expected[unread.start..][..N]);
        }
        self.host_writes(unread.start, &kept.map(|byte| !byte));
        assert_eq!(black_box(&value), &kept, "the guest's own copy has changed");
        unread.start += N;
        if let Some(claimed) = value.first_chunk().copied().map(u32::from_ne_bytes) {
            self.read(lent, unread, claimed as usize % 10_000)?;
        }
        Ok(())
    }

    fn make_ring(&mut self) -> Result<()> {
        let queue = self.queue()?;
        let (slots, slot_len) = (self.given.int_in_range(0..=70usize)?, self.given.int_in_range(0..=9000usize)?);
        let all = slots.max(1).next_power_of_two() * slot_len.max(64).next_power_of_two();
        let mut ring = match Ring::new(&mut self.queues[queue], slots, slot_len) {
            Ok(ring) => ring,
            Err(Refusal::Impossible) => {
                assert!(all > MOST_MASK || all as u64 > self.options[queue].limit);
                return Ok(());
            }
            Err(_) => return Ok(()),
        };
        let first = ring.send(&[]).unwrap();
        let (gpa, len) = ring.segment(&first);
        assert_eq!(len, 0);
        ring.release(first).unwrap();
        let place = self.place(gpa.0, all);
        self.take(&place);
        let slot_len = slot_len.max(64).next_power_of_two();
        self.rings.push(LiveRing { ring, place, slot_len, sent: 1, flying: VecDeque::new() });
        Ok(())
    }

    fn use_ring(&mut self) -> Result<()> {
        if self.rings.is_empty() {
            return self.make_ring();
        }
        let index = self.given.choose_index(self.rings.len())?;
        let mut ring = self.rings.swap_remove(index);
        let slots = ring.place.len() / ring.slot_len;
        match self.given.int_in_range(0u8..=8)? {
            0 => {
                // The device is done with all packets.
                let LiveRing { ring, place, .. } = ring;
                drop(ring);
                self.give(&place);
                return Ok(());
            }
            1..=4 => {
                let len = self.used(ring.slot_len)?.min(LONGEST);
                let packet = self.private.source(ring.sent, len, self.given.arbitrary()?);
                let at = ring.place.start + ring.sent % slots * ring.slot_len;
                NEAR.store(at, Relaxed);
                match ring.ring.send(packet) {
                    Ok(sent) => {
                        let place = at..at + len;
                        assert_eq!(ring.ring.segment(&sent), (cvm_core::Gpa(BASE + at as u64), len as u32));
                        assert!(len <= ring.slot_len && ring.flying.len() < slots);
                        self.sent(&place, &[packet]);
                        ring.flying.push_back((sent, place));
                        ring.sent += 1;
                    }
                    Err(Refusal::Impossible) => assert!(len > ring.slot_len),
                    Err(refusal) => assert_eq!((refusal, ring.flying.len()), (Refusal::Exhausted, slots)),
                }
            }
            _ if ring.flying.is_empty() => {}
            _ => {
                let which = self.given.choose_index(ring.flying.len())?;
                let (sent, place) = ring.flying.remove(which).expect("it is there");
                self.look_around(&place);
                match ring.ring.release(sent) {
                    Ok(()) => assert_eq!(which, 0),
                    Err(sent) => {
                        assert_ne!(which, 0);
                        ring.flying.insert(which, (sent, place));
                    }
                }
            }
        }
        assert_eq!(ring.ring.in_flight() as usize, ring.flying.len());
        self.rings.push(ring);
        Ok(())
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
        let platform = Platform::new(&boot, Host).unwrap();
        // SAFETY: there is one pool here.
        let Some(gone) = unsafe { self.pool.shrink(&platform) }.unwrap() else { return false };
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

/// Whether so many bytes are there, and whether an error says that they are not.
fn valid(len: usize, unread: &Range<usize>) -> (bool, bool) {
    (len <= unread.len(), len > unread.len())
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
