//! A network card, with several frames in flight both ways.

#![allow(unsafe_code, reason = "the driver is lent buffers, which it must be given again when the device is done")]

use super::{DeviceQueue, QueueHal};
use core::marker::PhantomData;
use core::ops::Range;
use core::ptr::NonNull;
use cvm_core::Gpa;
use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::transport::Transport;
use virtio_drivers::{BufferDirection, Error, Hal, PhysAddr, Result};

/// What precedes each frame in its buffer, in bytes (virtio 1.2, section 5.1.6).
pub const HEADER_LEN: usize = 12;

/// The shortest buffer that the driver receives into.
const MIN_BUFFER: usize = 1526;

/// A [`Hal`] that copies no more of a received frame than there is.
///
/// The driver gives a buffer back before it says how long the frame is. So what [`Hal::unshare`] would copy waits for
/// [`FrameHal::take`].
pub trait FrameHal: Hal {
    /// Makes the first `len` bytes of `buffer` those that the device wrote.
    ///
    /// # Safety
    /// The buffer must have been unshared since it was shared, and not been touched since.
    ///
    /// # Errors
    /// [`Error::IoError`] if that is more than the buffer has: the length is the device's word.
    unsafe fn take(buffer: &mut [u8], len: usize) -> Result;
}

/// [`QueueHal`], as a [`FrameHal`].
///
/// In between, the private buffer holds the address of the frame in the pool; so the buffers must have room for one.
#[derive(Debug)]
pub struct QueueFrames<Q>(PhantomData<Q>);

// SAFETY: `QueueHal` keeps the rules. That a slot of the pool is given back later does not break any.
unsafe impl<Q: DeviceQueue> Hal for QueueFrames<Q> {
    fn dma_alloc(pages: usize, direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        QueueHal::<Q>::dma_alloc(pages, direction)
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, vaddr: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: passed on from the caller.
        unsafe { QueueHal::<Q>::dma_dealloc(paddr, vaddr, pages) }
    }

    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, size: usize) -> NonNull<u8> {
        // SAFETY: passed on from the caller.
        unsafe { QueueHal::<Q>::mmio_phys_to_virt(paddr, size) }
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        // SAFETY: passed on from the caller.
        unsafe { QueueHal::<Q>::share(buffer, direction) }
    }

    unsafe fn unshare(paddr: PhysAddr, mut buffer: NonNull<[u8]>, direction: BufferDirection) {
        if direction == BufferDirection::DriverToDevice {
            // SAFETY: passed on from the caller.
            return unsafe { QueueHal::<Q>::unshare(paddr, buffer, direction) };
        }
        // SAFETY: the caller promises a valid buffer that nobody else accesses during the call.
        if let Some(note) = unsafe { buffer.as_mut() }.first_chunk_mut() {
            *note = paddr.to_ne_bytes();
        }
    }
}

impl<Q: DeviceQueue> FrameHal for QueueFrames<Q> {
    unsafe fn take(buffer: &mut [u8], len: usize) -> Result {
        let gpa = Gpa(PhysAddr::from_ne_bytes(*buffer.first_chunk().ok_or(Error::InvalidParam)?));
        Q::with(|queue| {
            // The pool was exhausted when this buffer was lent if it has no slot: the device got no address.
            let slot = queue.find(gpa, buffer.len()).ok_or(Error::DmaError)?;
            // The slot was made as long as the buffer is, so this is where the device's word is checked.
            queue.receive(slot, len, buffer).map_err(|_| Error::IoError)
        })
    }
}

