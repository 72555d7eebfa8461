//! Work on the other core.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

/// A thread that is told what to do without a system call.
pub struct Worker {
    shared: Arc<Orders>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Orders {
    /// How many iterations to do; 0 when they are done.
    iterations: AtomicU64,
    stop: AtomicBool,
}

impl Worker {
    pub fn new(mut work: impl FnMut(u64) + Send + 'static) -> Self {
        let shared = Arc::new(Orders::default());
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                while !shared.stop.load(Ordering::Acquire) {
                    match shared.iterations.load(Ordering::Acquire) {
                        0 => std::hint::spin_loop(),
                        iterations => {
                            work(iterations);
                            shared.iterations.store(0, Ordering::Release);
                        }
                    }
                }
            }
        });
        Self { shared, thread: Some(thread) }
    }

    pub fn start(&self, iterations: u64) {
        self.shared.iterations.store(iterations, Ordering::Release);
    }

    pub fn wait(&self) {
        while self.shared.iterations.load(Ordering::Acquire) != 0 {
            std::hint::spin_loop();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.wait();
        self.shared.stop.store(true, Ordering::Release);
        self.thread.take().into_iter().for_each(|thread| thread.join().expect("it does not panic"));
    }
}
