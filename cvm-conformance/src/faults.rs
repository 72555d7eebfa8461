//! System calls that fail when a test wants them to, without a hook in what is tested.
//!
//! [`with_fault`] runs something on a thread of its own and makes one of the system calls fail that it makes, or that a
//! thread or process makes which it starts. The kernel asks about each *candidate* by a seccomp filter
//! (`SECCOMP_RET_USER_NOTIF`): a call that makes, loads, seals, runs or converts a VM, or starts and confines who holds
//! it. Calls of the runtime's own, such as locks, anonymous memory, ends, signals, plain reads and writes, are none.
//!
//! A sweep first counts, and then has each call fail in turn:
//!
//! ```no_run
//! use cvm_conformance::faults::{Fault, with_fault};
//! # fn work() -> Result<(), std::io::Error> { Ok(()) }
//! # fn main() -> std::io::Result<()> {
//! let calls = with_fault(None, work)?.calls;
//! for nth in 0..calls {
//!     let outcome = with_fault(Some(Fault { nth, errno: libc::EIO }), work)?;
//!     println!("{nth}: {:?}: {:?}", outcome.failed, outcome.result.expect("no panic"));
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Limits:
//!
//! - Calls of several threads are counted as they come, so that the same number need not mean the same call twice.
//! - A thread that has ended may be listed by the kernel for a moment longer: who counts threads afterwards looks again.
//! - What runs under it cannot be run under it again: the kernel has one listener for all filters of a thread.
//! - A signal that arrives before the kernel has asked interrupts the call, which then begins again, or fails with
//!   `EINTR` if the signal's handler does not restart calls. Before Linux 5.19 so does one that arrives before the
//!   answer. An interrupted call is counted when it is made again.
//! - A process that sets a filter of its own makes calls fail or pass by it first; it is asked about what passes.

#![allow(unsafe_code, reason = "seccomp(2), its listener and poll(2) are called without a wrapper")]

mod candidates;

use libc::{c_int, c_ulong, pollfd, seccomp_data, seccomp_notif, seccomp_notif_resp, seccomp_notif_sizes, sock_fprog};
use std::io::{self, ErrorKind, PipeReader, PipeWriter, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Which call fails, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// The number of the candidate, from 0 on.
    pub nth: u64,
    /// The error number that it fails with, from 1 to 4095.
    pub errno: i32,
}

/// What came of work under [`with_fault`].
#[derive(Debug)]
pub struct Outcome<T> {
    /// What the work returned, or the panic that it ended with.
    pub result: thread::Result<T>,
    /// How many candidates were called.
    pub calls: u64,
    /// What was made to fail, such as `ioctl 0xae41`, `mmap`, or `openat of another process`; nothing if there were not
    /// as many calls.
    pub failed: Option<String>,
    /// Whether a thread or process that the work has started was still there a minute after its end.
    pub outlived: bool,
}

/// How long what the work has started may outlive it: far longer than a loaded machine needs to end it.
const GRACE: Duration = Duration::from_secs(60);

/// The greatest error number (Linux include/linux/err.h, `MAX_ERRNO`).
const MOST_ERRNO: i32 = 4095;

/// Runs `work` on a thread of its own, in which, and in whatever threads and processes it starts, one call fails.
///
/// It returns when all of these are gone, or a minute after the end of `work`; what is there then goes on without
/// faults. The thread gets no privileges by what it executes (`PR_SET_NO_NEW_PRIVS`).
///
/// # Errors
/// If the host does not let a process do that, see [`available`], and when supervising it fails; `work` has been run then,
/// or was not begun.
pub fn with_fault<T: Send>(fault: Option<Fault>, work: impl FnOnce() -> T + Send) -> io::Result<Outcome<T>> {
    supervised(fault, GRACE, work)
}

/// Whether this host lets a process do that, or why not.
///
/// # Errors
/// A sentence for whoever has to be told that something is skipped.
pub fn available() -> Result<(), String> {
    // SAFETY: it has no preconditions; the descriptor is closed at the end of the process at the latest.
    let work = || unsafe { libc::close(libc::eventfd(0, libc::EFD_CLOEXEC)) };
    match with_fault(None, work) {
        Ok(Outcome { calls: 1, .. }) => Ok(()),
        Ok(Outcome { calls, .. }) => Err(format!("one system call was seen {calls} times")),
        Err(error) => Err(format!("system calls cannot be made to fail by seccomp here: {error}")),
    }
}

