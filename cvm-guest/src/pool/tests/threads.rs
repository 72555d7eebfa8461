//! Several CPUs at once.

use super::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;

const ROUNDS: usize = if cfg!(debug_assertions) { 20_000 } else { 200_000 };

#[test]
fn what_one_cpu_maps_another_releases() {
    let pool = pool(2, 2);
    thread::scope(|scope| {
        for number in 0..2u8 {
            let (sender, receiver) = mpsc::sync_channel::<(ToDevice, u8)>(64);
            let pool = &pool;
            scope.spawn(move || {
                for (buffer, seed) in receiver {
                    assert!(seen(pool, &buffer).iter().all(|byte| *byte == seed));
                    pool.release(buffer);
                }
            });
            scope.spawn(move || {
                let options = QueueOptions { limit: 2 << 20, ..QueueOptions::default() };
                let mut queue = pool.queue(options).unwrap();
                for round in 0..ROUNDS / 4 {
                    let (len, seed) = ([64, 1500, 4096, 70_000][round % 4], (round % 127) as u8 * 2 + number);
                    loop {
                        match queue.to_device(&vec![seed; len]) {
                            Ok(buffer) => break sender.send((buffer, seed)).unwrap(),
                            Err(Refusal::Impossible) => unreachable!(),
                            // The other end has them.
                            Err(_) => thread::yield_now(),
                        }
                    }
                }
            });
        }
    });
    assert_eq!((pool.usage().empty, pool.usage().strays), (2 * CHUNK, 0));
    // The queues left before their last buffers came back, and those who take their numbers hear of it.
    let queues = [(); 2].map(|()| pool.queue(QueueOptions::default()).unwrap());
    drop(queues);
    assert_eq!(pool.usage().taken, 0);
}

#[test]
fn queues_of_different_sizes_take_the_same_blocks_in_turn() {
    let pool = pool(1, 3);
    thread::scope(|scope| {
        for (number, len) in [300, 9000, 300_000].into_iter().enumerate() {
            let pool = &pool;
            scope.spawn(move || {
                let mut queue = pool.queue(QueueOptions { window: 0, ..QueueOptions::default() }).unwrap();
                let mut held = vec![];
                for round in 0..ROUNDS {
                    held.extend(queue.to_device(&vec![number as u8; len.min(64)]).ok());
                    if let Ok(room) = queue.from_device(len) {
                        pool.release(room);
                    }
                    if held.len() > 20 || round % 3 == 0 {
                        for buffer in held.drain(..) {
                            assert!(seen(pool, &buffer).iter().all(|byte| *byte == number as u8));
                            queue.release(buffer);
                        }
                        queue.trim();
                    }
                }
                held.into_iter().for_each(|buffer| queue.release(buffer));
            });
        }
    });
    assert_eq!((pool.usage().empty, pool.usage().strays), (CHUNK, 0));
}

/// Lets a thread sleep until it is woken.
#[derive(Default)]
struct Bell(Mutex<bool>, Condvar);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
}

impl Bell {
    /// Waits for the bell; a minute is an eternity here.
    fn wait(&self) {
        let timeout = std::time::Duration::from_secs(60);
        let (mut rung, result) = self.1.wait_timeout_while(self.0.lock().unwrap(), timeout, |rung| !*rung).unwrap();
        assert!(!result.timed_out(), "nobody rang");
        *rung = false;
    }
}

#[test]
fn nobody_sleeps_through_the_release_of_what_he_waits_for() {
    let pool = pool(1, 2);
    let (sender, receiver) = mpsc::channel::<FromDevice>();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let (pool, done) = (&pool, &done);
        scope.spawn(move || receiver.into_iter().for_each(|buffer| pool.release(buffer)));
        // Takes and gives back what the other waits for, and goes idle in between.
        scope.spawn(move || {
            let mut queue = pool.queue(QueueOptions::default()).unwrap();
            while !done.load(Ordering::Relaxed) {
                let held: Vec<_> = (0..4).map_while(|_| queue.from_device(200 << 10).ok()).collect();
                held.into_iter().for_each(|buffer| queue.release(buffer));
                queue.trim();
                thread::yield_now();
            }
        });
        let mut queue = pool.queue(QueueOptions::default()).unwrap();
        let bell = Arc::new(Bell::default());
        let waker = Waker::from(Arc::clone(&bell));
        for _ in 0..ROUNDS / 10 {
            let buffer = loop {
                match queue.from_device(150 << 10) {
                    Ok(buffer) => break buffer,
                    Err(_) => match queue.poll_room(150 << 10, &mut Context::from_waker(&waker)) {
                        Poll::Ready(room) => room.unwrap(),
                        Poll::Pending => bell.wait(),
                    },
                }
            };
            sender.send(buffer).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        drop(sender);
    });
    assert_eq!(pool.usage().empty, CHUNK);
}
