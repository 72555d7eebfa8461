//! Deaths: of the process that holds the guest, and of the VMM.

use crate::guest::{Command, Keeper};
use crate::outcome::Observed;
use cvm::kvm::KvmPlatform;
use cvm::x86::Register;
use cvm::{Answer, BoxError, ConversionRequest, Side, Vcpu, Vm};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// What the process that holds a VM calls itself.
const VAULT: &str = "cvm-vault";

/// When what follows a death counts as something that hangs.
const SOON: Duration = Duration::from_secs(60);

/// How many deaths there are.
const ROUNDS: usize = 8;

struct Process {
    pid: i32,
    name: String,
    state: char,
    parent: i32,
}

/// "pid (name) state parent ..." (proc_pid_stat(5)).
fn process(pid: i32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
    let mut words = rest.split_whitespace();
    let state = words.next()?.chars().next()?;
    Some(Process { pid, name: name.to_owned(), state, parent: words.next()?.parse().ok()? })
}

fn children(parent: i32) -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter_map(process).filter(|process| process.parent == parent).collect()
}

/// The processes of `vmm` that hold a VM.
pub fn vaults(vmm: i32) -> Vec<i32> {
    children(vmm).into_iter().filter(|child| child.name == VAULT).map(|child| child.pid).collect()
}

pub fn own_pid() -> i32 {
    std::process::id().cast_signed()
}

pub fn kill(pid: i32) {
    // One that is gone already is what is wanted.
    let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
}

/// A number below `end` that is another one each time.
pub fn random(end: u64) -> u64 {
    RandomState::new().hash_one(()) % end
}

/// A time within which a guest converts some pages.
pub fn moment() -> Duration {
    Duration::from_micros(random(60_000))
}

/// Kills what holds the guest while the guest runs: every handle says so, and nothing is left.
pub fn kill_vault(platform: impl Fn() -> Result<KvmPlatform, BoxError>) -> Observed {
    let descriptors = || fs::read_dir("/proc/self/fd").map(Iterator::count).unwrap_or_default();
    let mut before = None;
    for _ in 0..ROUNDS {
        let launched = platform().and_then(|platform| Ok(Keeper::new(&platform, random(u64::MAX))?));
        let keeper = match launched {
            Ok(keeper) => keeper,
            Err(error) => return Observed::Got(format!("no more vms: {error}")),
        };
        let [vault] = vaults(own_pid())[..] else { return Observed::Absent("no other process holds the guest".into()) };
        if let Err(what) = one_death(keeper, vault) {
            return Observed::Got(what.into());
        }
        if children(own_pid()).iter().any(|child| child.state == 'Z' || child.name == VAULT) {
            return Observed::Got("a process is left".into());
        }
        // What the first VM leaves is there once.
        let open = descriptors();
        if *before.get_or_insert(open) != open {
            return Observed::Got("a descriptor is left".into());
        }
    }
    Observed::Refused("errors".into())
}

fn one_death(mut keeper: Keeper, vault: i32) -> Result<(), &'static str> {
    let (tell, told) = mpsc::channel();
    let runner = std::thread::spawn(move || {
        while keeper.command(Command::Share).and_then(|_| keeper.command(Command::Unshare)).is_ok() {}
        // Nobody listens any more if it took too long.
        let _ = tell.send(keeper);
    });
    std::thread::sleep(moment());
    kill(vault);
    let mut keeper = told.recv_timeout(SOON).map_err(|_| "a call hangs")?;
    runner.join().map_err(|_| "a call panics")?;
    let begin = Instant::now();
    if keeper.vcpu.run().is_ok() {
        return Err("the vcpu runs");
    }
    if keeper.vcpu.register(Register::Rip).is_ok_and(|read| read != cvm::RegisterRead::Hidden) {
        return Err("the vcpu has registers");
    }
    let request = ConversionRequest::from_guest(0, crate::guest::SIDE_PAGE, 1, Side::Shared);
    if keeper.vm.convert(&request).answer() == Answer::Done {
        return Err("pages are converted");
    }
    keeper.vcpu.kicker().kick();
    drop(keeper);
    if begin.elapsed() > SOON { Err("a call takes long") } else { Ok(()) }
}

/// Whether none of `pids` is there any more, soon.
pub fn are_gone(pids: &[i32]) -> bool {
    let begin = Instant::now();
    loop {
        // One that is dead waits for init, which is nobody's fault here.
        let is_gone = |process: Process| process.name != VAULT || process.state == 'Z';
        if pids.iter().all(|pid| process(*pid).is_none_or(is_gone)) {
            return true;
        }
        if begin.elapsed() > SOON {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// How often a VMM is killed.
pub const DEATHS: usize = ROUNDS;
