//! The ways by which guests ask, and what happens to one that does not.

use super::guest_state;
use crate::Bench;
use crate::clause::{Clause, Verdict};
use crate::guest::{DATA, MEMORY};
use crate::quality::told;
use crate::vmm::{Guest, range};
use cvm_core::doorbell::{Transport, control};
use cvm_core::{Answer, Error, Exit, Gpa, PAGE_SIZE, PageState, Platform, Side, Vcpu, Vm, VmConfig};
use iced_x86::code_asm::*;
use vm_memory::GuestAddressSpace;

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("4.24", "a VMM that chooses no transport gets one that is offered", default),
        Clause::new("4.25", "a guest can ask for conversions by doorbell", by_doorbell),
        Clause::new("4.26", "a guest can ask for conversions by hypercall", by_hypercall),
        Clause::new("4.27", "a guest can ask for conversions by page state change", by_page_state),
        Clause::new("4.28", "a touch of the shared side of a private page stops that vCPU alone", unasked_shared),
        Clause::new("4.29", "a touch of the private side of a shared page stops that vCPU alone", unasked_private),
    ]
}

const ALL: [Transport; 3] = [Transport::Doorbell, Transport::Hypercall, Transport::PageState];

fn default<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let default = || {
        let launch = bench.platform.launch(bench.config(1)).unwrap_or_else(|error| panic!("{}", told(&error)));
        launch.transport()
    };
    let chosen = default();
    let mut offered = Vec::new();
    for transport in ALL {
        match bench.platform.launch(VmConfig { transport: Some(transport), ..bench.config(1) }) {
            Ok(launch) => {
                assert_eq!((launch.transport(), launch.interface().transport), (transport, transport));
                offered.push(transport);
            }
            Err(Error::Config(_)) => {}
            Err(error) => panic!("{transport:?} is refused by: {}", told(&error)),
        }
    }
    assert!(offered.contains(&chosen), "{chosen:?} is not among {offered:?}");
    assert_eq!(default(), chosen, "another launch has another default");
    Verdict::Met
}

/// A guest that asks by `transport` is heard, refused and put off.
fn by<P: Platform>(bench: &Bench<'_, P>, transport: Transport) -> Verdict {
    let config = VmConfig { transport: Some(transport), ..bench.config(1) };
    let loaded = bench.load(config, |a| {
        if transport == Transport::Doorbell {
            a.listen(control::CONVERT)?;
            a.report()?;
        }
        a.convert(DATA, 3, Side::Shared)?;
        a.report()?;
        a.store(DATA, Side::Shared, 0x1111)?;
        a.convert(DATA + PAGE_SIZE, 1, Side::Private)?;
        a.report()?;
        a.store(DATA + PAGE_SIZE, Side::Private, 0x2222)?;
        a.ask(MEMORY, 1, Side::Shared)?;
        a.report()?;
        a.convert(DATA, 1, Side::Private)?;
        a.report()?;
        a.load(DATA + PAGE_SIZE, Side::Private)?;
        a.report()?;
        if transport == Transport::Hypercall {
            // Bits that are reserved, and a page size, which is a hint.
            for attributes in [1 << 5, 1 << 63, 1 << 5 | 1 << 4, 1] {
                a.mov(rbx, DATA + 8 * PAGE_SIZE)?;
                a.map_gpa_range(1, attributes)?;
                a.report()?;
            }
        }
        a.end(0)
    });
    let launch = match loaded {
        Ok(launch) => launch,
        Err(Error::Config(reason)) => return Verdict::NotOffered(reason),
        Err(error) => panic!("{}", told(&error)),
    };
    let mut guest = Guest::from_launch(launch);
    if transport == Transport::Doorbell {
        assert_eq!(guest.report(), Answer::Invalid as u32, "nothing was asked for yet");
    }
    let there = guest.convert();
    assert_eq!((there.answer, there.pages), (Answer::Done, 3), "{}", there.cause);
    assert_eq!((there.request.gpa(), there.request.pages(), there.request.to()), (Gpa(DATA), 3, Side::Shared));
    assert_eq!(guest.report(), 0);
    let back = guest.convert();
    assert_eq!((back.answer, back.pages), (Answer::Done, 1), "{}", back.cause);
    assert_eq!((back.request.vcpu(), back.request.to()), (0, Side::Private));
    assert_eq!(guest.report(), 0);
    assert_eq!(guest.read(DATA).unwrap(), 0x1111);
    guest.assert_private(range(DATA + PAGE_SIZE, 1));
    assert_eq!(guest.convert().answer, Answer::Invalid);
    let refused = guest.report();
    let pinned = guest.vm.memory().memory();
    assert_eq!(guest.convert().answer, Answer::Retry);
    drop(pinned);
    let put_off = guest.report();
    match transport {
        Transport::Doorbell => assert_eq!((refused, put_off), (Answer::Invalid as u32, Answer::Retry as u32)),
        Transport::Hypercall => assert!(refused != 0 && put_off != 0 && refused != put_off),
        // A guest cannot tell why not.
        Transport::PageState => assert!(refused != 0 && put_off != 0),
    }
    assert_eq!(guest.report(), 0x2222);
    if transport == Transport::Hypercall {
        for _ in 0..3 {
            assert_ne!(guest.report(), 0, "reserved attributes");
        }
        assert_eq!(guest.convert().pages, 1);
        assert_eq!(guest.report(), 0);
    }
    guest.end();
    Verdict::Met
}

