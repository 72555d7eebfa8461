//! A VM whose descriptors, vCPUs and memory this process holds.

mod kick;
mod loader;
mod memory;
mod staging;
mod vcpu;
mod vcpu_fd;
mod vm;

pub(crate) use kick::Kicker;
pub(crate) use loader::{Isolation, LocalLoader};
pub(crate) use memory::{Backing, FilesMemory, Layout, shared_view};
pub(crate) use vcpu::{LocalVcpu, is_amd, supported_cpuid};
pub(crate) use vm::{LocalVm, lifecycle};
