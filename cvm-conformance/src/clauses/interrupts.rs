//! Chapter 7: interrupts.

mod apic;
mod descriptors;
mod doorbells;
mod edges;
mod guard;
mod guest;
mod levels;

use crate::clause::Clause;
use cvm_core::Platform;

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("7.1", "who guards is said and agrees with the trust model", guard::who_guards),
        Clause::new("7.2", "the guard refuses all that the guest does not accept, with the reason", guard::refuses),
        Clause::new("7.3", "a running guest accepts vectors, each vCPU for itself", guard::at_run_time),
        Clause::new("7.4", "no guest can accept an exception", guard::no_exceptions),
        Clause::new("7.5", "a vector keeps its trigger", guard::triggers),
        Clause::new("7.6", "no vCPU has more interrupts in a second than its guest accepts", guard::limit),
        Clause::new("7.7", "an accepted edge arrives once, when the guest allows it", edges::once),
        Clause::new("7.8", "edges that wait arrive one after the other, the highest first", edges::highest_first),
        Clause::new("7.9", "an interrupt arrives at its own vCPU", edges::own_vcpu),
        Clause::new("7.10", "an interrupt wakes a vCPU that has halted, and nothing else does", edges::wakes),
        Clause::new("7.11", "an interrupt does not disturb what is being answered", edges::answers),
        Clause::new("7.12", "an interrupt that waits outlasts exits and kicks", edges::outlasts),
        Clause::new("7.13", "an asserted line interrupts again until it is lowered", levels::until_lowered),
        Clause::new(
            "7.14",
            "a line that is lowered before the guest takes it does not interrupt",
            levels::lowered_before,
        ),
        Clause::new("7.15", "a line counts when it is raised, and can be lowered whatever the limit", levels::limit),
        Clause::new("7.16", "a guest finds its APIC on and cannot turn to another mode", apic::mode),
        Clause::new("7.17", "nothing is emulated where the page of an APIC would be", apic::page),
        Clause::new("7.18", "an APIC takes accepted edges only", apic::edges_only),
        Clause::new(
            "7.19",
            "interrupts go through the APIC, the highest first, also to a vCPU that halts",
            apic::injected,
        ),
        Clause::new("7.20", "an APIC that the guest has turned off loses interrupts, and nothing fails", apic::off),
        Clause::new("7.21", "an interrupt has a descriptor only where the guest accepts it", descriptors::refused),
        Clause::new(
            "7.22",
            "each write of a descriptor interrupts once, and wakes a vCPU that halts",
            descriptors::once,
        ),
        Clause::new("7.23", "a descriptor interrupts a guest that spins", descriptors::spinning),
        Clause::new("7.24", "each descriptor raises its vector on its vCPU", descriptors::each),
        Clause::new("7.25", "a vCPU with an index above 255 has its own interrupts", descriptors::above_255),
        Clause::new("7.26", "what is accepted at run time has a descriptor on that vCPU", descriptors::at_run_time),
        Clause::new("7.27", "a limit holds for descriptors too, and what it drops is counted", descriptors::limit),
        Clause::new("7.28", "writes of a register with a descriptor are counted and make no exit", doorbells::counted),
        Clause::new("7.29", "a register gets its descriptor while the guest runs", doorbells::while_running),
        Clause::new(
            "7.30",
            "a register of a device gets one descriptor, and no other register any",
            doorbells::refused,
        ),
    ]
}
