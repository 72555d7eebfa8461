//! Chapter 5: exits.

mod failures;
mod kicks;
mod questions;
mod threads;
mod values;

pub(super) use failures::{Wrong, fail_alone};

use crate::clause::Clause;
use cvm_core::Platform;

/// An MSR that no KVM knows, outside the doorbells.
pub(super) const UNKNOWN_MSR: u32 = 0x4355_0000;

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("5.1", "the console shows each byte that the guest writes", values::console),
        Clause::new("5.2", "a guest ends with the code that it gives", values::end),
        Clause::new("5.3", "a doorbell register has 32 bits by whatever doorbell", values::registers_of_32_bits),
        Clause::new(
            "5.4",
            "ports outside the doorbells show what is written and give no more than is read",
            values::ports,
        ),
        Clause::new("5.5", "MSRs outside the doorbells show and take all 64 bits", values::msrs),
        Clause::new("5.6", "no port is answered by anybody but the VMM", values::nobody_elses_ports),
        Clause::new("5.7", "each vCPU talks to its host for itself", questions::each_for_itself),
        Clause::new(
            "5.8",
            "a question is answered once and in kind before the guest goes on",
            questions::once_and_in_kind,
        ),
        Clause::new("5.9", "a vCPU that halts stays halted and can be kicked", kicks::halted),
        Clause::new("5.10", "a halt with an APIC stays in the kernel until a kick", kicks::halted_in_the_kernel),
        Clause::new("5.11", "an unknown doorbell stops one vCPU only", failures::unknown_doorbells),
        Clause::new("5.12", "a doorbell takes neither narrow nor wide accesses", failures::widths),
        Clause::new("5.13", "string I/O stops one vCPU only", failures::string_io),
        Clause::new("5.14", "string I/O is named with its port", failures::string_io_by_name),
        Clause::new("5.15", "an access where there is no memory stops one vCPU only", failures::mmio),
        Clause::new("5.16", "an access where there is no memory is refused by its address", failures::mmio_by_address),
        Clause::new("5.17", "a triple fault stops one vCPU only", failures::triple_fault),
        Clause::new("5.18", "a guest that gives up says why", failures::terminated),
        Clause::new("5.19", "a watchdog stops a guest that spins and the guest can go on", kicks::watchdog),
        Clause::new("5.20", "kicks before a run stop the next run of their vCPU once", kicks::before_the_run),
        Clause::new("5.21", "a kick neither answers a question nor loses the answer", kicks::questions),
        Clause::new("5.22", "kicks that race with a spinning guest are never lost", kicks::race_with_spinning),
        Clause::new("5.23", "kicks that race with exits lose neither kick nor exit", kicks::race_with_exits),
        Clause::new("5.24", "a kicker may outlive its vCPU and its VM", kicks::outlives),
        Clause::new("5.25", "a vCPU keeps its VM alive", threads::keeps_its_vm),
        Clause::new("5.26", "a VM may be dropped while its vCPU runs on another thread", threads::dropped_meanwhile),
        Clause::new("5.27", "a vCPU may move to another thread between runs and answers", threads::moves),
    ]
}
