//! Copies that end where memory ends: allocations have just as many bytes, so a memory checker sees one more.

#![allow(unsafe_code, reason = "memory of the test's own stands for a shared chunk")]

use cvm_core::{Gpa, GpaRange, PAGE_SIZE};
use cvm_guest::{CHUNK_LEN, ChunkRecord, Pool, PoolOptions, QueueOptions, QueueRecord, SharedRegion};
use std::alloc::{Layout, alloc_zeroed};
use std::ptr::NonNull;

static CHUNKS: [ChunkRecord; 1] = [const { ChunkRecord::new() }; _];
static QUEUES: [QueueRecord; 1] = [const { QueueRecord::new() }; _];

/// Shared memory of so many bytes, for good: as the guest has it, and as the host does.
fn regions(len: usize) -> [SharedRegion; 2] {
    let layout = Layout::from_size_align(len, PAGE_SIZE as usize).unwrap();
    // SAFETY: the layout has bytes.
    let base = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap();
    let range = GpaRange::new(0x4000_0000, len as u64).unwrap();
    // SAFETY: it is there for good, at a multiple of a page, and has no references into it.
    [(); 2].map(|()| unsafe { SharedRegion::mapped_at(base, range) })
}

/// Just so many bytes.
fn bytes(len: usize, seed: usize) -> Box<[u8]> {
    (0..len).map(|at| (at * 7 + seed) as u8).collect()
}

/// Just so much room.
fn room(len: usize) -> Box<[u8]> {
    vec![0xee; len].into()
}

/// Every length up to where copies go by another way, and some beyond.
fn lengths() -> impl Iterator<Item = usize> {
    (0..600).chain([1023, 1024, 1500, 4095, 4096])
}

#[test]
fn a_region_is_copied_to_and_from_just_up_to_its_end() {
    let [region, _] = regions(8192);
    for len in lengths() {
        for offset in [0, region.len() - len] {
            let (sent, mut received) = (bytes(len, offset), room(len));
            region.write(offset, &sent).unwrap();
            region.read(offset, &mut received).unwrap();
            assert_eq!(sent, received);
            region.zero(offset, len).unwrap();
            region.read(offset, &mut received).unwrap();
            assert!(received.iter().all(|byte| *byte == 0));
        }
    }
}

#[test]
fn a_pool_copies_just_what_a_buffer_has() {
    let [region, host] = regions(CHUNK_LEN);
    let at = |gpa: Gpa| (gpa.0 - host.range().start().0) as usize;
    let pool = Pool::new(&CHUNKS, &QUEUES, PoolOptions::default());
    pool.add(region).unwrap();
    let mut queue = pool.queue(QueueOptions::default()).unwrap();
    for len in lengths().chain([300_000]) {
        let (sent, mut seen) = (bytes(len, 1), room(len));
        let buffer = queue.to_device(&sent).unwrap();
        host.read(at(pool.gpa(&buffer)), &mut seen).unwrap();
        assert_eq!(sent, seen);
        queue.release(buffer);

        let parts = [bytes(len / 3, 2), bytes(len - len / 3, 3)];
        let buffer = queue.gather(&[&parts[0], &parts[1]]).unwrap();
        host.read(at(pool.gpa(&buffer)), &mut seen).unwrap();
        assert_eq!(parts.concat(), *seen);
        queue.release(buffer);

        let (sent, mut received) = (bytes(len, 4), room(len));
        let buffer = queue.from_device(len).unwrap();
        host.write(at(pool.gpa(&buffer)), &sent).unwrap();
        queue.receive(buffer, len, &mut received).unwrap();
        assert_eq!(sent, received);

        let sent = bytes(len, 5);
        let buffer = queue.from_device(len).unwrap();
        host.write(at(pool.gpa(&buffer)), &sent).unwrap();
        let mut lent = queue.lend(buffer, len).unwrap();
        for part in [&sent[..len / 3], &sent[len / 3..]] {
            let mut received = room(part.len());
            lent.read(&mut received).unwrap();
            assert_eq!(*part, *received);
        }
        queue.release(lent);
        queue.trim();
    }
}
