//! What runs inside a confidential guest, without `std` and without an allocator.
//!
//! - [`Platform`]: what the boot page says, and the calls that follow from it: convert pages, write to the console, end.
//! - [`SharedRegion`]: memory that the host can write at any time. It copies in and out, and never lends a reference.
//! - [`Pool`]: bounce buffers in shared memory for the payloads of devices, and a [`Queue`] of them for each device queue.
//! - [`virtio`] (feature `virtio`): a `Hal` and a transport for the crate `virtio-drivers`, and a network card, which
//!   with the feature `smoltcp` is a device for the crate of that name.
//! - [`sev`]: guests of AMD SEV, SEV-ES and SEV-SNP; with the feature `report` the last of them get reports about themselves.
//! - [`entry`]: where a guest's vCPUs begin, and how they end at an exception.
//!
//! [`Machine`] stands for the instructions that reach the host, so that all of this runs in ordinary tests too.

#![cfg_attr(not(test), no_std)]

mod copy;
#[cfg(target_arch = "x86_64")]
mod end;
mod error;
#[cfg(target_arch = "x86_64")]
mod exceptions;
mod hypercall;
mod machine;
mod platform;
mod pool;
pub mod sev;
mod shared;
#[cfg(target_arch = "x86_64")]
mod start;
mod sync;
#[cfg(feature = "virtio")]
pub mod virtio;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "x86_64")]
pub use end::{EXCEPTION, end_after_panic};
pub use error::Error;
#[cfg(target_arch = "x86_64")]
pub use exceptions::VcpuTables;
pub use machine::Machine;
pub use platform::{Console, DeviceRegisters, Patience, Platform};
pub use pool::{
    Buffer, CHUNK_LEN, CLASSES, ChunkRecord, ClassUse, FromDevice, Lent, Placement, Pool, PoolOptions, PoolUse, Queue,
    QueueOptions, QueueRecord, QueueUse, Refusal, Ring, Sent, ToDevice,
};
pub use shared::SharedRegion;
#[cfg(target_arch = "x86_64")]
pub use x86::Processor;

#[cfg(target_arch = "x86_64")]
#[doc(hidden)]
pub use cvm_core::boot::BootPage;
