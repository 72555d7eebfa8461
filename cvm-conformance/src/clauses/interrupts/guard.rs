//! The interrupt guard.

use super::guest::{
    EDGE, HIGH, LEVEL, accept, allow, assert_refused, config, edges, interruptible, levels, report_came,
};
use crate::VmOf;
use crate::clause::Verdict;
use crate::quality;
use crate::subject::Bench;
use cvm_core::doorbell::{Access, Doorbell, control};
use cvm_core::interrupt::{Guarding, Refusal};
use cvm_core::platform::{Asset, Party, Powers};
use cvm_core::{Error, Event, InterruptPolicy, Platform, Vcpu, Vm, VmConfig};
use iced_x86::code_asm::*;
use std::num::NonZeroU32;
use std::thread;
use std::time::{Duration, Instant};

pub(super) fn who_guards<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let guest = bench.guest(bench.config(1), |a| a.end(0));
    let powers = bench.platform.trust_model().powers(Party::VmmProcess, Asset::Interrupts);
    match guest.vm.guarding() {
        Guarding::Enforced => assert_eq!(powers & !Powers::READ, Powers::empty(), "the vmm can get around the guard"),
        Guarding::Library => assert!(powers.contains(Powers::WRITE), "nobody keeps the vmm from anything"),
    }
    Verdict::Met
}

pub(super) fn refuses<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let policy = InterruptPolicy::default().accept(EDGE).and_then(|policy| policy.accept_level(LEVEL)).unwrap();
    let mut guest = interruptible(bench, config(bench, 1, policy), |a| {
        allow(a)?;
        report_came(a)?;
        a.end(0)
    });
    let mut refused = |event, why| assert_refused(guest.vcpus[0].inject(event), 0, event, why);
    for vector in 0..=255 {
        let none = if vector < 32 { Refusal::Reserved } else { Refusal::NotAccepted };
        if vector != EDGE {
            refused(Event::Interrupt(vector), if vector == LEVEL { Refusal::WrongTrigger } else { none });
        }
        if vector != LEVEL {
            let why = if vector == EDGE { Refusal::WrongTrigger } else { none };
            refused(Event::Line { vector, asserted: true }, why);
            refused(Event::Line { vector, asserted: false }, why);
        }
    }
    assert_eq!(guest.report(), 0, "something arrived that was refused");
    guest.end();
    Verdict::Met
}

pub(super) fn at_run_time<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let config = VmConfig { doorbell: Doorbell::Msr, ..config(bench, 2, InterruptPolicy::default()) };
    let mut guest = interruptible(bench, config, |a| {
        a.report()?;
        accept(a, EDGE.into())?;
        a.report()?;
        allow(a)?;
        report_came(a)?;
        a.end(0)
    });
    let (edge, high) = (Event::Interrupt(EDGE), Event::Interrupt(HIGH));
    guest.report();
    assert_refused(guest.vcpus[0].inject(edge), 0, edge, Refusal::NotAccepted);
    guest.report();
    guest.vcpus[0].inject(edge).expect("it has accepted the vector");
    assert_refused(guest.vcpus[0].inject(high), 0, high, Refusal::NotAccepted);
    assert_refused(guest.vcpus[1].inject(edge), 1, edge, Refusal::NotAccepted);
    assert_eq!(guest.report(), 0x41);
    guest.end();
    Verdict::Met
}

pub(super) fn no_exceptions<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    // Each vCPU tries one: an exception, one as a level, a vector with a bit that means nothing.
    let tried = [31, 14 | control::ACCEPT_LEVEL, u32::from(EDGE) | 0x200];
    let mut guest = bench.guest(config(bench, 3, edges()), |a| {
        a.mov(eax, tried[0])?;
        for (vcpu, value) in (1..).zip(&tried[1..]) {
            a.mov(ebx, *value)?;
            a.cmp(edi, vcpu)?;
            a.cmove(eax, ebx)?;
        }
        a.ring(control::ACCEPT)?;
        a.end(1)
    });
    for (index, value) in tried.into_iter().enumerate() {
        let error = guest.try_run(index).expect_err("it has accepted an exception");
        let is_named = matches!(
            error,
            Error::UnknownDoorbell { vcpu, register: control::ACCEPT, access: Access::Write(written) }
                if vcpu == index as u32 && written == value
        );
        assert!(is_named, "{value:#x}: {}", quality::told(&error));
    }
    Verdict::Met
}

