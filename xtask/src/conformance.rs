//! What came of the contract's clauses with every backend.

use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Deserialize;

use crate::error::{Context, Error, Result};
use crate::program::{note, print};
use crate::{tools, workspace};

/// The report, from the workspace's root.
const REPORT: &str = "docs/conformance.md";

/// What a line of a suite's report begins with (`cvm_conformance::REPORT_PREFIX`).
const PREFIX: &str = "conformance: ";

/// After how many clauses a run says how far it is.
const STEP: usize = 20;

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
    /// Give up on a suite after this time; what it has found by then is printed
    #[arg(short, long, value_name = "SECONDS", default_value_t = 1800)]
    timeout: u64,
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
        let results = all(&runs, Duration::from_secs(self.timeout))?;

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
        let columns = |in_l1: bool| {
            let of_place = runs.iter().zip(&results).filter(move |(run, _)| run.in_l1 == in_l1);
            of_place.map(|(run, lines)| Column { user: run.user, lines }).collect::<Vec<_>>()
        };
        let everywhere = report(&columns(true));
        let path = workspace::root().join(REPORT);
        if self.check {
            let kept = fs::read_to_string(&path).context(|| format!("reading {REPORT}"))?;
            let kept = kept.split(HOST_HEADING).next().unwrap_or_default();
            if kept.trim_end() != everywhere.trim_end() {
                return Err(Error::new(format!("{REPORT} is not what came of it: run `cargo xtask conformance`")));
            }
            print(format_args!("{REPORT} is what came of it"))?;
        } else {
            let here = format!("{everywhere}\n{HOST_HEADING}\n\n{}", summary(&columns(false)));
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
fn all(runs: &[Run<'_>], limit: Duration) -> Result<Vec<Vec<Line>>> {
    let mut order: Vec<_> = runs.iter().enumerate().collect();
    // A vault is a process for each VM, and takes longest.
    order.sort_by_key(|(_, run)| run.subject != "vault");
    let next = AtomicUsize::new(0);
    let results = Mutex::new(BTreeMap::new());
    let work = || {
        while let Some((index, run)) = order.get(next.fetch_add(1, Ordering::Relaxed)).copied() {
            let begin = Instant::now();
            note(format_args!("{}: running", place(run)));
            let result = one(run, limit);
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
fn one(run: &Run<'_>, limit: Duration) -> Result<Vec<Line>> {
    let as_user = workspace::root().join(AS_USER);
    let program: Vec<&Path> = match run.user {
        User::Root => vec![run.program],
        User::Nobody => vec![&as_user, run.program],
    };
    let mut command = if run.in_l1 {
        let mut l1 = Command::new(env::current_exe().context(|| "finding this program".into())?);
        l1.args(["l1", "--timeout", &limit.as_secs().to_string(), "--"]).args(program);
        l1
    } else {
        let (first, rest) = program.split_first().ok_or_else(|| Error::new("there is no program"))?;
        let mut here = Command::new(first);
        here.args(rest);
        here
    };
    command.env("CVM_CONFORMANCE_REPORT", "1").env("CVM_SUBJECT", run.subject).arg("--color=never");
    let doing = || format!("running {}", run.program.display());
    let mut suite = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().context(doing)?;
    let output = suite.stdout.take().ok_or_else(|| Error::new("the suite started without a pipe"))?;
    let (send, received) = mpsc::channel();
    thread::spawn(move || {
        let lines = BufReader::new(output).lines().map_while(io::Result::ok);
        lines.map(|line| send.send(line)).take_while(Result::is_ok).for_each(drop);
    });

    let end = Instant::now() + limit;
    let (mut lines, mut said) = (Vec::new(), String::new());
    let is_late = loop {
        match received.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(text) => match text.strip_prefix(PREFIX) {
                Some(json) => {
                    let line: Line =
                        serde_json::from_str(json).context(|| format!("reading the report of {}", place(run)))?;
                    lines.push(line);
                    if lines.len().is_multiple_of(STEP) {
                        note(format_args!("{}: {} clauses tried", place(run), lines.len()));
                    }
                }
                None => said.extend([&text, "\n"]),
            },
            Err(RecvTimeoutError::Timeout) => break true,
            Err(RecvTimeoutError::Disconnected) => break false,
        }
    };
    if is_late {
        // It fails only if the suite has just ended.
        let _ = suite.kill();
    }
    let status = suite.wait().context(doing)?;
    if is_late || !status.success() && lines.iter().all(|line| line.outcome != "failed") {
        return Err(Error::new(format!("{}: {}\n{said}", place(run), unfinished(&lines, limit, is_late))));
    }
    if lines.is_empty() {
        return Err(Error::new(format!("{}: {status}, and no clause was tried:\n{said}", place(run))));
    }
    Ok(lines)
}

/// What a run had found when it ended before its last clause.
fn unfinished(lines: &[Line], limit: Duration, is_late: bool) -> String {
    let end = if is_late { format!("no end within {} s", limit.as_secs()) } else { "the suite ended early".into() };
    let last =
        lines.last().map_or_else(|| "none".into(), |line| format!("the last one was {} {}", line.clause, line.name));
    let failed = lines.iter().filter(|line| line.outcome == "failed");
    let failed =
        failed.map(|line| format!("\n{} {}: {}", line.clause, line.name, line.reason.as_deref().unwrap_or("")));
    format!("{end}; {} clauses were tried, {last}{}", lines.len(), failed.collect::<String>())
}

/// What came of one suite.
struct Column<'a> {
    user: User,
    lines: &'a [Line],
}

impl Column<'_> {
    fn subject(&self) -> &str {
        self.lines.first().map_or("", |line| &line.subject)
    }

    /// What the suite's word rests on.
    fn witness(&self) -> &'static str {
        if self.subject().starts_with("sev") { "**model**" } else { "KVM" }
    }

    /// The clauses that are not met, by reason.
    fn departures(&self) -> Vec<Departure<'_>> {
        let mut departures: Vec<Departure<'_>> = Vec::new();
        for line in self.lines {
            let Some(reason) = line.reason.as_deref() else { continue };
            match departures.iter_mut().find(|(known, _)| *known == reason) {
                Some((_, clauses)) => clauses.push(&line.clause),
                None => departures.push((reason, vec![&line.clause])),
            }
        }
        departures
    }
}

