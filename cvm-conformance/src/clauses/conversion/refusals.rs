//! Requests that are not carried out, or not yet.

use super::guest_state;
use crate::Bench;
use crate::clause::{Clause, Verdict};
use crate::guest::{DATA, MEMORY, REPORT};
use crate::vmm::{Guest, drive, range};
use cvm_core::doorbell::Transport;
use cvm_core::memory::ConversionTotals;
use cvm_core::{Answer, ConversionRequest, Error, Exit, PAGE_SIZE, PageState, Platform, Side, Vcpu, Vm};
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("4.13", "a request that makes no sense is not done and changes nothing", senseless),
        Clause::new("4.14", "a host converts what its guest has asked for and nothing else", forged),
        Clause::new("4.15", "an answer is good for its own request alone", mixed_up),
        Clause::new("4.16", "a guest that was refused is not converted behind its back", behind_its_back),
        Clause::new("4.17", "a conversion to private waits for pins and names who holds them", pinned),
        Clause::new("4.18", "a guest that asks until it is done gets there", until_done),
    ]
}

fn senseless<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const FAR: u64 = (u32::MAX as u64) * PAGE_SIZE;
    let mut requests =
        vec![(DATA, 0), (MEMORY, 1), (MEMORY - PAGE_SIZE, 2), (MEMORY + PAGE_SIZE, 9), (FAR, 1), (FAR, 0)];
    let mut transport = None;
    let mut guest = bench.guest(bench.config(1), |a| {
        // What page state changes cannot say: they name each page.
        if a.transport() != Transport::PageState {
            requests.extend([
                (DATA, MEMORY / PAGE_SIZE),
                (DATA, u32::MAX.into()),
                (FAR, u32::MAX.into()),
                (0, u32::MAX.into()),
            ]);
        }
        transport = Some(a.transport());
        a.store(DATA, Side::Private, 0x1111)?;
        a.report()?;
        for (gpa, pages) in &requests {
            for side in [Side::Shared, Side::Private] {
                a.ask(*gpa, *pages, side)?;
                a.report()?;
            }
        }
        if a.transport() == Transport::Hypercall {
            for (gpa, pages) in [(DATA + 1, 1), (DATA, u64::MAX), (DATA, 1 << 52), (u64::MAX - 0xfff, 1), (1 << 52, 1)]
            {
                a.mov(rbx, gpa)?;
                a.map_gpa_range(pages, 0)?;
                a.report()?;
            }
        }
        a.load(DATA, Side::Private)?;
        a.report()?;
        a.end(0)
    });
    guest.report();
    let before = guest.allocated();
    let more = if transport == Some(Transport::Hypercall) { 5 } else { 0 };
    let mut arrived = 0;
    for number in 0..2 * requests.len() + more {
        let what = requests.get(number / 2);
        // Some never arrive, because whoever is in between has answered already.
        let exit = match guest.run() {
            Exit::Conversion(request) => {
                arrived += 1;
                let refused = guest.vm.convert(&request);
                assert_eq!((refused.answer(), refused.pages()), (Answer::Invalid, 0), "{what:x?}: {request:x?}");
                let cause = refused.cause();
                let is_sound =
                    matches!(cause, Some(Error::InvalidRequest { vcpu: 0, .. } | Error::OutsideMemory { .. }));
                assert!(is_sound, "{what:x?}: {request:x?}: {cause:?}");
                guest.vcpus[0].answer_conversion(refused).unwrap();
                guest.run()
            }
            exit => exit,
        };
        let Exit::DoorbellWrite { register: REPORT, value } = exit else { panic!("{what:x?}: {exit:x?}") };
        assert_ne!(value, 0, "the guest was told that it is done: {what:x?}");
    }
    assert_eq!(guest.report(), 0x1111);
    guest.end();
    assert_eq!((guest.allocated(), guest.shared_pages()), (before, 0));
    guest.assert_private(range(DATA, 16));
    let totals = ConversionTotals { requests: arrived, refused: arrived, ..Default::default() };
    assert_eq!(guest.conversions(), totals);
    Verdict::Met
}

/// That the host cannot carry out these requests: vCPU, address, pages, side.
fn assert_forged<V: Vm>(guest: &Guest<V>, when: &str, what: &[(u32, u64, u64, Side)]) {
    let before = guest.shared_pages();
    for (vcpu, gpa, pages, to) in what {
        let request = ConversionRequest::from_guest(*vcpu, *gpa, *pages, *to);
        let refused = guest.vm.convert(&request);
        assert_eq!((refused.answer(), refused.pages()), (Answer::Invalid, 0), "{when}: {request:x?}");
        let cause = refused.cause();
        let is_named = matches!(cause, Some(Error::NotAsked { vcpu: by, gpa: at }) if (*by, at.0) == (*vcpu, *gpa));
        assert!(is_named, "{when}: {request:x?}: {cause:?}");
    }
    assert_eq!(guest.shared_pages(), before, "{when}");
}

