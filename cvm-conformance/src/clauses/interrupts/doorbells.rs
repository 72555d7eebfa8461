//! Doorbells by descriptor.

use super::guest::{assert_no_descriptor, taken};
use crate::clause::Verdict;
use crate::quality;
use crate::subject::Bench;
use crate::vmm::{self, LIMIT};
use cvm_core::doorbell::{Access, Doorbell, PORT_BASE, SPACE, control, device_base};
use cvm_core::{Error, Exit, Platform, Vcpu, Vm, VmConfig};
use iced_x86::code_asm::*;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

pub(super) fn counted<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let notify = device_base(3) + 0x50;
    let mut guest = bench.guest(bench.config(1), |a| {
        for value in [0, 7, u32::MAX] {
            a.mov(eax, value)?;
            a.ring(notify)?;
        }
        a.mov(eax, 5)?;
        a.ring(notify + 4)?;
        a.ring(notify)?;
        a.listen(notify)?;
        a.report()?;
        // Half a register is none.
        a.port_out(PORT_BASE + notify, 2)
    });
    let eventfd = guest.vm.doorbell_fd(notify).unwrap();
    assert_eq!(taken(&eventfd), 0);
    assert_eq!(guest.run(), Exit::DoorbellWrite { register: notify + 4, value: 5 });
    assert_eq!(taken(&eventfd), 3);
    assert_eq!(guest.run(), Exit::DoorbellRead { register: notify });
    assert_eq!(taken(&eventfd), 1);
    guest.vcpus[0].answer_read(0x55).unwrap();
    assert_eq!(guest.report(), 0x55);
    let error = guest.try_run(0).expect_err("half a register is one");
    let is_named = matches!(
        error,
        Error::UnknownDoorbell { vcpu: 0, register, access: Access::Write(_) } if register == notify
    );
    assert!(is_named, "{}", quality::told(&error));
    assert_eq!(taken(&eventfd), 0);
    Verdict::Met
}

pub(super) fn while_running<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let notify = device_base(0) + 0x50;
    let mut guest = bench.guest(bench.config(1), |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.ring(notify)?;
        a.jmp(again)
    });
    let (tell, told) = mpsc::channel();
    let (vm, vcpu) = (&guest.vm, &mut guest.vcpus[0]);
    let kicker = vcpu.kicker();
    let arrived = thread::scope(|threads| {
        threads.spawn(move || {
            while vmm::run(vm, vcpu).unwrap() != Exit::Kicked {
                let _ = tell.send(());
            }
        });
        let exits = told.recv_timeout(LIMIT).is_ok();
        let eventfd = vm.doorbell_fd(notify);
        let begin = Instant::now();
        let arrives = |eventfd| taken(eventfd) > 0;
        let mut arrived = false;
        while exits && !arrived && begin.elapsed() < LIMIT {
            thread::sleep(Duration::from_millis(1));
            arrived = eventfd.as_ref().is_ok_and(arrives);
        }
        kicker.kick();
        arrived
    });
    assert!(arrived, "the guest's writes do not arrive");
    Verdict::Met
}

pub(super) fn refused<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let guest = bench.guest(bench.config(1), |a| a.end(0));
    let inside = (1..4).map(|offset| device_base(1) + offset);
    for register in
        [0, control::ACCEPT, control::CONVERT, control::END, SPACE, SPACE + 4, u16::MAX].into_iter().chain(inside)
    {
        assert_no_descriptor(guest.vm.doorbell_fd(register));
    }
    for register in [device_base(1), device_base(1) + 4] {
        let _eventfd = guest.vm.doorbell_fd(register).unwrap();
        assert_no_descriptor(guest.vm.doorbell_fd(register));
    }
    drop(guest);
    // No kernel signals descriptors for MSRs.
    let guest = bench.guest(VmConfig { doorbell: Doorbell::Msr, ..bench.config(1) }, |a| a.end(0));
    assert_no_descriptor(guest.vm.doorbell_fd(device_base(1)));
    Verdict::Met
}
