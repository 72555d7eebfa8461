//! The VMM's end of a vault: orders, requests, and what every handle says once there is no vault any more.
//!
//! No wait for the vault is without a deadline. A vault that misses one, or breaks the protocol, is given up: killed where
//! this process may kill it, cut off from its socket, which an honest vault takes for the end of its VMM, and marked dead on
//! every page.

use super::page::{Asking, Limit, NoReply, Page, Pages};
use super::protocol::{Given, Malformed, Message, Order, Reply, Report, Request};
use super::socket::{self, Descriptors, Received};
use crate::{Error, lock};
use rustix::net::{Shutdown, shutdown};
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// What a vault does first, for errors.
pub(super) const GREET: &str = "greet its vmm (does main begin with cvm::kvm::vault::init()?)";

/// A vault that was started, as its handles and the thread that waits for its end share it.
#[derive(Debug)]
pub(super) struct Connection {
    socket: OwnedFd,
    /// The number of the last order.
    last: Mutex<u32>,
    /// The process, if this one may kill it.
    process: Option<OwnedFd>,
    pages: Pages,
    exchanges: Vec<Exchange>,
    /// How long the vault may take for anything but to run the guest.
    deadline: Duration,
    /// Whether it was ended. The pages say so too, but a vault that cannot be killed can take that back.
    is_over: AtomicBool,
    /// Why the VMM has given it up, if it has.
    given_up: OnceLock<String>,
    /// How it ended.
    ended: Mutex<Option<String>>,
    has_ended: Condvar,
}

/// The VMM's end of one page, which threads use one after the other.
#[derive(Debug, Default)]
struct Exchange {
    turn: Mutex<Turn>,
    free: Condvar,
}

#[derive(Debug, Default)]
struct Turn {
    asking: Asking,
    under_way: UnderWay,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum UnderWay {
    #[default]
    Nothing,
    Run,
    Other,
}

impl Exchange {
    fn wait<'a>(&self, turn: MutexGuard<'a, Turn>) -> MutexGuard<'a, Turn> {
        self.free.wait(turn).unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks when it is this thread's turn. Nothing waits for a run to end, which may take for ever: then there is no answer.
    fn ask(&self, page: Page<'_>, request: &Request, limit: Limit<'_>) -> Option<Result<(Message, Vec<u8>), NoReply>> {
        let mut turn = lock(&self.turn);
        while turn.under_way != UnderWay::Nothing {
            if turn.under_way == UnderWay::Run {
                return None;
            }
            // Each of the others has a deadline.
            turn = self.wait(turn);
        }
        turn.under_way = if matches!(request, Request::Run(_)) { UnderWay::Run } else { UnderWay::Other };
        let mut asking = std::mem::take(&mut turn.asking);
        drop(turn);
        let answered = asking.ask(page, request.encode(), limit);
        *lock(&self.turn) = Turn { asking, under_way: UnderWay::Nothing };
        self.free.notify_all();
        Some(answered)
    }
}

/// Waits for the end of a child that was killed, and reaps it; false if it does not end in time.
fn reap(process: BorrowedFd<'_>, limit: Duration) -> bool {
    // A pidfd is readable once its process has ended.
    let has_ended = socket::await_readable(process, limit).unwrap_or(false);
    has_ended && waitid(WaitId::PidFd(process), WaitIdOptions::EXITED | WaitIdOptions::NOHANG).is_ok()
}

impl Connection {
    /// The connection to the vault at the other end of `socket`, which `process` leads to if this process may kill it.
    pub(super) fn new(socket: OwnedFd, process: Option<OwnedFd>, pages: Pages, deadline: Duration) -> Self {
        Self {
            socket,
            last: Mutex::new(0),
            process,
            exchanges: (0..pages.count()).map(|_| Exchange::default()).collect(),
            pages,
            deadline,
            is_over: AtomicBool::new(false),
            given_up: OnceLock::new(),
            ended: Mutex::default(),
            has_ended: Condvar::new(),
        }
    }

