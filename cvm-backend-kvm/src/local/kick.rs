//! Stopping a vCPU that runs on another thread.

#![allow(unsafe_code, reason = "a signal is sent to a thread, and a flag that the kernel reads is mapped twice")]

use crate::{Error, lock};
use cvm_core::Kick;
use kvm_bindings::{KVMIO, kvm_run, kvm_signal_mask};
use kvm_ioctls::VcpuFd;
use libc::{c_int, c_void, pthread_t, siginfo_t};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::cell::Cell;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{NonNull, null, null_mut};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use vmm_sys_util::ioctl::ioctl_with_ptr;
use vmm_sys_util::ioctl_iow_nr;
use vmm_sys_util::signal::{
    Error as SignalError, SIGRTMIN, block_signal, clear_signal, register_signal_handler, unblock_signal,
};

/// The signal that makes KVM_RUN return, see [`KvmPlatform`](crate::KvmPlatform).
fn signal() -> c_int {
    SIGRTMIN()
}

/// Does nothing; that there is a handler is what interrupts the call.
extern "C" fn ignore(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// A second mapping of the page that a vCPU shares with KVM, for one byte of it. The first one belongs to `VcpuFd`,
/// which is busy while the vCPU runs.
#[derive(Debug)]
struct ImmediateExit {
    page: NonNull<c_void>,
}

// SAFETY: the mapping is only ever accessed as an atomic byte.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

const PAGE: usize = 4096;

impl ImmediateExit {
    fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: `vcpu` owns the descriptor and outlives this function.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        // SAFETY: without MAP_FIXED the kernel chooses an address where nothing is.
        let page = unsafe { mmap(null_mut(), PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, 0)? };
        Ok(Self { page: NonNull::new(page).ok_or(io::ErrorKind::OutOfMemory)? })
    }

    fn set(&self, on: bool) {
        // SAFETY: the byte lies in the page, which lives as long as `self`, and every byte is a valid AtomicU8.
        let flag = unsafe { self.page.byte_add(offset_of!(kvm_run, immediate_exit)).cast::<AtomicU8>().as_ref() };
        flag.store(on.into(), Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: the page is this mapping, to which no reference is left.
        let unmapped = unsafe { munmap(self.page.as_ptr(), PAGE) };
        debug_assert!(unmapped.is_ok(), "a vcpu page could not be unmapped: {unmapped:?}");
    }
}

#[derive(Debug, Default)]
struct State {
    requested: bool,
    /// The thread that is in KVM_RUN, about to enter it, or just back. It lives for as long as it is named here.
    thread: Option<pthread_t>,
}

thread_local! {
    /// Whether this thread has unblocked the signal. A thread that exits takes its answer along, whereas its `pthread_t`
    /// soon names another thread.
    static IS_UNBLOCKED: Cell<bool> = const { Cell::new(false) };
}

/// Unblocks the signal on this thread, which may have inherited a mask that blocks every signal.
fn unblock() {
    if IS_UNBLOCKED.replace(true) {
        return;
    }
    // It fails only for a number that is no signal's.
    let unblocked = unblock_signal(signal());
    debug_assert!(unblocked.is_ok(), "the signal to vcpus could not be unblocked: {unblocked:?}");
}

// Linux include/uapi/linux/kvm.h: what is written is a kvm_signal_mask, whose length the number does not count.
ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, kvm_signal_mask);

/// Which signals are blocked while a vCPU runs, as the kernel has it: a bit for each signal, from 1 on.
#[repr(C, packed)]
struct SignalMask {
    len: u32,
    blocked: u64,
}

/// Has KVM do all that it does before it lets `vcpu` run, and does not let it: a signal is waiting.
pub(crate) fn call_off(vcpu: &mut VcpuFd) -> Result<(), Error> {
    handler()?;
    let failed = |source| Error::Kvm { step: "call off a vcpu's entry", source };
    let all_but_ours = SignalMask { len: size_of::<u64>() as u32, blocked: !(1 << (signal() - 1)) };
    let was_blocked = match block_signal(signal()) {
        Ok(()) => false,
        Err(SignalError::SignalAlreadyBlocked(_)) => true,
        Err(error) => return Err(failed(io::Error::other(error.to_string()))),
    };
    // SAFETY: the signal is sent to this thread, which blocks it until it has taken it again.
    unsafe { libc::pthread_kill(libc::pthread_self(), signal()) };
    // SAFETY: KVM reads a mask of the length that it says, which is on this stack.
    let called_off = match unsafe { ioctl_with_ptr(vcpu, KVM_SET_SIGNAL_MASK(), &raw const all_but_ours) } {
        0 => match vcpu.run().map(drop) {
            // A KVM that lets nothing run yet has kept nothing back either.
            Err(error) if [libc::EINTR, libc::EINVAL].contains(&error.errno()) => Ok(()),
            Err(error) => Err(failed(error.into())),
            Ok(()) => Err(failed(io::Error::other("it was let run"))),
        },
        _ => Err(failed(io::Error::last_os_error())),
    };
    // With that mask the vCPU's thread would be deaf to all other signals whenever the vCPU runs.
    // SAFETY: without a mask KVM reads nothing.
    let called_off = match unsafe { ioctl_with_ptr(vcpu, KVM_SET_SIGNAL_MASK(), null::<SignalMask>()) } {
        0 => called_off,
        _ => called_off.and(Err(failed(io::Error::last_os_error()))),
    };
    let cleared = clear_signal(signal());
    let restored = if was_blocked { Ok(()) } else { unblock_signal(signal()) };
    called_off.and(cleared.and(restored).map_err(|error| failed(io::Error::other(error.to_string()))))
}