/// Tells the supervisor that the work has ended, however it ends. A process that it has forked and that lives on may have
/// a copy of the descriptor, so closing it would tell nothing.
struct End(PipeWriter);

impl Drop for End {
    fn drop(&mut self) {
        // It fails if the supervisor has given up, who does not wait for it then.
        let _ = self.0.write(&[0]);
    }
}

fn supervised<T: Send>(
    fault: Option<Fault>,
    grace: Duration,
    work: impl FnOnce() -> T + Send,
) -> io::Result<Outcome<T>> {
    if fault.is_some_and(|fault| !(1..=MOST_ERRNO).contains(&fault.errno)) {
        return Err(io::Error::new(ErrorKind::InvalidInput, "no such error number"));
    }
    let (ended, end) = io::pipe()?;
    let (tell, told) = mpsc::sync_channel(1);
    let gone = || io::Error::other("the thread ended before it had a filter");
    let mut builder = thread::Builder::new();
    if let Some(name) = thread::current().name() {
        builder = builder.name(name.into());
    }
    let (result, supervisor, all_gone) = thread::scope(|scope| {
        let worker = builder.spawn_scoped(scope, move || {
            let _end = End(end);
            let listener = install();
            let filtered = listener.is_ok();
            tell.send(listener).ok().filter(|()| filtered).map(|()| work())
        })?;
        // From here on an error closes the listener, which lets nobody wait: calls fail with ENOSYS.
        let mut supervisor = Supervisor::new(told.recv().map_err(|_| gone())??, fault)?;
        let all_gone = supervisor.supervise(Some(ended), grace)?;
        let result = match worker.join() {
            Ok(done) => Ok(done.ok_or_else(gone)?),
            Err(panic) => Err(panic),
        };
        Ok::<_, io::Error>((result, supervisor, all_gone))
    })?;
    let outcome = Outcome { result, calls: supervisor.calls, failed: supervisor.failed(), outlived: !all_gone };
    if !all_gone {
        supervisor.let_go_on();
    }
    Ok(outcome)
}

/// What a system call says, as an error or a number.
fn checked(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Sets the filter for this thread and whatever it starts from now on; returns the descriptor by which the kernel asks.
fn install() -> io::Result<OwnedFd> {
    let mut filter = candidates::filter();
    let program = sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: it takes no pointers.
    checked(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1 as c_ulong, 0, 0, 0) }.into())?;
    let set = |flags: c_ulong| {
        let flags = flags | libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
        // SAFETY: the program is of the length that it says, and outlives the call, which only reads it.
        checked(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) })
    };
    let listener = match set(libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV) {
        // Linux before 5.19 does not know the flag.
        Err(error) if error.kind() == ErrorKind::InvalidInput => set(0),
        set => set,
    }?;
    // SAFETY: the kernel has just made the descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(listener as c_int) })
}

/// Room for one of the kernel's structures, of which this one may be longer than the one that is known here.
struct Room(Vec<u64>);

impl Room {
    fn new(known: usize, kernel: u16) -> Self {
        Self(vec![0; known.max(kernel.into()).div_ceil(size_of::<u64>())])
    }

    /// Has the kernel read or write what is in it, by a request of the listener's.
    fn ioctl(&mut self, listener: &OwnedFd, request: c_ulong) -> io::Result<()> {
        // SAFETY: the kernel writes no more than the structure, which fits into the room, and alignment is that of a u64.
        checked(unsafe { libc::ioctl(listener.as_raw_fd(), request, self.0.as_mut_ptr()) }.into()).map(drop)
    }
}

/// Answers what the kernel asks. It allocates nothing meanwhile and takes no lock, as who is asked about may hold one.
struct Supervisor {
    listener: OwnedFd,
    fault: Option<Fault>,
    calls: u64,
    /// What was made to fail, and whether by a thread of this process.
    failed: Option<(seccomp_data, bool)>,
    asked: Room,
    answer: Room,
}

