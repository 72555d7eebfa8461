//! A VMM whose vault is silent, stopped or hostile, and may not be killed.

use super::*;
use crate::local::Backing;
use crate::vault::page::Answering;
use cvm_core::doorbell::{Doorbell, Transport};
use cvm_core::interrupt::InterruptController;
use cvm_core::x86::Register;
use cvm_core::{Event, GpaRange, PageKind, Policy, Side, Trigger};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

const SOON: Duration = Duration::from_millis(30);
const LATE: Duration = Duration::from_secs(600);

/// A connection to a process of another user, so to say, and that end of it.
fn connect(deadline: Duration) -> (Connection, OwnedFd) {
    let (ours, theirs) = socket::pair().unwrap();
    let pages = Pages::map(&Backing::new("cvm-pages", Pages::bytes(1)).unwrap(), 1).unwrap();
    (Connection::new(ours, None, pages, deadline), theirs)
}

fn range() -> GpaRange {
    GpaRange::from_pages(0, 1).unwrap()
}

fn orders() -> Vec<Order> {
    vec![
        Order::Slot(range()),
        Order::Accept { vectors: [0; 4], trigger: Trigger::Edge, most_per_second: None },
        Order::Create {
            vcpus: 1,
            policy: Policy::empty(),
            doorbell: Doorbell::Port,
            transport: Transport::Doorbell,
            interrupt_controller: InterruptController::None,
        },
        Order::Load { range: range(), kind: PageKind::Zero },
        Order::SetVcpu { index: 0 },
        Order::Registers { part: 0, words: [0; 5] },
        Order::Seal,
        Order::Count,
        Order::DoorbellFd(0),
        Order::InterruptFd { vcpu: 0, vector: 0x41 },
        Order::CountDropped,
    ]
}

fn requests() -> Vec<Request> {
    vec![
        Request::Convert { range: range(), to: Side::Shared },
        Request::Poison(range()),
        Request::Register(Register::Rax),
        Request::Inject(Event::Interrupt(0x41)),
    ]
}

#[track_caller]
fn assert_overdue<T: std::fmt::Debug>(connection: &Connection, outcome: Result<T, Error>, named: &str) {
    match outcome {
        Err(Error::VaultOverdue { operation, waited }) => {
            assert_eq!((operation, waited), (named, SOON));
        }
        other => panic!("{named}: {other:?}"),
    }
    // From then on every handle says it, at once.
    let reason = format!("it was given up because the vault did not {named}");
    let says = |error| matches!(error, Error::VaultDied { status } if status.starts_with(&reason));
    assert!(says(connection.order(&Order::Count, &[]).unwrap_err()), "{named}: an order");
    assert!(says(connection.ask(0, &requests()[0]).unwrap_err()), "{named}: a request");
    assert!(says(connection.run(0, Given::Nothing, &|| false).unwrap_err()), "{named}: a run");
}

#[test]
fn a_silent_vault_is_given_up_at_every_order() {
    for order in orders() {
        let (connection, theirs) = connect(SOON);
        let outcome = connection.order(&order, &[]);
        assert_overdue(&connection, outcome, order.name());
        // A vault that cannot be killed hears of it as of the end of its VMM.
        assert!(socket::receive(&theirs, Descriptors::Some).unwrap().is_some(), "the order");
        assert!(socket::receive(&theirs, Descriptors::Some).unwrap().is_none(), "the end");
    }
    let (connection, _theirs) = connect(SOON);
    let outcome = connection.await_greeting();
    assert_overdue(&connection, outcome, GREET);
}

#[test]
fn a_silent_vault_is_given_up_at_every_request() {
    for request in requests() {
        let (connection, _theirs) = connect(SOON);
        let outcome = connection.ask(0, &request);
        assert_overdue(&connection, outcome, request.name());
    }
    let (connection, _theirs) = connect(SOON);
    let outcome = connection.run(0, Given::Nothing, &|| true);
    assert_overdue(&connection, outcome, "stop a vcpu that was kicked");
}

#[test]
fn a_guest_that_is_not_kicked_runs_for_longer_than_the_deadline() {
    let (connection, _theirs) = connect(SOON);
    thread::scope(|scope| {
        let run = scope.spawn(|| connection.run(0, Given::Nothing, &|| false));
        let mut answering = Answering::default();
        answering.next(connection.page(0)).unwrap();
        thread::sleep(5 * SOON);
        answering.answer(connection.page(0), Reply::Done.encode());
        assert_eq!(run.join().unwrap().unwrap(), Reply::Done);
    });
}

#[test]
fn every_thread_that_waits_hears_that_the_vault_is_given_up() {
    let (connection, _theirs) = connect(LATE);
    thread::scope(|scope| {
        let run = scope.spawn(|| connection.run(0, Given::Nothing, &|| false).map(drop));
        let order = scope.spawn(|| connection.order(&Order::Count, &[]).map(drop));
        thread::sleep(SOON);
        let _ = connection.broken("the test says so");
        for outcome in [run.join().unwrap(), order.join().unwrap()] {
            assert!(matches!(outcome, Err(Error::VaultDied { status }) if status.contains("the test says so")));
        }
    });
}

