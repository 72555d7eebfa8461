//! Which system calls may be made to fail, and the filter that has the kernel ask about them.

use libc::{c_long, seccomp_data, sock_filter};
use std::mem::offset_of;

/// When a call is a candidate.
#[derive(Debug, Clone, Copy)]
enum When {
    Always,
    /// If argument `.0` is one of these.
    Only(usize, &'static [i32]),
    /// Unless argument `.0` is this.
    Unless(usize, i32),
    /// If it maps a file, or replaces what the caller has mapped. Anonymous memory wherever there is room for it is the
    /// allocator's and the stacks', and nobody can go on without.
    Mapping,
}

#[derive(Debug)]
struct Candidate {
    number: c_long,
    name: &'static str,
    when: When,
    /// The argument that tells one such call from another.
    telling: Option<usize>,
}

const fn call(number: c_long, name: &'static str) -> Candidate {
    Candidate { number, name, when: When::Always, telling: None }
}

/// What makes, loads, seals, runs and converts a VM, and what makes and confines a process or a thread that holds one.
/// Every one of these fails on some host or under some limit, and none is the runtime's own: not locks, memory of the
/// allocator, signals, ends, nor plain reads and writes.
const CANDIDATES: &[Candidate] = &[
    // KVM and the secure processor.
    Candidate { telling: Some(1), ..call(libc::SYS_ioctl, "ioctl") },
    call(libc::SYS_openat, "openat"),
    // Memory.
    Candidate { when: When::Mapping, ..call(libc::SYS_mmap, "mmap") },
    call(libc::SYS_memfd_create, "memfd_create"),
    call(libc::SYS_ftruncate, "ftruncate"),
    call(libc::SYS_fallocate, "fallocate"),
    call(libc::SYS_fstat, "fstat"),
    call(libc::SYS_pread64, "pread64"),
    call(libc::SYS_pwrite64, "pwrite64"),
    // Rust's library asks whether a descriptor is still open before it closes it, and aborts over some of the answers.
    Candidate { when: When::Unless(1, libc::F_GETFD), telling: Some(1), ..call(libc::SYS_fcntl, "fcntl") },
    // Notifications, and other processes.
    call(libc::SYS_eventfd2, "eventfd2"),
    call(libc::SYS_epoll_create1, "epoll_create1"),
    call(libc::SYS_timerfd_create, "timerfd_create"),
    call(libc::SYS_pipe2, "pipe2"),
    call(libc::SYS_socketpair, "socketpair"),
    call(libc::SYS_sendmsg, "sendmsg"),
    call(libc::SYS_recvmsg, "recvmsg"),
    call(libc::SYS_poll, "poll"),
    call(libc::SYS_pidfd_open, "pidfd_open"),
    // Their start.
    call(libc::SYS_clone, "clone"),
    call(libc::SYS_clone3, "clone3"),
    call(libc::SYS_execve, "execve"),
    // What they give up. Not names, nor the capabilities of a bounding set, of which each is a call.
    Candidate {
        when: When::Only(0, &[libc::PR_SET_DUMPABLE, libc::PR_SET_NO_NEW_PRIVS, libc::PR_SET_PDEATHSIG]),
        telling: Some(0),
        ..call(libc::SYS_prctl, "prctl")
    },
    call(libc::SYS_close_range, "close_range"),
    call(libc::SYS_prlimit64, "prlimit64"),
    call(libc::SYS_capset, "capset"),
    call(libc::SYS_seccomp, "seccomp"),
    call(libc::SYS_landlock_create_ruleset, "landlock_create_ruleset"),
    call(libc::SYS_landlock_restrict_self, "landlock_restrict_self"),
];

/// What a call is known as: its name, and the argument that tells what it does.
pub(super) fn name(data: &seccomp_data) -> String {
    match CANDIDATES.iter().find(|candidate| candidate.number == c_long::from(data.nr)) {
        Some(Candidate { name, telling: Some(argument), .. }) => format!("{name} {:#x}", data.args[*argument]),
        Some(Candidate { name, telling: None, .. }) => (*name).into(),
        None => format!("system call {}", data.nr),
    }
}

/// `AUDIT_ARCH_X86_64` (Linux include/uapi/linux/audit.h): the machine of ELF files, 64 bits, little endian.
const X86_64: u32 = 62 | 1 << 31 | 1 << 30;

const fn load(offset: usize) -> sock_filter {
    sock_filter { code: (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, jt: 0, jf: 0, k: offset as u32 }
}

/// The lower half of an argument: all that the kernel looks at of commands and flags.
const fn load_argument(number: usize) -> sock_filter {
    load(offset_of!(seccomp_data, args) + number * size_of::<u64>())
}

/// Skips `yes` instructions if what was loaded compares, else `no`.
const fn jump(compare: u32, k: u32, yes: u8, no: u8) -> sock_filter {
    sock_filter { code: (libc::BPF_JMP | compare | libc::BPF_K) as u16, jt: yes, jf: no, k }
}

const fn answer(k: u32) -> sock_filter {
    sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k }
}

/// The program that has the kernel ask about candidates and let all else pass. Calls by another interface of the
/// processor, of 32 bits or x32, pass: nothing here makes one.
pub(super) fn filter() -> Vec<sock_filter> {
    const ASK: sock_filter = answer(libc::SECCOMP_RET_USER_NOTIF);
    const PASS: sock_filter = answer(libc::SECCOMP_RET_ALLOW);
    let mut program = vec![
        load(offset_of!(seccomp_data, arch)),
        jump(libc::BPF_JEQ, X86_64, 1, 0),
        PASS,
        load(offset_of!(seccomp_data, nr)),
    ];
    for candidate in CANDIDATES {
        let decision = match candidate.when {
            When::Always => vec![ASK],
            When::Only(argument, values) => {
                let each = values.iter().flat_map(|value| [jump(libc::BPF_JEQ, *value as u32, 0, 1), ASK]);
                std::iter::once(load_argument(argument)).chain(each).chain([PASS]).collect()
            }
            When::Unless(argument, value) => {
                vec![load_argument(argument), jump(libc::BPF_JEQ, value as u32, 1, 0), ASK, PASS]
            }
            When::Mapping => vec![
                load_argument(3),
                jump(libc::BPF_JSET, libc::MAP_FIXED as u32, 1, 0),
                jump(libc::BPF_JSET, libc::MAP_ANONYMOUS as u32, 1, 0),
                ASK,
                PASS,
            ],
        };
        program.push(jump(libc::BPF_JEQ, candidate.number as u32, 0, decision.len() as u8));
        program.extend(decision);
    }
    program.push(PASS);
    program
}
