//! Chapter 1: what a host offers.

use crate::clause::Clause;
use cvm_core::Platform;

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![]
}
