//! The trust model of a vault by the credentials of the processes, and what comes of using the powers that it admits.

use crate::isolation::{ASSETS, Isolation, Situation};
use crate::outcome::{Finding, Observed, guest_memfd, yama};
use crate::report::Report;
use crate::stage::{As, Played, Stage};
use crate::sys;
use cvm::kvm::KvmPlatform;
use cvm::platform::{Party, Powers};
use cvm::{BoxError, Platform};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

/// How often it is looked whether a launcher listens, and after how long each time.
const LOOKS: usize = 3000;
const PAUSE: Duration = Duration::from_millis(10);

/// Prints the trust model: a line for each power.
pub fn tell_model(platform: &KvmPlatform) -> Result<(), BoxError> {
    let model = platform.trust_model();
    for party in Party::ALL {
        for (asset, name) in ASSETS {
            let row = format!("{party:?} over {name}");
            let observed = Observed::Got(model.powers(party, asset).bits().to_string());
            println!("{}", serde_json::to_string(&Finding { row, observed })?);
        }
    }
    Ok(())
}

/// A launcher of vaults under their own user, that listens.
fn launcher(stage: &Stage, socket: &Path, device: &str) -> io::Result<Played> {
    // What an earlier one has left.
    let _ = fs::remove_file(socket);
    let launcher = stage.start(As::OfVaults, &["launch", &socket.to_string_lossy(), device])?;
    // A line of it has flags, in which this is SO_ACCEPTCON (Linux net/unix/af_unix.c, unix_seq_show).
    let listens = |line: &str| line.contains(" 00010000 ") && line.ends_with(&*socket.to_string_lossy());
    for _ in 0..LOOKS {
        if fs::read_to_string("/proc/net/unix")?.lines().any(listens) {
            return Ok(launcher);
        }
        thread::sleep(PAUSE);
    }
    launcher.kill();
    Err(io::Error::other("the launcher does not listen"))
}

/// That the trust model in each situation is the one which the rows and the document go by.
pub fn check(isolation: Isolation, stage: &Stage, report: &mut Report) -> io::Result<()> {
    let device = stage.device().to_string_lossy();
    let name = format!("{isolation:?}");
    let role = ["model", &*name, &*device];
    let mut compare = |situation, findings: Vec<Finding>| {
        let mut said = findings.into_iter();
        for party in Party::ALL {
            for (asset, name) in ASSETS {
                let expected = isolation.powers(situation, guest_memfd(), party, asset);
                let seen = said.next().map(|finding| finding.observed);
                if seen != Some(Observed::Got(expected.bits().to_string())) {
                    report.fail(format!(
                        "{situation:?}: the trust model says of {party:?} and {name} {seen:?}, not {:?}",
                        Powers::bits(&expected)
                    ));
                }
            }
        }
    };
    let as_child = if yama() { Situation::Closed } else { Situation::OpenStart };
    compare(as_child, stage.play(As::User, &role)?);
    if stage.has_vault_user() {
        compare(Situation::RootVmm, stage.play(As::Myself, &role)?);
        let (socket, program) = stage.for_vaults()?;
        compare(Situation::Closed, stage.play(As::User, &[&["by", &*program.to_string_lossy()], &role[..]].concat())?);
        let launcher = launcher(stage, &socket, &device)?;
        compare(
            Situation::Closed,
            stage.play(As::User, &[&["through", &*socket.to_string_lossy()], &role[..]].concat())?,
        );
        launcher.kill();
    }
    Ok(())
}

/// Reads vaults as their VMMs, and as other processes while they start.
pub fn attack(isolation: Isolation, stage: &Stage, report: &mut Report) -> io::Result<()> {
    let device = stage.device().to_string_lossy();
    let name = format!("{isolation:?}");
    let against = |parent| ["against-vault", &*name, &*device, parent];
    report.take(isolation, "vmm-child/", stage.play(As::User, &against("0"))?);
    if !stage.has_vault_user() {
        return Ok(());
    }
    report.take(isolation, "vmm-root/", stage.play(As::Myself, &against("0"))?);
    let (socket, program) = stage.for_vaults()?;
    let socket_name = socket.to_string_lossy();
    let launcher = launcher(stage, &socket, &device)?;
    let pid = launcher.pid().to_string();
    let role = [&["through", &*socket_name], &against(&pid)[..]].concat();
    report.take(isolation, "vmm-apart/", stage.play(As::User, &role)?);
    launcher.kill();

    let program = program.to_string_lossy();
    let starts = [
        ("child", As::User, "/proc/self/exe"),
        ("unreadable", As::User, &*program),
        ("apart", As::OfVaults, "/proc/self/exe"),
    ];
    for (row, who, program) in starts {
        let observed = if isolation == Isolation::Vault {
            let mut vault = stage.start(who, &["start-stopped", program])?;
            let pid = vault.line()?;
            let found = stage.play(As::User, &["open-memory", &pid])?;
            vault.end()?;
            found.into_iter().map(|finding| finding.observed).next().ok_or(io::ErrorKind::UnexpectedEof)?
        } else {
            Observed::Absent("there is no vault".into())
        };
        report.take(isolation, "start/", vec![Finding { row: row.into(), observed }]);
    }
    Ok(())
}

/// Starts a program and stops it before its first instruction, as a slow machine may; prints its number, and ends it when nobody
/// writes to this process any more.
pub fn start_stopped(program: &str) -> Result<(), BoxError> {
    let mut child = sys::start_stopped(program)?;
    println!("{}", child.id());
    io::stdout().flush()?;
    let _ = io::stdin().read(&mut [0]);
    child.kill()?;
    child.wait()?;
    Ok(())
}

/// Opens the memory of a process, and reads what it is about to execute.
pub fn open_memory(pid: i32) -> Result<(), BoxError> {
    let observed = match File::open(format!("/proc/{pid}/mem")) {
        Ok(_) => Observed::Got("its memory".into()),
        Err(error) => Observed::Refused(sys::name(&error)),
    };
    println!("{}", serde_json::to_string(&Finding { row: "open-memory".into(), observed })?);
    Ok(())
}
