//! A virtio network card, whose other end is in the VMM.

use crate::virtio::Registers;
use cvm::SharedMemory;
use std::io::{Read, Write};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, virtio_net_hdr_v1};

/// What precedes each frame (virtio 1.2, section 5.1.6): all zero, but for how many buffers a frame takes.
const HEADER_LEN: usize = size_of::<virtio_net_hdr_v1>();
const HEADER: [u8; HEADER_LEN] = {
    let mut header = [0; HEADER_LEN];
    header[HEADER_LEN - 2] = 1;
    header
};

const RECEIVE: usize = 0;
const SEND: usize = 1;

/// Who answers at the other end.
pub trait Responder {
    /// Takes a frame of the guest's.
    fn take(&mut self, frame: &[u8]);

    /// Replaces `frame` by the next one for the guest, if there is one.
    fn give(&mut self, frame: &mut Vec<u8>) -> bool;
}

/// The device.
pub struct NetDevice<R> {
    registers: Registers<2>,
    mac: [u8; 6],
    max_frame: usize,
    /// Room for what the guest sends.
    sent: Box<[u8]>,
    /// The next frame for the guest, and whether there is one: known before there is a buffer for it.
    next: (Vec<u8>, bool),
    /// How many frames of the guest's were too long or not in shared memory, and how many for it had no room.
    refused: u64,
    /// The other end.
    pub responder: R,
}

impl<R: Responder> NetDevice<R> {
    /// A card with this address, and frames of at most `max_frame` bytes.
    pub fn new(mac: [u8; 6], max_frame: usize, responder: R) -> Self {
        Self {
            registers: Registers::new(VIRTIO_ID_NET, 1 << VIRTIO_NET_F_MAC),
            mac,
            max_frame,
            sent: vec![0; HEADER_LEN + max_frame].into(),
            next: (Vec::with_capacity(max_frame), false),
            refused: 0,
            responder,
        }
    }

    /// How many frames were refused.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// What the guest reads from the register at `offset`.
    pub fn read(&self, offset: u16) -> u32 {
        self.registers.read(offset, &self.mac)
    }

    /// What the guest writes to the register at `offset`.
    pub fn write(&mut self, offset: u16, value: u32, memory: &SharedMemory) {
        if self.registers.write(offset, value) {
            self.serve(memory);
        }
    }

    /// Takes what the guest sends, and gives it what there is. Returns how many frames that were.
    pub fn serve(&mut self, memory: &SharedMemory) -> usize {
        if !self.registers.ready(SEND) || !self.registers.ready(RECEIVE) {
            return 0;
        }
        let Self { registers, sent, next, refused, responder, max_frame, .. } = self;
        let taken = registers.serve(SEND, memory, |chain, memory| {
            let frame = chain.reader(memory).ok().and_then(|mut reader| {
                let len = reader.available_bytes();
                let bytes = sent.get_mut(..len)?;
                reader.read_exact(bytes).ok()?;
                bytes.get(HEADER_LEN..)
            });
            match frame {
                Some(frame) => responder.take(frame),
                None => *refused += 1,
            }
            Ok(Some(0))
        });
        let (frame, there) = next;
        *there = *there || responder.give(frame);
        let given = registers.serve(RECEIVE, memory, |chain, memory| {
            if !*there {
                return Ok(None);
            }
            frame.truncate(*max_frame);
            let len = HEADER_LEN + frame.len();
            let written = chain.writer(memory).ok().filter(|writer| writer.available_bytes() >= len);
            let written = written.and_then(|mut writer| {
                writer.write_all(&HEADER).ok()?;
                writer.write_all(frame).ok()
            });
            *refused += u64::from(written.is_none());
            *there = responder.give(frame);
            Ok(Some(if written.is_some() { len as u32 } else { 0 }))
        });
        taken + given
    }

    /// As [`Registers::listen`]. Of buffers for frames the device need only know while a frame waits for one.
    pub fn listen(&mut self, on: bool, memory: &SharedMemory) {
        self.registers.listen(SEND, on, memory);
        self.registers.listen(RECEIVE, on && self.next.1, memory);
    }
}
