//! The main of a backend's conformance test.

use crate::clause::{Clause, Verdict};
use crate::clauses::{self, killed};
use crate::faults;
use crate::quality;
use crate::subject::{Bench, Departure, ShownBy, Subject};
use cvm_core::BoxError;
use libtest_mimic::{Arguments, Failed, Trial};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Arc, PoisonError, RwLock};

/// What became of a clause with one subject.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "outcome", content = "reason")]
pub enum Outcome {
    /// It is met.
    Met,
    /// It is not met, as the backend has declared for this reason.
    Departed(String),
    /// It is not met, or was declared without need.
    Failed(String),
}

/// A user that a VMM runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum User {
    /// The superuser.
    Root,
    /// Any other.
    Unprivileged,
}

/// A line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// What protects the subject's guests.
    pub subject: String,
    /// The user that the VMM ran as.
    pub user: User,
    /// The clause's number.
    pub clause: String,
    /// Its name.
    pub name: String,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What lines of the report begin with, which `$CVM_CONFORMANCE_REPORT` asks for: the rest of the line is a [`Line`] in JSON.
pub const REPORT_PREFIX: &str = "conformance: ";

/// Clauses that need the process for themselves wait for all others.
static ALONE: RwLock<()> = RwLock::new(());

/// All subjects' trials, and what becomes of them.
#[derive(Default)]
pub struct Suite {
    trials: Vec<Trial>,
}

impl std::fmt::Debug for Suite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Suite of {} trials", self.trials.len())
    }
}

fn user() -> User {
    if rustix::process::geteuid().is_root() { User::Root } else { User::Unprivileged }
}

/// Writes a line of the report at once, so that a run that does not come to its end has one too.
fn report(line: &Line) {
    if std::env::var_os("CVM_CONFORMANCE_REPORT").is_some() {
        // The clause's own line is not complete yet.
        println!("\n{REPORT_PREFIX}{}", serde_json::to_string(line).expect("names and texts"));
    }
}

fn judge(declared: Option<&Departure>, found: std::thread::Result<Verdict>) -> Outcome {
    match (declared, found) {
        (None, Ok(Verdict::Met)) => Outcome::Met,
        (None, Ok(Verdict::NotOffered(why))) => Outcome::Failed(format!("it is not offered, and not declared: {why}")),
        (None, Err(panic)) => Outcome::Failed(quality::said(&*panic).to_owned()),
        (Some(departure), Ok(Verdict::Met)) => {
            Outcome::Failed(format!("it is met: there is nothing to declare ({})", departure.reason))
        }
        (Some(departure), Ok(Verdict::NotOffered(why))) => match departure.shown_by {
            ShownBy::Refusal => Outcome::Departed(departure.reason.clone()),
            ShownBy::Failure(words) => {
                Outcome::Failed(format!("it was to fail with {words:?}, and is not offered: {why}"))
            }
        },
        (Some(departure), Err(panic)) => match (quality::said(&*panic), departure.shown_by) {
            (said, ShownBy::Failure(words)) if said.contains(words) => Outcome::Departed(departure.reason.clone()),
            (said, ShownBy::Failure(words)) => Outcome::Failed(format!("it was to fail with {words:?}: {said}")),
            (said, ShownBy::Refusal) => Outcome::Failed(format!("it was to be refused: {said}")),
        },
    }
}

