//! What a vault gives up, so that no process gets into it and little gets out.

#![allow(unsafe_code, reason = "two system calls that no library has as they are needed here")]

use crate::Error;
use landlock::{ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus, Scope};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getpid, set_dumpable_behavior, setrlimit};
use rustix::stdio::{dup2_stderr, dup2_stdout};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_name, set_no_new_privs,
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ptr::null;

/// The first thing that a vault does: no process gets into it from now on. It keeps its standard input, which is the socket,
/// and nothing else that it was started with. There must be no other thread: most of this is for the calling thread only.
pub(super) fn drop_privileges() -> Result<(), Error> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(Error::vault("refuse to be dumped"))?;
    check_alone(&fs::read_to_string("/proc/self/status").map_err(Error::vault("look for a tracer"))?)?;
    // SAFETY: nothing of this process uses a descriptor above the standard ones yet.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, FIRST_OTHER, u32::MAX, 0) };
    if closed != 0 {
        return Err(Error::vault("close descriptors")(io::Error::last_os_error()));
    }
    silence().map_err(Error::vault("silence its standard output"))?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .map_err(Error::vault("forbid core dumps"))?;
    set_no_new_privs(true).map_err(Error::vault("give up new privileges"))?;
    // Where it is not root, it has no say about what it could get, and cannot get it.
    for capability in CapabilitySet::all().iter() {
        let _ = remove_capability_from_bounding_set(capability);
    }
    let _ = clear_ambient_capability_set();
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .map_err(Error::vault("give up its capabilities"))?;
    set_name(c"cvm-vault").map_err(Error::vault("name itself"))?;
    std::env::set_current_dir("/").map_err(Error::vault("leave its directory"))
}

/// Checks by this process's own `/proc/self/status` that nothing traces it, as a tracer that had attached itself before is still
/// there, and that it has one thread.
fn check_alone(status: &str) -> Result<(), Error> {
    let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).map_or("unknown", str::trim);
    let problem = match (field("TracerPid:"), field("Threads:")) {
        ("0", "1") => return Ok(()),
        ("0", threads) => format!("it has {threads} threads before its main begins, of which no other is confined"),
        (tracer, _) => format!("process {tracer} traces it"),
    };
    Err(Error::vault("start")(io::Error::other(problem)))
}

/// Occupies standard output and standard error with an empty file that cannot be written. Else KVM's descriptors and shared
/// memory would get their numbers, and a message of the C library would land there.
fn silence() -> io::Result<()> {
    let nothing = memfd_create("cvm-nothing", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    fcntl_add_seals(&nothing, SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL)?;
    dup2_stdout(&nothing)?;
    dup2_stderr(&nothing)?;
    Ok(())
}

/// The last thing that a vault does before it takes orders: it can open nothing any more, and make no system call but
/// those that running a VM takes.
pub(super) fn lock_down() -> Result<(), Error> {
    // The system-call filter allows nothing that landlock would judge; where the kernel has landlock, it holds even if
    // the filter has a hole.
    let landlock = || {
        Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(ABI::V5))?
            .handle_access(AccessNet::from_all(ABI::V5))?
            .scope(Scope::from_all(ABI::V6))?
            .create()?
            .restrict_self()
    };
    let has_landlock = has_landlock()?;
    let restricted =
        landlock().map_err(|error| Error::vault("restrict itself by landlock")(io::Error::other(error)))?;
    if has_landlock && restricted.ruleset == RulesetStatus::NotEnforced {
        let source = io::Error::other("the kernel has it, and it is not enforced");
        return Err(Error::vault("restrict itself by landlock")(source));
    }
    let filters = filters().map_err(|error| Error::vault("make a filter of system calls")(io::Error::other(error)))?;
    // The list last: it does not have the call that sets a filter.
    filters.iter().try_for_each(|filter| {
        // All threads, even though there is only one.
        seccompiler::apply_filter_all_threads(filter)
            .map_err(|error| Error::vault("filter its system calls")(io::Error::other(error)))
    })
}

/// Whether the kernel has landlock and lets this process use it. Else the rules are left out, but not for any other failure.
fn has_landlock() -> Result<bool, Error> {
    /// `LANDLOCK_CREATE_RULESET_VERSION` (Linux include/uapi/linux/landlock.h).
    const VERSION: u32 = 1;
    // SAFETY: without rules the call makes nothing: it tells its version.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, null::<u8>(), 0usize, VERSION) };
    if version > 0 {
        return Ok(true);
    }
    let source = io::Error::last_os_error();
    match source.raw_os_error() {
        Some(libc::ENOSYS | libc::EOPNOTSUPP | libc::EPERM) => Ok(false),
        _ => Err(Error::vault("ask for landlock")(source)),
    }
}

