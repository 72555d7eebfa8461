//! Chapter 11: several VMs at once.

use crate::clause::{Clause, Verdict};
use crate::guest::{Assembler, DATA, REPORT};
use crate::vmm::{drive, range};
use crate::{Bench, Guest, VmOf};
use cvm_core::doorbell::{Doorbell, control};
use cvm_core::memory::ConversionTotals;
use cvm_core::{
    Answer, ConversionListener, Error, Event, Exit, Gpa, GpaRange, InterruptController, Objection, PAGE_SIZE,
    PageState, Platform, Side, Vcpu, Vm, VmConfig,
};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("11.1", "VMs that run in turns have each its own memory and registers and view", in_turns),
        Clause::new("11.2", "VMs that run at the same time have each its own memory and totals", at_once),
        Clause::new("11.3", "a request of one VM is nothing to another", requests),
        Clause::new("11.4", "an answer for one VM answers no other", answers),
        Clause::new("11.5", "what one guest accepts no other gets", interrupts),
        Clause::new("11.6", "a kick stops no vCPU of another VM", kicks),
        Clause::new("11.7", "a descriptor of one VM is signalled by no other", descriptors),
        Clause::new("11.8", "a VM that crashes or is dropped disturbs no other and leaves nothing", ends),
    ]
}

/// Counts what it is asked about.
#[derive(Default)]
struct Asked(AtomicU64);

impl ConversionListener for Asked {
    fn name(&self) -> &str {
        "a count"
    }
    fn prepare(&self, _: GpaRange, _: Side) -> Result<(), Objection> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn committed(&self, _: GpaRange, _: Side) {}
    fn aborted(&self, _: GpaRange, _: Side) {}
    fn poisoned(&self, _: GpaRange) {}
}

fn in_turns<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let start = |number: u32, doorbell, vcpus| {
        bench.guest(VmConfig { doorbell, ..bench.config(vcpus) }, |a| {
            a.mov(r9d, number)?;
            a.store(DATA, Side::Private, 0x1000 + number)?;
            a.report()?;
            a.load(DATA, Side::Private)?;
            a.report()?;
            a.convert(DATA, 1, Side::Shared)?;
            a.report()?;
            a.store(DATA, Side::Shared, 0x2000 + number)?;
            a.report()?;
            a.load(DATA, Side::Shared)?;
            a.report()?;
            a.convert(DATA, 1, Side::Private)?;
            a.report()?;
            a.store(DATA, Side::Private, 0x4000 + number)?;
            a.report()?;
            a.load(DATA, Side::Private)?;
            a.report()?;
            a.mov(eax, r9d)?;
            a.report()?;
            a.end(number)
        })
    };
    let mut guests = [start(0, Doorbell::Port, 1), start(1, Doorbell::Msr, 1), start(2, Doorbell::Port, 3)];
    let asked = guests.each_ref().map(|guest| {
        let asked = Arc::<Asked>::default();
        guest.vm.add_listener(asked.clone());
        asked
    });
    guests.iter_mut().for_each(|guest| _ = guest.report());
    assert_eq!(guests.each_mut().map(Guest::report), [0x1000, 0x1001, 0x1002]);
    let before = asked.each_ref().map(|asked| asked.0.load(Ordering::SeqCst));

    // One after the other, so that each is shared where others are not.
    for index in 0..guests.len() {
        assert_eq!(guests[index].convert().pages, 1);
        for (other, guest) in guests.iter().enumerate() {
            let shared = if other <= index { PageState::Shared } else { PageState::Private };
            assert_eq!(guest.vm.memory().map().get(Gpa(DATA)), Some(shared), "vm {other}, when vm {index} has shared");
            if other > index {
                guest.assert_private(range(DATA, 1));
            }
            let count = asked[other].0.load(Ordering::SeqCst) - before[other];
            assert_eq!(count > 0, other <= index, "the listener of vm {other}, when vm {index} has shared");
        }
    }
    assert_eq!(guests.each_mut().map(Guest::report), [0, 0, 0]);
    guests.iter_mut().for_each(|guest| _ = guest.report());
    assert_eq!(guests.each_ref().map(|guest| guest.read(DATA).expect("it is shared")), [0x2000, 0x2001, 0x2002]);
    for (number, guest) in (0..).zip(&guests) {
        guest.write(DATA, 0x3000 + number);
    }
    assert_eq!(guests.each_mut().map(Guest::report), [0x3000, 0x3001, 0x3002]);
    for index in (0..guests.len()).rev() {
        assert_eq!(guests[index].convert().pages, 1);
        guests[index].assert_private(range(DATA, 1));
        for other in &guests[..index] {
            assert!(other.read(DATA).is_ok(), "its shared page is gone");
        }
    }
    assert_eq!(guests.each_mut().map(Guest::report), [0, 0, 0]);
    guests.iter_mut().for_each(|guest| _ = guest.report());
    assert_eq!(guests.each_mut().map(Guest::report), [0x4000, 0x4001, 0x4002]);
    assert_eq!(guests.each_mut().map(Guest::report), [0, 1, 2], "a register of another vm");
    assert_eq!(guests.each_mut().map(Guest::run), [0, 1, 2].map(|code| Exit::Ended { code }));
    let totals = ConversionTotals { requests: 2, refused: 0, to_private: 1, to_shared: 1 };
    assert_eq!(guests.each_ref().map(Guest::conversions), [totals; 3]);
    Verdict::Met
}

