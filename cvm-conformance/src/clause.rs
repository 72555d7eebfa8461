//! What a clause of the contract is to the suite.

use crate::Bench;
use cvm_core::Platform;

/// What the check of a clause found; a panic says that the clause is not met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The backend does what the contract says.
    Met,
    /// The backend does not offer what the clause is about, and refuses it as the contract says, for this reason.
    NotOffered(String),
}

/// A clause of the contract.
#[derive(Debug)]
pub struct Clause<P: Platform> {
    /// Its number in `docs/contract.md`, which never changes.
    pub number: &'static str,
    /// Its name: a sentence.
    pub name: &'static str,
    /// Whether nothing else may happen in the process meanwhile.
    pub alone: bool,
    /// Tries it.
    pub check: fn(&Bench<'_, P>) -> Verdict,
}

impl<P: Platform> Clause<P> {
    /// A clause that is either met or not.
    pub(crate) const fn new(number: &'static str, name: &'static str, check: fn(&Bench<'_, P>) -> Verdict) -> Self {
        Self { number, name, alone: false, check }
    }

    /// The same, checked while nothing else happens in the process.
    pub(crate) const fn alone(mut self) -> Self {
        self.alone = true;
        self
    }
}