fn by_doorbell<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    by(bench, Transport::Doorbell)
}

fn by_hypercall<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    by(bench, Transport::Hypercall)
}

fn by_page_state<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    by(bench, Transport::PageState)
}

/// A guest whose second vCPU touches a page on a side where it is not, after it was shared or not; the first one goes on.
fn unasked<P: Platform>(bench: &Bench<'_, P>, side: Side) -> Verdict {
    const FROM: u64 = DATA + 4 * PAGE_SIZE;
    for touch in ["reads", "writes"] {
        let mut has_two_sides = false;
        let mut guest = bench.guest(bench.config(2), |a| {
            has_two_sides = a.address(FROM, Side::Shared) != a.address(FROM, Side::Private);
            let mut second = a.create_label();
            a.test(edi, edi)?;
            a.jne(second)?;
            a.mov(eax, 7u32)?;
            a.report()?;
            a.end(0)?;
            a.set_label(&mut second)?;
            if side == Side::Private {
                a.convert(FROM, 1, Side::Shared)?;
                a.report()?;
            }
            if touch == "reads" {
                a.load(FROM + 8, side)?;
            } else {
                a.store(FROM + 8, side, 1)?;
            }
            a.end(0)
        });
        if !has_two_sides {
            return Verdict::NotOffered("the guest reaches both sides of a page at the same address".into());
        }
        if side == Side::Private {
            let Ok(Exit::Conversion(request)) = guest.try_run(1) else { panic!("no request") };
            let conversion = guest.vm.convert(&request);
            guest.vcpus[1].answer_conversion(conversion).unwrap();
            assert_eq!(guest.report_of(1), 0);
        }
        let before = guest_state(&guest, FROM);
        match guest.try_run(1) {
            Err(Error::MissingConversion { vcpu: 1, gpa }) => {
                assert_eq!(gpa.0 & !(PAGE_SIZE - 1), FROM, "{gpa} is another page than it {touch}");
            }
            other => panic!("a vcpu that {touch} the {side} side: {other:?}"),
        }
        let again = guest.try_run(1);
        assert!(matches!(again, Err(Error::Protocol { vcpu: 1, .. })), "it ran on: {again:?}");
        assert_eq!(guest_state(&guest, FROM), before, "a touch has converted the page");
        assert_eq!(before, Some(PageState::from(side.other())));
        assert_eq!(guest.report(), 7);
        guest.end();
    }
    Verdict::Met
}

fn unasked_shared<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    unasked(bench, Side::Shared)
}

fn unasked_private<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    unasked(bench, Side::Private)
}
