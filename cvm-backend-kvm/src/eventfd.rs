//! Descriptors that count signals.

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::fstat;
use rustix::io::{ReadWriteFlags, preadv2, write};
use std::io::{self, IoSliceMut};
use std::os::fd::OwnedFd;

/// An eventfd that does not block.
pub(crate) fn new() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Adds a signal.
pub(crate) fn signal(eventfd: &OwnedFd) {
    // It fails only where there are more than can be counted already.
    let _ = write(eventfd, &1u64.to_ne_bytes());
}

/// Takes all signals; whether there were any. It never waits: who else holds the eventfd may have emptied it, and cleared
/// the flag by which an empty one is not waited for.
pub(crate) fn take(eventfd: &OwnedFd) -> bool {
    preadv2(eventfd, &mut [IoSliceMut::new(&mut [0; 8])], u64::MAX, ReadWriteFlags::NOWAIT).is_ok()
}

/// Checks that something from another process is served by the kernel alone, as an eventfd is: to poll or read a file may wait
/// for the process that serves its file system. What only the kernel is to use, the kernel checks by itself.
pub(crate) fn check(theirs: &OwnedFd) -> io::Result<()> {
    let device = |descriptor: &OwnedFd| fstat(descriptor).map(|status| status.st_dev);
    if device(theirs)? == device(&new()?)? { Ok(()) } else { Err(io::Error::other("it is no eventfd")) }
}
