//! What other backends on KVM build on: memory, vCPUs, interrupts and the handles of a VM, whatever protects it.
//!
//! | step | what |
//! |---|---|
//! | open the device, ask about a configuration | [`Host::open`], [`Host::check`] |
//! | make a VM of the backend's own type, and prepare it as its kind demands | [`Host::kvm`] |
//! | give it memory | [`GuestMemory`] |
//! | give it vCPUs, as the configuration says | [`Machine::new`] |
//! | load it, in the backend's own way | [`Machine::vm`], [`Machine::memory`], [`Machine::vcpus`] |
//! | let it run | [`Machine::set_states`] (and [`Machine::settle_states`] to measure them), [`Machine::finish`] with the backend's [`Traits`] |
//!
//! The result is a [`LocalVm`], which is the same for all of them: one loop around `KVM_RUN`, one conversion engine, one way
//! for interrupts.

pub use crate::error::{chain, failed};
pub use crate::host::{Host, open_device, setting};
pub use crate::local::{GuestMemory, LocalVcpu, LocalVm, Machine, PinnedMemory, Traits, VcpuSnapshot};
pub use crate::probe::{no_device, no_vm_type};
