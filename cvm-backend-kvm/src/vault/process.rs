//! The process of a vault, as its VMM finds it: started or connected to, asked, watched, ended.

use super::credentials::{self, Peer};
use super::page::{Asking, NoReply, Page, Pages};
use super::protocol::{Malformed, Message, Order, Reply, Report, Request};
use super::socket::{self, Received};
use super::{MARK, NAME, Program};
use crate::local::Backing;
use crate::trust::{Start, is_closed};
use crate::{Error, lock};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_passcred, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect as connect_socket, shutdown,
    socket_with,
};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long a vault may take to say that it is there, where processors are emulated and files come over a network.
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// How this process has hold of a vault.
#[derive(Debug)]
enum Hold {
    /// It is a child, which this process can kill.
    Child(OwnedFd),
    /// Something else has started it: it ends when this connection is shut down.
    Apart(OwnedFd),
}

/// The socket with the number of the last order.
#[derive(Debug)]
struct Orders {
    socket: OwnedFd,
    last: u32,
}

/// A vault that was started.
#[derive(Debug)]
pub(super) struct Vault {
    orders: Mutex<Orders>,
    hold: Hold,
    /// What came of it.
    end: Arc<OnceLock<String>>,
    watcher: Option<JoinHandle<()>>,
    pub(super) pages: Arc<Pages>,
    asking: Vec<Mutex<Asking>>,
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
fn connect(path: &Path) -> Result<OwnedFd, Error> {
    let connect = || -> io::Result<OwnedFd> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // Its greeting is to say who it is.
        set_socket_passcred(&socket, true)?;
        set_socket_timeout(&socket, Timeout::Send, Some(Duration::from_secs(PATIENCE.tv_sec.unsigned_abs())))?;
        connect_socket(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket)
    };
    connect().map_err(|source| Error::VaultSocket { path: path.to_owned(), source })
}

/// Waits until there is a greeting, or until there cannot be one any more.
fn await_message(socket: BorrowedFd<'_>) -> Result<(), Error> {
    loop {
        match poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&PATIENCE)) {
            Ok(0) => {
                let what = "it did not answer: does main begin with cvm::kvm::vault::init()?";
                return Err(Error::VaultProtocol { what });
            }
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(Error::vault("wait for it")(error)),
        }
    }
}

/// The process that has started to serve this connection, by its greeting, which stays to be read.
fn identify(socket: &OwnedFd, path: &Path) -> Result<Peer, Error> {
    await_message(socket.as_fd())?;
    let peer = credentials::of_next_message(socket.as_fd()).map_err(Error::vault("say who it is"))?;
    let closed = || io::Error::other("the connection was closed before a vault greeted: is this user given vaults?");
    let peer = peer.ok_or_else(|| Error::VaultSocket { path: path.to_owned(), source: closed() })?;
    set_socket_passcred(socket, false).map_err(Error::vault("use its socket"))?;
    Ok(peer)
}

/// Has a vault started for a moment, if something else starts them, and learns who it is.
pub(crate) fn try_out(program: &mut Program) -> Result<Option<Start>, Error> {
    let Program::Apart { path, uid } = program else { return Ok(None) };
    let socket = connect(path)?;
    let peer = identify(&socket, path)?;
    // The greeting tells whether it can be a vault here at all.
    greeting(&socket)?;
    *uid = Some(peer.uid);
    Ok(Some(Start::Apart { uid: peer.uid, closed: is_closed(peer.pid) }))
}