    pub(super) fn vcpus(&self) -> u32 {
        self.pages.count()
    }

    pub(super) fn page(&self, vcpu: u32) -> Page<'_> {
        self.pages.page(vcpu)
    }

    // The end of a vault

    /// Ends the vault, or what passes for one, as far as this process can.
    pub(super) fn end(&self) {
        self.is_over.store(true, Ordering::SeqCst);
        // Either fails if it has ended already; and a process of another user cannot be killed.
        let _ = self.process.as_ref().map(|process| pidfd_send_signal(process, Signal::KILL));
        let _ = shutdown(&self.socket, Shutdown::Both);
        (0..self.vcpus()).for_each(|vcpu| self.page(vcpu).poison());
    }

    /// Ends a vault that no thread waits for, and reaps its process.
    pub(super) fn end_unwatched(&self) {
        self.end();
        let _ = self.process.as_ref().map(|process| reap(process.as_fd(), self.deadline));
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    /// For the thread that waits for the end of the vault: it has come.
    pub(super) fn has_ended(&self, status: String) {
        *lock(&self.ended) = Some(status);
        self.has_ended.notify_all();
        self.end();
    }

    /// Waits for the end of a vault that was ended; nothing if it takes too long, as where it could not be killed.
    pub(super) fn await_end(&self) -> Option<String> {
        let ended = lock(&self.ended);
        let waited = self.has_ended.wait_timeout_while(ended, self.deadline, |ended| ended.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Waits for the end of the process of a vault that was ended; false if it may go on. Of a process that something else has
    /// started, the end is not seen.
    pub(super) fn is_gone(&self) -> bool {
        self.process.is_some() && self.await_end().is_some()
    }

    /// Gives up a vault for this reason, which every handle tells from now on.
    fn give_up(&self, reason: String) {
        let _ = self.given_up.set(reason);
        self.end();
    }

    /// What to say of a vault that is not there any more.
    fn dead(&self) -> Error {
        // A vault closes its socket before it has ended; something else may close it and live on.
        self.end();
        let given_up = || self.given_up.get().cloned();
        let status = given_up().or_else(|| self.await_end()).or_else(given_up);
        // Later calls do not wait again.
        let lives = || self.given_up.get_or_init(|| "it has closed its socket, and does not end".into()).clone();
        Error::VaultDied { status: status.unwrap_or_else(lives) }
    }

    /// Gives up a vault that breaks the protocol: it cannot be what was started.
    pub(super) fn broken(&self, what: &'static str) -> Error {
        self.give_up(format!("it was given up because it broke the protocol: {what}"));
        Error::VaultProtocol { what }
    }

    fn overdue(&self, operation: &'static str) -> Error {
        let error = Error::VaultOverdue { operation, waited: self.deadline };
        self.give_up(format!("it was given up because {error}"));
        error
    }

    /// Gives up a vault that reports on another order than it was given.
    pub(super) fn unfit_report(&self) -> Error {
        self.broken("its report does not fit the order")
    }

    /// Gives up a vault that replies to another request than there was.
    pub(super) fn unfit_reply(&self) -> Error {
        self.broken("its reply does not fit the request")
    }

    // Orders

    /// Waits for the report with this number.
    fn receive(&self, sequence: u32, operation: &'static str) -> Result<Report, Error> {
        // The report may come later, and must not be taken for that of the next order.
        let hear = |source| {
            self.give_up("it was given up because its report could not be read".into());
            Error::vault("report")(source)
        };
        match socket::await_readable(&self.socket, self.deadline) {
            Ok(true) => {}
            Ok(false) => return Err(self.overdue(operation)),
            Err(source) => return Err(hear(source)),
        }
        // No other thread takes it.
        let received = match socket::receive(&self.socket, Descriptors::None) {
            Ok(Some(received)) => received,
            Ok(None) => return Err(self.dead()),
            Err(error) if error.kind() == ErrorKind::InvalidData => return Err(self.broken("its report is malformed")),
            Err(source) => return Err(hear(source)),
        };
        let Received { message, text, .. } = received;
        if message.sequence != sequence {
            return Err(self.broken("its report is out of order"));
        }
        Report::decode(&message, &text).map_err(|_| self.broken("its report is malformed"))
    }

    /// Waits for the first report, which nothing has asked for.
    pub(super) fn await_greeting(&self) -> Result<(), Error> {
        let _order = lock(&self.last);
        match self.receive(0, GREET)? {
            Report::Done => Ok(()),
            Report::Failed(reason) => Err(Error::VaultRefused { reason }),
            _ => Err(self.broken("its greeting is none")),
        }
    }

    /// Gives an order, and waits for the report.
    pub(super) fn order(&self, order: &Order, descriptors: &[BorrowedFd<'_>]) -> Result<Report, Error> {
        let mut last = lock(&self.last);
        // An order that could not be sent has no number: the vault counts those that it gets.
        let sequence = last.wrapping_add(1);
        match socket::send(&self.socket, sequence, order.encode(), descriptors) {
            Ok(()) => *last = sequence,
            Err(error) if [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&error.kind()) => {
                return Err(self.dead());
            }
            // A report follows the order that was taken from the socket, so an honest vault leaves room for the next order:
            // there is nothing to wait for.
            Err(source) if source.kind() == ErrorKind::WouldBlock => {
                self.give_up("it was given up because it does not take its orders".into());
                return Err(Error::vault("take an order")(source));
            }
            Err(source) => return Err(Error::vault("order something")(source)),
        }
        match self.receive(sequence, order.name())? {
            Report::Failed(reason) => Err(Error::VaultRefused { reason }),
            report => Ok(report),
        }
    }

    /// Gives an order that has no result.
    pub(super) fn order_done(&self, order: &Order, descriptors: &[BorrowedFd<'_>]) -> Result<(), Error> {
        match self.order(order, descriptors)? {
            Report::Done => Ok(()),
            _ => Err(self.unfit_report()),
        }
    }

    // Requests

    fn request(&self, vcpu: u32, request: &Request, operation: &'static str, limit: Limit<'_>) -> Result<Reply, Error> {
        let exchange = self.exchanges.get(vcpu as usize);
        let exchange = exchange.ok_or_else(|| Error::VaultRefused { reason: "there is no such vcpu".into() })?;
        if self.is_over() {
            return Err(self.dead());
        }
        let Some(answered) = exchange.ask(self.page(vcpu), request, limit) else {
            return Ok(Reply::Outdated("the vcpu runs, so its guest waits for nothing".into()));
        };
        match answered {
            _ if self.is_over() => Err(self.dead()),
            Ok((message, text)) => match Reply::decode(vcpu, &message, &text) {
                Ok(Reply::Refused(reason)) => Err(Error::VaultRefused { reason }),
                Ok(reply) => Ok(reply),
                Err(Malformed { .. }) => Err(self.broken("its reply is malformed")),
            },
            Err(NoReply::Dead) => Err(self.dead()),
            Err(NoReply::OutOfOrder) => Err(self.broken("its reply is out of order")),
            Err(NoReply::Overdue) => Err(self.overdue(operation)),
        }
    }

    /// Runs `vcpu` up to its next exit, however long that takes, but for a deadline after it was kicked.
    pub(super) fn run(&self, vcpu: u32, given: Given, is_kicked: &dyn Fn() -> bool) -> Result<Reply, Error> {
        let is_kicked = || is_kicked() || self.is_over();
        let limit = Limit::AfterKick { within: self.deadline, is_kicked: &is_kicked };
        self.request(vcpu, &Request::Run(given), "stop a vcpu that was kicked", limit)
    }

    /// Asks for what the vault does by itself on the page of `vcpu`.
    pub(super) fn ask(&self, vcpu: u32, request: &Request) -> Result<Reply, Error> {
        self.request(vcpu, request, request.name(), Limit::Within(self.deadline))
    }
}

#[cfg(test)]
mod tests;
