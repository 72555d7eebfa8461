//! VMs and vCPUs on several threads.

use super::kicks::wait_for;
use crate::clause::Verdict;
use crate::guest::{DATA, REPORT};
use crate::vmm::{self, LIMIT};
use crate::{Bench, Guest};
use cvm_core::{Answer, Exit, Platform, Side, Vcpu, Vm, Watchdog};
use iced_x86::code_asm::*;
use std::thread;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// The exit of a report.
fn said(value: u32) -> Exit {
    Exit::DoorbellWrite { register: REPORT, value }
}

pub(super) fn keeps_its_vm<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(3), |a| {
        a.report()?;
        a.store(DATA, Side::Private, 0x1111)?;
        a.load(DATA, Side::Private)?;
        a.report()?;
        a.end(0)
    });
    guest.report_of(1);
    let mut last = guest.vcpus.remove(1);
    let _watchdog = Watchdog::new(LIMIT, vec![last.kicker()]).unwrap();
    // The VM, a vCPU that has run, and one that never has.
    guest.report_of(0);
    drop(guest);
    assert_eq!(last.index(), 1);
    assert_eq!(last.run().unwrap(), said(0x1111));
    last.kicker().kick();
    assert_eq!(last.run().unwrap(), Exit::Kicked);
    assert_eq!(last.run().unwrap(), Exit::Ended { code: 0 });
    Verdict::Met
}

pub(super) fn dropped_meanwhile<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(1), |a| {
        a.convert(DATA, 1, Side::Shared)?;
        wait_for(a, DATA)?;
        a.report()?;
        a.end(0)
    });
    assert_eq!(guest.convert().answer, Answer::Done);
    let Guest { mut vcpus, vm, .. } = guest;
    let mut vcpu = vcpus.remove(0);
    let view = vm.memory().clone();
    let _watchdog = Watchdog::new(LIMIT, vec![vcpu.kicker()]).unwrap();
    thread::scope(|scope| {
        let runs = scope.spawn(move || {
            assert_eq!(vcpu.run().unwrap(), said(0x2222));
            assert_eq!(vcpu.run().unwrap(), Exit::Ended { code: 0 });
        });
        // Long enough for the guest to be where it waits, most times.
        thread::sleep(Duration::from_millis(20));
        drop(vm);
        view.memory().write_obj(0x2222u32, GuestAddress(DATA)).expect("the view lives on, and the page is shared");
        runs.join().unwrap();
    });
    Verdict::Met
}

pub(super) fn moves<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(1), |a| {
        a.mov(r12d, 0x1111u32)?;
        a.listen(REPORT)?;
        a.add(eax, r12d)?;
        a.report()?;
        a.convert(DATA, 1, Side::Shared)?;
        a.report()?;
        wait_for(a, DATA)?;
        a.add(eax, r12d)?;
        a.report()?;
        a.end(0)
    });
    let mut vcpu = guest.vcpus.remove(0);
    let vm = &guest.vm;
    /// Does this on a thread of its own.
    fn elsewhere<V: Send, R: Send>(vcpu: &mut V, act: impl FnOnce(&mut V) -> R + Send) -> R {
        thread::scope(|scope| scope.spawn(|| act(vcpu)).join().unwrap())
    }
    let asked = elsewhere(&mut vcpu, |vcpu| vmm::run(vm, vcpu).unwrap());
    assert_eq!(asked, Exit::DoorbellRead { register: REPORT });
    elsewhere(&mut vcpu, |vcpu| vcpu.answer_read(1).unwrap());
    assert_eq!(elsewhere(&mut vcpu, |vcpu| vcpu.run().unwrap()), said(0x1112));
    let Exit::Conversion(request) = elsewhere(&mut vcpu, |vcpu| vcpu.run().unwrap()) else { panic!("no conversion") };
    let conversion = elsewhere(&mut vcpu, |_| vm.convert(&request));
    elsewhere(&mut vcpu, |vcpu| vcpu.answer_conversion(conversion).unwrap());
    assert_eq!(elsewhere(&mut vcpu, |vcpu| vcpu.run().unwrap()), said(0));
    // Kicks find it wherever it is.
    for _ in 0..3 {
        let watchdog = Watchdog::new(Duration::from_millis(20), vec![vcpu.kicker()]).unwrap();
        assert_eq!(elsewhere(&mut vcpu, |vcpu| vcpu.run().unwrap()), Exit::Kicked);
        assert!(watchdog.fired());
    }
    vm.memory().memory().write_obj(2u32, GuestAddress(DATA)).unwrap();
    assert_eq!(vcpu.run().unwrap(), said(0x1113));
    assert_eq!(elsewhere(&mut vcpu, |vcpu| vcpu.run().unwrap()), Exit::Ended { code: 0 });
    assert!(!guest.is_overdue());
    Verdict::Met
}
