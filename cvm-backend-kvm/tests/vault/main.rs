//! The vault as a VMM finds it that does not keep to the rules, and VMMs as they find a vault that dies.
//!
//! The hostile VMM here starts the vault's program itself, and says to it whatever it likes.

mod apart;
#[path = "../common/mod.rs"]
mod common;
mod confinement;
mod death;
mod ends;
mod guests;
mod hostile_vmm;
mod noise;
mod orders;
mod requests;
mod stopped;

use common::kvm;
use cvm_backend_kvm::KvmPlatform;
use cvm_core::Protection;
use rustix::process::Pid;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How long a vault may take for anything.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a whole test may take where processors are emulated.
const LIMIT: Duration = Duration::from_secs(120);

/// Makes a test the only one that has vaults and files, and ends the whole program if it hangs: its vaults end with it.
struct Alone {
    _turn: MutexGuard<'static, ()>,
    _done: Sender<()>,
}

impl Alone {
    fn new() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        // A test that failed has left nothing.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let (done, is_done) = channel();
        let name = thread::current().name().unwrap_or_default().to_owned();
        thread::spawn(move || {
            if is_done.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                let _ = std::io::stderr().write_all(format!("{name} hangs\n").as_bytes());
                process::abort();
            }
        });
        Self { _turn: turn, _done: done }
    }
}

/// What a test needs: this host's KVM with vaults, and its turn, which ends last.
struct Vaults {
    platform: KvmPlatform,
    _alone: Alone,
}

fn vaults() -> Option<Vaults> {
    let _alone = Alone::new();
    kvm()?;
    let platform = KvmPlatform::open(Path::new("/dev/kvm"), Some(Protection::Vault)).unwrap();
    Some(Vaults { platform, _alone })
}

/// Processes that this one has started and not heard the end of.
fn children() -> Vec<Pid> {
    let child = |entry: fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // The name, in parentheses, may have anything in it.
        let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse::<u32>().ok()?;
        (parent == process::id()).then(|| Pid::from_raw(pid)).flatten()
    };
    fs::read_dir("/proc").unwrap().filter_map(|entry| child(entry.ok()?)).collect()
}
