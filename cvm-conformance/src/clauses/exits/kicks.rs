//! Halts, and kicks from other threads.

use super::questions::out_of_order;
use crate::clause::Verdict;
use crate::guest::{Assembler, DATA, REPORT};
use crate::vmm::{self, LIMIT};
use crate::{Bench, Guest, VmOf};
use cvm_core::{Exit, InterruptController, Platform, Side, Vcpu, Vm, VmConfig, Watchdog};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::sync::mpsc::{self, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a guest is left alone before it is kicked.
const SHORT: Duration = Duration::from_millis(30);

/// Reads `gpa`, shared, until there is a number, which is in EAX then.
pub(super) fn wait_for(a: &mut Assembler, gpa: u64) -> Result<(), IcedError> {
    let mut spin = a.create_label();
    a.set_label(&mut spin)?;
    a.load(gpa, Side::Shared)?;
    a.test(eax, eax)?;
    a.je(spin)
}

/// That the first vCPU stops for a watchdog, and for nothing before that.
fn assert_stopped<V: Vm>(guest: &mut Guest<V>) {
    let watchdog = Watchdog::new(SHORT, vec![guest.vcpus[0].kicker()]).unwrap();
    assert_eq!(guest.run(), Exit::Kicked);
    assert!(watchdog.fired(), "it stopped before it was kicked");
    assert!(!guest.is_overdue());
}

pub(super) fn halted<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(2), |a| {
        let mut second = a.create_label();
        a.test(edi, edi)?;
        a.jne(second)?;
        a.cli()?;
        a.hlt()?;
        a.end(1)?;
        a.set_label(&mut second)?;
        a.mov(eax, 7u32)?;
        a.report()?;
        a.end(0)
    });
    for _ in 0..3 {
        assert_eq!(guest.run(), Exit::Halted);
    }
    guest.vcpus[0].kicker().kick();
    assert_eq!(guest.run(), Exit::Kicked);
    assert_eq!(guest.run(), Exit::Halted, "a kick woke it");
    out_of_order(guest.vcpus[0].answer_read(0));
    assert_eq!(guest.report_of(1), 7);
    assert_eq!(guest.run(), Exit::Halted);
    Verdict::Met
}

pub(super) fn halted_in_the_kernel<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let config = VmConfig { interrupt_controller: InterruptController::Apic, ..bench.config(1) };
    let mut guest = bench.guest(config, |a| {
        a.report()?;
        a.cli()?;
        a.hlt()?;
        a.end(1)
    });
    guest.report();
    for _ in 0..3 {
        assert_stopped(&mut guest);
    }
    Verdict::Met
}

pub(super) fn watchdog<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(1), |a| {
        a.convert(DATA, 1, Side::Shared)?;
        wait_for(a, DATA)?;
        a.report()?;
        a.end(0)
    });
    assert_eq!(guest.convert().pages, 1);
    for _ in 0..3 {
        assert_stopped(&mut guest);
    }
    guest.write(DATA, 0x1111);
    assert_eq!(guest.report(), 0x1111);
    guest.end();
    Verdict::Met
}

pub(super) fn before_the_run<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(2), |a| {
        a.mov(eax, edi)?;
        a.report()?;
        a.mov(eax, edi)?;
        a.report()?;
        a.end(0)
    });
    // By two ways that lead to the same vCPU, from another thread.
    let kickers = [guest.vcpus[0].kicker(), guest.vcpus[0].kicker()];
    for _ in 0..2 {
        let kickers = kickers.clone();
        thread::spawn(move || kickers.iter().for_each(|kicker| kicker.kick())).join().unwrap();
        assert_eq!(guest.report_of(1), 1, "it hit another vcpu");
        assert_eq!(guest.run(), Exit::Kicked);
        assert_eq!(guest.report(), 0, "two kicks before a run are not one");
    }
    guest.end();
    Verdict::Met
}