/// One that no process of the VMM can kill takes back on its pages that it is dead, and goes on to answer.
#[test]
fn a_vault_that_is_given_up_is_not_heard_again() {
    let (connection, _theirs) = connect(SOON);
    let page = connection.page(0);
    let _ = connection.broken("the test says so");
    let answering = Answering::default();
    let revive = || answering.answer(page, Reply::Done.encode());
    revive();
    for outcome in [connection.ask(0, &requests()[0]), connection.run(0, Given::Nothing, &|| false)] {
        assert!(matches!(outcome, Err(Error::VaultDied { status }) if status.contains("the test says so")));
        revive();
    }
}

#[test]
fn a_run_under_way_ends_even_if_the_vault_takes_back_that_it_was_given_up() {
    let (connection, _theirs) = connect(SOON);
    thread::scope(|scope| {
        let run = scope.spawn(|| connection.run(0, Given::Nothing, &|| false));
        Answering::default().next(connection.page(0)).unwrap();
        // As if the vault had been faster than the thread that waits.
        connection.given_up.set("the test says so".into()).unwrap();
        connection.is_over.store(true, Ordering::SeqCst);
        let outcome = run.join().unwrap();
        assert!(matches!(outcome, Err(Error::VaultDied { status }) if status.contains("the test says so")));
    });
}

#[test]
fn a_request_does_not_wait_for_the_end_of_a_run() {
    let (connection, _theirs) = connect(LATE);
    let is_answered = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| connection.run(0, Given::Nothing, &|| false));
        let mut answering = Answering::default();
        answering.next(connection.page(0)).unwrap();
        let outcome = connection.ask(0, &requests()[0]).unwrap();
        assert!(matches!(outcome, Reply::Outdated(_)), "{outcome:?}");
        is_answered.store(true, Ordering::Relaxed);
        answering.answer(connection.page(0), Reply::Done.encode());
    });
    assert!(is_answered.into_inner());
}

#[test]
fn a_vault_that_hands_over_descriptors_is_given_up_and_they_are_not_opened() {
    let (connection, theirs) = connect(LATE);
    // An eventfd that is full, and whose writers wait, is the least that it could be.
    let full = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    socket::send(&theirs, 0, Report::Done.encode(), &[full.as_fd()]).unwrap();
    let outcome = connection.await_greeting();
    assert!(matches!(outcome, Err(Error::VaultProtocol { .. })), "{outcome:?}");
}

#[test]
fn a_vault_that_reports_before_it_is_ordered_to_and_takes_no_orders_is_given_up() {
    let (connection, theirs) = connect(LATE);
    let outcome = (1..).find_map(|sequence| {
        socket::send(&theirs, sequence, Report::Done.encode(), &[]).unwrap();
        connection.order_done(&Order::Seal, &[]).err()
    });
    assert!(matches!(outcome, Some(Error::Vault { step: "take an order", .. })), "{outcome:?}");
}

#[test]
fn a_kick_does_not_wait_for_a_vault_that_takes_none() {
    let (kicks, _theirs) = socket::kick_pair().unwrap();
    // More than any socket has room for.
    (0..100_000).for_each(|_| socket::signal(&kicks));
}

#[test]
fn the_wait_for_the_end_of_a_vault_that_does_not_end_is_over_by_the_deadline() {
    let (connection, theirs) = connect(SOON);
    assert_eq!(connection.await_end(), None);
    drop(theirs);
    let error = connection.order(&Order::Count, &[]).unwrap_err();
    assert!(matches!(error, Error::VaultDied { status } if status.contains("does not end")));
    connection.has_ended("a status".into());
    assert_eq!(connection.await_end().as_deref(), Some("a status"));
}

#[test]
fn an_order_that_cannot_be_sent_does_not_take_a_number() {
    let (connection, theirs) = connect(SOON);
    let too_many = [theirs.as_fd(); 4 * socket::MOST_DESCRIPTORS];
    let outcome = connection.order(&Order::Count, &too_many);
    assert!(matches!(outcome, Err(Error::Vault { step: "order something", .. })), "{outcome:?}");
    // Nothing answers the next one, which has the first number all the same.
    connection.order(&Order::Count, &[]).unwrap_err();
    let received = socket::receive(&theirs, Descriptors::Some).unwrap().expect("the order");
    assert_eq!(received.message.sequence, 1);
}

#[test]
fn a_vault_whose_report_cannot_be_read_is_given_up() {
    // A pipe is readable, and is no socket.
    let (reader, writer) = std::io::pipe().unwrap();
    rustix::io::write(&writer, &[0]).unwrap();
    let pages = Pages::map(&Backing::new("cvm-pages", Pages::bytes(1)).unwrap(), 1).unwrap();
    let connection = Connection::new(reader.into(), None, pages, LATE);
    let outcome = connection.await_greeting();
    assert!(matches!(outcome, Err(Error::Vault { step: "report", .. })), "{outcome:?}");
    let error = connection.ask(0, &requests()[0]).unwrap_err();
    assert!(matches!(&error, Error::VaultDied { status } if status.contains("could not be read")), "{error}");
}

#[test]
fn the_wait_for_a_child_that_does_not_end_is_over_by_the_deadline_and_one_that_ends_is_reaped() {
    let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    let process = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    assert!(!reap(process.as_fd(), SOON));
    child.kill().unwrap();
    assert!(reap(process.as_fd(), LATE));
    assert_eq!(child.wait().unwrap_err().raw_os_error(), Some(libc::ECHILD));
}
