//! Virtio for protected guests: payloads bounce through a shared pool, and registers are reached by doorbell.

#[cfg(test)]
mod disk_tests;
#[cfg(test)]
mod fake;
mod hal;
mod net;
#[cfg(feature = "smoltcp")]
mod phy;
mod transport;

pub use hal::{PoolHal, StaticPool};
pub use net::{FrameHal, HEADER_LEN, Net, PoolFrames};
#[cfg(feature = "smoltcp")]
pub use phy::{Received, Room};
pub use transport::{DoorbellTransport, TransportError};
