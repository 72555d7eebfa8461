//! The credentials that the kernel attaches to a socket and its messages.
//!
//! rustix has these calls, but not for a process that is unknown in this PID namespace: its number is 0 then, which rustix takes
//! for impossible.

#![allow(unsafe_code, reason = "credentials of a process in another PID namespace, for which there is no safe wrapper")]

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};

/// A process at the other end of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Peer {
    /// 0 if it has no number in this PID namespace.
    pub(super) pid: i32,
    pub(super) uid: u32,
}

impl From<libc::ucred> for Peer {
    fn from(credentials: libc::ucred) -> Self {
        Self { pid: credentials.pid, uid: credentials.uid }
    }
}

/// The process that has connected to a listening socket, as it was then.
pub(super) fn of_connector(socket: BorrowedFd<'_>) -> io::Result<Peer> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `credentials`, for which every value is valid (unix(7), SO_PEERCRED).
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    if len as usize != size_of::<libc::ucred>() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(credentials.into())
}

/// How many bytes of ancillary data credentials take.
// SAFETY: it computes a size from a size.
const CREDENTIALS_BYTES: usize = unsafe { libc::CMSG_SPACE(size_of::<libc::ucred>() as libc::c_uint) } as usize;

/// The process that has sent the next message, which stays where it is. `SO_PASSCRED` must have been set before it was sent;
/// nothing when there is no message to come.
pub(super) fn of_next_message(socket: BorrowedFd<'_>) -> io::Result<Option<Peer>> {
    // As much as the credentials take with their header, aligned as a header has to be, and no more: where there is room for
    // descriptors that come along, the kernel opens them in this process, which a peer must not bring about.
    let mut control = [0u64; CREDENTIALS_BYTES.div_ceil(size_of::<u64>())];
    let mut byte = 0u8;
    let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: all of a msghdr may be zero (recvmsg(2)).
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    (header.msg_iov, header.msg_iovlen) = (&raw mut part, 1);
    (header.msg_control, header.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control) as _);
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the kernel writes to `byte` and `control`, which live on, no more than the header says.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    if received < 0 {
        return Err(io::Error::last_os_error());
    }
    if received == 0 {
        return Ok(None);
    }
    // SAFETY: the header is as the kernel has left it, with `control` behind it.
    let first = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    // SAFETY: the result of CMSG_FIRSTHDR is null or points to a whole header in `control`, which is aligned for it.
    let Some(message) = (unsafe { first.as_ref() }) else { return Err(io::ErrorKind::InvalidData.into()) };
    let is_whole = message.cmsg_len >= size_of::<libc::cmsghdr>() + size_of::<libc::ucred>();
    // The kernel puts credentials before descriptors.
    if (message.cmsg_level, message.cmsg_type) != (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) || !is_whole {
        return Err(io::ErrorKind::InvalidData.into());
    }
    // SAFETY: by its length the message has credentials behind its header, for which every value is valid.
    let credentials = unsafe { libc::CMSG_DATA(first).cast::<libc::ucred>().read_unaligned() };
    Ok(Some(credentials.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vault::socket;
    use rustix::net::sockopt::set_socket_passcred;
    use rustix::net::{SendFlags, send};
    use std::os::fd::AsFd;

    #[test]
    fn a_message_has_the_credentials_of_its_sender_and_stays() {
        let (ours, theirs) = socket::pair().unwrap();
        set_socket_passcred(&ours, true).unwrap();
        assert_eq!(of_next_message(ours.as_fd()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        send(&theirs, b"greeting", SendFlags::NOSIGNAL).unwrap();
        let pid = std::process::id().cast_signed();
        let own = Peer { pid, uid: rustix::process::geteuid().as_raw() };
        for _ in 0..2 {
            assert_eq!(of_next_message(ours.as_fd()).unwrap(), Some(own));
        }
        assert_eq!(of_connector(ours.as_fd()).unwrap(), own);
        drop(theirs);
        let mut message = [0; 16];
        assert_eq!(rustix::net::recv(&ours, &mut message[..], rustix::net::RecvFlags::empty()).unwrap().0, 8);
        assert_eq!(of_next_message(ours.as_fd()).unwrap(), None);
    }

    #[test]
    fn no_descriptor_that_comes_along_is_opened() {
        let (ours, theirs) = socket::pair().unwrap();
        set_socket_passcred(&ours, true).unwrap();
        // A socket whose other end tells whether anybody still has it.
        let (watched, handed_over) = socket::kick_pair().unwrap();
        socket::send(&theirs, 0, Default::default(), &[handed_over.as_fd()]).unwrap();
        assert!(of_next_message(ours.as_fd()).unwrap().is_some());
        // The message is taken, and with it all that has the other end, unless this process was given it.
        drop((handed_over, theirs));
        socket::receive(&ours, socket::Descriptors::None).unwrap_err();
        assert_eq!(socket::take_signals(&watched).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_message_without_credentials_is_refused() {
        let (ours, theirs) = socket::pair().unwrap();
        send(&theirs, b"greeting", SendFlags::NOSIGNAL).unwrap();
        assert_eq!(of_next_message(ours.as_fd()).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
