//! The vault: a process of its own that holds a VM, so that its VMM does not.
//!
//! The vault has the KVM descriptors, the vCPUs' threads and private memory. The VMM has the shared side, a page for each
//! vCPU by which it learns of exits and answers them, and a socket. What it may ask for is in [`protocol`]; the vault
//! keeps its own record of what the guest has asked for and of which page is on which side, and refuses the rest.
//!
//! A program becomes able to start vaults in one of two ways:
//!
//! - its `main` calls [`init`] before anything else; the program then starts itself again as a vault, in which [`init`]
//!   does not return;
//! - the program `cvm-vault` of this crate is installed beside it, or [`use_program`] names it.
//!
//! A vault looks after itself before it takes the first order: it cannot be dumped or traced by its user, keeps no
//! descriptor but its socket, has no capabilities and gets none, can open no file (landlock), and makes no system call
//! but those that running a VM takes (seccomp). When its VMM dies it ends; when it dies, every handle of its VM says so.
//!
//! What it does not do: prove to anybody that it is there. It protects a guest from a VMM that is taken over after the
//! launch, not from one that never started it. A process of the same user which attaches itself in the instant between
//! the vault's start and its first instructions is noticed if it traces, and not if it merely opened the memory of the
//! process; a `cvm-vault` that its user can execute and not read (mode 0711, owned by another) closes that gap, as the
//! kernel never lets anybody look into such a process.

mod bell;
mod client;
mod page;
mod process;
pub mod protocol;
mod sandbox;
mod server;
mod socket;
mod vcpu;

pub(crate) use client::{VaultLoader, VaultVm, launch};
pub(crate) use vcpu::VaultVcpu;

use crate::Error;
use cvm_core::Protection;
use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// What a vault is called, as a program, in its arguments, and where processes are listed.
const NAME: &str = "cvm-vault";

/// Set in a vault's environment, so that a program which does not call [`init`] does not start itself forever.
const MARK: &str = "CVM_IS_VAULT";

/// The most bytes that are loaded by one order.
const MOST_LOADED: u64 = 2 << 20;

/// How a vault is started.
static PROGRAM: OnceLock<Program> = OnceLock::new();

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Program {
    /// By running this program again.
    This,
    /// By running another one.
    Other(PathBuf),
}

impl Program {
    /// What vaults are started by here.
    pub(crate) fn find() -> Result<Self, Error> {
        let beside = || {
            let path = env::current_exe().ok()?.with_file_name(NAME);
            path.is_file().then_some(Self::Other(path))
        };
        PROGRAM.get().cloned().or_else(beside).ok_or_else(|| Error::NotOffered {
            protection: Protection::Vault,
            what: format!(
                "this program cannot start one: call cvm::kvm::vault::init() first in main, or put {NAME} beside it"
            ),
        })
    }

    fn path(&self) -> &Path {
        match self {
            // Even where the program was replaced or removed meanwhile, this leads to it.
            Self::This => Path::new("/proc/self/exe"),
            Self::Other(path) => path,
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
    let _ = PROGRAM.set(Program::This);
}

/// Names the program that [`init`] has in place of this one: for programs whose `main` is not their own.
///
/// It has no effect after [`init`], or a second time.
pub fn use_program(path: impl Into<PathBuf>) {
    let _ = PROGRAM.set(Program::Other(path.into()));
}
