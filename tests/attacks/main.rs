//! Attacks on every isolation that this machine offers, by a hostile VMM, by processes beside it, and by a hostile guest.
//!
//! Each row of [`rows`] says what an attack is expected to give, under each isolation; what it gives is compared with
//! that, and `docs/isolation.md` with the rows. `--write` writes that document. `--conversions` and `--programs` say how
//! much a hostile guest tries.
//!
//! The program plays every party itself: it starts itself again with `--role`, as another process or user.

#[path = "../../cvm-backend-kvm/tests/common/mod.rs"]
mod common;

mod find;
mod guest;
mod hostile_guest;
mod isolation;
mod killing;
mod kvm;
mod outcome;
mod process;
mod report;
mod roles;
mod rows;
mod stage;
mod sys;
mod trust;
mod vmm;

use cvm::kvm::KvmPlatform;
use hostile_guest::Effort;
use isolation::Isolation;
use outcome::{Finding, Observed};
use report::Report;
use stage::{As, Stage};
use std::io;
use std::process::ExitCode;

/// What this program is asked for. It must bear the arguments that `cargo test` passes to every test program.
#[derive(Debug)]
struct Options {
    write: bool,
    effort: Effort,
}

impl Options {
    /// Nothing if no test of this program's is meant.
    fn parse(mut arguments: impl Iterator<Item = String>) -> Option<Self> {
        let mut options = Self { write: false, effort: Effort { conversions: 2000, programs: 40 } };
        let (mut filtered, mut meant) = (false, false);
        while let Some(argument) = arguments.next() {
            let mut number = || arguments.next().and_then(|number| number.parse().ok());
            match argument.as_str() {
                "--write" => options.write = true,
                "--conversions" => options.effort.conversions = number().unwrap_or(options.effort.conversions),
                "--programs" => options.effort.programs = number().map_or(options.effort.programs, u64::from),
                "--list" => return None,
                "--skip" | "--test-threads" | "--format" | "--color" | "--logfile" => drop(arguments.next()),
                other if other.starts_with('-') => {}
                name => {
                    filtered = true;
                    meant |= "attacks".contains(name);
                }
            }
        }
        (!filtered || meant).then_some(options)
    }
}

fn main() -> ExitCode {
    cvm::kvm::vault::init();
    let mut arguments = std::env::args().skip(1).peekable();
    if arguments.next_if(|first| first == "--role").is_some() {
        return roles::play(&arguments.collect::<Vec<_>>());
    }
    let Some(options) = Options::parse(arguments) else { return ExitCode::SUCCESS };
    let stage = Stage::new(options.effort);
    let mut report = Report::default();
    stage.lacks.iter().for_each(|lack| report.skip(lack));
    for (isolation, protection) in Isolation::offered() {
        match KvmPlatform::open(stage.device(), Some(protection)) {
            Ok(_) => {
                if let Err(error) = trust::check(isolation, &stage, &mut report) {
                    report.fail(format!("the trust model of {protection}: {error}"));
                }
                if let Err(error) = attack(isolation, &stage, options.effort, &mut report) {
                    report.fail(format!("{protection}: {error}"));
                }
            }
            Err(error) if isolation == Isolation::None && std::env::var_os("CVM_REQUIRE_KVM").is_some() => {
                report.fail(format!("{protection}: {error}"));
            }
            Err(error) => report.skip(&format!("isolation {protection}: {error}")),
        }
    }
    report.document(options.write);
    report.end()
}

fn attack(isolation: Isolation, stage: &Stage, effort: Effort, report: &mut Report) -> io::Result<()> {
    let device = stage.device().to_string_lossy();
    let name = format!("{isolation:?}");
    let role = |role| [role, &*name, &*device];

    report.take(isolation, "", stage.play(As::User, &role("vmm"))?);
    let [programs, conversions] = [effort.programs, effort.conversions.into()].map(|number| number.to_string());
    let guest = [&role("guest")[..], &[&conversions, &programs]].concat();
    report.take(isolation, "", stage.play(As::User, &guest)?);
    report.take(isolation, "", stage.play(As::User, &role("kill-vault"))?);
    report.take(isolation, "", vec![kill_vmm(stage, &role("convert"))?]);
    trust::attack(isolation, stage, report)?;

    let mut beside = Vec::new();
    if stage.has_user() {
        beside.push((As::User, "user/"));
    }
    if stage.has_root() {
        beside.push((As::Myself, "root/"));
    }
    for (who, prefix) in beside {
        // Each has a victim of its own, which must be well at its end.
        let mut holder = stage.start(As::User, &role("hold"))?;
        let victim = holder.line()?;
        let (pid, nonce) = victim.split_once(' ').ok_or(io::ErrorKind::UnexpectedEof)?;
        let findings = stage.play(who, &["attack", pid, nonce])?;
        report.take(isolation, prefix, findings);
        report.take(isolation, prefix, holder.end()?);
    }
    report.complete(isolation, stage);
    Ok(())
}

/// Kills VMMs while their guests run.
fn kill_vmm(stage: &Stage, role: &[&str]) -> io::Result<Finding> {
    let mut observed = Observed::Refused("gone".into());
    for _ in 0..killing::DEATHS {
        let mut vmm = stage.start(As::User, role)?;
        vmm.line()?;
        let vaults = killing::vaults(vmm.pid());
        std::thread::sleep(killing::moment());
        vmm.kill();
        if vaults.is_empty() {
            observed = Observed::Absent("no other process holds the guest".into());
        } else if !killing::are_gone(&vaults) {
            observed = Observed::Got("what holds the guest lives on".into());
            break;
        }
    }
    Ok(Finding { row: "kill-vmm".into(), observed })
}
