//! Signals that meet what a test does at whatever it is about.

use libc::{SIGUSR1, c_int, c_void, siginfo_t};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;
use vmm_sys_util::signal::{Killable, register_signal_handler};

static MET: AtomicU64 = AtomicU64::new(0);

extern "C" fn meet(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    MET.fetch_add(1, Ordering::Relaxed);
}

/// How many signals have come.
pub fn met() -> u64 {
    MET.load(Ordering::Relaxed)
}

/// What `work` gives on a thread that gets signals all the while. System calls are not taken up again by themselves.
pub fn among<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    register_signal_handler(SIGUSR1, meet).unwrap();
    let name = thread::current().name().unwrap_or_default().to_owned();
    let worker = thread::Builder::new().name(name).spawn(work).unwrap();
    while !worker.is_finished() {
        worker.kill(SIGUSR1).unwrap();
        thread::sleep(Duration::from_micros(500));
    }
    worker.join().unwrap()
}
