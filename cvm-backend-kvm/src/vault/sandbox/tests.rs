//! What a process can do that has gone through all that a vault does before it takes orders: children of this one try it.

use super::*;
use libc::{c_long, syscall};

/// What comes of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The process was killed by the filter.
    Killed,
    /// The process was killed by this other signal.
    Signal(i32),
    /// The call failed with this error.
    Fails(i32),
    /// The call went through.
    Succeeds,
    /// The process could not be confined.
    Unconfined,
}

const UNCONFINED: i32 = 250;
const SUCCESS: i32 = 251;

/// What comes of `attempt` in a process that `prepare`s first, as a vault does.
fn outcome(prepare: impl FnOnce() -> Result<(), Error>, attempt: impl FnOnce() -> c_long) -> Outcome {
    // SAFETY: the child has the one thread that this call returns on, uses no lock but the allocator's, which the C library
    // keeps usable, and ends by _exit.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "{}", io::Error::last_os_error());
    if child == 0 {
        let status = match prepare() {
            Err(_) => UNCONFINED,
            Ok(()) if attempt() == -1 => io::Error::last_os_error().raw_os_error().unwrap_or(0),
            Ok(()) => SUCCESS,
        };
        // SAFETY: it does not return.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: the status is written to this stack.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    match (libc::WIFSIGNALED(status), libc::WTERMSIG(status), libc::WEXITSTATUS(status)) {
        (true, libc::SIGSYS, _) => Outcome::Killed,
        (true, signal, _) => Outcome::Signal(signal),
        (false, _, UNCONFINED) => Outcome::Unconfined,
        (false, _, SUCCESS) => Outcome::Succeeds,
        (false, _, errno) => Outcome::Fails(errno),
    }
}

fn confine() -> Result<(), Error> {
    drop_privileges()?;
    lock_down()
}

fn confined(attempt: impl FnOnce() -> c_long) -> Outcome {
    outcome(confine, attempt)
}

/// A system call with these arguments.
fn call(number: c_long, arguments: [u64; 6]) -> c_long {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: no pointer among the arguments of the attempts leads to memory that Rust uses.
    unsafe { syscall(number, a, b, c, d, e, f) }
}

const NONE: [u64; 6] = [0; 6];
const PAGE: u64 = 4096;

fn first(argument: u64) -> [u64; 6] {
    [argument, 0, 0, 0, 0, 0]
}

