//! Certificates for guests that ask for them together with a report.
//!
//! The key that signs reports may change: when firmware is updated, or a key loaded. Whoever does that is to hold an exclusive
//! lock on the file of certificates meanwhile; here a shared one is held from before the file is read until KVM has the
//! report (Linux Documentation/virt/kvm/api.rst, KVM_EXIT_SNP_REQ_CERTS). The locks are those of open file descriptions.

#![allow(unsafe_code, reason = "the standard library has locks of another kind")]

use cvm_core::{PAGE_SIZE, SharedMemory};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::Path;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// The most bytes of certificates that a guest gets: Linux guests have room for 16 KiB (drivers/virt/coco/sev-guest,
/// `SEV_FW_BLOB_MAX_SIZE`).
const MOST: u64 = 1 << 20;

/// What comes of a request, in the numbers that KVM takes as an answer.
#[derive(Debug)]
pub(super) enum Served {
    /// The certificates are in the guest's memory. They are those of the key as long as the lock is held.
    Done(Locked),
    /// The guest has too little room: this many pages are needed.
    TooFew(u64),
    /// They are changing now.
    Later,
    /// There are none to be had.
    Failed,
}

/// A file that nobody changes.
#[derive(Debug)]
#[allow(dead_code, reason = "the lock goes with the descriptor")]
pub(super) struct Locked(File);

/// Takes a shared lock on the whole file, or says that somebody has an exclusive one.
fn lock(file: File) -> io::Result<Locked> {
    // Type, whence, start, length and owner: a length of 0 is up to the end, wherever that is.
    let lock =
        libc::flock { l_type: libc::F_RDLCK as _, l_whence: libc::SEEK_SET as _, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the descriptor is open, and the kernel reads a flock.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } {
        0 => Ok(Locked(file)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Puts the certificates in the file `path` into the `pages` pages at `gpa`, which the guest has shared.
pub(super) fn serve(path: &Path, memory: &SharedMemory, gpa: u64, pages: u64) -> Served {
    let Ok(file) = File::open(path) else { return Served::Failed };
    let mut locked = match lock(file) {
        Ok(locked) => locked,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Served::Later,
        Err(_) => return Served::Failed,
    };
    let mut table = Vec::new();
    match (&mut locked.0).take(MOST + 1).read_to_end(&mut table) {
        Ok(read) if read as u64 <= MOST => {}
        _ => return Served::Failed,
    }
    let needed = (table.len() as u64).div_ceil(PAGE_SIZE);
    if needed > pages {
        return Served::TooFew(needed);
    }
    match memory.memory().write_slice(&table, GuestAddress(gpa)) {
        Ok(()) => Served::Done(locked),
        Err(_) => Served::Failed,
    }
}
