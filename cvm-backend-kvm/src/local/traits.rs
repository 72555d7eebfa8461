//! What VMs of different protection do not have in common.

use super::vcpu::LocalVcpu;
use cvm_core::export::Export;
use cvm_core::{Error, Lifecycle, LifecycleAnswer, SharedMemory};
use kvm_bindings::kvm_run;
use std::any::Any;
use std::fmt::Debug;

/// What is particular to the VMs of a backend.
pub trait Traits: Debug + Send + Sync {
    /// Whether nobody can read the registers of its vCPUs once it is sealed, so that of an exit just what the guest put
    /// into the GHCB for it is exposed.
    fn hides_registers(&self) -> bool;

    /// What can be done with it, where that is another answer than VMs on plain KVM have. Whether private memory is swapped
    /// follows from what it is.
    fn lifecycle(&self, what: Lifecycle) -> Option<LifecycleAnswer>;

    /// How its private pages can leave it; see [`Vm::export`](cvm_core::Vm::export).
    fn export(&self) -> Option<&dyn Export<LocalVcpu>> {
        None
    }

    /// Answers, in the page that `vcpu` shares with KVM, an exit that VMs on plain KVM do not have; the guest goes on
    /// after that. What is returned is kept until KVM has completed the exit: a lock, say.
    ///
    /// # Errors
    /// Why the guest cannot go on.
    fn exit(&self, vcpu: u32, run: &mut kvm_run, memory: &SharedMemory) -> Result<Option<Box<dyn Any>>, Error>;
}

/// Those of plain KVM.
#[derive(Debug)]
pub(crate) struct Plain;

impl Traits for Plain {
    fn hides_registers(&self) -> bool {
        false
    }

    fn lifecycle(&self, _what: Lifecycle) -> Option<LifecycleAnswer> {
        None
    }

    fn exit(&self, vcpu: u32, run: &mut kvm_run, _memory: &SharedMemory) -> Result<Option<Box<dyn Any>>, Error> {
        let reason = format!("it left by an exit that plain guests do not have: {}", run.exit_reason);
        Err(Error::Crashed { vcpu, reason })
    }
}

/// What can be done with a VM on plain KVM, whoever holds it, whose private memory is swapped or not.
pub(crate) fn lifecycle(what: Lifecycle, swap: LifecycleAnswer) -> LifecycleAnswer {
    match what {
        Lifecycle::Swap => swap,
        Lifecycle::Migrate | Lifecycle::StopAndCopy | Lifecycle::Snapshot | Lifecycle::Dump => {
            LifecycleAnswer::No("there is no protected export of private memory and registers")
        }
        Lifecycle::Reset => LifecycleAnswer::No("the launch is measured once: launch a new vm"),
        Lifecycle::Hotplug => LifecycleAnswer::No("memory and vcpus are part of the measured launch"),
        Lifecycle::AssignDevice => LifecycleAnswer::No("no iommu mapping follows the conversions"),
    }
}