pub(super) fn questions<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(1), |a| {
        a.listen(REPORT)?;
        a.report()?;
        a.convert(DATA, 1, Side::Shared)?;
        a.report()?;
        a.end(0)
    });
    let kicker = guest.vcpus[0].kicker();
    assert_eq!(guest.run(), Exit::DoorbellRead { register: REPORT });
    // While the question waits, when it has been answered, and once more before the guest has seen the answer.
    kicker.kick();
    out_of_order(guest.try_run(0));
    guest.vcpus[0].answer_read(5).unwrap();
    assert_eq!(guest.run(), Exit::Kicked, "the kick was lost");
    kicker.kick();
    assert_eq!(guest.run(), Exit::Kicked);
    out_of_order(guest.vcpus[0].answer_read(6));
    assert_eq!(guest.report(), 5, "the answer was lost");

    let request = guest.request();
    kicker.kick();
    out_of_order(guest.try_run(0));
    let conversion = guest.vm.convert(&request);
    assert_eq!(conversion.pages(), 1);
    guest.vcpus[0].answer_conversion(conversion).unwrap();
    for _ in 0..2 {
        assert_eq!(guest.run(), Exit::Kicked);
        kicker.kick();
    }
    assert_eq!(guest.run(), Exit::Kicked);
    assert_eq!(guest.report(), 0, "the answer was lost");
    guest.end();
    Verdict::Met
}

/// Kicks a vCPU over and over, each time at another distance from the start of its run, which `until_kicked` makes.
fn race<V: Vm>(guest: &mut Guest<V>, mut until_kicked: impl FnMut(&mut Guest<V>)) {
    const KICKS: u64 = 100;
    let kicker = guest.vcpus[0].kicker();
    thread::scope(|scope| {
        // The other thread spins until a run begins: to be woken would take it longer than that.
        let (begin, begun) = mpsc::channel();
        scope.spawn(move || {
            for kick in 0..KICKS {
                loop {
                    match begun.try_recv() {
                        Ok(()) => break,
                        Err(TryRecvError::Empty) => thread::yield_now(),
                        Err(TryRecvError::Disconnected) => return,
                    }
                }
                // From nothing to the time that some exits take on emulated processors.
                let (begin, distance) = (Instant::now(), Duration::from_nanos((kick % 50).pow(2) * 60));
                while begin.elapsed() < distance {
                    std::hint::spin_loop();
                }
                kicker.kick();
            }
        });
        for kick in 0..KICKS {
            begin.send(()).unwrap();
            until_kicked(guest);
            // A lost kick would have left the vCPU running until the guest's own watchdog.
            assert!(!guest.is_overdue(), "kick {kick} was lost");
        }
    });
}

pub(super) fn race_with_spinning<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(1), |a| {
        a.report()?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.jmp(again)
    });
    guest.report();
    race(&mut guest, |guest| assert_eq!(guest.run(), Exit::Kicked));
    Verdict::Met
}

pub(super) fn race_with_exits<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    // The guest counts: writes that are lost or made twice are noticed, and so are answers.
    let mut guest = bench.guest(bench.config(1), |a| {
        a.xor(r12d, r12d)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(r12d)?;
        a.mov(eax, r12d)?;
        a.report()?;
        a.listen(REPORT)?;
        a.cmp(eax, r12d)?;
        a.je(again)?;
        a.end(1)
    });
    let mut count = 0;
    let mut writes = true;
    race(&mut guest, |guest| {
        loop {
            match guest.run() {
                Exit::Kicked => break,
                Exit::DoorbellWrite { register: REPORT, value } if writes => {
                    count += 1;
                    assert_eq!(value, count, "a write was lost, or made twice");
                    writes = false;
                }
                Exit::DoorbellRead { register: REPORT } if !writes => {
                    guest.vcpus[0].answer_read(count.into()).unwrap();
                    writes = true;
                }
                Exit::Ended { .. } => panic!("an answer was lost"),
                other => panic!("{other:?} after {count} rounds"),
            }
        }
    });
    assert!(count > 0, "the guest never got as far as an exit");
    Verdict::Met
}

pub(super) fn outlives<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest: Guest<VmOf<P>> = bench.guest(bench.config(2), |a| {
        a.report()?;
        a.end(0)
    });
    let kickers = [0, 1].map(|vcpu| guest.vcpus[vcpu].kicker());
    guest.report();
    drop(guest.vcpus.remove(0));
    kickers[0].kick();
    // What is vCPU 1 is the first that is left.
    let Guest { mut vcpus, vm, .. } = guest;
    let watchdog = Watchdog::new(LIMIT, vec![vcpus[0].kicker()]).unwrap();
    assert!(matches!(vmm::drive(&vm, &mut vcpus[0]), Ok(Exit::DoorbellWrite { .. })), "the kick hit another vcpu");
    drop((vcpus, vm));
    kickers.iter().for_each(|kicker| kicker.kick());
    assert!(!watchdog.fired());
    // It has kept nothing of its vCPU that a new VM could be mixed up with.
    let mut guest = bench.guest(bench.config(1), |a| a.end(0));
    kickers.iter().for_each(|kicker| kicker.kick());
    guest.end();
    Verdict::Met
}