/// Shares and takes back a page after the other, and ends with 0 if each had what was written last.
fn churn(a: &mut Assembler, number: u32, pages: u32) -> Result<(), IcedError> {
    let mut wrong = a.create_label();
    for page in 0..pages {
        let gpa = DATA + u64::from(page) * PAGE_SIZE;
        let value = number << 16 | page;
        a.store(gpa, Side::Private, value)?;
        a.load(gpa, Side::Private)?;
        a.cmp(eax, value as i32)?;
        a.jne(wrong)?;
        a.convert(gpa, 1, Side::Shared)?;
        a.store(gpa, Side::Shared, !value)?;
        a.load(gpa, Side::Shared)?;
        a.cmp(eax, !value as i32)?;
        a.jne(wrong)?;
        if page % 2 == 0 {
            a.convert(gpa, 1, Side::Private)?;
        }
    }
    a.end(0)?;
    a.set_label(&mut wrong)?;
    a.end(1)
}

fn at_once<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const PAGES: u32 = 24;
    let mut guests = [1, 2, 3].map(|number| bench.guest(bench.config(1), |a| churn(a, number, PAGES)));
    let start = Barrier::new(guests.len());
    thread::scope(|scope| {
        for guest in &mut guests {
            let Guest { vcpus, vm, .. } = guest;
            scope.spawn(|| {
                start.wait();
                assert_eq!(drive(vm, &mut vcpus[0]).expect("it runs"), Exit::Ended { code: 0 });
            });
        }
    });
    for (number, guest) in (1..).zip(&guests) {
        for page in 0..PAGES {
            let found = guest.read(DATA + u64::from(page) * PAGE_SIZE);
            match page % 2 {
                0 => assert!(found.is_err(), "vm {number}, page {page}: {found:?}"),
                _ => assert_eq!(found.expect("it is shared"), !(number << 16 | page), "vm {number}, page {page}"),
            }
        }
        let half = u64::from(PAGES / 2);
        let totals = ConversionTotals { requests: 3 * half, refused: 0, to_private: half, to_shared: 2 * half };
        assert_eq!(guest.conversions(), totals, "vm {number}");
    }
    Verdict::Met
}

/// Two VMs whose guests ask for the same.
fn pair<P: Platform>(bench: &Bench<'_, P>) -> [Guest<VmOf<P>>; 2] {
    [0, 1].map(|_| {
        bench.guest(bench.config(1), |a| {
            a.report()?;
            // The pages are given up whatever the answer: one guest is refused after its pages were converted.
            a.rescind(DATA, 2)?;
            a.ask(DATA, 2, Side::Shared)?;
            a.report()?;
            a.end(0)
        })
    })
}

