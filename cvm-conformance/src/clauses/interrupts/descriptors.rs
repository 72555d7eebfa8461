//! Interrupts by descriptor.

use super::guest::{
    EDGE, HIGH, INTERRUPTS, LEVEL, accept, allow, assert_no_descriptor, assert_refused, came, config, descriptor,
    edges, halt, handling, interruptible, report_came, signal, signal_soon, with_apic,
};
use crate::clause::Verdict;
use crate::guest::{MEMORY, REPORT};
use crate::quality;
use crate::subject::Bench;
use crate::vmm::{self, LIMIT};
use cvm_core::interrupt::Refusal;
use cvm_core::{Error, Event, Exit, GpaRange, InterruptPolicy, Platform, Vcpu, Vm, VmConfig};
use iced_x86::code_asm::*;
use std::fs;
use std::num::NonZeroU32;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// The number that the kernel gives an eventfd, by whatever descriptor.
fn identity(eventfd: &OwnedFd) -> Option<String> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", eventfd.as_raw_fd())).ok()?;
    info.lines().find(|line| line.starts_with("eventfd-id:")).map(str::to_owned)
}

pub(super) fn refused<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let guest = bench.guest(config(bench, 1, edges()), |a| a.end(0));
    assert_no_descriptor(guest.vm.interrupt_fd(0, EDGE));
    drop(guest);

    let config = match with_apic(bench, 2) {
        Ok(config) => config,
        Err(verdict) => return verdict,
    };
    let guest = bench.guest(config, |a| a.end(0));
    let refused = |vcpu, vector, why| {
        assert_refused(guest.vm.interrupt_fd(vcpu, vector), vcpu, Event::Interrupt(vector), why);
    };
    for vector in 0..32 {
        refused(0, vector, Refusal::Reserved);
    }
    for vector in [32, EDGE - 1, EDGE + 1, LEVEL, 255] {
        refused(1, vector, Refusal::NotAccepted);
    }
    for vcpu in [2, 256, u32::MAX] {
        assert_no_descriptor(guest.vm.interrupt_fd(vcpu, EDGE));
    }
    let first = descriptor(&guest.vm, 1, EDGE);
    let again = descriptor(&guest.vm, 1, EDGE);
    assert_eq!(identity(&first), identity(&again), "the same interrupt has two eventfds");
    let other = descriptor(&guest.vm, 0, EDGE);
    assert!(identity(&first).is_none() || identity(&first) != identity(&other), "two interrupts have one eventfd");
    Verdict::Met
}

pub(super) fn once<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let config = match with_apic(bench, 1) {
        Ok(config) => config,
        Err(verdict) => return verdict,
    };
    let mut guest = interruptible(bench, config, |a| {
        for _ in 0..3 {
            halt(a)?;
            report_came(a)?;
        }
        allow(a)?;
        report_came(a)?;
        a.end(0)
    });
    for came in [0x41, 0x4141, 0x41_4141] {
        let signalled = signal_soon(descriptor(&guest.vm, 0, EDGE));
        assert_eq!(guest.report(), came);
        signalled.join().unwrap();
    }
    assert_eq!(guest.report(), 0x41_4141, "it came more often than it was written");
    guest.end();
    assert_eq!(guest.vm.dropped_interrupts().unwrap(), 0);
    Verdict::Met
}

pub(super) fn spinning<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let config = match with_apic(bench, 1) {
        Ok(config) => config,
        Err(verdict) => return verdict,
    };
    let mut guest = interruptible(bench, config, |a| {
        a.sti()?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        came(a)?;
        a.test(eax, eax)?;
        a.je(again)?;
        a.cli()?;
        a.report()?;
        a.end(0)
    });
    let signalled = signal_soon(descriptor(&guest.vm, 0, HIGH));
    assert_eq!(guest.report(), 0x7f);
    guest.end();
    signalled.join().unwrap();
    Verdict::Met
}

pub(super) fn each<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let config = match with_apic(bench, 2) {
        Ok(config) => config,
        Err(verdict) => return verdict,
    };
    let mut guest = interruptible(bench, config, |a| {
        for _ in 0..2 {
            halt(a)?;
            report_came(a)?;
        }
        a.end(0)
    });
    let (tell, told) = mpsc::channel();
    let (vm, vcpus) = (&guest.vm, &mut guest.vcpus);
    thread::scope(|threads| {
        for vcpu in vcpus {
            let tell = tell.clone();
            threads.spawn(move || {
                loop {
                    match vmm::run(vm, vcpu).unwrap() {
                        Exit::DoorbellWrite { register: REPORT, value } => {
                            let _ = tell.send((vcpu.index(), value));
                        }
                        Exit::Ended { code: 0 } => return,
                        other => panic!("{other:?}"),
                    }
                }
            });
        }
        for (vcpu, vector, came) in [(1, HIGH, 0x7f), (0, EDGE, 0x41), (1, EDGE, 0x7f41), (0, HIGH, 0x417f)] {
            signal(&descriptor(vm, vcpu, vector));
            assert_eq!(told.recv_timeout(LIMIT), Ok((vcpu, came)));
        }
    });
    assert!(told.try_recv().is_err(), "there were more reports than interrupts");
    Verdict::Met
}

