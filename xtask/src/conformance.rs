//! What came of the contract's clauses with every backend.

use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use clap::Args;
use serde::Deserialize;

use crate::error::{Context, Error, Result};
use crate::program::{note, print};
use crate::{tools, workspace};

/// The report, from the workspace's root.
const REPORT: &str = "docs/conformance.md";

/// What a line of a suite's report begins with (`cvm_conformance::REPORT_PREFIX`).
const PREFIX: &str = "conformance: ";

/// How long a suite may take in L1, in seconds.
const LIMIT: &str = "900";

/// The part of the report that is the same on every machine ends before this.
const HOST_HEADING: &str = "## On the machine that wrote this";

/// The backends whose suites are run, and what protects their guests in L1, with the user that the suite runs as.
const BACKENDS: [(&str, &[(&str, User)]); 2] = [
    (
        "cvm-backend-kvm",
        &[("none", User::Root), ("guest-memfd", User::Root), ("vault", User::Root), ("vault", User::Nobody)],
    ),
    ("cvm-backend-sev", &[("sev", User::Root), ("sev-es", User::Root), ("sev-snp", User::Root)]),
];

/// Of them, the backend that this machine's KVM is enough for, and what protects its guests.
const HERE: (&str, &[(&str, User)]) =
    ("cvm-backend-kvm", &[("none", User::Root), ("vault", User::Root), ("vault", User::Nobody)]);

/// Runs a program as an unprivileged user that may use KVM; from the workspace's root.
const AS_USER: &str = ".ci/as-user";

/// The user that a suite runs as: a VMM that is root can trace its vault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum User {
    Root,
    /// An unprivileged one.
    Nobody,
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Root => "root",
            Self::Nobody => "nobody",
        })
    }
}

/// Try every clause of the contract with every backend, and write docs/conformance.md.
///
/// Plain KVM is tried on this machine and in L1, what needs more in L1 alone: see `cargo xtask l1 --help` for what that takes.
/// It fails when a clause does that is not declared.
#[derive(Args)]
pub struct Conformance {
    /// Only compare what comes of it in L1 with what docs/conformance.md says
    #[arg(long)]
    check: bool,
}

/// A line of a suite's report.
#[derive(Debug, Clone, Deserialize)]
struct Line {
    subject: String,
    clause: String,
    name: String,
    outcome: String,
    reason: Option<String>,
}

/// One subject's suite, somewhere.
struct Run<'a> {
    program: &'a Path,
    subject: &'static str,
    user: User,
    in_l1: bool,
}