fn requests<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let [mut asks, mut silent] = pair(bench);
    asks.report();
    silent.report();
    let request = asks.request();
    let stray = silent.vm.convert(&request);
    assert_eq!((stray.answer(), stray.pages()), (Answer::Invalid, 0));
    assert!(matches!(stray.cause(), Some(Error::NotAsked { vcpu: 0, gpa }) if gpa.0 == DATA), "{:?}", stray.cause());
    silent.assert_private(range(DATA, 2));
    assert_eq!(silent.conversions(), ConversionTotals::default());

    // Neither has lost its own.
    let answer = asks.vm.convert(&request);
    assert_eq!((answer.answer(), answer.pages()), (Answer::Done, 2), "{:?}", answer.cause());
    asks.vcpus[0].answer_conversion(answer).expect("an answer to what was asked");
    assert_eq!(asks.report(), 0);
    silent.assert_private(range(DATA, 2));
    assert_eq!(silent.convert().pages, 2);
    assert_eq!(silent.report(), 0);
    asks.end();
    silent.end();
    Verdict::Met
}

fn answers<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let [mut first, mut second] = pair(bench);
    first.report();
    second.report();
    let (request, same) = (first.request(), second.request());
    assert_eq!(request, same, "two guests that ask for the same");
    let answer = first.vm.convert(&request);
    assert_eq!((answer.answer(), answer.pages()), (Answer::Done, 2), "{:?}", answer.cause());
    let stray = second.vcpus[0].answer_conversion(answer);
    assert!(matches!(stray, Err(Error::Protocol { vcpu: 0, .. })), "{stray:?}");
    second.assert_private(range(DATA, 2));
    let early = second.try_run(0);
    assert!(matches!(early, Err(Error::Protocol { vcpu: 0, .. })), "its question is answered: {early:?}");

    // One that was refused itself is no answer either, and the guest hears of its own alone.
    let stray = first.vm.convert(&request);
    assert!(matches!(stray.cause(), Some(Error::NotAsked { .. })), "{:?}", stray.cause());
    let refused = second.vcpus[0].answer_conversion(stray);
    assert!(matches!(refused, Err(Error::Protocol { vcpu: 0, .. })), "{refused:?}");
    let own = second.vm.convert(&same);
    assert_eq!((own.answer(), own.pages()), (Answer::Done, 2), "{:?}", own.cause());
    second.vcpus[0].answer_conversion(own).expect("an answer to what was asked");
    assert_eq!(second.report(), 0);
    second.end();
    first.vcpus[0].refuse_conversion().expect("its question is still open");
    assert_ne!(first.report(), 0);
    first.end();
    Verdict::Met
}

fn interrupts<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let start = |vector: u32| {
        bench.guest(VmConfig { interrupt_controller: InterruptController::None, ..bench.config(1) }, |a| {
            a.mov(eax, vector)?;
            a.ring(control::ACCEPT)?;
            a.report()?;
            a.end(0)
        })
    };
    let mut guests = [start(0x41), start(0x42)];
    guests.iter_mut().for_each(|guest| _ = guest.report());
    for (own, other) in [(0, 1), (1, 0)] {
        let vectors = [Event::Interrupt(0x41), Event::Interrupt(0x42)];
        let refused = guests[own].vcpus[0].inject(vectors[other]);
        assert!(matches!(refused, Err(Error::InjectionRefused { vcpu: 0, .. })), "{refused:?}");
        guests[own].vcpus[0].inject(vectors[own]).expect("the guest has accepted it");
    }
    // Interrupts are off: they wait for ever.
    guests.iter_mut().for_each(Guest::end);
    Verdict::Met
}

