//! Chapter 7: interrupts.

use crate::clause::Clause;
use cvm_core::Platform;

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![]
}