impl Conformance {
    /// Runs all suites, and writes or compares.
    pub fn run(&self) -> Result<ExitCode> {
        let programs = programs()?;
        let mut runs = Vec::new();
        for (package, subjects) in BACKENDS {
            let program = programs.get(package).ok_or_else(|| Error::new(format!("{package} has no suite")))?;
            runs.extend(subjects.iter().map(|(subject, user)| Run { program, subject, user: *user, in_l1: true }));
            if package == HERE.0 && !self.check {
                runs.extend(HERE.1.iter().map(|(subject, user)| Run { program, subject, user: *user, in_l1: false }));
            }
        }
        let results = all(&runs)?;

        let mut failed = 0;
        for (run, lines) in runs.iter().zip(&results) {
            for line in lines.iter().filter(|line| line.outcome == "failed") {
                failed += 1;
                note(format_args!(
                    "{} {} {}: {}",
                    place(run),
                    line.clause,
                    line.name,
                    line.reason.as_deref().unwrap_or_default()
                ));
            }
        }
        if failed > 0 {
            return Err(Error::new(format!("{failed} clauses failed; docs/contract.md says what they are about")));
        }
        let lines = |in_l1: bool| {
            let of_place = runs.iter().zip(&results).filter(move |(run, _)| run.in_l1 == in_l1);
            of_place.map(|(run, lines)| (run.user, lines.as_slice())).collect::<Vec<_>>()
        };
        let everywhere = report(&lines(true));
        let path = workspace::root().join(REPORT);
        if self.check {
            let kept = fs::read_to_string(&path).context(|| format!("reading {REPORT}"))?;
            let kept = kept.split(HOST_HEADING).next().unwrap_or_default();
            if kept.trim_end() != everywhere.trim_end() {
                return Err(Error::new(format!("{REPORT} is not what came of it: run `cargo xtask conformance`")));
            }
            print(format_args!("{REPORT} is what came of it"))?;
        } else {
            let here = format!("{everywhere}\n{HOST_HEADING}\n\n{}", table(&lines(false)));
            fs::write(&path, here).context(|| format!("writing {REPORT}"))?;
            print(format_args!("{REPORT} is written"))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Builds the suites of all backends, and finds each by its package.
fn programs() -> Result<BTreeMap<String, PathBuf>> {
    #[derive(Deserialize)]
    struct Target {
        src_path: PathBuf,
    }
    #[derive(Deserialize)]
    struct Artifact {
        target: Target,
        executable: PathBuf,
    }
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    // As the tests of the workspace are built, so that it is done once.
    command.current_dir(workspace::root()).args([
        "test",
        "--no-run",
        "--message-format",
        "json",
        "--test",
        "conformance",
    ]);
    let messages = tools::output(&mut command)?;
    let artifacts = messages.lines().filter_map(|line| serde_json::from_str::<Artifact>(line).ok());
    let suites = artifacts.filter(|artifact| artifact.target.src_path.ends_with("tests/conformance.rs"));
    let package = |source: &Path| Some(source.ancestors().nth(2)?.file_name()?.to_str()?.to_owned());
    Ok(suites.filter_map(|suite| Some((package(&suite.target.src_path)?, suite.executable))).collect())
}

/// Where a suite runs, and of what.
fn place(run: &Run<'_>) -> String {
    format!("{} as {}{}", run.subject, run.user, if run.in_l1 { " in L1" } else { "" })
}

/// Runs the suites, as many at once as there are processors.
fn all(runs: &[Run<'_>]) -> Result<Vec<Vec<Line>>> {
    let mut order: Vec<_> = runs.iter().enumerate().collect();
    // A vault is a process for each VM, and takes longest.
    order.sort_by_key(|(_, run)| run.subject != "vault");
    let next = AtomicUsize::new(0);
    let results = Mutex::new(BTreeMap::new());
    let work = || {
        while let Some((index, run)) = order.get(next.fetch_add(1, Ordering::Relaxed)).copied() {
            let begin = Instant::now();
            note(format_args!("{}: running", place(run)));
            let result = one(run);
            note(format_args!("{}: {} s", place(run), begin.elapsed().as_secs()));
            if let Ok(mut results) = results.lock() {
                results.insert(index, result);
            }
        }
    };
    let workers = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| (0..workers).for_each(|_| _ = scope.spawn(work)));
    let results = results.into_inner().unwrap_or_default();
    results.into_values().collect()
}

/// Runs one suite. That clauses fail is no error here.
fn one(run: &Run<'_>) -> Result<Vec<Line>> {
    let as_user = workspace::root().join(AS_USER);
    let program: Vec<&Path> = match run.user {
        User::Root => vec![run.program],
        User::Nobody => vec![&as_user, run.program],
    };
    let mut command = if run.in_l1 {
        let mut l1 = Command::new(env::current_exe().context(|| "finding this program".into())?);
        l1.args(["l1", "--timeout", LIMIT, "--"]).args(program);
        l1
    } else {
        let (first, rest) = program.split_first().ok_or_else(|| Error::new("there is no program"))?;
        let mut here = Command::new(first);
        here.args(rest);
        here
    };
    command.env("CVM_CONFORMANCE_REPORT", "1").env("CVM_SUBJECT", run.subject).arg("--color=never");
    let Output { stdout, stderr, status } =
        command.output().context(|| format!("running {}", run.program.display()))?;
    let text = String::from_utf8_lossy(&stdout);
    let lines = text.lines().filter_map(|line| line.strip_prefix(PREFIX));
    let lines = lines.map(serde_json::from_str).collect::<Result<Vec<Line>, _>>();
    let lines = lines.context(|| format!("reading the report of {}", place(run)))?;
    if lines.is_empty() || !status.success() && lines.iter().all(|line| line.outcome != "failed") {
        let said = format!("{text}{}", String::from_utf8_lossy(&stderr));
        return Err(Error::new(format!("{}: {status}, and no report of a failure:\n{said}", place(run))));
    }
    Ok(lines)
}

/// The report but for what is of one machine.
fn report(columns: &[(User, &[Line])]) -> String {
    format!(
        "# Conformance\n\n\
         What each clause of [the contract](contract.md) came to with each backend, as `cargo xtask conformance` wrote it.\n\
         **yes**: the clause is met. A number: the backend has declared that it is not, for the reason below with this \
         number; that it\nis indeed not met was tried too. Each column names the user whose process was the VMM: nobody has no privileges, \
         and KVM for a device.\n\n\
         ## In L1\n\n\
         L1 is a small VM whose KVM has the whole interface of confidential VMs; what stands for AMD's secure processor \
         there is faked,\nand encrypts nothing.\n\n{}",
        table(columns)
    )
}

/// Clauses by subjects, and the reasons.
fn table(columns: &[(User, &[Line])]) -> String {
    let mut text = String::from("| clause |");
    for (user, lines) in columns {
        _ = write!(text, " {} as {user} |", lines.first().map_or("", |line| &line.subject));
    }
    _ = writeln!(text, "\n|---|{}", "---|".repeat(columns.len()));
    let mut reasons: Vec<&str> = Vec::new();
    // Suites run in one order, that of the numbers.
    for (row, clause) in columns.first().map_or(&[][..], |(_, lines)| lines).iter().enumerate() {
        _ = write!(text, "| {} {} |", clause.clause, clause.name);
        for (_, lines) in columns {
            match lines.get(row).and_then(|line| line.reason.as_deref()) {
                None => text.push_str(" yes |"),
                Some(reason) => {
                    let known = reasons.iter().position(|known| *known == reason);
                    let number = known.unwrap_or_else(|| {
                        reasons.push(reason);
                        reasons.len() - 1
                    });
                    _ = write!(text, " {} |", number + 1);
                }
            }
        }
        text.push('\n');
    }
    if !reasons.is_empty() {
        text.push('\n');
    }
    for (number, reason) in (1..).zip(reasons) {
        _ = writeln!(text, "{number}. {reason}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(subject: &str, clause: &str, reason: Option<&str>) -> Line {
        let outcome = if reason.is_some() { "departed" } else { "met" }.into();
        Line {
            subject: subject.into(),
            clause: clause.into(),
            name: "it holds".into(),
            outcome,
            reason: reason.map(Into::into),
        }
    }

    #[test]
    fn a_reason_that_two_have_is_written_once() {
        let one = [line("one", "1.1", None), line("one", "1.2", Some("cannot"))];
        let two = [line("two", "1.1", Some("will not")), line("two", "1.2", Some("cannot"))];
        let expected = "| clause | one as root | two as nobody |\n|---|---|---|\n| 1.1 it holds | yes | 1 |\n| 1.2 it holds | 2 | 2 |\n\n\
                        1. will not\n2. cannot\n";
        assert_eq!(table(&[(User::Root, &one), (User::Nobody, &two)]), expected);
    }

    #[test]
    fn a_line_of_a_report_is_understood() {
        let text = r#"{"subject":"sev","clause":"4.2","name":"n","outcome":"departed","reason":"r"}"#;
        let line: Line = serde_json::from_str(text).unwrap();
        assert_eq!((line.outcome.as_str(), line.reason.as_deref()), ("departed", Some("r")));
        let text = r#"{"subject":"sev","clause":"4.2","name":"n","outcome":"met"}"#;
        assert!(serde_json::from_str::<Line>(text).unwrap().reason.is_none());
    }
}
