//! The socket between a VMM and its vault: whole messages, some with descriptors.

use super::protocol::{Encoded, MOST_TEXT, Message};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use zerocopy::{FromBytes, IntoBytes};

/// The most descriptors that come with a message.
pub(super) const MOST_DESCRIPTORS: usize = 2;

/// A message with what came along.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) message: Message,
    pub(super) text: Vec<u8>,
    pub(super) descriptors: Vec<OwnedFd>,
}

/// Both ends of a new socket.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Sends a message. It never waits: who does not fetch what was sent to him is not sent more.
pub(super) fn send(
    socket: impl AsFd,
    sequence: u32,
    (mut message, text): Encoded,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    message.sequence = sequence;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let parts = [IoSlice::new(message.as_bytes()), IoSlice::new(text.as_bytes())];
    sendmsg(socket, &parts, &mut ancillary, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives a message, waiting for it unless `flags` say otherwise; nothing when the other end is gone.
pub(super) fn receive(socket: impl AsFd, flags: RecvFlags) -> io::Result<Option<Received>> {
    let mut bytes = [0; size_of::<Message>() + MOST_TEXT];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let (received, flags, descriptors) = loop {
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match recvmsg(&socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC | flags) {
            Ok(received) => {
                let mut descriptors = Vec::new();
                for message in ancillary.drain() {
                    if let RecvAncillaryMessage::ScmRights(rights) = message {
                        descriptors.extend(rights);
                    }
                }
                break (received.bytes, received.flags, descriptors);
            }
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    };
    if received == 0 {
        return Ok(None);
    }
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "a message of the wrong size");
    let (message, text) = Message::read_from_prefix(&bytes[..received]).map_err(|_| malformed())?;
    if flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) || text.len() != usize::from(message.text) {
        return Err(malformed());
    }
    Ok(Some(Received { message, text: text.to_vec(), descriptors }))
}