/// The report but for what is of one machine.
fn report(columns: &[Column<'_>]) -> String {
    format!(
        "# Conformance\n\n\
         `cargo xtask conformance` tries each clause of [the contract](contract.md) with each backend, and writes this page. A \
         backend declares\nwhich clauses it departs from, and how they show it: a clause that fails in any other way fails the \
         run, and so does one that is met.\n\n\
         ## In L1\n\n\
         L1 is a small VM on an emulated processor, whose KVM has every interface of confidential VMs. The witness **KVM** is \
         the kernel's own code.\n**model** means that the trusted entity, and a processor with its instructions, are models \
         in L1's kernel: nothing of what is said there was tried\non hardware. A VMM that is root can trace its vault, so the \
         vault is tried as an unprivileged user (nobody), too.\n\n{}",
        summary(columns)
    )
}

/// A reason, and the clauses that are not met for it.
type Departure<'a> = (&'a str, Vec<&'a str>);

/// A line for each suite, and the reasons of what is not met.
fn summary(columns: &[Column<'_>]) -> String {
    let mut text = String::from("| isolation | user | witness | clauses met | not met |\n|---|---|---|---|---|\n");
    let mut reasons: Vec<(Departure<'_>, Vec<String>)> = Vec::new();
    for column in columns {
        let departures = column.departures();
        let name = match column.user {
            User::Root => column.subject().to_owned(),
            User::Nobody => format!("{} as nobody", column.subject()),
        };
        let count = departures.iter().map(|(_, clauses)| clauses.len()).sum::<usize>();
        let met = column.lines.len() - count;
        let (subject, user, witness) = (column.subject(), column.user, column.witness());
        _ = writeln!(text, "| {subject} | {user} | {witness} | {met} of {} | {count} |", column.lines.len());
        for departure in departures {
            match reasons.iter_mut().find(|(known, _)| *known == departure) {
                Some((_, names)) => names.push(name.clone()),
                None => reasons.push((departure, vec![name.clone()])),
            }
        }
    }
    text.push_str("\n| not met | by | reason |\n|---|---|---|\n");
    for ((reason, clauses), names) in reasons {
        _ = writeln!(text, "| {} | {} | {reason} |", clauses.join(", "), names.join(", "));
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
    fn a_summary_has_a_line_a_suite_and_each_reason_once() {
        let one =
            [line("vault", "1.1", None), line("vault", "1.2", Some("cannot")), line("vault", "1.3", Some("cannot"))];
        let two = [line("sev", "1.1", Some("will not")), line("sev", "1.2", None), line("sev", "1.3", None)];
        let columns = [
            Column { user: User::Root, lines: &one },
            Column { user: User::Nobody, lines: &one },
            Column { user: User::Root, lines: &two },
        ];
        let expected = "| isolation | user | witness | clauses met | not met |\n|---|---|---|---|---|\n\
                        | vault | root | KVM | 1 of 3 | 2 |\n| vault | nobody | KVM | 1 of 3 | 2 |\n\
                        | sev | root | **model** | 2 of 3 | 1 |\n\n\
                        | not met | by | reason |\n|---|---|---|\n\
                        | 1.2, 1.3 | vault, vault as nobody | cannot |\n| 1.1 | sev | will not |\n";
        assert_eq!(summary(&columns), expected);
    }

    #[test]
    fn a_run_that_is_late_says_what_it_found() {
        let mut failed = line("none", "1.2", Some("it hangs"));
        failed.outcome = "failed".into();
        let text = unfinished(&[line("none", "1.1", None), failed], Duration::from_secs(9), true);
        assert_eq!(
            text,
            "no end within 9 s; 2 clauses were tried, the last one was 1.2 it holds\n1.2 it holds: it hangs"
        );
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
