//! Chapter 9: what can be done with a running VM.

use crate::clause::Clause;
use cvm_core::Platform;

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![]
}
