//! The sockets between a VMM and its vault: one for whole messages, some with descriptors, and one for kicks.
//!
//! Descriptors cross in one direction only, to the vault. A VMM takes none: whatever a hostile vault hands over might block
//! the VMM that uses it, or even closes it.

use super::bell::Patience;
use super::protocol::{Encoded, MOST_TEXT, Message};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, send as send_bytes, sendmsg, socketpair,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

/// The most descriptors that come with a message.
pub(super) const MOST_DESCRIPTORS: usize = 3;

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

/// Both ends of a new socket for [kicks](signal).
pub(super) fn kick_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

/// Makes the other end of a socket for kicks readable. Unlike a write to an eventfd, whose flags the other end can change,
/// it never waits.
pub(super) fn signal(kicks: impl AsFd) {
    // It fails where so many kicks wait already that one more tells nothing new, and where the other end is gone.
    let _ = send_bytes(kicks, &[0], SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
}

/// Takes what was signalled, or the better part of it. An error says that there will be no more.
pub(super) fn take_signals(kicks: impl AsFd) -> io::Result<()> {
    let (mut bytes, mut none) = ([0; 256], RecvAncillaryBuffer::default());
    match recvmsg(kicks, &mut [IoSliceMut::new(&mut bytes)], &mut none, RecvFlags::DONTWAIT) {
        Ok(received) if received.bytes == 0 => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Sends a message. It never waits: a peer that does not fetch its messages gets no more.
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
    loop {
        match sendmsg(&socket, &parts, &mut ancillary, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            sent => return Ok(sent.map(drop)?),
        }
    }
}

/// Whether descriptors may come with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Descriptors {
    /// A message with some is malformed, and they are not even opened here.
    None,
    /// As many as [`MOST_DESCRIPTORS`].
    Some,
}

/// Waits until there is something to read or the other end is gone; false if neither comes in time.
pub(super) fn await_readable(socket: impl AsFd, limit: Duration) -> io::Result<bool> {
    let mut patience = Patience::new(limit);
    while let Ok(slice) = patience.slice(Instant::now()) {
        match poll(&mut [PollFd::new(&socket, PollFlags::IN)], Timespec::try_from(slice).ok().as_ref()) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(false)
}

/// Receives a message without waiting for it; nothing when the other end is gone.
pub(super) fn receive(socket: impl AsFd, descriptors: Descriptors) -> io::Result<Option<Received>> {
    let mut bytes = [0; size_of::<Message>() + MOST_TEXT];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let (received, flags, descriptors) = loop {
        let mut ancillary = match descriptors {
            Descriptors::None => RecvAncillaryBuffer::default(),
            Descriptors::Some => RecvAncillaryBuffer::new(&mut space),
        };
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match recvmsg(&socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT) {
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