/// The first descriptor that is no standard one.
const FIRST_OTHER: u32 = 3;

/// The one argument in which a call must be as said.
fn only(argument: u8, width: SeccompCmpArgLen, is: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, width, is, value)?])
}

/// The type of KVM's ioctls, in bits 8 to 15 of their numbers (Linux include/uapi/linux/kvm.h, KVMIO).
const KVMIO: u64 = 0xae;

/// The flags of a new thread, as C libraries make them, and no others.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

/// A flag that some C libraries add, and that the kernel ignores (Linux include/uapi/linux/sched.h).
const CLONE_DETACHED: u64 = 0x0040_0000;

/// Two filters, which act on each call together: the stricter one wins.
fn filters() -> Result<[BpfProgram; 2], BackendError> {
    let any = [
        // Memory: its own, and the guest's.
        libc::SYS_brk,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_memfd_create,
        libc::SYS_ftruncate,
        libc::SYS_fallocate,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_lseek,
        libc::SYS_fstat,
        // The VMM: orders, kicks, and futexes in shared pages.
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_poll,
        libc::SYS_ppoll,
        libc::SYS_read,
        libc::SYS_preadv2,
        libc::SYS_write,
        libc::SYS_close,
        libc::SYS_eventfd2,
        libc::SYS_futex,
        // Threads, and the signal that kicks them.
        libc::SYS_set_robust_list,
        libc::SYS_rseq,
        libc::SYS_sigaltstack,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigreturn,
        libc::SYS_restart_syscall,
        libc::SYS_getpid,
        libc::SYS_gettid,
        libc::SYS_sched_yield,
        libc::SYS_sched_getaffinity,
        libc::SYS_nanosleep,
        libc::SYS_clock_nanosleep,
        libc::SYS_clock_gettime,
        libc::SYS_gettimeofday,
        libc::SYS_getrandom,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ];
    use SeccompCmpArgLen::{Dword, Qword};
    use SeccompCmpOp::{Eq, MaskedEq};
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = any.into_iter().map(|call| (call, Vec::new())).collect();
    let executable = libc::PROT_EXEC as u64;
    let own_process = getpid().as_raw_nonzero().get() as u64;
    rules.extend([
        // The kernel takes 32 bits of the number. No descriptor of another driver gets here: see what the server checks.
        (libc::SYS_ioctl, vec![only(1, Dword, MaskedEq(0xff00), KVMIO << 8)?]),
        // It interrupts and aborts its own threads. The kernel takes 32 bits of the process, too.
        (libc::SYS_tgkill, vec![only(0, Dword, Eq, own_process)?]),
        // No new code.
        (libc::SYS_mmap, vec![only(2, Dword, MaskedEq(executable), 0)?]),
        (libc::SYS_mprotect, vec![only(2, Dword, MaskedEq(executable), 0)?]),
        // Threads, not processes.
        (libc::SYS_clone, vec![only(0, Qword, MaskedEq(!CLONE_DETACHED), THREAD)?]),
        (libc::SYS_prctl, vec![only(0, Dword, Eq, libc::PR_SET_NAME as u64)?]),
        (
            libc::SYS_fcntl,
            [libc::F_DUPFD_CLOEXEC, libc::F_ADD_SEALS, libc::F_GET_SEALS, libc::F_GETFD]
                .into_iter()
                .map(|command| only(1, Dword, Eq, command as u64))
                .collect::<Result<_, _>>()?,
        ),
    ]);
    // What a C library tries and can do without: how many processors there are, how large a stack may be, and a call whose
    // flags are in memory, where a filter cannot look, and for which it has `clone`.
    let lacks =
        [libc::SYS_openat, libc::SYS_sysinfo, libc::SYS_prlimit64, libc::SYS_clone3].map(|call| (call, Vec::new()));
    rules.extend(lacks.clone());
    let list = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?;
    let lack = SeccompAction::Errno(libc::ENOSYS as u32);
    let lacks = SeccompFilter::new(BTreeMap::from(lacks), SeccompAction::Allow, lack, TargetArch::x86_64)?;
    Ok([lacks.try_into()?, list.try_into()?])
}

#[cfg(test)]
mod tests;
