//! The process of a vault: started or connected to, watched, ended.

use super::connection::{Connection, GREET};
use super::credentials::{self, Peer};
use super::page::Pages;
use super::protocol::Report;
use super::socket::{self, Descriptors, Received};
use super::{DEADLINE, MARK, NAME, Program};
use crate::Error;
use crate::local::Backing;
use crate::trust::{Start, is_closed};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_passcred, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect as connect_socket, socket_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io::{self, ErrorKind};
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// A vault that was started. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Vault {
    connection: Arc<Connection>,
    watcher: Option<JoinHandle<()>>,
}

/// Starts the process; the socket is its standard input.
fn start(program: &Path, device: &Path) -> Result<(Child, OwnedFd), Error> {
    let (ours, theirs) = socket::pair().map_err(Error::vault("make a socket"))?;
    let mut command = Command::new(program);
    // An absolute path, for the vault leaves its directory.
    command.arg0(NAME).arg(std::path::absolute(device).map_err(Error::vault("find the device"))?);
    command.env_clear().env(MARK, "1");
    // A program whose libraries are found by it could not start without.
    command.envs(std::env::var_os("LD_LIBRARY_PATH").map(|path| ("LD_LIBRARY_PATH", path)));
    command.stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null());
    // What a terminal sends to the VMM is not for the vault.
    command.process_group(0);
    let child = command.spawn().map_err(Error::vault("start its process"))?;
    Ok((child, ours))
}

/// Connects to what starts vaults at `path`; the result is a vault that is about to greet.
fn connect(path: &Path, deadline: Duration) -> Result<OwnedFd, Error> {
    let connect = || -> io::Result<OwnedFd> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // Its greeting is to say who it is.
        set_socket_passcred(&socket, true)?;
        set_socket_timeout(&socket, Timeout::Send, Some(deadline))?;
        connect_socket(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket)
    };
    connect().map_err(|source| Error::VaultSocket { path: path.to_owned(), source })
}

/// The process that has started to serve this connection, by its greeting, which stays to be read.
fn identify(socket: &OwnedFd, path: &Path, deadline: Duration) -> Result<Peer, Error> {
    if !socket::await_readable(socket, deadline).map_err(Error::vault("wait for its greeting"))? {
        return Err(Error::VaultOverdue { operation: GREET, waited: deadline });
    }
    let peer = credentials::of_next_message(socket.as_fd()).map_err(Error::vault("say who it is"))?;
    let closed = || io::Error::other("the connection was closed before a vault greeted: is this user given vaults?");
    let peer = peer.ok_or_else(|| Error::VaultSocket { path: path.to_owned(), source: closed() })?;
    set_socket_passcred(socket, false).map_err(Error::vault("use its socket"))?;
    Ok(peer)
}

/// Has a vault started for a moment, if something else starts them, and learns who it is.
pub(crate) fn try_out(program: &mut Program) -> Result<Option<Start>, Error> {
    let Program::Apart { path, uid } = program else { return Ok(None) };
    let socket = connect(path, DEADLINE)?;
    let peer = identify(&socket, path, DEADLINE)?;
    // The greeting tells whether it can be a vault here at all.
    greeting(&socket)?;
    *uid = Some(peer.uid);
    Ok(Some(Start::Apart { uid: peer.uid, closed: is_closed(peer.pid) }))
}

/// Reads the greeting of a vault that has just started.
fn greeting(socket: &OwnedFd) -> Result<(), Error> {
    let received = socket::receive(socket, Descriptors::None).map_err(Error::vault("hear from it"))?;
    let Received { message, text, .. } =
        received.ok_or_else(|| Error::VaultDied { status: "it has closed its socket".into() })?;
    match Report::decode(&message, &text) {
        Ok(Report::Done) if message.sequence == 0 => Ok(()),
        Ok(Report::Failed(reason)) if message.sequence == 0 => Err(Error::VaultRefused { reason }),
        _ => Err(Error::VaultProtocol { what: "its greeting is none" }),
    }
}

/// Waits until the vault at the other end of this connection is gone, or the connection is shut down.
fn await_hangup(socket: BorrowedFd<'_>) -> String {
    loop {
        // Hanging up is reported whatever is waited for.
        match poll(&mut [PollFd::new(&socket, PollFlags::empty())], None) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return "its connection is closed".into(),
            Err(error) => return format!("its connection cannot be watched: {error}"),
        }
    }
}

impl Vault {
    pub(super) fn new(
        program: &Program,
        device: &Path,
        vcpus: u32,
        pages: &Backing,
        deadline: Duration,
    ) -> Result<Self, Error> {
        let pages = Pages::map(pages, vcpus)?;
        let (process, socket, wait): (_, _, Box<dyn FnOnce() -> String + Send>) = match program {
            Program::Apart { path, uid } => {
                let socket = connect(path, deadline)?;
                let peer = identify(&socket, path, deadline)?;
                if uid.is_some_and(|known| known != peer.uid) {
                    let source = io::Error::other("the vault is of another user than when the platform was opened");
                    return Err(Error::VaultSocket { path: path.clone(), source });
                }
                let watched = socket.try_clone().map_err(Error::vault("copy its socket"))?;
                (None, socket, Box::new(move || await_hangup(watched.as_fd())))
            }
            Program::This | Program::Other(_) => {
                let path = program.path().ok_or(io::Error::from(ErrorKind::NotFound));
                let (mut child, socket) = start(path.map_err(Error::vault("find its program"))?, device)?;
                let process = Pid::from_raw(child.id() as i32).ok_or(io::Error::from(ErrorKind::NotFound));
                let process = process.and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
                let process = process.inspect_err(|_| drop(child.kill().and_then(|()| child.wait())));
                let process = process.map_err(Error::vault("get hold of its process"))?;
                let wait = move || child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
                (Some(process), socket, Box::new(wait))
            }
        };
        let connection = Arc::new(Connection::new(socket, process, pages, deadline));
        let watched = Arc::clone(&connection);
        let watcher = std::thread::Builder::new().name("vault-watcher".into()).spawn(move || watched.has_ended(wait()));
        let watcher = watcher.inspect_err(|_| connection.end_unwatched());
        let watcher = watcher.map_err(Error::vault("start a thread that watches it"))?;
        let vault = Self { connection, watcher: Some(watcher) };
        vault.await_greeting()?;
        Ok(vault)
    }
}

impl Deref for Vault {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for Vault {
    fn drop(&mut self) {
        self.end();
        // A process that does not end even so, as in a system call that never returns, is left to the watcher.
        let watcher = self.watcher.take();
        if let Some(watcher) = watcher.filter(|_| self.await_end().is_some()) {
            // It has panicked at worst, and then the process is dead all the same.
            let _ = watcher.join();
        }
    }
}
