//! A hostile host, and drivers that mix up their pools.

use super::*;
use crate::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use zerocopy::{FromBytes, IntoBytes};

/// What a device writes before a packet, as a network device might.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes)]
#[repr(C)]
struct Header {
    len: u32,
    kind: u32,
}

#[test]
fn a_device_that_claims_more_than_the_buffer_has_gets_an_error_and_the_buffer_is_back() {
    let pool = pool(1, 1);
    let mut queue = pool.queue(QueueOptions::default()).unwrap();
    for used in [101, 256, 257, usize::MAX, 1 << 40] {
        let error = Error::OutOfBounds { offset: 0, len: used, limit: 100 };
        let buffer = queue.from_device(100).unwrap();
        let mut data = [0xcc; 400];
        assert_eq!(queue.receive(buffer, used, &mut data), Err(error));
        assert_eq!(data, [0xcc; 400]);
        let buffer = queue.from_device(100).unwrap();
        assert_eq!(queue.lend(buffer, used).unwrap_err(), error);
    }
    let buffer = queue.from_device(100).unwrap();
    let error = Error::OutOfBounds { offset: 0, len: 100, limit: 99 };
    assert_eq!(queue.receive(buffer, 100, &mut [0; 99]), Err(error));
    let usage = queue.usage();
    assert_eq!((usage.taken, usage.from_device, usage.lent), (usage.ready, 0, 0));
}

#[test]
fn a_host_that_scribbles_over_everything_meanwhile_gets_nothing_but_its_bytes_through() {
    const CANARY: u8 = 0xc5;
    let pool = pool(1, 1);
    let mut queue = pool.queue(QueueOptions::default()).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // The host writes everywhere, also where no buffer is.
        scope.spawn(|| {
            let mut word = 1u64;
            while !done.load(Ordering::Relaxed) {
                for at in (0..CHUNK_LEN as u64).step_by(64) {
                    word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(7);
                    pool.write(at, &word.to_ne_bytes());
                }
            }
        });
        let stop = Stop(&done);
        let mut data = vec![CANARY; 8192];
        for round in 0..20_000usize {
            let len = [64, 1500, 4096][round % 3];
            let buffer = queue.from_device(len).unwrap();
            // The used length is the host's, too: read once from shared memory, and whatever came is checked.
            let mut used = [0; 4];
            pool.read((round * 64 % CHUNK_LEN) as u64, &mut used).unwrap();
            let used = u32::from_ne_bytes(used) as usize % 8192;
            if round % 2 == 0 {
                let received = queue.receive(buffer, used, &mut data[1000..]);
                assert_eq!(received.is_ok(), used <= len);
                let written = if received.is_ok() { used } else { 0 };
                assert!(data[..1000].iter().chain(&data[1000 + written..]).all(|byte| *byte == CANARY));
                data[1000..1000 + written].fill(CANARY);
                continue;
            }
            match queue.lend(buffer, used) {
                Ok(mut lent) => {
                    let Ok(header) = lent.read_value::<Header>() else {
                        assert!(used < size_of::<Header>());
                        continue;
                    };
                    let before = header;
                    let claimed = header.len as usize % 4096;
                    let mut payload = [CANARY; 4096 + 64];
                    let read = lent.read(&mut payload[32..][..claimed]);
                    assert_eq!(read.is_ok(), claimed <= used - size_of::<Header>());
                    let written = if read.is_ok() { claimed } else { 0 };
                    assert!(payload[..32].iter().chain(&payload[32 + written..]).all(|byte| *byte == CANARY));
                    // It is the guest's own copy.
                    assert_eq!(std::hint::black_box(header), before);
                    queue.release(lent);
                }
                Err(error) => assert_eq!(error, Error::OutOfBounds { offset: 0, len: used, limit: len }),
            }
        }
        drop(stop);
    });
    drop(queue);
    let usage = pool.usage();
    assert_eq!((usage.empty, usage.taken, usage.strays), (CHUNK, 0, 0));
}

/// Ends the other thread even if this one fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn handles_of_other_pools_and_forged_ones_lead_nowhere_outside() {
    // Records that follow each other, so that the pools differ in the bits that handles have of them.
    let chunks: &[ChunkRecord] = vec![ChunkRecord::new(), ChunkRecord::new()].leak();
    let queues: &[QueueRecord] = vec![QueueRecord::new(), QueueRecord::new()].leak();
    let pool = Pool::new(&chunks[..1], &queues[..1], PoolOptions::default());
    let other = Pool::new(&chunks[1..], &queues[1..], PoolOptions::default());
    let range = region(0).range();
    pool.add(region(0)).unwrap();
    other.add(region(1)).unwrap();
    let mut queue = pool.queue(QueueOptions::default()).unwrap();
    let mut others = other.queue(QueueOptions::default()).unwrap();
    pool.release(others.from_device(100).unwrap());
    queue.release(others.from_device(100).unwrap());
    assert_eq!(pool.usage().strays, 2);
    let buffer = others.from_device(100).unwrap();
    assert_eq!(queue.receive(buffer, 10, &mut [0; 100]), Err(Error::ForeignBuffer));
    let buffer = others.from_device(100).unwrap();
    assert_eq!(queue.lend(buffer, 10).unwrap_err(), Error::ForeignBuffer);

    // Forged with all that safe code cannot know.
    let owner = handle::Owner::new(pool.tag(), 0);
    let mut live = queue.from_device(100).unwrap();
    put(&pool, &live, &[9; 100]);
    for block in [0, 1, 7, 8, 9, 4095, 65535] {
        for low in [0, 1, 255, 256, 4096, BLOCK_LEN as u64 - 1] {
            let offset = (block << BLOCK_SHIFT) + low;
            for len in [0, 100, handle::LONG] {
                let forged = || FromDevice(Raw::new(offset, len, owner));
                let gpa = pool.gpa(&forged()).0;
                assert!(gpa == 0 || range.contains(Gpa(gpa)));
                let _ = queue.receive(forged(), len, &mut vec![0; len]);
                pool.release(forged());
            }
        }
    }
    // The first slot was given back by one of these; what is handed out is still within the pool.
    for _ in 0..1000 {
        let next = queue.from_device(200).unwrap();
        assert!(range.contains(pool.gpa(&next)));
        queue.release(std::mem::replace(&mut live, next));
    }
    queue.release(live);
}