/// A buffer, and how many bytes of it the driver was lent.
type Buffer = (&'static mut [u8], usize);

/// A network card with `N` buffers for frames to come, and `N` for frames to go.
///
/// A device that breaks the protocol, by a length or a token that cannot be, is not used any more: every call returns
/// the first error then.
pub struct Net<H: FrameHal, T: Transport, const N: usize> {
    /// The frame that is looked at: its buffer, and where it is in there.
    held: Option<(&'static mut [u8], Range<usize>)>,
    line: Line<H, T, N>,
}

/// All of a network card but the frame that is looked at.
pub(super) struct Line<H: FrameHal, T: Transport, const N: usize> {
    driver: VirtIONetRaw<H, T, N>,
    /// The buffers that the device has, by token.
    receiving: [Option<&'static mut [u8]>; N],
    sending: [Option<Buffer>; N],
    /// Those to send with that it does not have.
    idle: [Option<&'static mut [u8]>; N],
    max_frame: usize,
    broken: Option<Error>,
}

impl<H: FrameHal, T: Transport, const N: usize> Net<H, T, N> {
    /// The network card behind `transport`. Every buffer must have [`HEADER_LEN`] bytes more than the longest frame, and
    /// those to receive into 1526 at least. Without bounce buffers they must be where the device can reach them.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] for buffers that are too short, and those of the driver.
    pub fn new(transport: T, receive: [&'static mut [u8]; N], send: [&'static mut [u8]; N]) -> Result<Self> {
        let shortest = receive.iter().chain(&send).map(|buffer| buffer.len()).min().unwrap_or(0);
        if shortest < MIN_BUFFER {
            return Err(Error::InvalidParam);
        }
        let mut line = Line {
            driver: VirtIONetRaw::new(transport)?,
            receiving: [const { None }; N],
            sending: [const { None }; N],
            idle: send.map(Some),
            max_frame: shortest - HEADER_LEN,
            broken: None,
        };
        for buffer in receive {
            line.lend(buffer)?;
        }
        Ok(Self { held: None, line })
    }

    /// The card's Ethernet address, as the device tells.
    pub fn mac_address(&self) -> [u8; 6] {
        self.line.driver.mac_address()
    }

    /// Why the device is not used any more.
    pub fn broken(&self) -> Option<Error> {
        self.line.broken
    }

    /// The longest frame that can be sent and received.
    pub fn max_frame(&self) -> usize {
        self.line.max_frame
    }

    /// The next frame that has come, if any: the caller's until the next call. With bounce buffers it is a copy, which
    /// the host cannot change any more.
    ///
    /// # Errors
    /// If the device broke the protocol.
    pub fn receive(&mut self) -> Result<Option<&[u8]>> {
        if let Some((buffer, _)) = self.held.take() {
            self.line.lend(buffer)?;
        }
        self.held = self.line.pop()?;
        Ok(self.received())
    }

    /// The frame that [`Net::receive`] returned last.
    pub fn received(&self) -> Option<&[u8]> {
        self.held.as_ref().and_then(|(buffer, place)| buffer.get(place.clone()))
    }

    /// Sends a frame of `len` bytes, which `fill` writes: its buffer has whatever an earlier frame left there.
    ///
    /// # Errors
    /// [`Error::NotReady`] if all buffers are on their way, [`Error::InvalidParam`] for a frame that is too long, and if
    /// the device broke the protocol.
    pub fn send(&mut self, len: usize, fill: impl FnOnce(&mut [u8])) -> Result {
        if len > self.line.max_frame {
            return Err(Error::InvalidParam);
        }
        let place = self.line.room()?.ok_or(Error::NotReady)?;
        self.line.send(place, len, fill);
        self.line.check()
    }

    /// Whether the device has sent all that it was given, after a look.
    ///
    /// # Errors
    /// If the device broke the protocol.
    pub fn all_sent(&mut self) -> Result<bool> {
        self.line.room()?;
        Ok(self.line.idle.iter().all(Option::is_some))
    }

    /// The buffers to send with that the device does not have, without room for the header: for a frame of which little
    /// changes, to prepare.
    pub fn idle(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.line.idle.iter_mut().flatten().map(|buffer| &mut buffer[HEADER_LEN..])
    }

    /// The frame that was received, and what there is to send with.
    #[cfg(feature = "smoltcp")]
    pub(super) fn parts(&mut self) -> (Option<&[u8]>, &mut Line<H, T, N>) {
        (self.held.as_ref().and_then(|(buffer, place)| buffer.get(place.clone())), &mut self.line)
    }
}

impl<H: FrameHal, T: Transport, const N: usize> Line<H, T, N> {
    fn breaks<R>(&mut self, error: Error) -> Result<R> {
        Err(*self.broken.get_or_insert(error))
    }

    fn check(&self) -> Result {
        self.broken.map_or(Ok(()), Err)
    }

    /// Lends a buffer to the device.
    fn lend(&mut self, buffer: &'static mut [u8]) -> Result {
        self.check()?;
        // SAFETY: the buffer is kept, untouched, until the token comes back.
        let token = match unsafe { self.driver.receive_begin(buffer) } {
            Ok(token) => token,
            Err(error) => return self.breaks(error),
        };
        match self.receiving.get_mut(usize::from(token)) {
            Some(place @ None) => {
                *place = Some(buffer);
                Ok(())
            }
            // The driver's bookkeeping is private, so this cannot be.
            _ => self.breaks(Error::WrongToken),
        }
    }

    /// The next frame that has come.
    fn pop(&mut self) -> Result<Option<(&'static mut [u8], Range<usize>)>> {
        self.check()?;
        let Some(token) = self.driver.poll_receive() else { return Ok(None) };
        let Some(buffer) = self.receiving.get_mut(usize::from(token)).and_then(Option::take) else {
            return self.breaks(Error::WrongToken);
        };
        // SAFETY: this is the buffer that the token was returned for.
        let frame = match unsafe { self.driver.receive_complete(token, buffer) } {
            // SAFETY: the driver has unshared it.
            Ok((header, len)) => unsafe { H::take(buffer, header.saturating_add(len)) }.map(|()| header..header + len),
            // The driver has done so too if the device has written less than a header.
            // SAFETY: as above.
            Err(Error::IoError) => unsafe { H::take(buffer, 0) }.and(Err(Error::IoError)),
            Err(error) => Err(error),
        };
        match frame {
            Ok(frame) => Ok(Some((buffer, frame))),
            Err(error) => self.breaks(error),
        }
    }

    /// Where there is a buffer to send with, after a look at what the device has sent.
    pub(super) fn room(&mut self) -> Result<Option<usize>> {
        self.check()?;
        while let Some(token) = self.driver.poll_transmit() {
            let sent = self.sending.get_mut(usize::from(token)).and_then(Option::take);
            let (Some((buffer, len)), Some(place)) = (sent, self.idle.iter_mut().find(|place| place.is_none())) else {
                return self.breaks(Error::WrongToken);
            };
            // SAFETY: this is what the token was returned for.
            if let Err(error) = unsafe { self.driver.transmit_complete(token, &buffer[..len]) } {
                return self.breaks(error);
            }
            *place = Some(buffer);
        }
        Ok(self.idle.iter().position(Option::is_some))
    }

    /// Sends what `fill` writes with the buffer that [`Line::room`] has found. A frame that is too long is none, and
    /// nothing is sent.
    pub(super) fn send<R>(&mut self, place: usize, len: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let Some(buffer) = self.idle.get_mut(place).and_then(Option::take) else { return fill(&mut []) };
        let end = HEADER_LEN.saturating_add(len);
        let Some(frame) = buffer.get_mut(HEADER_LEN..end) else {
            self.idle[place] = Some(buffer);
            return fill(&mut []);
        };
        let result = fill(frame);
        buffer[..HEADER_LEN].fill(0);
        // SAFETY: the buffer is kept, untouched, until the token comes back.
        match unsafe { self.driver.transmit_begin(&buffer[..end]) } {
            Ok(token) if self.sending.get(usize::from(token)).is_some_and(Option::is_none) => {
                self.sending[usize::from(token)] = Some((buffer, end));
            }
            // The driver has room for as many frames as there are buffers, so this cannot be.
            Ok(_) => self.broken = Some(Error::WrongToken),
            Err(error) => self.broken = Some(error),
        }
        result
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
