//! System calls that an attacker makes, and that have no safe wrapper.

#![allow(unsafe_code, reason = "KVM's ioctls, ptrace, process_vm_readv and kcmp are raw system calls")]

use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::ptr::null_mut;

/// An ioctl of KVM's whose argument is a `T`, of which the kernel reads or writes no more than `T` has.
pub struct Ioctl<T> {
    request: u64,
    argument: PhantomData<T>,
}

impl<T> Ioctl<T> {
    // `_IOC` of Linux include/uapi/asm-generic/ioctl.h; 0xae is KVM's type.
    const fn new(direction: u64, number: u64, size: usize) -> Self {
        Self { request: direction << 30 | (size as u64) << 16 | 0xae << 8 | number, argument: PhantomData }
    }

    pub const fn none(number: u64) -> Self {
        Self::new(0, number, 0)
    }

    pub const fn write(number: u64) -> Self {
        Self::new(1, number, size_of::<T>())
    }

    pub const fn read(number: u64) -> Self {
        Self::new(2, number, size_of::<T>())
    }

    /// One whose number counts only the first `size` bytes of the argument, which say how many follow.
    pub const fn with_header(number: u64, size: usize) -> Self {
        Self::new(3, number, size)
    }

    /// The same for one that is only written.
    pub const fn write_header(number: u64, size: usize) -> Self {
        Self::new(1, number, size)
    }

    /// Makes the call. Addresses in `argument` must be those of mappings that nothing in this process refers to.
    pub fn call(&self, fd: &impl AsRawFd, argument: &mut T) -> io::Result<i32> {
        // KVM_RUN and its like refuse an argument.
        let argument = if size_of::<T>() == 0 { null_mut() } else { std::ptr::from_mut(argument) };
        // SAFETY: KVM's ABI has a `T` for this request, which lives until the call returns. Of addresses in it the
        // caller promises that what happens there is nobody's business.
        checked(unsafe { libc::ioctl(fd.as_raw_fd(), self.request as _, argument) })
    }
}

fn checked(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A second descriptor for one of which only the number is known, as an attacker has it from /proc.
pub fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the number was read from /proc/self/fd; if it was closed since then, duplicating it fails.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
}

/// Stops a process as a debugger does, and lets it go again.
pub fn attach(pid: i32) -> io::Result<()> {
    // SAFETY: these calls pass no memory but the status word.
    unsafe {
        if libc::ptrace(libc::PTRACE_ATTACH, pid, null_mut::<c_void>(), null_mut::<c_void>()) < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut status = 0;
        checked(libc::waitpid(pid, &raw mut status, libc::__WALL))?;
        libc::ptrace(libc::PTRACE_DETACH, pid, null_mut::<c_void>(), null_mut::<c_void>());
    }
    Ok(())
}

/// Starts a program such that it is stopped before its first instruction, and traced by nobody.
pub fn start_stopped(program: &str) -> io::Result<Child> {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let trace = || {
        // SAFETY: the call passes no memory.
        checked(unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, null_mut::<c_void>(), null_mut::<c_void>()) } as i32)?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes one system call.
    let child = unsafe { command.pre_exec(trace) }.spawn()?;
    let pid = child.id().cast_signed();
    let mut status = 0;
    // SAFETY: these calls pass no memory but the status word.
    unsafe {
        // A traced process stops at the end of an exec (ptrace(2)).
        checked(libc::waitpid(pid, &raw mut status, libc::__WALL))?;
        let stop = std::ptr::without_provenance_mut::<c_void>(libc::SIGSTOP as usize);
        checked(libc::ptrace(libc::PTRACE_DETACH, pid, null_mut::<c_void>(), stop) as i32)?;
    }
    Ok(child)
}

/// Reads another process's memory.
pub fn read_process(pid: i32, address: u64, into: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote = libc::iovec { iov_base: address as *mut c_void, iov_len: into.len() };
    // SAFETY: the kernel writes to `into` alone.
    let read = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Compares the first descriptors of two processes: the kernel says only whether they are the same, or in which order.
pub fn compare_files(one: i32, other: i32) -> io::Result<()> {
    const KCMP_FILE: i32 = 0;
    // SAFETY: the call passes no memory.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_FILE, 0, 0) };
    if order < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The name of an error number.
pub fn name(error: &io::Error) -> String {
    let known = [
        (libc::EACCES, "EACCES"),
        (libc::EBADF, "EBADF"),
        (libc::EEXIST, "EEXIST"),
        (libc::EFAULT, "EFAULT"),
        (libc::EINVAL, "EINVAL"),
        (libc::EIO, "EIO"),
        (libc::ENODEV, "ENODEV"),
        (libc::ENOENT, "ENOENT"),
        (libc::ENOTTY, "ENOTTY"),
        (libc::EPERM, "EPERM"),
        (libc::ESRCH, "ESRCH"),
    ];
    let found = known.iter().find(|(number, _)| error.raw_os_error() == Some(*number));
    found.map_or_else(|| error.to_string(), |(_, name)| (*name).to_owned())
}
