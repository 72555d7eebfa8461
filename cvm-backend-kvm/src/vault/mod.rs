//! The vault: a process of its own that holds a VM, so that its VMM does not.
//!
//! The vault has the KVM descriptors, the vCPUs' threads and private memory. The VMM has the shared side, a page for each
//! vCPU by which it learns of exits and answers them, and a socket. What it may ask for is in [`protocol`]; the vault
//! keeps its own record of what the guest has asked for and of which page is on which side, and refuses the rest.
//!
//! A program becomes able to have vaults in one of three ways:
//!
//! - its `main` calls [`init`] before anything else; the program then starts itself again as a vault, in which [`init`]
//!   does not return;
//! - the program `cvm-vault` of this crate is installed beside it, or [`use_program`] names it;
//! - something else starts the vaults, as a user that the VMM is not, and [`use_socket`] names the socket to reach them by: a
//!   [`Launcher`], which is `cvm-vault --listen`, or a socket unit of systemd with `Accept=yes` for `cvm-vault --connection`.
//!   This is the strong form, see `docs/isolation.md`.
//!
//! A vault looks after itself before it takes the first order: it cannot be dumped or traced by its user, keeps no
//! descriptor but its socket, has no capabilities and gets none, can open no file (landlock), and makes no system call
//! but those that running a VM takes (seccomp). When its VMM dies it ends; when it dies, every handle of its VM says so.
//!
//! What it does not do: prove to anybody that it is there. It protects a guest from a VMM that is taken over after the
//! launch, not from one that never started it. It protects from no process that the kernel lets trace it: a VMM that is root,
//! or has `CAP_SYS_PTRACE`, reads the memory of a vault. And a process of the VMM's user can attach itself in the instant
//! between the start of a child and its first instructions. A vault of its own user closes that gap; so does a `cvm-vault` that
//! its user can execute and not read (mode 0711, owned by another), as the kernel never lets anybody look into such a process,
//! and Yama. The trust model and the probe of [`KvmPlatform`](crate::KvmPlatform) say what is open here and how to close it.

mod bell;
mod client;
mod connection;
mod credentials;
mod launcher;
mod page;
mod process;
pub mod protocol;
mod sandbox;
mod server;
mod socket;
mod vcpu;
mod vcpu_thread;

pub(crate) use client::{VaultLoader, VaultVm, launch};
pub use launcher::Launcher;
pub(crate) use process::try_out;
pub(crate) use vcpu::VaultVcpu;

use crate::{Error, lock};
use cvm_core::Protection;
use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

/// What a vault is called, as a program, in its arguments, and where processes are listed.
const NAME: &str = "cvm-vault";

/// Set in a vault's environment, so that a program which does not call [`init`] does not start itself forever.
const MARK: &str = "CVM_IS_VAULT";

/// How long a vault may take for what it does by itself, where processors are emulated and files come over a network.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// The most bytes that are loaded by one order.
const MOST_LOADED: u64 = 2 << 20;

/// How vaults are started, as was named last.
static PROGRAM: Mutex<Option<Program>> = Mutex::new(None);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Program {
    /// By running this program again.
    This,
    /// By running another one.
    Other(PathBuf),
    /// By whatever listens on the socket at `path`; as this user, if it is known.
    Apart { path: PathBuf, uid: Option<u32> },
}

impl Program {
    /// What vaults are started by here.
    pub(crate) fn find() -> Result<Self, Error> {
        let beside = || {
            let path = env::current_exe().ok()?.with_file_name(NAME);
            path.is_file().then_some(Self::Other(path))
        };
        lock(&PROGRAM).clone().or_else(beside).ok_or_else(|| Error::NotOffered {
            protection: Protection::Vault,
            what: format!(
                "this program cannot start one: call cvm::kvm::vault::init() first in main, or put {NAME} beside it"
            ),
        })
    }

    /// The program, if this process is to run it.
    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            // Even where the program was replaced or removed meanwhile, this leads to it.
            Self::This => Some(Path::new("/proc/self/exe")),
            Self::Other(path) => Some(path),
            Self::Apart { .. } => None,
        }
    }
}

/// Whether this process was started as a vault.
pub(crate) fn is_vault() -> bool {
    env::var_os(MARK).is_some()
}

/// Makes this program able to start vaults, and to be one: the first call in `main`, before there are threads or open
/// files.
///
/// In a process that was started as a vault it serves its VMM and does not return.
pub fn init() {
    let mut arguments = env::args_os();
    if is_vault() && arguments.next().as_deref() == Some(OsStr::new(NAME)) {
        let device = arguments.next().unwrap_or_default();
        server::serve(rustix::stdio::stdin(), Path::new(&device));
    }
    lock(&PROGRAM).get_or_insert(Program::This);
}

/// Names the program that vaults are started by in place of this one. Platforms that are opened afterwards use it.
pub fn use_program(path: impl Into<PathBuf>) {
    *lock(&PROGRAM) = Some(Program::Other(path.into()));
}

/// Names the socket by which vaults are reached that something else starts, as another user: a [`Launcher`], or systemd.
/// Platforms that are opened afterwards use it.
///
/// The VMM can neither signal nor reap such a vault: it ends when the VMM closes the connection, which is when the VM is
/// dropped.
pub fn use_socket(path: impl Into<PathBuf>) {
    *lock(&PROGRAM) = Some(Program::Apart { path: path.into(), uid: None });
}

/// Makes this process the vault of the VMM that is connected to its standard input, with the KVM device at `device`: for a
/// program that something else than a VMM starts for each connection. There must be no other thread yet.
pub fn serve(device: &Path) -> ! {
    server::serve(rustix::stdio::stdin(), device)
}