fn forged<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(2), |a| {
        a.convert(DATA, 2, Side::Shared)?;
        a.report()?;
        a.end(0)
    });
    let asked = (0, DATA, 2, Side::Shared);
    assert_forged(&guest, "before anybody has asked", &[asked, (1, DATA, 2, Side::Shared), (7, 0, 1, Side::Shared)]);
    let request = guest.request();
    let others = [
        (1, DATA, 2, Side::Shared),
        (u32::MAX, DATA, 2, Side::Shared),
        (0, DATA - PAGE_SIZE, 2, Side::Shared),
        (0, DATA, 3, Side::Shared),
        (0, DATA, 1, Side::Shared),
        (0, DATA + PAGE_SIZE, 1, Side::Shared),
        (0, DATA, 2, Side::Private),
        (0, DATA, 0, Side::Shared),
        (0, u64::MAX, u64::MAX, Side::Shared),
    ];
    assert_forged(&guest, "another one than was asked for", &others);
    assert_eq!(guest.conversions().requests, 0);

    let done = guest.vm.convert(&request);
    assert_eq!((done.answer(), done.pages()), (Answer::Done, 2), "{:?}", done.cause());
    assert_forged(&guest, "once more", &[asked]);
    guest.vcpus[0].answer_conversion(done).unwrap();
    assert_eq!(guest.report(), 0);
    assert_forged(&guest, "after the answer", &[asked, (0, DATA, 2, Side::Private)]);
    assert_eq!(guest.conversions().requests, 1);
    assert_eq!(guest.shared_pages(), 2);
    guest.end();
    assert_forged(&guest, "after the end", &[asked, (0, DATA, 2, Side::Private)]);
    Verdict::Met
}

fn mixed_up<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let guest = || {
        bench.guest(bench.config(2), |a| {
            for _ in 0..2 {
                a.lea(ebx, edi + (DATA / PAGE_SIZE) as u32)?;
                a.ask_frame(1, Side::Shared)?;
                a.report()?;
            }
            a.end(0)
        })
    };
    let request = |guest: &mut Guest<_>, vcpu: usize| match guest.try_run(vcpu) {
        Ok(Exit::Conversion(request)) => request,
        other => panic!("{other:?} where a request should be"),
    };
    // Those of two vCPUs, and those of two VMs in which the same vCPU asks for the same.
    let (mut here, mut there) = (guest(), guest());
    let conversions = [0, 1].map(|vcpu| {
        let request = request(&mut here, vcpu);
        here.vm.convert(&request)
    });
    let elsewhere = request(&mut there, 0);
    let elsewhere = there.vm.convert(&elsewhere);
    let is_refused = |result| matches!(result, Err(Error::Protocol { .. }));
    let [of_first, of_second] = conversions;
    assert!(is_refused(here.vcpus[0].answer_conversion(of_second)), "it took another vcpu's answer");
    assert!(is_refused(here.vcpus[0].answer_conversion(elsewhere)), "it took an answer of another vm");
    assert!(is_refused(here.vcpus[1].answer_conversion(of_first)), "it took another vcpu's answer");
    assert!(is_refused(here.vcpus[0].answer_read(0)), "a request is no read");
    assert!(is_refused(here.vcpus[0].run().map(drop)), "it ran before it was answered");
    // They still can be refused, once, and ask again.
    for vcpu in [0, 1] {
        here.vcpus[vcpu].refuse_conversion().unwrap();
        assert!(is_refused(here.vcpus[vcpu].refuse_conversion()), "nothing waits for an answer");
        assert_ne!(here.report_of(vcpu), 0);
        let again = request(&mut here, vcpu);
        let again = here.vm.convert(&again);
        assert_eq!((again.answer(), again.pages()), (Answer::Done, 0), "{:?}", again.cause());
        here.vcpus[vcpu].answer_conversion(again).unwrap();
        assert_eq!(here.report_of(vcpu), 0);
        assert_eq!(here.try_run(vcpu).unwrap(), Exit::Ended { code: 0 });
    }
    Verdict::Met
}