/// Makes sure that there is a handler for the signal.
fn handler() -> Result<(), Error> {
    static HANDLER: OnceLock<Result<(), i32>> = OnceLock::new();
    let handler = HANDLER.get_or_init(|| register_signal_handler(signal(), ignore).map_err(|error| error.errno()));
    handler
        .map_err(|errno| Error::Kvm { step: "handle the signal to vcpus", source: io::Error::from_raw_os_error(errno) })
}

/// Kicks one vCPU.
#[derive(Debug)]
pub(crate) struct Kicker {
    state: Mutex<State>,
    immediate_exit: ImmediateExit,
}

impl Kicker {
    pub(crate) fn new(vcpu: &VcpuFd) -> Result<Arc<Self>, Error> {
        handler()?;
        let made = ImmediateExit::new(vcpu);
        let immediate_exit = made.map_err(|source| Error::Kvm { step: "prepare a way to interrupt a vcpu", source })?;
        Ok(Arc::new(Self { state: Mutex::default(), immediate_exit }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Whether a kick was requested; it is over then.
    pub(crate) fn take(&self) -> bool {
        let mut state = self.state();
        if state.requested {
            state.requested = false;
            self.immediate_exit.set(false);
            return true;
        }
        false
    }

    /// Lets no KVM_RUN get as far as the guest for as long as the result lives.
    pub(crate) fn hold(&self) -> Hold<'_> {
        self.immediate_exit.set(true);
        Hold(self)
    }

    /// Marks this thread as the one in KVM_RUN for as long as the result lives.
    pub(crate) fn enter(&self) -> Entered<'_> {
        // SAFETY: it has no preconditions.
        let this = unsafe { libc::pthread_self() };
        unblock();
        self.state().thread = Some(this);
        Entered(self)
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        let mut state = self.state();
        state.requested = true;
        // With the flag set, a KVM_RUN that is only about to begin returns at once; the signal ends one under way.
        self.immediate_exit.set(true);
        if let Some(thread) = state.thread {
            // SAFETY: the thread is alive: it takes itself out, under the lock that is held here, before it goes on.
            let sent = unsafe { libc::pthread_kill(thread, signal()) };
            debug_assert_eq!(sent, 0, "a vcpu thread could not be signalled");
        }
    }
}

/// No KVM_RUN gets as far as the guest.
pub(crate) struct Hold<'a>(&'a Kicker);

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let state = self.0.state();
        self.0.immediate_exit.set(state.requested);
    }
}

/// A thread is in KVM_RUN.
pub(crate) struct Entered<'a>(&'a Kicker);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.0.state().thread = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    impl ImmediateExit {
        /// A page of this process in place of a vCPU's.
        fn detached() -> Self {
            // SAFETY: without MAP_FIXED the kernel chooses an address where nothing is.
            let page = unsafe {
                rustix::mm::mmap_anonymous(null_mut(), PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
            };
            Self { page: NonNull::new(page.unwrap()).unwrap() }
        }
    }

    /// Blocks the signal on this thread; returns whether it was blocked already.
    fn block() -> bool {
        matches!(block_signal(signal()), Err(SignalError::SignalAlreadyBlocked(_)))
    }

    #[test]
    fn the_signal_is_unblocked_on_a_thread_that_has_the_pthread_t_of_an_earlier_one() {
        let kicker = Kicker { state: Mutex::default(), immediate_exit: ImmediateExit::detached() };
        // Threads inherit the mask of the one that starts them.
        block();
        let enter = || {
            assert!(block(), "the thread does not inherit the mask");
            let _entered = kicker.enter();
            // SAFETY: it has no preconditions.
            (unsafe { libc::pthread_self() }, block())
        };
        let mut names = Vec::new();
        // The C library keeps the stack of a thread that has exited for the next one, and the pthread_t with it.
        while names.len() < 100 {
            let (name, is_blocked) = thread::scope(|scope| scope.spawn(enter).join().unwrap());
            assert!(!is_blocked, "thread {} lets no kick through", names.len());
            if names.contains(&name) {
                return;
            }
            names.push(name);
        }
        panic!("no pthread_t was used a second time");
    }
}
