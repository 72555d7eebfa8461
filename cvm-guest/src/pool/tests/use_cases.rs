//! What each part promises, one by one.

use super::*;
use crate::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

#[test]
fn a_buffer_carries_its_bytes_and_is_given_back() {
    let pool = pool(1, 1);
    let mut queue = pool.queue(QueueOptions::default()).unwrap();
    let out = queue.to_device(b"to the device").unwrap();
    assert_eq!((seen(&pool, &out), pool.len(&out)), (b"to the device".to_vec(), 13));
    let back = queue.from_device(300).unwrap();
    assert_ne!(pool.gpa(&out), pool.gpa(&back));
    put(&pool, &back, &[7; 300]);
    let mut data = [0; 200];
    queue.receive(back, 200, &mut data).unwrap();
    assert_eq!(data, [7; 200]);
    queue.release(out);
    let usage = queue.usage();
    assert_eq!((usage.to_device, usage.from_device, usage.maps), (13, 200, 2));
    assert_eq!(usage.taken, usage.ready);
}

#[test]
fn a_scatter_list_becomes_one_buffer() {
    let pool = pool(1, 1);
    let mut queue = pool.queue(QueueOptions::default()).unwrap();
    let parts: Vec<Vec<u8>> = (0..16u8).map(|part| vec![part; 4096]).collect();
    let slices: Vec<&[u8]> = parts.iter().map(|part| &part[..]).collect();
    let buffer = queue.gather(&slices).unwrap();
    assert_eq!(seen(&pool, &buffer), parts.concat());
    queue.release(buffer);
    let nothing = queue.gather(&[]).unwrap();
    assert_eq!(pool.len(&nothing), 0);
    queue.release(nothing);
}

#[test]
fn an_empty_buffer_has_an_address_of_its_own() {
    let pool = pool(1, 1);
    let mut queue = pool.queue(QueueOptions::default()).unwrap();
    let (a, b) = (queue.from_device(0).unwrap(), queue.from_device(0).unwrap());
    assert_ne!(pool.gpa(&a), pool.gpa(&b));
    queue.release(a);
    queue.release(b);
}

#[test]
fn a_run_is_contiguous_for_the_device_and_keeps_its_length() {
    let pool = bare(3, 1, PoolOptions::default());
    // The second does not follow the first.
    [4, 8, 9].into_iter().for_each(|number| pool.add(region(number)).unwrap());
    let mut queue = pool.queue(QueueOptions::default()).unwrap();
    assert_eq!(queue.from_device(4 << 20 | 1), Err(Refusal::Exhausted));
    let data: Vec<u8> = (0..(4 << 20) - 5u32).map(|at| (at >> 8) as u8 ^ at as u8).collect();
    let placement = Placement::offset(4095, 5);
    let long = queue.to_device_at(&data, placement).unwrap();
    assert_eq!(pool.gpa(&long).0, 0x4000_0000 + 8 * CHUNK + 5);
    assert_eq!(pool.len(&long), data.len());
    assert!(seen(&pool, &long) == data);
    let mut held = vec![];
    for (len, expected) in [(CHUNK_LEN, 0x4000_0000 + 4 * CHUNK), (300_001, 0)] {
        match queue.from_device(len) {
            Ok(run) => {
                assert_eq!((pool.gpa(&run).0, pool.len(&run)), (expected, len));
                held.push(run);
            }
            Err(refusal) => assert_eq!((refusal, expected), (Refusal::Exhausted, 0)),
        }
    }
    queue.release(long);
    assert_eq!((pool.usage().empty, held.len()), (2 * CHUNK, 1));
    assert_eq!(queue.from_device(usize::MAX), Err(Refusal::Impossible));
}

