//! Edges, without an interrupt controller.

use super::guest::{EDGE, HIGH, allow, assert_refused, config, edges, halt, interruptible, report_came};
use crate::clause::Verdict;
use crate::guest::{DATA, REPORT};
use crate::subject::Bench;
use cvm_core::interrupt::Refusal;
use cvm_core::{Answer, Event, Exit, Platform, Side, Vcpu, Vm};

/// Ports and MSRs that nobody emulates.
const PORT: u16 = 0x1234;
const MSR: u32 = 0x4355_0000;

pub(super) fn once<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = interruptible(bench, config(bench, 1, edges()), |a| {
        super::guest::wait(a)?;
        report_came(a)?;
        for _ in 0..2 {
            allow(a)?;
            report_came(a)?;
        }
        a.end(0)
    });
    guest.vcpus[0].inject(Event::Interrupt(EDGE)).unwrap();
    assert_eq!(guest.report(), 0, "interrupts are off");
    assert_eq!(guest.report(), 0x41);
    assert_eq!(guest.report(), 0x41, "it came twice");
    guest.end();
    Verdict::Met
}

pub(super) fn highest_first<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = interruptible(bench, config(bench, 1, edges()), |a| {
        report_came(a)?;
        allow(a)?;
        report_came(a)?;
        a.end(0)
    });
    assert_eq!(guest.report(), 0);
    // A vector that waits already is not there twice.
    for vector in [EDGE, HIGH, EDGE] {
        guest.vcpus[0].inject(Event::Interrupt(vector)).unwrap();
    }
    assert_eq!(guest.report(), 0x7f41);
    guest.end();
    Verdict::Met
}

pub(super) fn own_vcpu<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = interruptible(bench, config(bench, 2, edges()), |a| {
        allow(a)?;
        report_came(a)?;
        a.end(0)
    });
    guest.vcpus[1].inject(Event::Interrupt(EDGE)).unwrap();
    assert_eq!(guest.report_of(0), 0, "it came to another one");
    assert_eq!(guest.report_of(1), 0x41);
    Verdict::Met
}

pub(super) fn wakes<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = interruptible(bench, config(bench, 1, edges()), |a| {
        for _ in 0..2 {
            halt(a)?;
            report_came(a)?;
        }
        a.hlt()?;
        a.end(1)
    });
    for came in [0x41, 0x4141] {
        assert_eq!(guest.run(), Exit::Halted);
        assert_eq!(guest.run(), Exit::Halted, "it woke by itself");
        let refused = Event::Interrupt(0x40);
        assert_refused(guest.vcpus[0].inject(refused), 0, refused, Refusal::NotAccepted);
        guest.vcpus[0].kicker().kick();
        assert_eq!(guest.run(), Exit::Kicked);
        assert_eq!(guest.run(), Exit::Halted, "a kick woke it");
        guest.vcpus[0].inject(Event::Interrupt(EDGE)).unwrap();
        assert_eq!(guest.report(), came);
    }
    assert_eq!(guest.run(), Exit::Halted);
    guest.vcpus[0].inject(Event::Interrupt(EDGE)).unwrap();
    assert_eq!(guest.run(), Exit::Halted, "it woke by what it does not allow");
    Verdict::Met
}

pub(super) fn answers<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let shared = DATA + 0x8000;
    let mut guest = interruptible(bench, config(bench, 1, edges()), |a| {
        for exit in 0..4 {
            // By a page between guest and host exits are made in several steps, which no other exit may come between.
            if !a.is_by_ghcb() {
                a.sti()?;
                a.nop()?;
            }
            match exit {
                0 => a.listen(REPORT)?,
                1 => a.port_in(PORT, 4)?,
                2 => a.msr_in(MSR)?,
                _ => a.convert(shared, 1, Side::Shared)?,
            }
            a.nop()?;
            a.cli()?;
            a.report()?;
            allow(a)?;
            report_came(a)?;
        }
        a.end(0)
    });
    let edge = Event::Interrupt(EDGE);
    let reads = [
        Exit::DoorbellRead { register: REPORT },
        Exit::PortRead { port: PORT, width: 4 },
        Exit::MsrRead { index: MSR },
    ];
    for (read, came) in reads.into_iter().zip([0x41, 0x4141, 0x41_4141]) {
        assert_eq!(guest.run(), read);
        // Before or after the answer is all the same.
        let is_before = came != 0x4141;
        if is_before {
            guest.vcpus[0].inject(edge).unwrap();
        }
        guest.vcpus[0].answer_read(0x1111).unwrap();
        if !is_before {
            guest.vcpus[0].inject(edge).unwrap();
        }
        assert_eq!(guest.report(), 0x1111, "{read:?}");
        assert_eq!(guest.report(), came, "{read:?}");
    }
    let request = guest.request();
    let conversion = guest.vm.convert(&request);
    assert_eq!(conversion.answer(), Answer::Done, "{:?}", conversion.cause());
    guest.vcpus[0].inject(edge).unwrap();
    guest.vcpus[0].answer_conversion(conversion).unwrap();
    assert_eq!(guest.report(), 0, "the guest has not heard that it was done");
    assert_eq!(guest.report(), 0x4141_4141);
    guest.end();
    Verdict::Met
}

pub(super) fn outlasts<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = interruptible(bench, config(bench, 1, edges()), |a| {
        for _ in 0..3 {
            report_came(a)?;
        }
        allow(a)?;
        report_came(a)?;
        a.end(0)
    });
    guest.vcpus[0].inject(Event::Interrupt(EDGE)).unwrap();
    for _ in 0..3 {
        guest.vcpus[0].kicker().kick();
        assert_eq!(guest.run(), Exit::Kicked);
        assert_eq!(guest.report(), 0, "interrupts are off");
    }
    guest.vcpus[0].kicker().kick();
    assert_eq!(guest.run(), Exit::Kicked);
    assert_eq!(guest.report(), 0x41);
    guest.end();
    Verdict::Met
}
