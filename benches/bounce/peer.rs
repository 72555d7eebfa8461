//! A host on the other core, which looks at what the guest shares.

use super::pool::Chunk;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

/// What a host does to shared memory.
#[derive(Debug, Clone, Copy)]
pub enum Touch {
    Read,
    Write,
}

/// A host that goes through chunks over and over, as long as it lives.
pub struct Peer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    pub fn new(chunks: [Chunk; 2], touch: Touch) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let regions = chunks.map(|chunk| chunk.region());
                let mut page = [0x5a; 4096];
                while !stop.load(Ordering::Relaxed) {
                    for at in (0..regions[0].len()).step_by(page.len()) {
                        for region in &regions {
                            match touch {
                                Touch::Read => region.read(at, &mut page).expect("it is inside"),
                                Touch::Write => region.write(at, &page).expect("it is inside"),
                            }
                        }
                    }
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().into_iter().for_each(|thread| thread.join().expect("a host does not panic"));
    }
}