pub(super) fn above_255<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let config = match with_apic(bench, 1) {
        Ok(config) => config,
        Err(verdict) => return verdict,
    };
    // The pages by which so many vCPUs talk to their host reach further.
    let memory = vec![GpaRange::new(0, MEMORY + MEMORY / 2).unwrap()];
    let guest = handling(bench, VmConfig { memory, vcpus: 258, ..config }, &INTERRUPTS, |a| {
        halt(a)?;
        report_came(a)?;
        a.end(0)
    });
    let mut guest = match guest {
        Ok(guest) => guest,
        Err(Error::Config(reason)) => return Verdict::NotOffered(reason),
        Err(error) => panic!("{}", quality::told(&error)),
    };
    // Their ids have the same low byte.
    for (vcpu, vector) in [(1, EDGE), (257, HIGH)] {
        signal(&descriptor(&guest.vm, vcpu, vector));
    }
    for (vcpu, vector) in [(1, EDGE), (257, HIGH)] {
        let reported = vmm::drive(&guest.vm, &mut guest.vcpus[vcpu]).unwrap();
        assert_eq!(reported, Exit::DoorbellWrite { register: REPORT, value: vector.into() });
    }
    Verdict::Met
}

pub(super) fn at_run_time<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let config = match with_apic(bench, 2) {
        Ok(config) => config,
        Err(verdict) => return verdict,
    };
    let mut guest = interruptible(bench, VmConfig { interrupts: InterruptPolicy::default(), ..config }, |a| {
        accept(a, EDGE.into())?;
        a.report()?;
        halt(a)?;
        report_came(a)?;
        a.end(0)
    });
    let (edge, high) = (Event::Interrupt(EDGE), Event::Interrupt(HIGH));
    assert_refused(guest.vm.interrupt_fd(0, EDGE), 0, edge, Refusal::NotAccepted);
    guest.report();
    assert_refused(guest.vm.interrupt_fd(1, EDGE), 1, edge, Refusal::NotAccepted);
    assert_refused(guest.vm.interrupt_fd(0, HIGH), 0, high, Refusal::NotAccepted);
    signal(&descriptor(&guest.vm, 0, EDGE));
    assert_eq!(guest.report(), 0x41);
    guest.end();
    Verdict::Met
}

pub(super) fn limit<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let config = match with_apic(bench, 1) {
        Ok(config) => config,
        Err(verdict) => return verdict,
    };
    let most = NonZeroU32::new(1).unwrap();
    let config = VmConfig { interrupts: edges().limit(most), ..config };
    let mut guest = interruptible(bench, config, |a| {
        allow(a)?;
        report_came(a)?;
        halt(a)?;
        report_came(a)?;
        a.end(0)
    });
    let edge = descriptor(&guest.vm, 0, EDGE);
    // Interrupts are counted together, by whatever way they come. A slow host may have a new second in between.
    let (mut written, start) = (0, Instant::now());
    while guest.vm.dropped_interrupts().unwrap() == 0 {
        assert!(
            start.elapsed() < LIMIT,
            "none of {written} writes was dropped, each in the second of another interrupt"
        );
        while guest.vcpus[0].inject(Event::Interrupt(HIGH)).is_err() {
            thread::sleep(Duration::from_millis(10));
        }
        let begin = Instant::now();
        signal(&edge);
        written += 1;
        while guest.vm.dropped_interrupts().unwrap() == 0 && begin.elapsed() < Duration::from_secs(1) {
            thread::sleep(Duration::from_millis(1));
        }
    }
    let came = if written == 1 { 0x7f } else { 0x7f41 };
    assert_eq!(guest.report(), came, "what was dropped came later");
    let woken = AtomicBool::new(false);
    let last = thread::scope(|threads| {
        threads.spawn(|| {
            while !woken.load(Ordering::SeqCst) {
                signal(&edge);
                thread::sleep(Duration::from_millis(200));
            }
        });
        let last = guest.try_run(0);
        woken.store(true, Ordering::SeqCst);
        last
    });
    let value = came << 8 | u32::from(EDGE);
    assert_eq!(last.unwrap(), Exit::DoorbellWrite { register: REPORT, value }, "no second after it is a new one");
    guest.end();
    Verdict::Met
}
