//! Attacks on every isolation that this machine offers, by a hostile VMM, by processes beside it, and by a hostile guest.
//!
//! Each row of [`rows`] says what an attack is expected to give, under each isolation; what it gives is compared with
//! that, and `docs/isolation.md` with the rows. `--write` writes that document.
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

use clap::Parser;
use cvm::kvm::KvmPlatform;
use cvm::{Platform, Protection};
use hostile_guest::Effort;
use isolation::Isolation;
use libtest_mimic::{Arguments, Failed, Trial};
use outcome::{Finding, Observed};
use report::Report;
use stage::{As, Stage};
use std::io;
use std::process::ExitCode;
use std::sync::{Arc, LazyLock};

/// What this program is asked for, besides what every test program understands.
#[derive(Debug, Parser)]
struct Options {
    #[command(flatten)]
    harness: Arguments,
    /// Write docs/isolation.md instead of comparing it with the rows
    #[arg(long)]
    write: bool,
    /// How often a hostile guest converts a page
    #[arg(long, value_name = "NUMBER", default_value_t = 2000)]
    conversions: u32,
    /// How many random programs a hostile guest runs
    #[arg(long, value_name = "NUMBER", default_value_t = 40)]
    programs: u64,
}

/// A test: rows of one isolation that are played together.
struct Scene {
    name: &'static str,
    /// Their groups, as [`report::group`] has them.
    groups: &'static [&'static str],
    /// Whether the attacker is root.
    by_root: bool,
    play: fn(Isolation, &Stage, Effort, &mut Report) -> io::Result<()>,
}

const SCENES: &[Scene] = &[
    Scene {
        name: "the trust model",
        groups: &[],
        by_root: false,
        play: |isolation, stage, _, report| trust::check(isolation, stage, report),
    },
    Scene {
        name: "a hostile vmm",
        groups: &["vmm"],
        by_root: false,
        play: |isolation, stage, _, report| play(isolation, stage, "vmm", &[], report),
    },
    Scene {
        name: "a hostile guest",
        groups: &["guest"],
        by_root: false,
        play: |isolation, stage, effort, report| {
            let [programs, conversions] = [effort.programs, effort.conversions.into()].map(|number| number.to_string());
            play(isolation, stage, "guest", &[&conversions, &programs], report)
        },
    },
    Scene {
        name: "the death of a vault",
        groups: &["kill-vault"],
        by_root: false,
        play: |isolation, stage, _, report| play(isolation, stage, "kill-vault", &[], report),
    },
    Scene {
        name: "the death of a vmm",
        groups: &["kill-vmm"],
        by_root: false,
        play: |isolation, stage, _, report| {
            report.take(isolation, "", vec![kill_vmm(stage, &role(isolation, stage, "convert"))?]);
            Ok(())
        },
    },
    Scene {
        name: "vmms against their vaults",
        groups: &["vmm-child", "vmm-root", "vmm-apart", "start"],
        by_root: false,
        play: |isolation, stage, _, report| trust::attack(isolation, stage, report),
    },
    Scene {
        name: "another process of the user",
        groups: &["user"],
        by_root: false,
        play: |isolation, stage, _, report| {
            if stage.has_user() { beside(isolation, stage, As::User, "user/", report) } else { Ok(()) }
        },
    },
    Scene {
        name: "another process of root",
        groups: &["root"],
        by_root: true,
        play: |isolation, stage, _, report| beside(isolation, stage, As::Myself, "root/", report),
    },
];

/// The arguments of a role that a VMM with this isolation plays.
fn role(isolation: Isolation, stage: &Stage, name: &str) -> [String; 3] {
    [name.into(), format!("{isolation:?}"), stage.device().to_string_lossy().into_owned()]
}

/// Has the user of the VMMs play a role.
fn play(isolation: Isolation, stage: &Stage, name: &str, more: &[&str], report: &mut Report) -> io::Result<()> {
    let role = role(isolation, stage, name);
    let arguments: Vec<_> = role.iter().map(String::as_str).chain(more.iter().copied()).collect();
    report.take(isolation, "", stage.play(As::User, &arguments)?);
    Ok(())
}

