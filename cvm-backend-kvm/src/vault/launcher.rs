//! The launcher: starts a vault for each VMM that connects to a socket, as a user that VMMs are not.

use super::{MARK, NAME, credentials};
use crate::Error;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen as start_listening, socket_with,
};
use rustix::process::{DumpableBehavior, geteuid, set_dumpable_behavior, umask};
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

/// How many VMMs may wait for their vaults.
const BACKLOG: i32 = 64;

/// How long the launcher pauses when the host has no descriptor or memory left for a connection.
const PAUSE: Duration = Duration::from_millis(100);

/// A launcher of vaults that VMMs reach by a socket, see [`use_socket`](super::use_socket).
#[derive(Debug, Clone)]
pub struct Launcher {
    /// Where the socket is made.
    pub socket: PathBuf,
    /// The KVM device of the vaults.
    pub device: PathBuf,
    /// The users whose VMMs get vaults.
    pub users: Vec<u32>,
    /// How many vaults there may be at a time.
    pub most: usize,
}

impl Launcher {
    /// Listens, and starts this program again as a vault for each VMM that connects: its `main` must begin with
    /// [`init`](super::init). The vaults share nothing with each other, and outlive the launcher.
    ///
    /// A connection from another user, or one too many, is closed without a word.
    ///
    /// # Errors
    /// [`Error::Vault`] when the socket cannot be made or listened on, or when this process is root.
    pub fn run(&self) -> Result<Infallible, Error> {
        if geteuid().is_root() {
            let source = io::Error::other("the launcher is root: start it as a user of its own");
            return Err(Error::vault("listen")(source));
        }
        set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(Error::vault("refuse to be dumped"))?;
        // Each vault is started in another directory.
        let device = std::path::absolute(&self.device).map_err(Error::vault("find the device"))?;
        let listener = self.listen().map_err(Error::vault("listen"))?;
        let mut vaults: Vec<Child> = Vec::new();
        loop {
            let connection = match accept_with(&listener, SocketFlags::CLOEXEC) {
                Ok(connection) => connection,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    thread::sleep(PAUSE);
                    continue;
                }
                Err(error) => return Err(Error::vault("take a connection")(error)),
            };
            vaults.retain_mut(|vault| matches!(vault.try_wait(), Ok(None)));
            let peer = credentials::of_connector(connection.as_fd());
            if peer.is_ok_and(|peer| self.users.contains(&peer.uid)) && vaults.len() < self.most {
                // A VMM whose vault does not start sees its connection closed.
                vaults.extend(start(&device, connection));
            }
        }
    }

    fn listen(&self) -> io::Result<OwnedFd> {
        let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // The kernel tells who connects, so the file need not say it. It has this mode from the start: whoever can write to the
        // directory could put another file of this user's in its place before a change of its mode.
        let mask = umask(Mode::XUSR | Mode::XGRP | Mode::XOTH);
        let bound = SocketAddrUnix::new(&self.socket).and_then(|address| bind(&listener, &address));
        umask(mask);
        bound?;
        start_listening(&listener, BACKLOG)?;
        Ok(listener)
    }
}

fn start(device: &Path, connection: OwnedFd) -> io::Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(NAME).arg(device).env_clear().env(MARK, "1");
    command.stdin(connection).stdout(Stdio::null()).stderr(Stdio::null());
    // What a terminal sends to the launcher is not for the vaults.
    command.process_group(0);
    command.spawn()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::stat;

    #[test]
    fn every_user_may_connect_to_the_socket_as_it_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let launcher = Launcher { socket: socket.clone(), device: PathBuf::new(), users: Vec::new(), most: 0 };
        let mask = umask(Mode::from_raw_mode(0o077));
        let listener = launcher.listen();
        let kept = umask(mask);
        listener.unwrap();
        assert_eq!(Mode::from_raw_mode(stat(&socket).unwrap().st_mode), Mode::from_raw_mode(0o666));
        assert_eq!(kept, Mode::from_raw_mode(0o077));
    }
}
