//! The contract between a virtual machine monitor and the trusted entity that protects a guest from it.
//!
//! A VMM author meets the modules in this order:
//!
//! 1. [`platform`]: what this host can do, and for each thing that it cannot, why; whom one has to trust.
//! 2. [`launch`]: configure, load pages, seal. Every page enters a transcript and so the measurement.
//! 3. [`memory`]: private by default; the guest asks for sharing. One page-state map, one conversion engine, one
//!    view of the shared pages for device models.
//! 4. [`vm`]: run vCPUs; an [`Exit`] carries just the values that are exposed for it.
//! 5. [`interrupt`]: what the host may inject.
//! 6. [`lifecycle`]: what can be done with the running VM, as data.
//! 7. [`export`]: private pages leave a VM for another platform, where the trusted entity has a way.
//!
//! With the feature `linux`, [`launch`] also starts kernels from their files, see `linux`.
//!
//! What guest and VMM say to each other is in [`doorbell`] and [`boot`]; these, [`address`], [`side`] and what of [`x86`]
//! needs no allocation build without `std`, for guests. There is no ioctl and no unsafe code here: backends bring those.

#![forbid(unsafe_code)]
#![cfg_attr(not(feature = "std"), no_std)]

pub mod address;
pub mod boot;
pub mod doorbell;
pub mod side;

#[cfg(feature = "std")]
mod error;
#[cfg(feature = "std")]
pub mod export;
#[cfg(feature = "std")]
pub mod igvm;
#[cfg(feature = "std")]
pub mod image;
#[cfg(feature = "std")]
pub mod interrupt;
#[cfg(feature = "std")]
pub mod launch;
#[cfg(feature = "std")]
pub mod lifecycle;
#[cfg(all(feature = "linux", target_arch = "x86_64"))]
pub mod linux;
#[cfg(feature = "std")]
pub mod memory;
#[cfg(feature = "std")]
pub mod platform;
#[cfg(feature = "std")]
mod policy;
#[cfg(feature = "std")]
pub mod vm;
pub mod x86;

pub use address::{Gpa, GpaRange, PAGE_SIZE, RangeError};
pub use doorbell::Trigger;
pub use side::{Answer, Side};

#[cfg(feature = "std")]
pub use error::{BoxError, Error};
#[cfg(feature = "std")]
pub use interrupt::{Event, InterruptController, InterruptGuard, InterruptPolicy};
#[cfg(feature = "std")]
pub use launch::{Launch, Measurement, PageKind, Transcript, VmConfig};
#[cfg(feature = "std")]
pub use lifecycle::{Lifecycle, LifecycleAnswer};
#[cfg(feature = "std")]
pub use memory::{Conversion, ConversionListener, ConversionRequest, Objection, PageState, PageStateMap, SharedMemory};
#[cfg(feature = "std")]
pub use platform::{Offer, Platform, Protection, TrustModel};
#[cfg(feature = "std")]
pub use policy::Policy;
#[cfg(feature = "std")]
pub use vm::{Exit, Kick, RegisterRead, Vcpu, Vm, Watchdog};
