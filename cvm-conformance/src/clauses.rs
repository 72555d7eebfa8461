//! The clauses, a module for each chapter of `docs/contract.md`.

mod conversion;
mod errors;
mod exits;
mod faults;
mod fresh;
mod interrupts;
mod launch;
mod lifecycle;
mod memory;
mod platform;
mod policy;
mod registers;
mod resources;
mod several;

use crate::clause::Clause;
use cvm_core::Platform;
pub(crate) use platform::is_refused_as_probed;
pub(crate) use resources::killed;

/// The chapter whose clauses need a host that lets calls be made to fail.
pub(crate) const FAULTS: &str = "13";

/// All clauses, in the order of their numbers.
pub fn clauses<P: Platform + Sync>() -> Vec<Clause<P>> {
    let chapters = [
        platform::clauses(),
        launch::clauses(),
        memory::clauses(),
        conversion::clauses(),
        exits::clauses(),
        registers::clauses(),
        interrupts::clauses(),
        policy::clauses(),
        lifecycle::clauses(),
        resources::clauses(),
        several::clauses(),
        errors::clauses(),
        faults::clauses(),
    ];
    chapters.into_iter().flatten().collect()
}
