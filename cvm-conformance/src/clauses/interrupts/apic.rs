//! Local APICs.

use super::guest::{
    EDGE, FAULT, HIGH, LEVEL, accept, allow, assert_refused, descriptor, halt, handling, interruptible, report_came,
    signal, with_apic,
};
use crate::clause::Verdict;
use crate::quality;
use crate::subject::Bench;
use cvm_core::doorbell::control;
use cvm_core::interrupt::Refusal;
use cvm_core::launch::APIC_PAGE;
use cvm_core::{Error, Event, Exit, Gpa, Platform, Side, Vcpu, VmConfig};
use iced_x86::code_asm::*;
use std::thread;
use std::time::Duration;

/// `IA32_APIC_BASE`, the APIC's id, and its spurious-interrupt vector register (Intel SDM, volume 3, section 12.12).
const BASE: u32 = 0x1b;
const ID: u32 = 0x802;
const SPURIOUS: u32 = 0x80f;

pub(super) fn mode<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let config = match with_apic(bench, 2) {
        Ok(config) => config,
        Err(verdict) => return verdict,
    };
    let mut guest = handling(bench, config, &[FAULT], |a| {
        for msr in [BASE, ID, SPURIOUS] {
            a.msr_in(msr)?;
            a.report()?;
        }
        a.msr_in(BASE)?;
        // Neither enabled nor in x2APIC mode.
        a.and(eax, !0xc00)?;
        a.msr_out(BASE)?;
        report_came(a)?;
        a.msr_in(BASE)?;
        a.report()?;
        a.end(0)
    })
    .unwrap();
    for (vcpu, base) in [(0, 0xfee0_0d00), (1, 0xfee0_0c00)] {
        let mut report = || guest.report_of(vcpu);
        assert_eq!([report(), report(), report()], [base, vcpu as u32, 0x1ff]);
        // Whoever asks by a page gets the fault there.
        let came = report();
        assert!([u32::from(FAULT), 0].contains(&came), "{came:#x}");
        assert_eq!(report(), base, "it has turned to another mode");
    }
    Verdict::Met
}

pub(super) fn page<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let config = match with_apic(bench, 2) {
        Ok(config) => config,
        Err(verdict) => return verdict,
    };
    let version = APIC_PAGE.0 + 0x30;
    let mut guest = bench.guest(config, |a| {
        // Each vCPU tries a side.
        let [private, shared] = [Side::Private, Side::Shared].map(|side| a.address(version, side));
        a.mov(rbx, private)?;
        a.mov(rcx, shared)?;
        a.test(edi, edi)?;
        a.cmovne(rbx, rcx)?;
        a.mov(eax, dword_ptr(rbx))?;
        a.report()
    });
    for vcpu in 0..2 {
        match guest.try_run(vcpu) {
            Err(Error::MmioRefused { gpa, write: false, .. }) => {
                // Some know the page alone.
                assert!([APIC_PAGE, Gpa(version)].contains(&gpa), "{gpa}");
            }
            // Who cannot find the instruction in private memory does not know what it accesses.
            Err(Error::Crashed { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    Verdict::Met
}

pub(super) fn edges_only<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let config = match with_apic(bench, 1) {
        Ok(config) => config,
        Err(verdict) => return verdict,
    };
    let levels = VmConfig { interrupts: config.interrupts.accept_level(LEVEL).unwrap(), ..config.clone() };
    let refused = bench.platform.launch(levels).map(drop).expect_err("an apic takes a level");
    assert!(matches!(refused, Error::Config(_)), "{}", quality::told(&refused));

    let mut guest = interruptible(bench, config, |a| {
        allow(a)?;
        report_came(a)?;
        accept(a, u32::from(LEVEL) | control::ACCEPT_LEVEL)?;
        a.end(1)
    });
    for (event, why) in [
        (Event::Line { vector: EDGE, asserted: true }, Refusal::EdgesOnly),
        (Event::Line { vector: EDGE, asserted: false }, Refusal::EdgesOnly),
        (Event::Interrupt(LEVEL), Refusal::NotAccepted),
        (Event::Interrupt(31), Refusal::Reserved),
    ] {
        assert_refused(guest.vcpus[0].inject(event), 0, event, why);
    }
    assert_eq!(guest.report(), 0, "something arrived that was refused");
    let error = guest.try_run(0).expect_err("it has accepted a level");
    assert!(matches!(error, Error::Crashed { vcpu: 0, .. }), "{}", quality::told(&error));
    quality::assert_good(&error);
    Verdict::Met
}

pub(super) fn injected<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let config = match with_apic(bench, 1) {
        Ok(config) => config,
        Err(verdict) => return verdict,
    };
    let mut guest = interruptible(bench, config, |a| {
        report_came(a)?;
        allow(a)?;
        report_came(a)?;
        halt(a)?;
        report_came(a)?;
        a.end(0)
    });
    for vector in [EDGE, HIGH, EDGE] {
        guest.vcpus[0].inject(Event::Interrupt(vector)).unwrap();
    }
    assert_eq!(guest.report(), 0, "interrupts are off");
    assert_eq!(guest.report(), 0x7f41);
    // A halt is no exit, so that the thread must be called out of it.
    let kicker = guest.vcpus[0].kicker();
    let kicked = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        kicker.kick();
    });
    assert_eq!(guest.run(), Exit::Kicked);
    kicked.join().unwrap();
    guest.vcpus[0].inject(Event::Interrupt(HIGH)).unwrap();
    assert_eq!(guest.report(), 0x7f_417f);
    guest.end();
    Verdict::Met
}

pub(super) fn off<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let config = match with_apic(bench, 1) {
        Ok(config) => config,
        Err(verdict) => return verdict,
    };
    let mut guest = interruptible(bench, config, |a| {
        // Without its enable bit, and then with it again.
        for value in [0xffu32, 0x1ff] {
            a.mov(eax, value)?;
            a.xor(edx, edx)?;
            a.msr_out(SPURIOUS)?;
            report_came(a)?;
        }
        allow(a)?;
        report_came(a)?;
        a.end(0)
    });
    let eventfd = descriptor(&guest.vm, 0, EDGE);
    assert_eq!(guest.report(), 0);
    signal(&eventfd);
    guest.vcpus[0].inject(Event::Interrupt(EDGE)).expect("that it is lost is no failure");
    assert_eq!(guest.report(), 0);
    guest.vcpus[0].inject(Event::Interrupt(HIGH)).unwrap();
    assert_eq!(guest.report(), 0x7f);
    guest.end();
    Verdict::Met
}