#[test]
fn calls_that_a_vault_has_no_use_for_kill_it() {
    let forbidden = [
        ("open", libc::SYS_open),
        ("openat2", libc::SYS_openat2),
        ("creat", libc::SYS_creat),
        ("open_by_handle_at", libc::SYS_open_by_handle_at),
        ("readlink", libc::SYS_readlink),
        ("getdents64", libc::SYS_getdents64),
        ("newfstatat", libc::SYS_newfstatat),
        ("unlink", libc::SYS_unlink),
        ("rename", libc::SYS_rename),
        ("mount", libc::SYS_mount),
        ("open_tree", libc::SYS_open_tree),
        ("chroot", libc::SYS_chroot),
        ("dup", libc::SYS_dup),
        ("dup2", libc::SYS_dup2),
        ("pipe2", libc::SYS_pipe2),
        ("socket", libc::SYS_socket),
        ("socketpair", libc::SYS_socketpair),
        ("connect", libc::SYS_connect),
        ("bind", libc::SYS_bind),
        ("accept4", libc::SYS_accept4),
        ("sendto", libc::SYS_sendto),
        ("recvmmsg", libc::SYS_recvmmsg),
        ("setsockopt", libc::SYS_setsockopt),
        ("ptrace", libc::SYS_ptrace),
        ("process_vm_readv", libc::SYS_process_vm_readv),
        ("process_vm_writev", libc::SYS_process_vm_writev),
        ("process_madvise", libc::SYS_process_madvise),
        ("kcmp", libc::SYS_kcmp),
        ("io_uring_setup", libc::SYS_io_uring_setup),
        ("io_uring_enter", libc::SYS_io_uring_enter),
        ("io_uring_register", libc::SYS_io_uring_register),
        ("io_setup", libc::SYS_io_setup),
        ("fork", libc::SYS_fork),
        ("vfork", libc::SYS_vfork),
        ("execve", libc::SYS_execve),
        ("execveat", libc::SYS_execveat),
        ("unshare", libc::SYS_unshare),
        ("setns", libc::SYS_setns),
        ("tkill", libc::SYS_tkill),
        ("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo),
        ("pidfd_open", libc::SYS_pidfd_open),
        ("pidfd_getfd", libc::SYS_pidfd_getfd),
        ("pidfd_send_signal", libc::SYS_pidfd_send_signal),
        ("userfaultfd", libc::SYS_userfaultfd),
        ("bpf", libc::SYS_bpf),
        ("perf_event_open", libc::SYS_perf_event_open),
        ("keyctl", libc::SYS_keyctl),
        ("add_key", libc::SYS_add_key),
        ("request_key", libc::SYS_request_key),
        ("seccomp", libc::SYS_seccomp),
        ("landlock_create_ruleset", libc::SYS_landlock_create_ruleset),
        ("setrlimit", libc::SYS_setrlimit),
        ("setuid", libc::SYS_setuid),
        ("setresuid", libc::SYS_setresuid),
        ("capset", libc::SYS_capset),
        ("personality", libc::SYS_personality),
        ("arch_prctl", libc::SYS_arch_prctl),
        ("modify_ldt", libc::SYS_modify_ldt),
        ("iopl", libc::SYS_iopl),
        ("ioperm", libc::SYS_ioperm),
        ("shmget", libc::SYS_shmget),
        ("shmat", libc::SYS_shmat),
        ("msgget", libc::SYS_msgget),
        ("mq_open", libc::SYS_mq_open),
        ("memfd_secret", libc::SYS_memfd_secret),
        ("pkey_mprotect", libc::SYS_pkey_mprotect),
        ("remap_file_pages", libc::SYS_remap_file_pages),
        ("init_module", libc::SYS_init_module),
        ("kexec_load", libc::SYS_kexec_load),
        ("sched_setscheduler", libc::SYS_sched_setscheduler),
        ("no call at all", 10_000),
    ];
    for (name, number) in forbidden {
        assert_eq!(confined(|| call(number, NONE)), Outcome::Killed, "{name}");
    }
    // SAFETY: it has no preconditions.
    let parent = unsafe { libc::getpid() } as u64;
    assert_eq!(
        confined(|| call(libc::SYS_kill, first(parent))),
        Outcome::Killed,
        "kill, no signal, of another process"
    );
}

#[test]
fn calls_that_a_c_library_can_do_without_fail() {
    for (name, number) in [
        ("openat", libc::SYS_openat),
        ("clone3", libc::SYS_clone3),
        ("prlimit64", libc::SYS_prlimit64),
        ("sysinfo", libc::SYS_sysinfo),
    ] {
        assert_eq!(confined(|| call(number, NONE)), Outcome::Fails(libc::ENOSYS), "{name}");
    }
}

#[test]
fn memory_with_new_code_kills_a_vault() {
    let executable = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    let map = |prot| [0, PAGE, prot, (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64, u64::MAX, 0];
    for prot in [executable, libc::PROT_EXEC as u64, executable | 1 << 32] {
        assert_eq!(confined(|| call(libc::SYS_mmap, map(prot))), Outcome::Killed, "mmap {prot:#x}");
        assert_eq!(
            confined(|| call(libc::SYS_mprotect, [0, PAGE, prot, 0, 0, 0])),
            Outcome::Killed,
            "mprotect {prot:#x}"
        );
    }
    assert_eq!(confined(|| call(libc::SYS_mmap, map(libc::PROT_READ as u64))), Outcome::Succeeds);
}

#[test]
fn a_vault_has_kvms_ioctls_and_no_others() {
    let ioctl = |number: u64| confined(|| call(libc::SYS_ioctl, [0, number, 0, 0, 0, 0]));
    let numbers = [
        ("TIOCSTI", libc::TIOCSTI),
        ("TCGETS", libc::TCGETS),
        ("FIONBIO", libc::FIONBIO),
        ("FIOCLEX", libc::FIOCLEX),
        ("BLKRRPART", 0x125f),
        ("VHOST_SET_OWNER", 0xaf01),
        ("VFIO_GET_API_VERSION", 0x3b64),
        ("UFFDIO_API", 0xc018_aa3f),
        ("zero", 0),
    ];
    for (name, number) in numbers {
        assert_eq!(ioctl(number), Outcome::Killed, "{name}");
        // The kernel looks at the lower half only, and so does the filter.
        assert_eq!(ioctl(0xae00 << 32 | number), Outcome::Killed, "{name} with an upper half");
    }
    // KVM_GET_API_VERSION, of what is not KVM.
    assert!(matches!(ioctl(0xae00), Outcome::Fails(_)));
}

#[test]
fn flags_of_shared_descriptors_are_not_a_vaults_to_change() {
    let fcntl = |command: i32| confined(|| call(libc::SYS_fcntl, [0, command as u64, 0, 0, 0, 0]));
    for command in [libc::F_SETFL, libc::F_SETFD, libc::F_SETOWN, libc::F_SETPIPE_SZ, libc::F_SETLK] {
        assert_eq!(fcntl(command), Outcome::Killed, "{command}");
    }
}

#[test]
fn a_vault_makes_threads_and_no_processes() {
    let clone = |flags: u64| confined(|| call(libc::SYS_clone, first(flags)));
    let with = |flag: i32| THREAD | flag as u32 as u64;
    for flags in [
        0,
        libc::SIGCHLD as u64,
        (libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD) as u64,
        (libc::CLONE_VM | libc::CLONE_THREAD) as u64,
        with(libc::CLONE_PTRACE),
        with(libc::CLONE_UNTRACED),
        with(libc::CLONE_PIDFD),
        with(libc::CLONE_NEWUSER),
        with(libc::CLONE_NEWNS),
        with(libc::CLONE_IO),
        THREAD | 1 << 33,
    ] {
        assert_eq!(clone(flags), Outcome::Killed, "{flags:#x}");
    }
    let thread = || std::thread::spawn(|| 7).join().map_or(-1, |seven| seven);
    assert_eq!(confined(thread), Outcome::Succeeds);
}

#[test]
fn a_thread_of_a_vault_is_as_confined_as_the_first() {
    let attempt = || std::thread::spawn(|| call(libc::SYS_socket, NONE)).join().unwrap_or(-1);
    assert_eq!(confined(attempt), Outcome::Killed);
}

#[test]
fn a_vault_with_another_thread_does_not_start() {
    let prepare = || {
        std::thread::spawn(|| std::thread::sleep(std::time::Duration::from_secs(60)));
        confine()
    };
    assert_eq!(outcome(prepare, || 0), Outcome::Unconfined);
    for (status, says) in [
        ("TracerPid:\t0\nThreads:\t2\n", "it has 2 threads"),
        ("TracerPid:\t123\nThreads:\t1\n", "process 123 traces it"),
        ("TracerPid:\t0\n", "it has unknown threads"),
        ("", "process unknown traces it"),
    ] {
        let Err(Error::Vault { step: "start", source }) = check_alone(status) else { panic!("{status}") };
        assert!(source.to_string().starts_with(says), "{source}");
    }
}

#[test]
fn a_vault_signals_its_own_threads_and_no_others() {
    let own = || -> u64 { getpid().as_raw_nonzero().get() as u64 };
    let parent = own();
    let tgkill = |process: u64| call(libc::SYS_tgkill, [process, process, 0, 0, 0, 0]);
    assert_eq!(confined(|| tgkill(own())), Outcome::Succeeds);
    assert_eq!(confined(|| tgkill(parent)), Outcome::Killed);
    assert_eq!(confined(|| tgkill(parent | own() << 32)), Outcome::Killed);
    // As a C library ends a program that it finds broken.
    // SAFETY: it does not return.
    assert_eq!(confined(|| unsafe { libc::abort() }), Outcome::Signal(libc::SIGABRT));
}

#[test]
fn a_vault_names_its_threads_and_changes_nothing_else_of_itself() {
    let prctl = |option: u64, value: u64| confined(|| call(libc::SYS_prctl, [option, value, 0, 0, 0, 0]));
    for option in [
        libc::PR_SET_DUMPABLE,
        libc::PR_SET_PTRACER,
        libc::PR_SET_SECCOMP,
        libc::PR_SET_MM,
        libc::PR_CAPBSET_DROP,
        libc::PR_SET_NO_NEW_PRIVS,
        libc::PR_SET_PDEATHSIG,
    ] {
        assert_eq!(prctl(option as u64, 1), Outcome::Killed, "{option}");
        assert_eq!(prctl(1 << 32 | option as u64, 1), Outcome::Killed, "{option} with an upper half");
    }
    assert_eq!(prctl(libc::PR_SET_NAME as u64, c"vcpu".as_ptr() as u64), Outcome::Succeeds);
}

#[test]
fn other_ways_into_the_kernel_kill_a_vault() {
    /// The bit of a call of the x32 ABI (Linux arch/x86/include/uapi/asm/unistd.h).
    const X32: c_long = 0x4000_0000;
    for number in [libc::SYS_getpid, libc::SYS_write, libc::SYS_futex] {
        assert_eq!(confined(|| call(X32 | number, NONE)), Outcome::Killed, "x32 {number}");
    }
    let i386 = |number: c_long| -> c_long {
        let mut result = number;
        // SAFETY: the call of the i386 ABI with zeros for arguments changes no memory.
        unsafe {
            std::arch::asm!("push rbx", "xor ebx, ebx", "int 0x80", "pop rbx", inout("rax") result, in("rcx") 0, in("rdx") 0);
        }
        result
    };
    // exit, read, open, getpid and socketcall of i386.
    for number in [1, 3, 5, 20, 102] {
        // A kernel without that ABI has a fault instead.
        let outcome = confined(|| i386(number));
        assert!([Outcome::Killed, Outcome::Signal(libc::SIGSEGV)].contains(&outcome), "i386 {number}: {outcome:?}");
    }
}

#[test]
fn what_a_vault_says_lands_nowhere() {
    for descriptor in [1, 2] {
        let write = || call(libc::SYS_write, [descriptor, c"x".as_ptr() as u64, 1, 0, 0, 0]);
        assert_eq!(confined(write), Outcome::Fails(libc::EPERM), "{descriptor}");
    }
    let next = || match call(libc::SYS_memfd_create, [c"next".as_ptr() as u64, 0, 0, 0, 0, 0]) {
        3 => 0,
        _ => -1,
    };
    assert_eq!(confined(next), Outcome::Succeeds, "the next descriptor is no standard one");
}
