//! The parties that can reach into a vault, by the credentials of the processes as they are.
//!
//! [`Facts`] are read from the kernel; a fact that cannot be read has the value that is worst for the guest. From them follow the
//! findings, each with a remedy, and from the findings the trust model: who can trace the vault has it do anything.

use crate::local::Isolation;
use crate::vault::Program;
use cvm_core::platform::{Asset, Missing, Party, Powers, TrustModel};
use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The capabilities by which a process reaches neither another process' memory nor more capabilities. All others count, also
/// those that a later kernel adds.
const HARMLESS: CapabilitySet = CapabilitySet::KILL
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::NET_BROADCAST)
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::IPC_LOCK)
    .union(CapabilitySet::SYS_PACCT)
    .union(CapabilitySet::SYS_NICE)
    .union(CapabilitySet::SYS_RESOURCE)
    .union(CapabilitySet::SYS_TIME)
    .union(CapabilitySet::LEASE)
    .union(CapabilitySet::AUDIT_WRITE)
    .union(CapabilitySet::WAKE_ALARM)
    .union(CapabilitySet::BLOCK_SUSPEND);

/// The initial user namespace (Linux include/linux/proc_ns.h, PROC_USER_INIT_INO).
const INITIAL_USER_NAMESPACE: &str = "user:[4026531837]";

/// How many ancestors a process may have before the rest counts as unknown.
const MOST_ANCESTORS: usize = 1024;

/// How a vault comes to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// The VMM starts it as its child.
    Child {
        /// Whether the VMM's user can execute the program and not read it, so that the kernel never makes it dumpable.
        unreadable: bool,
    },
    /// Something else starts it, and the VMM connects to it.
    Apart {
        /// The vault's user.
        uid: u32,
        /// Whether the kernel has refused the VMM a look at the vault.
        closed: bool,
    },
}

/// What decides who can reach into a vault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Why the credentials of the VMM cannot be read, if they cannot.
    unknown: Option<String>,
    /// The user IDs of all threads of the VMM: real, effective, saved and of file accesses.
    uids: BTreeSet<u32>,
    /// The capabilities that a thread of the VMM has or can raise.
    capabilities: CapabilitySet,
    /// Whether the VMM is in the initial user namespace.
    initial_namespace: bool,
    /// Yama's `ptrace_scope`; 0 where there is no Yama.
    yama: u32,
    /// Whether an ancestor of the VMM is of the VMM's user: Yama lets ancestors trace.
    related: bool,
    start: Start,
}

/// What one thread's `/proc/<pid>/status` says.
#[derive(Debug, PartialEq, Eq)]
struct Status {
    uids: [u32; 4],
    permitted: CapabilitySet,
    parent: u32,
}

impl Status {
    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let uids: Vec<u32> = field("Uid")?.split_whitespace().map_while(|word| word.parse().ok()).collect();
        let permitted = u64::from_str_radix(field("CapPrm")?.trim(), 16).ok()?;
        Some(Self {
            uids: uids.try_into().ok()?,
            permitted: CapabilitySet::from_bits_retain(permitted),
            parent: field("PPid")?.trim().parse().ok()?,
        })
    }

    fn read(path: &Path) -> io::Result<Self> {
        Self::parse(&fs::read_to_string(path)?).ok_or(io::ErrorKind::InvalidData.into())
    }
}