/// Reads the greeting of a vault that has just started.
fn greeting(socket: &OwnedFd) -> Result<(), Error> {
    let received = socket::receive(socket, RecvFlags::empty()).map_err(Error::vault("hear from it"))?;
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
    pub(super) fn new(program: &Program, device: &Path, vcpus: u32, pages: &Backing) -> Result<Self, Error> {
        let pages = Arc::new(Pages::map(pages, vcpus)?);
        let (hold, socket, wait): (_, _, Box<dyn FnOnce() -> String + Send>) = match program {
            Program::Apart { path, uid } => {
                let socket = connect(path)?;
                let peer = identify(&socket, path)?;
                if uid.is_some_and(|known| known != peer.uid) {
                    let source = io::Error::other("the vault is of another user than when the platform was opened");
                    return Err(Error::VaultSocket { path: path.clone(), source });
                }
                let [held, watched] = [socket.try_clone(), socket.try_clone()];
                let held = held.map_err(Error::vault("copy its socket"))?;
                let watched = watched.map_err(Error::vault("copy its socket"))?;
                (Hold::Apart(held), socket, Box::new(move || await_hangup(watched.as_fd())))
            }
            Program::This | Program::Other(_) => {
                let path = program.path().ok_or(io::Error::from(ErrorKind::NotFound));
                let (mut child, socket) = start(path.map_err(Error::vault("find its program"))?, device)?;
                let process = Pid::from_raw(child.id() as i32).ok_or(io::Error::from(ErrorKind::NotFound));
                let process = process.and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
                let process = process.inspect_err(|_| drop(child.kill().and_then(|()| child.wait())));
                let process = process.map_err(Error::vault("get hold of its process"))?;
                let wait = move || child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
                (Hold::Child(process), socket, Box::new(wait))
            }
        };
        let end = Arc::<OnceLock<String>>::default();
        let watcher = {
            let (end, pages) = (Arc::clone(&end), Arc::clone(&pages));
            std::thread::Builder::new().name("vault-watcher".into()).spawn(move || {
                let _ = end.set(wait());
                (0..pages.count()).for_each(|index| pages.page(index).bury());
            })
        };
        let mut vault = Self {
            orders: Mutex::new(Orders { socket, last: 0 }),
            hold,
            end,
            watcher: None,
            asking: (0..vcpus).map(|_| Mutex::default()).collect(),
            pages,
        };
        vault.watcher = Some(watcher.map_err(Error::vault("start a thread that watches it"))?);
        vault.await_greeting()?;
        Ok(vault)
    }

    fn await_greeting(&self) -> Result<(), Error> {
        let orders = lock(&self.orders);
        await_message(orders.socket.as_fd())?;
        match self.receive(&orders, 0)? {
            (Report::Done, _) => Ok(()),
            (Report::Failed(reason), _) => Err(Error::VaultRefused { reason }),
            _ => Err(Error::VaultProtocol { what: "its greeting is none" }),
        }
    }

    /// What is to be said of a vault that does not answer.
    fn dead(&self) -> Error {
        // It closes its socket before it is done with dying; what is no vault may close it and live on.
        self.kill();
        let status = self.end.wait().clone();
        Error::VaultDied { status }
    }

    fn receive(&self, orders: &Orders, sequence: u32) -> Result<(Report, Vec<OwnedFd>), Error> {
        let received = match socket::receive(&orders.socket, RecvFlags::empty()) {
            Ok(Some(received)) => received,
            Ok(None) => return Err(self.dead()),
            Err(source) => return Err(Error::vault("hear from it")(source)),
        };
        let Received { message, text, descriptors } = received;
        if message.sequence != sequence {
            return Err(self.disown("its report is out of order"));
        }
        let report = Report::decode(&message, &text).map_err(|_| self.disown("its report is malformed"))?;
        Ok((report, descriptors))
    }

    /// Gives an order, and waits for the report.
    pub(super) fn order(&self, order: &Order, descriptors: &[BorrowedFd<'_>]) -> Result<(Report, Vec<OwnedFd>), Error> {
        let mut orders = lock(&self.orders);
        orders.last = orders.last.wrapping_add(1);
        match socket::send(&orders.socket, orders.last, order.encode(), descriptors) {
            Ok(()) => {}
            Err(error) if [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&error.kind()) => {
                return Err(self.dead());
            }
            Err(source) => return Err(Error::vault("order something")(source)),
        }
        match self.receive(&orders, orders.last)? {
            (Report::Failed(reason), _) => Err(Error::VaultRefused { reason }),
            answer => Ok(answer),
        }
    }

    /// Gives an order that has no result.
    pub(super) fn order_done(&self, order: &Order) -> Result<(), Error> {
        match self.order(order, &[])? {
            (Report::Done, _) => Ok(()),
            _ => Err(self.unfit_report()),
        }
    }

    pub(super) fn page(&self, vcpu: u32) -> Page<'_> {
        self.pages.page(vcpu)
    }

    /// Asks on the page of `vcpu`, and waits for the answer.
    pub(super) fn ask(&self, vcpu: u32, request: &Request) -> Result<Reply, Error> {
        let asking = self.asking.get(vcpu as usize);
        let asking = asking.ok_or(Error::VaultRefused { reason: "there is no such vcpu".into() })?;
        let answered: Result<(Message, Vec<u8>), _> =
            lock(asking).ask(self.page(vcpu), request.encode(), !matches!(request, Request::Run(_)));
        match answered {
            Ok((message, text)) => match Reply::decode(vcpu, &message, &text) {
                Ok(Reply::Refused(reason)) => Err(Error::VaultRefused { reason }),
                Ok(reply) => Ok(reply),
                Err(Malformed { .. }) => Err(self.disown("its reply is malformed")),
            },
            Err(NoReply::Dead) => Err(self.dead()),
            Err(NoReply::OutOfOrder) => Err(self.disown("its reply is out of order")),
        }
    }

    /// Ends the vault: at once if it is a child, and else as soon as it notices.
    fn kill(&self) {
        // Both fail if the vault is dead already.
        let _ = match &self.hold {
            Hold::Child(process) => pidfd_send_signal(process, Signal::KILL),
            Hold::Apart(socket) => shutdown(socket, Shutdown::Both),
        };
    }

    /// Kills a vault that does not keep to the protocol: it cannot be what was started.
    pub(super) fn disown(&self, what: &'static str) -> Error {
        self.kill();
        Error::VaultProtocol { what }
    }

    /// Kills one that reports on another order than it was given.
    pub(super) fn unfit_report(&self) -> Error {
        self.disown("its report does not fit the order")
    }

    /// Kills one that replies to another request than there was.
    pub(super) fn unfit_reply(&self) -> Error {
        self.disown("its reply does not fit the request")
    }
}

impl Drop for Vault {
    fn drop(&mut self) {
        self.kill();
        match self.watcher.take() {
            // It has panicked at worst, and then the process is dead all the same.
            Some(watcher) => drop(watcher.join()),
            // There was no thread to be had: nobody else waits for the process.
            None => match &self.hold {
                Hold::Child(process) => drop(waitid(WaitId::PidFd(process.as_fd()), WaitIdOptions::EXITED)),
                Hold::Apart(_) => {}
            },
        }
    }
}
