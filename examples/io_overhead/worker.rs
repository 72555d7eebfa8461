//! A device on a thread of its own, which the guest rings without an exit to this process.

use crate::block::BlockDevice;
use crate::cpu;
use crate::net::NetDevice;
use crate::responder::Responder;
use cvm::{BoxError, SharedMemory};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::thread::{Pid, gettid};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// What a worker needs of a device.
pub trait Device: Send + 'static {
    /// Serves what is in the queues. Returns how much there was.
    fn serve(&mut self, memory: &SharedMemory) -> usize;
    /// Tells the guest whether to ring from now on.
    fn listen(&mut self, on: bool, memory: &SharedMemory);
}

impl Device for BlockDevice {
    fn serve(&mut self, memory: &SharedMemory) -> usize {
        self.serve(memory)
    }

    fn listen(&mut self, on: bool, memory: &SharedMemory) {
        self.listen(on, memory);
    }
}

impl Device for NetDevice<Responder> {
    fn serve(&mut self, memory: &SharedMemory) -> usize {
        self.serve(memory)
    }

    fn listen(&mut self, on: bool, memory: &SharedMemory) {
        self.listen(on, memory);
    }
}

/// What is common to the thread and who started it.
struct Shared<D> {
    device: Mutex<D>,
    memory: SharedMemory,
    /// What the guest rings, and whoever wants the thread to look.
    bell: OwnedFd,
    stopping: AtomicBool,
}

/// A device and its thread, which ends when this is dropped.
pub struct Worker<D> {
    shared: Arc<Shared<D>>,
    id: Pid,
    thread: Option<JoinHandle<()>>,
}

impl<D: Device> Worker<D> {
    /// Serves `device` whenever `bell`, an eventfd, is signalled.
    pub fn start(name: &str, device: D, memory: SharedMemory, bell: OwnedFd) -> Result<Self, BoxError> {
        let shared = Arc::new(Shared { device: Mutex::new(device), memory, bell, stopping: AtomicBool::new(false) });
        let theirs = Arc::clone(&shared);
        let (tell, told) = mpsc::channel();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            let _ = tell.send(gettid());
            theirs.work();
        })?;
        Ok(Self { shared, id: told.recv()?, thread: Some(thread) })
    }
}

impl<D> Worker<D> {
    /// The device.
    pub fn device(&self) -> MutexGuard<'_, D> {
        self.shared.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The shared memory, by the device's name.
    pub fn memory(&self) -> &SharedMemory {
        &self.shared.memory
    }

    /// Has the device look at its queues.
    pub fn ring(&self) {
        // It fails when it would overflow, and then it is signalled anyway.
        let _ = rustix::io::write(&self.shared.bell, &1u64.to_ne_bytes());
    }

    /// How much processor time the thread has used.
    pub fn used(&self) -> Duration {
        cpu::thread(self.id)
    }
}

impl<D: Device> Shared<D> {
    fn work(&self) {
        let lock = || self.device.lock().unwrap_or_else(PoisonError::into_inner);
        // The lock is let go in between, for whoever else needs the device.
        let serve = || !self.stopping.load(Ordering::Acquire) && lock().serve(&self.memory) > 0;
        while !self.stopping.load(Ordering::Acquire) {
            // Signals are no reason to stop, and the eventfd can be read by nobody else.
            let _ = poll(&mut [PollFd::new(&self.bell, PollFlags::IN)], None);
            let _ = rustix::io::read(&self.bell, &mut [0; 8]);
            lock().listen(false, &self.memory);
            loop {
                while serve() {}
                lock().listen(true, &self.memory);
                // What came before the guest knew.
                if !serve() {
                    break;
                }
                lock().listen(false, &self.memory);
            }
        }
    }
}

impl<D> Drop for Worker<D> {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.ring();
        if let Some(thread) = self.thread.take() {
            // A device that panicked has said so.
            let _ = thread.join();
        }
    }
}
