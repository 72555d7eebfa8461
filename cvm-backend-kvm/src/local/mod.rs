//! A VM whose descriptors, vCPUs and memory this process holds.

mod apic;
mod interrupts;
mod kick;
mod loader;
mod machine;
mod memory;
mod staging;
mod traits;
mod vcpu;
mod vcpu_fd;
mod vm;
mod vm_fd;

pub(crate) use apic::lacks as apic_lacks;
pub(crate) use kick::Kicker;
pub(crate) use loader::LocalLoader;
pub use machine::Machine;
pub(crate) use memory::{Backing, FilesMemory, Isolation, Layout, shared_view};
pub use memory::{GuestMemory, PinnedMemory};
pub use traits::Traits;
pub(crate) use traits::lifecycle;
pub use vcpu::{LocalVcpu, VcpuSnapshot};
pub use vm::LocalVm;
