//! What this program does when it has started itself again.

use crate::guest::{Command, Keeper};
use crate::hostile_guest::{self, Effort};
use crate::isolation::Isolation;
use crate::outcome::{Finding, Observed};
use crate::process::{self, Victim};
use crate::{killing, kvm, stage, trust, vmm};
use cvm::BoxError;
use cvm::kvm::KvmPlatform;
use cvm::kvm::vault::{self, Launcher};
use rustix::process::{Signal, set_parent_process_death_signal};
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Plays the role that `arguments` name.
pub fn play(arguments: &[String]) -> ExitCode {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match set_parent_process_death_signal(Some(Signal::KILL)).map_err(BoxError::from).and_then(|()| role(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("role {arguments:?}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn role(arguments: &[&str]) -> Result<(), BoxError> {
    match *arguments {
        ["vmm", isolation, device] => be_vmm(&platform(isolation, device)?),
        ["guest", isolation, device, conversions, programs] => {
            let effort = Effort { conversions: conversions.parse()?, programs: programs.parse()? };
            be_guests_vmm(&platform(isolation, device)?, effort)
        }
        ["kill-vault", isolation, device] => tell("kill-vault", killing::kill_vault(|| platform(isolation, device))),
        ["convert", isolation, device] => convert(&platform(isolation, device)?),
        ["hold", isolation, device] => hold(&platform(isolation, device)?),
        ["launch", socket, device] => {
            Err(Launcher { socket: socket.into(), device: device.into(), users: vec![stage::UNPRIVILEGED], most: 8 }
                .run()
                .map_or_else(BoxError::from, |never| match never {}))
        }
        ["through", socket, ref rest @ ..] => {
            vault::use_socket(socket);
            role(rest)
        }
        ["by", program, ref rest @ ..] => {
            vault::use_program(program);
            role(rest)
        }
        ["model", isolation, device] => trust::tell_model(&platform(isolation, device)?),
        ["against-vault", isolation, device, parent] => against_vault(&platform(isolation, device)?, parent),
        ["start-stopped", program] => trust::start_stopped(program),
        ["open-memory", pid] => trust::open_memory(pid.parse()?),
        ["attack", pid, nonce] => {
            let victim = Victim { pid: pid.parse()?, nonce: nonce.parse()? };
            process::all(victim).try_for_each(|(row, observed)| tell(row, observed))
        }
        _ => Err("there is no such role".into()),
    }
}

fn platform(isolation: &str, device: &str) -> Result<KvmPlatform, BoxError> {
    let found = Isolation::offered().find(|(known, _)| format!("{known:?}") == isolation);
    let (_, protection) = found.ok_or("there is no such isolation")?;
    Ok(KvmPlatform::open(Path::new(device), Some(protection))?)
}

fn tell(row: &str, observed: Observed) -> Result<(), BoxError> {
    println!("{}", serde_json::to_string(&Finding { row: row.into(), observed })?);
    Ok(())
}

fn nonce() -> u64 {
    killing::random(u64::MAX)
}

/// Every attack of a hostile VMM, each on a guest of its own. One that was refused must leave the guest as it was.
fn be_vmm(platform: &KvmPlatform) -> Result<(), BoxError> {
    for (row, attack) in vmm::ATTACKS.iter().chain(kvm::ATTACKS) {
        let mut keeper = Keeper::new(platform, nonce())?;
        if !keeper.is_well() {
            return Err("the guest is not well before the attack".into());
        }
        let mut observed = attack(platform, &mut keeper);
        if matches!(observed, Observed::Refused(_)) && !keeper.is_well() {
            observed = Observed::Absent(format!("the guest is disturbed, although the attack was {observed}"));
        }
        tell(row, observed)?;
    }
    Ok(())
}

/// Every attack of a hostile guest, beside a guest that must not notice.
fn be_guests_vmm(platform: &KvmPlatform, effort: Effort) -> Result<(), BoxError> {
    for (row, attack) in hostile_guest::ATTACKS {
        let mut beside = Keeper::with_limit(platform, nonce(), LONG)?;
        let mut observed = attack(platform, effort);
        if !beside.is_well() {
            observed = Observed::Got("the guest beside it is disturbed".into());
        }
        tell(row, observed)?;
    }
    Ok(())
}

/// Longer than any role may take.
const LONG: Duration = Duration::from_secs(86_400);

/// Has a guest convert until somebody kills this process.
fn convert(platform: &KvmPlatform) -> Result<(), BoxError> {
    let mut keeper = Keeper::with_limit(platform, nonce(), LONG)?;
    println!("ready");
    io::stdout().flush()?;
    loop {
        keeper.command(Command::Share)?;
        keeper.command(Command::Unshare)?;
    }
}

/// Holds a guest in a vault, and reads the memory of the vault. It is a child of `parent`, or of this process if that is 0.
fn against_vault(platform: &KvmPlatform, parent: &str) -> Result<(), BoxError> {
    let mut keeper = Keeper::with_limit(platform, nonce(), LONG)?;
    let parent = Some(parent.parse()?).filter(|parent| *parent != 0).unwrap_or(killing::own_pid());
    let Some(pid) = killing::vaults(parent).first().copied() else {
        return tell("proc-mem", Observed::Absent("there is no vault".into()));
    };
    let mut found = process::all(Victim { pid, nonce: keeper.nonce });
    let (row, observed) = found.find(|(row, _)| *row == "proc-mem").ok_or("there is no such attack")?;
    tell(row, if keeper.is_well() { observed } else { Observed::Got("the guest is disturbed".into()) })
}

/// Has a guest count until nobody writes to this process any more.
fn hold(platform: &KvmPlatform) -> Result<(), BoxError> {
    let mut keeper = Keeper::with_limit(platform, nonce(), LONG)?;
    let own = killing::own_pid();
    println!("{} {}", killing::vaults(own).first().unwrap_or(&own), keeper.nonce);
    io::stdout().flush()?;
    let over = AtomicBool::new(false);
    let well = std::thread::scope(|scope| {
        scope.spawn(|| {
            // Whatever ends the reading, nobody waits for the guest any more.
            let _ = io::stdin().read(&mut [0]);
            over.store(true, Ordering::Relaxed);
        });
        let mut well = true;
        while !over.load(Ordering::Relaxed) {
            well &= keeper.is_well();
            std::thread::sleep(Duration::from_millis(1));
        }
        well && keeper.is_well()
    });
    tell("well", if well { Observed::Refused("well".into()) } else { Observed::Got("it is disturbed".into()) })
}