fn behind_its_back<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(1), |a| {
        for (side, value) in [(Side::Private, 0x1111), (Side::Shared, 0x2222)] {
            a.store(DATA, side, value)?;
            a.convert(DATA, 1, side.other())?;
            a.report()?;
            a.load(DATA, side)?;
            a.report()?;
            if side == Side::Private {
                a.convert(DATA, 1, Side::Shared)?;
            }
        }
        a.end(0)
    });
    for (side, value) in [(Side::Private, 0x1111), (Side::Shared, 0x2222)] {
        let before = guest.conversions();
        let request = guest.request();
        guest.vcpus[0].refuse_conversion().unwrap();
        let late = guest.vm.convert(&request);
        assert!(matches!(late.cause(), Some(Error::NotAsked { .. })), "{:?}", late.cause());
        assert_ne!(guest.report(), 0, "the guest was told that it is done");
        let late = guest.vm.convert(&request);
        assert!(matches!(late.cause(), Some(Error::NotAsked { .. })), "{:?}", late.cause());
        assert_eq!(guest.report(), value);
        assert_eq!(guest_state(&guest, DATA), Some(side.into()));
        assert_eq!(guest.conversions(), before);
        if side == Side::Private {
            assert_eq!(guest.convert().pages, 1);
        }
    }
    guest.end();
    Verdict::Met
}

fn pinned<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(1), |a| {
        a.convert(DATA, 1, Side::Shared)?;
        a.store(DATA, Side::Shared, 0x1111)?;
        a.convert(DATA, 1, Side::Private)?;
        a.report()?;
        a.load(DATA, Side::Shared)?;
        a.report()?;
        a.convert(DATA + PAGE_SIZE, 1, Side::Shared)?;
        a.report()?;
        a.convert(DATA, 1, Side::Private)?;
        a.report()?;
        a.end(0)
    });
    assert_eq!(guest.convert().pages, 1);
    let memory = guest.vm.memory();
    let (disk, idle, card) = (memory.named("disk"), memory.named("idle"), memory.named("network card"));
    let pins = [disk.memory(), card.memory()];
    drop(idle.memory());
    let put_off = guest.convert();
    assert_eq!((put_off.answer, put_off.pages), (Answer::Retry, 0), "{}", put_off.cause);
    let said = ["pinned", "disk", "network card", "0x300000..0x301000"];
    assert!(said.iter().all(|part| put_off.cause.contains(part)), "{}", put_off.cause);
    assert!(!put_off.cause.contains("idle"), "{}", put_off.cause);
    for pin in &pins {
        assert_eq!(pin.read_obj::<u32>(GuestAddress(DATA)).unwrap(), 0x1111, "it did not stay as it was");
    }
    assert_ne!(guest.report(), 0);
    assert_eq!(guest.report(), 0x1111);
    assert_eq!(guest.convert().answer, Answer::Done, "sharing more waits for pins");
    assert_eq!(guest.report(), 0);
    drop(pins);
    let done = guest.convert();
    assert_eq!((done.answer, done.pages), (Answer::Done, 1), "{}", done.cause);
    assert_eq!(guest.report(), 0);
    guest.assert_private(range(DATA, 1));
    guest.end();
    Verdict::Met
}

fn until_done<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    // More runs of pages than a conversion does at once.
    const RUNS: u64 = 260;
    const BASE: u64 = 64 << 20;
    let mut config = bench.config(1);
    config.memory.push(range(BASE, 2 * RUNS));
    let mut guest = bench.guest(config, |a| {
        let (mut page, mut refused, mut again) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(r8d, RUNS as u32)?;
        a.mov(r9, BASE / PAGE_SIZE)?;
        a.set_label(&mut page)?;
        a.mov(rbx, r9)?;
        a.ask_frame(1, Side::Shared)?;
        a.test(eax, eax)?;
        a.jne(refused)?;
        a.add(r9, 2)?;
        a.dec(r8d)?;
        a.jne(page)?;
        a.report()?;
        a.set_label(&mut again)?;
        a.ask(BASE, 2 * RUNS, Side::Private)?;
        a.test(eax, eax)?;
        a.jne(again)?;
        a.end(0)?;
        a.set_label(&mut refused)?;
        a.end(1)
    });
    let Guest { vm, vcpus, .. } = &mut guest;
    assert_eq!(drive(vm, &mut vcpus[0]).unwrap(), Exit::DoorbellWrite { register: REPORT, value: 0 });
    assert_eq!(guest.shared_pages(), RUNS);
    let mut converted = 0;
    let exit = loop {
        match guest.run() {
            Exit::Conversion(request) => {
                let conversion = guest.vm.convert(&request);
                assert_ne!(conversion.answer(), Answer::Invalid, "{:?}", conversion.cause());
                assert_ne!((conversion.answer(), conversion.pages()), (Answer::Retry, 0), "{:?}", conversion.cause());
                converted += conversion.pages();
                guest.vcpus[0].answer_conversion(conversion).unwrap();
            }
            exit => break exit,
        }
    };
    assert_eq!((exit, converted, guest.shared_pages()), (Exit::Ended { code: 0 }, RUNS, 0));
    assert_eq!(guest_state(&guest, BASE), Some(PageState::Private));
    Verdict::Met
}