impl Supervisor {
    fn new(listener: OwnedFd, fault: Option<Fault>) -> io::Result<Self> {
        let mut sizes = seccomp_notif_sizes { seccomp_notif: 0, seccomp_notif_resp: 0, seccomp_data: 0 };
        // SAFETY: the kernel writes one such structure.
        checked(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_NOTIF_SIZES, 0, &raw mut sizes) })?;
        let asked = Room::new(size_of::<seccomp_notif>(), sizes.seccomp_notif);
        let answer = Room::new(size_of::<seccomp_notif_resp>(), sizes.seccomp_notif_resp);
        Ok(Self { listener, fault, calls: 0, failed: None, asked, answer })
    }

    /// Answers until nobody is left to be asked about, which is true, or until so long after `ended` can be read.
    fn supervise(&mut self, ended: Option<PipeReader>, grace: Duration) -> io::Result<bool> {
        let waiting = |fd| pollfd { fd, events: libc::POLLIN, revents: 0 };
        // The kernel passes over descriptors below 0.
        let mut descriptors =
            [self.listener.as_raw_fd(), ended.as_ref().map_or(-1, |ended| ended.as_raw_fd())].map(waiting);
        let mut deadline = None;
        loop {
            let timeout = match deadline.map(|deadline: Instant| deadline.saturating_duration_since(Instant::now())) {
                None => -1,
                Some(Duration::ZERO) => return Ok(false),
                Some(left) => left.as_millis() as c_int + 1,
            };
            // SAFETY: the array is of the length that is said.
            let ready = checked(unsafe { libc::poll(descriptors.as_mut_ptr(), 2, timeout) }.into());
            match ready {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                ready => ready?,
            };
            let [listener, end] = descriptors.map(|descriptor| descriptor.revents);
            if listener & libc::POLLIN != 0 {
                self.answer()?;
            } else if listener != 0 {
                return Ok(true);
            }
            if end != 0 {
                descriptors[1] = waiting(-1);
                deadline = Some(Instant::now() + grace);
            }
        }
    }

    /// Answers one question.
    fn answer(&mut self) -> io::Result<()> {
        let forgiven = |error: io::Error| match error.raw_os_error() {
            // Who was asked about has been killed or interrupted; or this was.
            Some(libc::ENOENT | libc::EINTR) => Ok(()),
            _ => Err(error),
        };
        // The kernel takes nothing but zeros.
        self.asked.0.fill(0);
        if let Err(error) = self.asked.ioctl(&self.listener, libc::SECCOMP_IOCTL_NOTIF_RECV) {
            return forgiven(error);
        }
        // SAFETY: the room has at least the size and the alignment of the structure, which any bytes are one of.
        let asked = unsafe { self.asked.0.as_ptr().cast::<seccomp_notif>().read() };
        let fault = self.fault.filter(|fault| fault.nth == self.calls && self.failed.is_none());
        let (error, flags) = match fault {
            Some(fault) => (-fault.errno, 0),
            None => (0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
        };
        // While it waits for an answer its number is nobody else's.
        // SAFETY: signal 0 is none; the call takes no pointers.
        let ours = fault.is_some() && unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), asked.pid, 0) } == 0;
        let answer = seccomp_notif_resp { id: asked.id, val: 0, error, flags };
        self.answer.0.fill(0);
        // SAFETY: the room has at least the size and the alignment of the structure.
        unsafe { self.answer.0.as_mut_ptr().cast::<seccomp_notif_resp>().write(answer) };
        if let Err(error) = self.answer.ioctl(&self.listener, libc::SECCOMP_IOCTL_NOTIF_SEND) {
            return forgiven(error);
        }
        self.calls += 1;
        if fault.is_some() {
            self.failed = Some((asked.data, ours));
        }
        Ok(())
    }

    fn failed(&self) -> Option<String> {
        self.failed.as_ref().map(|(data, ours)| {
            let name = candidates::name(data);
            if *ours { name } else { format!("{name} of another process") }
        })
    }

    /// Looks after those that have outlived the work, on a thread of its own, until they are gone.
    fn let_go_on(mut self) {
        self.fault = None;
        // Without a thread the listener is closed, and their calls fail.
        let _ = thread::Builder::new().name("faults".into()).spawn(move || self.supervise(None, Duration::ZERO));
    }
}

#[cfg(test)]
mod tests;
