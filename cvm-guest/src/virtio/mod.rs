//! Virtio for protected guests: payloads bounce through a shared pool, and registers are reached by doorbell.

#[cfg(all(test, not(loom)))]
mod disk_tests;
#[cfg(all(test, not(loom)))]
mod fake;
mod hal;
mod net;
#[cfg(feature = "smoltcp")]
mod phy;
mod transport;

pub use hal::{DeviceQueue, QueueHal};
pub use net::{FrameHal, HEADER_LEN, Net, QueueFrames};
#[cfg(feature = "smoltcp")]
pub use phy::{Received, Room};
pub use transport::{DoorbellTransport, TransportError};