#[test]
fn the_largest_slot_knows_lengths_that_no_handle_holds() {
    let pool = pool(1, 1);
    let mut queue = pool.queue(QueueOptions::default()).unwrap();
    for len in (256 << 10) - 3..=(256 << 10) + 3 {
        let buffer = queue.from_device(len).unwrap();
        assert_eq!(pool.len(&buffer), len);
        assert!(queue.receive(buffer, len + 1, &mut vec![0; len + 1]).is_err());
    }
}

#[test]
fn slots_are_used_again_in_the_order_in_which_they_came_back() {
    let pool = pool(1, 1);
    let mut queue = pool.queue(QueueOptions { window: 64 << 10, ..QueueOptions::default() }).unwrap();
    let mut order = vec![];
    for _ in 0..64 {
        let buffer = queue.from_device(4096).unwrap();
        order.push(pool.gpa(&buffer).0);
        queue.release(buffer);
    }
    // A refill brings half of the window: eight slots.
    let mut distinct = order[..8].to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), 8);
    assert!(order.chunks(8).all(|turn| turn == &order[..8]));
}

#[test]
fn random_slots_are_not_in_order_and_not_used_again_soon() {
    fn random() -> u64 {
        static STATE: AtomicUsize = AtomicUsize::new(1);
        (STATE.fetch_add(1, Ordering::Relaxed) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
    let pool = bare(1, 1, PoolOptions { random: Some(random), ..PoolOptions::default() });
    pool.add(region(0)).unwrap();
    let mut queue = pool.queue(QueueOptions { window: 256 << 10, ..QueueOptions::default() }).unwrap();
    let order: Vec<u64> = (0..1000)
        .map(|_| {
            let buffer = queue.from_device(4096).unwrap();
            let gpa = pool.gpa(&buffer).0;
            queue.release(buffer);
            gpa
        })
        .collect();
    assert_ne!(order[..32], order[32..64]);
    // A refill brings 32 slots, of which one among the older 16 comes next.
    for (at, gpa) in order.iter().enumerate() {
        assert!(!order[at + 1..].iter().take(16).any(|later| later == gpa), "{at}");
    }
}

#[test]
fn one_queue_at_its_limit_leaves_the_rest_to_others() {
    let pool = pool(1, 2);
    let mut greedy = pool.queue(QueueOptions { limit: 512 << 10, ..QueueOptions::default() }).unwrap();
    let mut other = pool.queue(QueueOptions::default()).unwrap();
    let mut held = vec![];
    let refusal = loop {
        match greedy.from_device(4096) {
            Ok(buffer) => held.push(buffer),
            Err(refusal) => break refusal,
        }
    };
    assert_eq!((refusal, held.len()), (Refusal::Limited, 128));
    assert_eq!(greedy.from_device(1 << 20), Err(Refusal::Impossible));
    assert_eq!((greedy.usage().limited, greedy.usage().high_water), (1, 512 << 10));
    let rest: Vec<_> = (0..6).map(|_| other.from_device(256 << 10).unwrap()).collect();
    assert_eq!(other.from_device(256 << 10), Err(Refusal::Exhausted));
    assert_eq!((other.usage().exhausted, pool.usage().exhausted), (1, 1));
    // What comes back from another CPU counts.
    pool.release(held.pop().unwrap());
    held.push(greedy.from_device(4000).unwrap());
    held.into_iter().for_each(|buffer| greedy.release(buffer));
    rest.into_iter().for_each(|buffer| other.release(buffer));
}

#[test]
fn a_pool_cut_for_small_buffers_serves_large_ones_when_these_are_back() {
    let pool = pool(1, 2);
    let mut small = pool.queue(QueueOptions::default()).unwrap();
    let mut large = pool.queue(QueueOptions::default()).unwrap();
    let buffers: Vec<_> = (0..8192).map(|_| small.from_device(256).unwrap()).collect();
    assert_eq!(large.from_device(1 << 20), Err(Refusal::Exhausted));
    assert_eq!(pool.usage().classes[0], ClassUse { slot_len: 256, slots: 8192, taken: 8192 });
    // From here on all come back through the pool, but for those at hand.
    buffers.into_iter().for_each(|buffer| pool.release(buffer));
    small.trim();
    let run = large.from_device(2 << 20).unwrap();
    assert_eq!(pool.usage().runs, 2 << 20);
    large.release(run);
    assert_eq!(pool.usage().empty, 2 << 20);
}

#[test]
fn a_small_buffer_is_made_of_a_larger_slot_when_nothing_else_is_free() {
    let pool = pool(1, 2);
    let mut queue = pool.queue(QueueOptions::default()).unwrap();
    let mut held: Vec<_> = (0..8 * 64 - 1).map(|_| queue.from_device(4096).unwrap()).collect();
    // The last one is at hand in its window, and goes back to the pool to be found there.
    held.push(queue.from_device(100).unwrap());
    assert_eq!(pool.gpa(&held[511]).0 % 4096, 0);
    assert_eq!(queue.from_device(100), Err(Refusal::Exhausted));
    held.into_iter().for_each(|buffer| queue.release(buffer));
    drop(queue);
    assert_eq!((pool.usage().empty, pool.usage().taken), (2 << 20, 0));
}

struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn who_waits_is_woken_by_whoever_gives_something_back() {
    let pool = pool(1, 2);
    let mut waiting = pool.queue(QueueOptions::default()).unwrap();
    let mut other = pool.queue(QueueOptions::default()).unwrap();
    let woken = Arc::new(Count(AtomicUsize::new(0)));
    let waker = Waker::from(Arc::clone(&woken));
    let mut context = Context::from_waker(&waker);
    let count = || woken.0.load(Ordering::SeqCst);
    assert_eq!(waiting.poll_room(usize::MAX, &mut context), Poll::Ready(Err(Refusal::Impossible)));
    assert_eq!(waiting.poll_room(4096, &mut context), Poll::Ready(Ok(())));
    assert_eq!(waiting.poll_room(1 << 20, &mut context), Poll::Ready(Ok(())));

    // By the other queue, which gives back what it has at hand, too.
    waiting.trim();
    let mut held: Vec<_> = (0..8).map(|_| other.from_device(200 << 10).unwrap()).collect();
    assert_eq!(waiting.poll_room(4096, &mut context), Poll::Pending);
    assert_eq!((count(), pool.usage().waiting, waiting.usage().waits), (0, 1, 1));
    other.release(held.pop().unwrap());
    assert_eq!((count(), pool.usage().waiting), (1, 0));
    assert_eq!(waiting.poll_room(4096, &mut context), Poll::Ready(Ok(())));

    // Through the pool.
    assert_eq!(waiting.poll_room(256 << 10, &mut context), Poll::Ready(Ok(())));
    let mine = waiting.from_device(256 << 10).unwrap();
    assert_eq!(waiting.poll_room(100, &mut context), Poll::Pending);
    pool.release(held.pop().unwrap());
    assert_eq!(count(), 2);
    assert_eq!(waiting.poll_room(512 << 10, &mut context), Poll::Pending);
    // By itself.
    waiting.release(mine);
    assert_eq!(count(), 3);
    // By a chunk.
    assert_eq!(waiting.poll_room(1 << 20, &mut context), Poll::Pending);
    drop(waiting);
    assert_eq!(pool.usage().waiting, 0);
    held.into_iter().for_each(|buffer| other.release(buffer));
}

#[test]
fn who_is_at_its_limit_is_woken_by_its_own_buffers_and_slows_nobody_down() {
    let pool = pool(1, 1);
    let mut queue = pool.queue(QueueOptions { limit: 8192, ..QueueOptions::default() }).unwrap();
    let woken = Arc::new(Count(AtomicUsize::new(0)));
    let waker = Waker::from(Arc::clone(&woken));
    let mut context = Context::from_waker(&waker);
    let (a, b) = (queue.from_device(4096).unwrap(), queue.from_device(4096).unwrap());
    assert_eq!(queue.poll_room(256, &mut context), Poll::Pending);
    assert_eq!(pool.usage().waiting, 0, "others need not hurry");
    pool.release(a);
    assert_eq!(woken.0.load(Ordering::SeqCst), 1);
    let a = queue.from_device(4096).unwrap();
    assert_eq!(queue.poll_room(256, &mut context), Poll::Pending);
    queue.release(b);
    assert_eq!(woken.0.load(Ordering::SeqCst), 2);
    assert_eq!(queue.poll_room(256, &mut context), Poll::Ready(Ok(())));
    queue.release(a);
}

#[test]
fn a_ring_goes_round_in_order() {
    let pool = pool(1, 1);
    let mut queue = pool.queue(QueueOptions::default()).unwrap();
    assert_eq!(Ring::new(&mut queue, 1 << 13, 64).unwrap_err(), Refusal::Impossible);
    assert_eq!(Ring::new(&mut queue, usize::MAX, 64).unwrap_err(), Refusal::Impossible);
    let mut ring = Ring::new(&mut queue, 3, 100).unwrap();
    assert_eq!(ring.send(&[0; 129]).unwrap_err(), Refusal::Impossible);
    let mut flying = std::collections::VecDeque::new();
    for turn in 0..100u8 {
        let packet = vec![turn; 1 + turn as usize];
        flying.push_back((ring.send(&packet).unwrap(), packet));
        if flying.len() == 4 {
            assert_eq!(ring.send(&[1]).unwrap_err(), Refusal::Exhausted);
            for (sent, packet) in &flying {
                let (gpa, len) = ring.segment(sent);
                let mut seen = vec![0; len as usize];
                pool.read(gpa.0 - 0x4000_0000, &mut seen).unwrap();
                assert_eq!(seen, *packet);
            }
            let (last, _) = flying.pop_back().unwrap();
            let last = ring.release(last).unwrap_err();
            let (first, _) = flying.pop_front().unwrap();
            ring.release(first).unwrap();
            flying.push_back((last, vec![turn; 1 + turn as usize]));
        }
    }
    assert_eq!((ring.in_flight(), ring.copied()), (3, (1..=100).sum()));
    drop(ring);
    drop(queue);
    assert_eq!(pool.usage().taken, 0);
}

#[test]
fn what_a_dropped_queue_had_in_flight_counts_for_the_next_with_its_number() {
    let pool = pool(1, 1);
    let options = QueueOptions { limit: 8192, ..QueueOptions::default() };
    let mut queue = pool.queue(options).unwrap();
    assert_eq!(pool.queue(options).unwrap_err(), Error::NoQueue);
    let buffer = queue.from_device(4096).unwrap();
    drop(queue);
    let mut queue = pool.queue(options).unwrap();
    assert_eq!(queue.usage().taken, 4096);
    pool.release(buffer);
    let both = [queue.from_device(4096).unwrap(), queue.from_device(4096).unwrap()];
    assert_eq!(queue.usage().taken, 8192);
    both.into_iter().for_each(|buffer| queue.release(buffer));
}

#[test]
fn contents_do_not_outlast_a_release_where_that_was_asked_for() {
    let pool = bare(2, 2, PoolOptions { zero_on_release: true, ..PoolOptions::default() });
    [0, 1].into_iter().for_each(|number| pool.add(region(number)).unwrap());
    let mut queue = pool.queue(QueueOptions::default()).unwrap();
    for len in [1, 77, 4096, 256 << 10, 700_000] {
        for here in [true, false] {
            let buffer = queue.to_device(&vec![0xaa; len]).unwrap();
            if here { queue.release(buffer) } else { pool.release(buffer) }
        }
    }
    let mut all = vec![1; 2 * CHUNK_LEN];
    pool.read(0, &mut all).unwrap();
    assert!(all.iter().all(|byte| *byte == 0));
}