pub(super) fn triggers<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = interruptible(bench, config(bench, 1, edges()), |a| {
        accept(a, u32::from(LEVEL) | control::ACCEPT_LEVEL)?;
        // Once more is no change.
        accept(a, u32::from(LEVEL) | control::ACCEPT_LEVEL)?;
        a.report()?;
        accept(a, u32::from(EDGE) | control::ACCEPT_LEVEL)?;
        a.end(1)
    });
    let raised = Event::Line { vector: LEVEL, asserted: true };
    assert_refused(guest.vcpus[0].inject(raised), 0, raised, Refusal::NotAccepted);
    guest.report();
    let edge = Event::Interrupt(LEVEL);
    assert_refused(guest.vcpus[0].inject(edge), 0, edge, Refusal::WrongTrigger);
    for asserted in [true, false] {
        let line = Event::Line { vector: EDGE, asserted };
        assert_refused(guest.vcpus[0].inject(line), 0, line, Refusal::WrongTrigger);
        guest.vcpus[0].inject(Event::Line { vector: LEVEL, asserted }).expect("it has accepted the level");
    }
    let error = guest.try_run(0).expect_err("the vector has the other trigger now");
    assert!(matches!(error, Error::Crashed { vcpu: 0, .. }), "{}", quality::told(&error));
    quality::assert_good(&error);
    Verdict::Met
}

pub(super) fn limit<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let most = NonZeroU32::new(2).unwrap();
    let mut guest = interruptible(bench, config(bench, 2, levels().limit(most)), |a| {
        allow(a)?;
        report_came(a)?;
        a.end(0)
    });
    let edge = Event::Interrupt(EDGE);
    let begin = Instant::now();
    // When each interrupt was injected: not before the first time, and not after the second.
    let mut injected = Vec::new();
    let mut inject = |vcpu: &mut <VmOf<P> as Vm>::Vcpu| {
        let before = Instant::now();
        let result = vcpu.inject(edge);
        injected.extend(result.is_ok().then(|| (before, Instant::now())));
        result
    };
    inject(&mut guest.vcpus[0]).expect("it is the first one");
    // One at the begin of a second and others around its end: a guard that begins to count anew then lets too many pass.
    thread::sleep(Duration::from_millis(900));
    while begin.elapsed() < Duration::from_millis(1500) {
        // It is the guard's to say when there were too many.
        let _ = inject(&mut guest.vcpus[0]);
        thread::sleep(Duration::from_millis(10));
    }
    for (first, last) in injected.iter().zip(injected.iter().skip(2)) {
        let within = last.1 - first.0;
        assert!(within >= Duration::from_secs(1), "three interrupts within {within:?}");
    }
    guest.vcpus[1].inject(edge).expect("each vcpu is counted by itself");
    // It would refuse for as long as nobody waits.
    let refused = (0..1000).find_map(|_| guest.vcpus[0].inject(edge).err()).expect("it never refuses");
    assert_refused::<()>(Err(refused), 0, edge, Refusal::TooMany { most });
    while guest.vcpus[0].inject(edge).is_err() {
        assert!(begin.elapsed() < Duration::from_secs(60), "no second after it is a new one");
        thread::sleep(Duration::from_millis(50));
    }
    // Longer than a second after the last one there are as many again as the limit says, and not fewer.
    thread::sleep(Duration::from_millis(1100));
    for number in 1..=most.get() {
        guest.vcpus[0].inject(edge).unwrap_or_else(|error| panic!("number {number}: {}", quality::told(&error)));
    }
    assert_eq!(guest.report(), 0x41);
    guest.end();
    Verdict::Met
}