/// The status of every thread of this process.
fn threads() -> io::Result<Vec<Status>> {
    let entries = loop {
        match fs::read_dir("/proc/self/task") {
            // Unlike other calls this one is not repeated after a signal.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            entries => break entries?,
        }
    };
    let mut threads = Vec::new();
    for entry in entries {
        let path = entry?.path();
        match Status::read(&path.join("status")) {
            Ok(status) => threads.push(status),
            // It has ended meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(threads)
}

/// Whether an ancestor of the process whose parent is `parent` has one of `uids`.
fn is_related(mut parent: u32, uids: &BTreeSet<u32>) -> bool {
    for _ in 0..MOST_ANCESTORS {
        // The first process of the system, or of this PID namespace.
        if parent == 0 {
            return false;
        }
        match Status::read(Path::new(&format!("/proc/{parent}/status"))) {
            Ok(status) if status.uids.iter().all(|uid| !uids.contains(uid)) => parent = status.parent,
            _ => return true,
        }
    }
    true
}

/// Whether this process can execute the program at `path` and not read it, and cannot change that as its owner.
fn is_unreadable(path: &Path, uids: &BTreeSet<u32>) -> bool {
    // With 1 the kernel makes even such processes dumpable (Linux Documentation/admin-guide/sysctl/fs.rst, suid_dumpable).
    let kept = fs::read_to_string("/proc/sys/fs/suid_dumpable").is_ok_and(|mode| ["0", "2"].contains(&mode.trim()));
    let unreadable = accessat(CWD, path, Access::READ_OK, AtFlags::EACCESS) == Err(Errno::ACCESS);
    let owner = fs::metadata(path).map(|file| file.uid());
    kept && unreadable && owner.is_ok_and(|owner| !uids.contains(&owner))
}

impl Facts {
    /// Reads the facts of this process as a VMM whose vaults come from `program`; `peer` is what is known of those that
    /// something else starts.
    pub(crate) fn read(program: &Program, peer: Option<Start>) -> Self {
        let (threads, unknown) = match threads() {
            Ok(threads) => (threads, None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        let uids: BTreeSet<_> = threads.iter().flat_map(|thread| thread.uids).collect();
        let permitted = threads.iter().map(|thread| thread.permitted);
        let yama = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
        let namespace = fs::read_link("/proc/self/ns/user");
        let start = peer.unwrap_or_else(|| Start::Child {
            unreadable: program.path().is_some_and(|path| is_unreadable(path, &uids)),
        });
        Self {
            capabilities: permitted.fold(CapabilitySet::empty(), CapabilitySet::union),
            initial_namespace: namespace.is_ok_and(|link| link.as_os_str() == INITIAL_USER_NAMESPACE),
            yama: yama.ok().and_then(|scope| scope.trim().parse().ok()).unwrap_or(0),
            related: threads.first().is_none_or(|thread| is_related(thread.parent, &uids)),
            unknown,
            uids,
            start,
        }
    }

    /// Why nobody knows whether the VMM is privileged, if that is so.
    pub(crate) fn unknown(&self) -> Option<&str> {
        self.unknown.as_deref()
    }

    /// The ways into the vault, each with the parties that have it.
    pub(crate) fn findings(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        let mut find = |parties, what: String, remedy: &str| {
            findings.push(Finding { parties, way: Missing::new(what, remedy) });
        };
        let both: &[Party] = &[Party::VmmProcess, Party::SameUser];
        let reaching = self.capabilities.difference(HARMLESS);
        if let Some(why) = &self.unknown {
            let what = format!("the vmm cannot read its own credentials: {why}");
            find(both, what, "mount /proc where the vmm runs");
        } else if self.uids.contains(&0) {
            let what = "the vmm is root, and so can read the memory of every process, the vault's included";
            find(both, what.into(), UNPRIVILEGED);
        } else if !reaching.is_empty() {
            let what = format!("the vmm has capabilities by which it can reach the vault: {}", names(reaching));
            find(both, what, "drop them from the permitted set of every thread before the vmm opens the platform");
        }
        if !self.initial_namespace {
            let what = "the vmm is not known to be in the initial user namespace, and the user who owns another one has \
                        every capability in it";
            find(&[Party::SameUser], what.into(), "run the vmm and its vault in the initial user namespace");
        }
        match self.start {
            Start::Child { unreadable: true } => {}
            Start::Child { unreadable: false } if self.is_yama_enough() => {}
            Start::Child { unreadable: false } => {
                let what =
                    "a process of the vmm's user can attach to the vault between its start and its first instructions";
                find(
                    &[Party::SameUser],
                    what.into(),
                    "run the vault under its own user (cvm-vault --listen, cvm::kvm::vault::use_socket), or install \
                     cvm-vault with mode 0711 and another owner and name it by use_program, or set \
                     kernel.yama.ptrace_scope to 2",
                );
            }
            Start::Apart { uid, .. } if self.uids.contains(&uid) => {
                let what = "the vault runs as the vmm's own user, whose processes can attach to it as it starts";
                find(&[Party::SameUser], what.into(), "run cvm-vault as a user of its own");
            }
            Start::Apart { closed: true, .. } => {}
            Start::Apart { closed: false, .. } => {
                let what = "the kernel did not refuse the vmm a look at the vault when the vmm opened the platform";
                find(
                    both,
                    what.into(),
                    "open the platform after the vmm has dropped its privileges, and run the vault in the initial user \
                     namespace and in the vmm's pid namespace",
                );
            }
        }
        findings
    }

    /// Whether Yama keeps processes of the VMM's user from tracing a child of the VMM (Linux
    /// Documentation/admin-guide/LSM/Yama.rst): from 1 on only its ancestors may, from 2 on only who has CAP_SYS_PTRACE.
    fn is_yama_enough(&self) -> bool {
        self.yama >= 2 || self.yama == 1 && !self.related
    }
}

const UNPRIVILEGED: &str = "run the vmm as an unprivileged user";

/// The names of capabilities, as capabilities(7) has them.
fn names(capabilities: CapabilitySet) -> String {
    let known = capabilities.iter_names().map(|(name, _)| format!("CAP_{name}"));
    let named = capabilities.iter_names().map(|(_, capability)| capability);
    let unknown = capabilities.difference(named.fold(CapabilitySet::empty(), CapabilitySet::union));
    let unknown = (!unknown.is_empty()).then(|| format!("{:#x}", unknown.bits()));
    known.chain(unknown).collect::<Vec<_>>().join(", ")
}

/// A way into a vault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    /// The parties that have it.
    pub(crate) parties: &'static [Party],
    /// The way, and what closes it.
    pub(crate) way: Missing,
}

/// The trust model of guests in a vault with these ways into it, whose private memory is kept by `isolation`.
pub(crate) fn model(findings: &[Finding], isolation: Isolation) -> TrustModel {
    let open = |party| findings.iter().any(|finding| finding.parties.contains(&party));
    TrustModel::new(|party, asset| match party {
        Party::OtherVms => Powers::empty(),
        // They can keep interrupts from arriving, and no more.
        Party::VmmProcess | Party::SameUser if !open(party) => Powers::empty(),
        Party::VmmProcess | Party::SameUser => held_by(isolation, asset),
        _ => Powers::all(),
    })
}

/// The powers of a process that holds the VM, or has taken over the process that does.
pub(crate) fn held_by(isolation: Isolation, asset: Asset) -> Powers {
    match (isolation, asset) {
        // The kernel gives no process a way to private memory, but who has the vCPUs can set their registers, and who has the VM
        // can have the guest see something else.
        (Isolation::GuestMemfd, Asset::PrivateMemory) => Powers::STEER | Powers::REMAP,
        // The files and registers are in the process, and nothing is encrypted.
        _ => Powers::all(),
    }
}

/// Whether the kernel refuses this process a look at another one, as it asks for before ptrace and `/proc/<pid>/mem`; not for
/// a process that is unknown here.
pub(crate) fn is_closed(pid: i32) -> bool {
    let looked = fs::read_link(format!("/proc/{pid}/ns/user"));
    pid > 0 && looked.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
}

#[cfg(test)]
mod tests;