impl Suite {
    /// A suite of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds every clause for `subject`, if this host has it. If `$CVM_SUBJECT` is set, only the subject with this protection is
    /// added, and required.
    ///
    /// # Errors
    /// That the host lacks it, where it is [required](Subject::required); declarations about clauses that do not exist.
    pub fn add<S: Subject>(&mut self, subject: S) -> Result<(), BoxError> {
        let name = subject.protection().to_string();
        if let Some((protection, stage)) = killed::wanted() {
            if protection == name {
                killed::reach(&Bench::new(&subject.open()?, subject.protection()), &stage);
            }
            return Ok(());
        }
        let only = std::env::var("CVM_SUBJECT").ok();
        if only.as_ref().is_some_and(|only| *only != name) {
            return Ok(());
        }
        let platform = match subject.open() {
            Ok(platform) => platform,
            Err(why) if only.is_some() || subject.required() => return Err(format!("{name} is required: {why}").into()),
            Err(why) => {
                clauses::is_refused_as_probed::<S::Platform>(subject.protection(), &*why)?;
                writeln!(std::io::stderr(), "SKIPPED: {name}: {why}")?;
                return Ok(());
            }
        };
        let mut departures = subject.departures(&platform);
        let clauses = clauses::clauses::<S::Platform>();
        if let Some(stray) = departures.iter().find(|it| clauses.iter().all(|clause| clause.number != it.clause)) {
            return Err(format!("{name} departs from a clause {} that does not exist", stray.clause).into());
        }
        if let (Err(why), false) = (faults::available(), only.is_some() || subject.required()) {
            writeln!(std::io::stderr(), "SKIPPED: {name}, chapter {}: {why}", clauses::FAULTS)?;
            let of_faults = clauses.iter().filter(|clause| clause.number.split('.').next() == Some(clauses::FAULTS));
            departures.extend(of_faults.map(|clause| Departure::not_offered(clause.number, why.clone())));
        }
        let shared = Arc::new((subject, platform));
        for clause in clauses {
            let declared = departures.iter().find(|departure| departure.clause == clause.number).cloned();
            let (shared, subject) = (Arc::clone(&shared), name.clone());
            let trial = format!("{name} {} {}", clause.number, clause.name.replace(' ', "_"));
            let kind = if declared.is_some() { "departs" } else { "" };
            let run = move || {
                let outcome = judge(declared.as_ref(), check(&shared.0, &shared.1, &clause));
                let failed = match &outcome {
                    Outcome::Failed(why) => Err(Failed::from(why)),
                    _ => Ok(()),
                };
                report(&Line {
                    subject,
                    user: user(),
                    clause: clause.number.into(),
                    name: clause.name.into(),
                    outcome,
                });
                failed
            };
            self.trials.push(Trial::test(trial, run).with_kind(kind));
        }
        Ok(())
    }

    /// Runs it as the command line says, which is that of any test.
    pub fn run(self) -> ExitCode {
        let mut arguments = Arguments::from_args();
        // As many guests as processors, each with a thread of its own, would only wait for each other.
        arguments.test_threads.get_or_insert(1);
        libtest_mimic::run(&arguments, self.trials).exit_code()
    }
}

fn check<S: Subject>(
    subject: &S,
    platform: &S::Platform,
    clause: &Clause<S::Platform>,
) -> std::thread::Result<Verdict> {
    let (open, held) = (|| subject.open(), || subject.held());
    let bench = Bench::new(platform, subject.protection()).of_subject(&open, &held, subject.trusted_entity());
    let check = AssertUnwindSafe(|| (clause.check)(&bench));
    if clause.alone {
        let _alone = ALONE.write().unwrap_or_else(PoisonError::into_inner);
        catch_unwind(check)
    } else {
        let _shared = ALONE.read().unwrap_or_else(PoisonError::into_inner);
        catch_unwind(check)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panicked(said: &'static str) -> std::thread::Result<Verdict> {
        Err(Box::new(said))
    }

    #[test]
    fn a_departure_excuses_the_failure_that_it_names_and_no_other() {
        let fails = Departure::fails("4.2", "it is not zero", "nothing is encrypted");
        let departed = Outcome::Departed("nothing is encrypted".into());
        assert_eq!(judge(Some(&fails), panicked("page 3: it is not zero")), departed);
        for other in [panicked("the guest crashed"), Ok(Verdict::Met), Ok(Verdict::NotOffered("no".into()))] {
            assert!(matches!(judge(Some(&fails), other), Outcome::Failed(_)));
        }
    }

    #[test]
    fn a_departure_for_want_of_an_offer_excuses_no_failure() {
        let refused = Departure::not_offered("4.27", "another maker's");
        let departed = Outcome::Departed("another maker's".into());
        assert_eq!(judge(Some(&refused), Ok(Verdict::NotOffered("no such transport".into()))), departed);
        for other in [panicked("no such transport"), Ok(Verdict::Met)] {
            assert!(matches!(judge(Some(&refused), other), Outcome::Failed(_)));
        }
    }

    #[test]
    fn what_is_not_declared_is_met_or_fails() {
        assert_eq!(judge(None, Ok(Verdict::Met)), Outcome::Met);
        for other in [panicked("no"), Ok(Verdict::NotOffered("no".into()))] {
            assert!(matches!(judge(None, other), Outcome::Failed(_)));
        }
    }
}