/// Has another process attack the one that holds a guest, which must be well at the end.
fn beside(isolation: Isolation, stage: &Stage, who: As, prefix: &str, report: &mut Report) -> io::Result<()> {
    let role = role(isolation, stage, "hold");
    let mut holder = stage.start(As::User, &role.each_ref().map(String::as_str))?;
    let victim = holder.line()?;
    let (pid, nonce) = victim.split_once(' ').ok_or(io::ErrorKind::UnexpectedEof)?;
    report.take(isolation, prefix, stage.play(who, &["attack", pid, nonce])?);
    report.take(isolation, prefix, holder.end()?);
    Ok(())
}

/// Kills VMMs while their guests run.
fn kill_vmm(stage: &Stage, role: &[String; 3]) -> io::Result<Finding> {
    let mut observed = Observed::Refused("gone".into());
    for _ in 0..killing::DEATHS {
        let mut vmm = stage.start(As::User, &role.each_ref().map(String::as_str))?;
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

/// The users and the device, which the first test that runs makes.
type SharedStage = LazyLock<Stage, Box<dyn FnOnce() -> Stage + Send>>;

/// Plays a scene.
fn run(scene: &Scene, isolation: Isolation, stage: &Stage, effort: Effort) -> Result<(), Failed> {
    let protection = isolation.protection().ok_or("the library does not have this isolation")?;
    KvmPlatform::open(stage.device(), Some(protection)).map_err(|error| format!("{protection}: {error}"))?;
    let mut report = Report::default();
    (scene.play)(isolation, stage, effort, &mut report)?;
    report.complete(isolation, stage, scene.groups);
    report.end()
}

/// Why this host does not offer an isolation.
fn missing(protection: Protection) -> Option<String> {
    let offer = KvmPlatform::probe().into_iter().find(|offer| offer.protection == protection);
    let Some(offer) = offer else { return Some("the library does not have it".into()) };
    let missing: Vec<_> = offer.missing.iter().map(|missing| missing.what.clone()).collect();
    (!missing.is_empty()).then(|| missing.join("; "))
}

/// Whether a host that does not offer an isolation fails the tests: `CVM_REQUIRE_KVM` requires what any KVM offers, and
/// `CVM_REQUIRE_L1` what the KVM of L1 offers besides.
fn is_required(isolation: Isolation) -> bool {
    let variable = if isolation == Isolation::GuestMemfd { "CVM_REQUIRE_L1" } else { "CVM_REQUIRE_KVM" };
    std::env::var_os(variable).is_some()
}

/// A scene as a test: ignored, or failed if it is required, where this host does not have what it takes.
fn trial(
    scene: &'static Scene,
    isolation: Isolation,
    protection: Protection,
    missing: Option<&str>,
    stage: &Arc<SharedStage>,
    effort: Effort,
) -> Trial {
    let name = format!("{protection}: {}", scene.name);
    if let Some(missing) = missing {
        let reason = format!("{protection} is not offered here: {missing}");
        let required = is_required(isolation);
        return Trial::test(name, move || Err(reason.into())).with_ignored_flag(!required);
    }
    let stage = Arc::clone(stage);
    let trial = Trial::test(name, move || run(scene, isolation, &stage, effort));
    trial.with_ignored_flag(scene.by_root && !rustix::process::geteuid().is_root())
}

fn main() -> ExitCode {
    cvm::kvm::vault::init();
    let mut arguments = std::env::args().skip(1).peekable();
    if arguments.next_if(|first| first == "--role").is_some() {
        return roles::play(&arguments.collect::<Vec<_>>());
    }
    let mut options = Options::parse();
    // Roles have limits of time, and would only wait for each other.
    options.harness.test_threads.get_or_insert(1);
    let effort = Effort { conversions: options.conversions, programs: options.programs };
    let stage: Arc<SharedStage> = Arc::new(LazyLock::new(Box::new(move || {
        let stage = Stage::new(effort);
        stage.lacks.iter().for_each(|lack| eprintln!("SKIPPED: {lack}"));
        stage
    })));
    let mut trials = vec![
        Trial::test("the document has the rows", move || report::document(options.write)),
        Trial::test("every row is played in one test", || report::groups(SCENES.iter().flat_map(|scene| scene.groups))),
    ];
    for (isolation, protection) in Isolation::offered() {
        let missing = missing(protection);
        if let Some(missing) = &missing {
            eprintln!("SKIPPED: isolation {protection}: {missing}");
        }
        trials.extend(SCENES.iter().map(|it| trial(it, isolation, protection, missing.as_deref(), &stage, effort)));
    }
    libtest_mimic::run(&options.harness, trials).exit_code()
}
