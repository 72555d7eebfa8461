//! The network card as `smoltcp` takes it.

use super::net::{FrameHal, Line, Net};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use virtio_drivers::transport::Transport;

/// A frame that has come. With bounce buffers it is a copy: what is parsed cannot change any more.
#[derive(Debug)]
pub struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Room for a frame to send.
pub struct Room<'a, H: FrameHal, T: Transport, const N: usize> {
    line: &'a mut Line<H, T, N>,
    place: usize,
}

impl<H: FrameHal, T: Transport, const N: usize> TxToken for Room<'_, H, T, N> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.line.send(self.place, len, f)
    }
}

/// From a device that is [broken](Net::broken) nothing comes, and there is no room to send.
impl<H: FrameHal, T: Transport, const N: usize> Device for Net<H, T, N> {
    type RxToken<'a>
        = Received<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Room<'a, H, T, N>
    where
        Self: 'a;

    fn receive(&mut self, _timestamp: Instant) -> Option<(Received<'_>, Room<'_, H, T, N>)> {
        // A frame that comes must find room for its answer.
        let place = self.parts().1.room().ok()??;
        Net::receive(self).ok()??;
        let (frame, line) = self.parts();
        Some((Received(frame?), Room { line, place }))
    }

    fn transmit(&mut self, _timestamp: Instant) -> Option<Room<'_, H, T, N>> {
        let line = self.parts().1;
        let place = line.room().ok()??;
        Some(Room { line, place })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.max_frame();
        capabilities
    }
}
