//! What an attack is expected to give, and what it gave.

use crate::isolation::{Isolation, Situation};
use cvm::kvm::KvmPlatform;
use cvm::platform::{Asset, Party, Powers};
use cvm::{Platform, Protection};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What is expected of an attack under one isolation.
#[derive(Debug, Clone, Copy)]
pub enum Outcome {
    /// It succeeds, as the trust model admits.
    Open(&'static str),
    /// It succeeds, as the trust model admits, where private memory is a file; in a `guest_memfd` nothing is found.
    OpenInFile(&'static str),
    /// It ends with this (or, where "or" is written, with one of these), because of that.
    Refused(&'static str, &'static str),
    /// There is nothing to make it on.
    Absent(&'static str),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(what) => write!(f, "**open**: {what}"),
            Self::OpenInFile(what) => write!(f, "**open**: {what}, unless it is in a guest_memfd"),
            Self::Refused(with, why) => write!(f, "{with}: {why}"),
            Self::Absent(why) => write!(f, "-: {why}"),
        }
    }
}

/// What an attack gave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Observed {
    /// The attacker got what it wanted; this is what it saw.
    Got(String),
    /// It ended with this.
    Refused(String),
    /// There was nothing to make it on.
    Absent(String),
    /// This machine's KVM cannot do it, where others can.
    Unable(String),
    /// The kernel is built without the system call that the attack is made of (ENOSYS).
    NoSuchCall,
}

impl fmt::Display for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Got(what) => write!(f, "got it: {what}"),
            Self::Refused(with) => write!(f, "refused: {with}"),
            Self::Absent(why) => write!(f, "nothing to attack: {why}"),
            Self::Unable(why) => write!(f, "not possible here: {why}"),
            Self::NoSuchCall => f.write_str("this kernel is built without the system call"),
        }
    }
}

/// One attack with what it gave, as a role tells it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Finding {
    pub row: String,
    pub observed: Observed,
}

/// One line of the document.
#[derive(Debug)]
pub struct Row {
    /// What the code calls it.
    pub id: &'static str,
    /// What is attacked, and how.
    pub what: &'static str,
    /// The power that it takes, for the trust model to admit or not.
    pub power: Option<(Asset, Powers)>,
    /// What is expected, by isolation.
    pub outcomes: [Outcome; 3],
}

impl Row {
    pub fn outcome(&self, isolation: Isolation) -> Outcome {
        self.outcomes[isolation.column()]
    }

    /// Why what `party` saw is not what is expected.
    pub fn judge(&self, isolation: Isolation, party: Option<Party>, observed: &Observed) -> Result<(), String> {
        let expected = self.outcome(isolation);
        let situation = Situation::of_row(self.id);
        let admitted = party
            .zip(self.power)
            .map(|(party, (asset, power))| isolation.powers(situation, guest_memfd(), party, asset).contains(power));
        match (expected, observed) {
            (Outcome::Open(_) | Outcome::OpenInFile(_), Observed::Got(_)) if admitted == Some(false) => {
                Err("it is open, and the trust model does not admit it".into())
            }
            (Outcome::Open(_), Observed::Got(_)) => Ok(()),
            // A refusal that was not tried is none.
            (Outcome::Open(_), Observed::Unable(_)) => Ok(()),
            // The attack does not exist on such a kernel, for any attacker.
            (_, Observed::NoSuchCall) => Ok(()),
            (Outcome::Absent(_), Observed::Absent(_)) => Ok(()),
            (Outcome::OpenInFile(_), Observed::Got(_)) if !guest_memfd() => Ok(()),
            (Outcome::OpenInFile(_), Observed::Refused(seen)) if guest_memfd() && seen == "not found" => Ok(()),
            (Outcome::Refused(with, _), Observed::Refused(seen)) if with == seen => Ok(()),
            (Outcome::Refused(with, _), Observed::Refused(seen)) if with.split(" or ").any(|one| one == seen) => Ok(()),
            // A machine may be stricter than others with processes of the same user.
            (Outcome::Open(_), Observed::Refused(_)) if party == Some(Party::SameUser) && yama() => Ok(()),
            _ => Err(format!("expected {expected}; {observed}")),
        }
    }
}

/// Whether private memory is in a `guest_memfd`, wherever it can be.
pub fn guest_memfd() -> bool {
    let offers = KvmPlatform::probe();
    offers.iter().any(|offer| offer.protection == Protection::GuestMemfd && offer.missing.is_empty())
}

/// Whether the kernel restricts what a process may do to others of its user (Linux Documentation/admin-guide/LSM/Yama.rst).
pub fn yama() -> bool {
    std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").is_ok_and(|scope| scope.trim() != "0")
}
