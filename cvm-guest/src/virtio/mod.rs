//! Virtio for protected guests: payloads bounce through a shared pool, and registers are reached by doorbell.

mod hal;
mod transport;

pub use hal::{DeviceQueue, QueueHal};
pub use transport::{DoorbellTransport, TransportError};