fn kicks<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let [mut kicked, mut other] = pair(bench);
    kicked.report();
    other.report();
    let kicker = kicked.vcpus[0].kicker();
    kicker.kick();
    // Both on this thread: whatever stops a vCPU is not for the thread that runs it.
    assert_eq!(other.convert().pages, 2);
    assert_eq!(kicked.run(), Exit::Kicked);
    kicker.kick();
    assert_eq!(other.report(), 0);
    assert_eq!(kicked.run(), Exit::Kicked);
    assert_eq!(kicked.convert().pages, 2);
    drop(kicked);
    // Of a VM that is gone.
    kicker.kick();
    other.end();
    Verdict::Met
}

fn descriptors<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let [mut with, mut without] = [0, 1].map(|number| {
        bench.guest(bench.config(1), move |a| {
            a.mov(eax, number)?;
            a.ring(REPORT + 4)?;
            a.end(0)
        })
    });
    let descriptor = match with.vm.doorbell_fd(REPORT + 4) {
        Ok(descriptor) => descriptor,
        Err(Error::NoDescriptor(reason)) => return Verdict::NotOffered(reason),
        Err(error) => panic!("{error:?}"),
    };
    let count = || {
        let mut count = [0; 8];
        rustix::io::read(&descriptor, &mut count).ok().map(|_| u64::from_ne_bytes(count))
    };
    assert_eq!(without.run(), Exit::DoorbellWrite { register: REPORT + 4, value: 1 });
    without.end();
    assert_eq!(count(), None, "another vm's guest has signalled it");
    with.end();
    assert_eq!(count(), Some(1));
    Verdict::Met
}

fn ends<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut lives = bench.guest(bench.config(1), |a| {
        a.store(DATA, Side::Private, 0x1111)?;
        a.convert(DATA + PAGE_SIZE, 1, Side::Shared)?;
        a.store(DATA + PAGE_SIZE, Side::Shared, 0x2222)?;
        a.report()?;
        for (gpa, side) in [(DATA, Side::Private), (DATA + PAGE_SIZE, Side::Shared)].repeat(2) {
            a.load(gpa, side)?;
            a.report()?;
        }
        a.end(0)
    });
    let mut dies = bench.guest(bench.config(2), |a| {
        a.store(DATA, Side::Private, 0x5ec2_e7e5)?;
        a.store(DATA + 2 * PAGE_SIZE, Side::Private, 0x5ec2_e7e5)?;
        a.convert(DATA + PAGE_SIZE, 1, Side::Shared)?;
        a.store(DATA + PAGE_SIZE, Side::Shared, 0x5ec2_e7e5)?;
        a.report()?;
        // There is nobody for exceptions.
        a.ud2()
    });
    assert_eq!((lives.convert().pages, dies.convert().pages), (1, 1));
    lives.report();
    dies.report();
    let crash = dies.try_run(0);
    assert!(matches!(crash, Err(Error::Crashed { vcpu: 0, .. })), "{crash:?}");
    assert_eq!((lives.report(), lives.report()), (0x1111, 0x2222), "after another vm has crashed");
    drop(dies);

    let mut next = bench.guest(bench.config(1), |a| {
        for page in [0, 2] {
            a.load(DATA + page * PAGE_SIZE, Side::Private)?;
            a.report()?;
        }
        a.convert(DATA + PAGE_SIZE, 1, Side::Shared)?;
        a.load(DATA + PAGE_SIZE, Side::Shared)?;
        a.report()?;
        a.end(0)
    });
    assert_eq!((next.report(), next.report()), (0, 0), "contents of a vm that is gone");
    assert_eq!(next.convert().pages, 1);
    assert_eq!(next.report(), 0, "shared contents of a vm that is gone");
    next.end();
    assert_eq!((lives.report(), lives.report()), (0x1111, 0x2222), "after another vm is gone");
    assert_eq!(lives.read(DATA + PAGE_SIZE).expect("it is shared"), 0x2222);
    lives.end();
    Verdict::Met
}
