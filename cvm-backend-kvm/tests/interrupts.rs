//! Interrupts, and notifications that need no exit, as guests on real vCPUs find them.

mod common;

use common::*;
use cvm_backend_kvm::KvmPlatform;
use cvm_core::doorbell::{Access, Doorbell, PORT_BASE, SPACE, control, device_base};
use cvm_core::interrupt::Refusal;
use cvm_core::launch::APIC_PAGE;
use cvm_core::{
    Error, Event, Exit, Gpa, InterruptController, InterruptPolicy, PAGE_SIZE, PageKind, Platform, Protection, Vcpu, Vm,
    VmConfig,
};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

const TABLE: u64 = 0x2000;
const IDT: u64 = 0x3000;
const HANDLERS: u64 = 0x4000;
/// Where the stack of the first vCPU ends; those of the others follow, 256 bytes each.
const STACK_TOP: u64 = DATA + 0x1000;
/// Where the handlers of each vCPU count: 8 bytes for each.
const COUNT: u64 = DATA + 0x2_0000;

/// The vectors that guests have handlers for. That of [`LEVEL`] also reports.
const VECTORS: [u8; 3] = [0x41, 0x7f, LEVEL];
const LEVEL: u8 = 0x62;

/// The MSR by which a guest ends an interrupt (Intel SDM, volume 3, section 12.12).
const EOI: u32 = 0x80b;

/// What vectors [`VECTORS`] are accepted as unless a test says otherwise.
fn policy() -> InterruptPolicy {
    InterruptPolicy::default().accept(0x41).unwrap().accept(0x7f).unwrap()
}

/// A guest that has set up its interrupt table before `write`: each vector of [`VECTORS`] adds itself to
/// [`COUNT`]` = COUNT * 256 + vector` of its vCPU. R15 is eight times the vCPU's index.
fn interruptible(platform: &KvmPlatform, write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>) -> Guest {
    interruptible_under(policy(), platform, write)
}

/// The same, with a policy of the test's own.
fn interruptible_under(
    interrupts: InterruptPolicy,
    platform: &KvmPlatform,
    write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
) -> Guest {
    interruptible_with(VmConfig { interrupts, ..config(1) }, platform, write)
}

/// The same, with a configuration of the test's own.
fn interruptible_with(
    config: VmConfig,
    platform: &KvmPlatform,
    write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
) -> Guest {
    // A null, a 64-bit code and a data descriptor, and behind them the operands of lgdt and lidt.
    let mut table = [0u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff].map(u64::to_le_bytes).concat();
    for (limit, base) in [(23u16, TABLE), (4095, IDT)] {
        table.extend(limit.to_le_bytes());
        table.extend(base.to_le_bytes());
    }
    let mut idt = vec![0u8; 4096];
    let mut handlers = Vec::new();
    for vector in VECTORS {
        let at = HANDLERS + handlers.len() as u64;
        // A 64-bit interrupt gate (AMD64 APM volume 2, section 4.8.4), present, to the code segment.
        let gate = at & 0xffff | 8 << 16 | 0x8e00 << 32 | (at >> 16 & 0xffff) << 48;
        idt[usize::from(vector) * 16..][..8].copy_from_slice(&gate.to_le_bytes());
        handlers.extend(assemble(&config, at, |a| {
            for register in [rax, rbx, rcx, rdx] {
                a.push(register)?;
            }
            count(a)?;
            a.shl(eax, 8)?;
            a.or(eax, u32::from(vector))?;
            a.mov(dword_ptr(rbx), eax)?;
            if vector == LEVEL {
                a.report()?;
            }
            if config.interrupt_controller == InterruptController::Apic {
                a.mov(ecx, EOI)?;
                a.xor(eax, eax)?;
                a.xor(edx, edx)?;
                a.wrmsr()?;
            }
            for register in [rdx, rcx, rbx, rax] {
                a.pop(register)?;
            }
            a.iretq()
        }));
    }

    let mut launch = load(platform, config, |a| {
        a.mov(r15, rdi)?;
        a.shl(r15, 3)?;
        a.shl(rdi, 8)?;
        a.mov(rsp, STACK_TOP)?;
        a.add(rsp, rdi)?;
        a.mov(rbx, TABLE + 24)?;
        a.lgdt(ptr(rbx))?;
        a.lidt(ptr(rbx + 10))?;
        write(a)
    });
    launch.load(Gpa(TABLE), &table, PageKind::Measured).unwrap();
    launch.load(Gpa(IDT), &idt, PageKind::Measured).unwrap();
    launch.load(Gpa(HANDLERS), &handlers, PageKind::Measured).unwrap();
    Guest::from_launch(launch)
}

/// Loads the vCPU's count into EAX, and its address into RBX.
fn count(a: &mut Assembler) -> Result<(), IcedError> {
    a.mov(rbx, COUNT)?;
    a.add(rbx, r15)?;
    a.mov(eax, dword_ptr(rbx))
}

/// Reports the vCPU's count.
fn report_count(a: &mut Assembler) -> Result<(), IcedError> {
    count(a)?;
    a.report()
}

/// Some thousand instructions: hosts that emulate them do not look for interrupts after each one.
fn wait(a: &mut Assembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(ecx, 5000u32)?;
    a.set_label(&mut again)?;
    a.dec(ecx)?;
    a.jne(again)
}

/// Waits for an interrupt, and allows none but while it waits.
fn halt(a: &mut Assembler) -> Result<(), IcedError> {
    a.sti()?;
    a.hlt()?;
    a.cli()
}

/// A VM with local APICs. Where KVM cannot have them a test has nothing to do.
fn with_apic(platform: &KvmPlatform, vcpus: u32) -> Option<VmConfig> {
    let config = VmConfig { interrupts: policy(), interrupt_controller: InterruptController::Apic, ..config(vcpus) };
    match platform.launch(config.clone()) {
        Ok(_) => Some(config),
        Err(why @ Error::Config(_)) => {
            skip(&why.to_string());
            None
        }
        Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
    }
}

/// Signals an eventfd.
fn signal(eventfd: &OwnedFd) {
    File::from(eventfd.try_clone().unwrap()).write_all(&1u64.to_ne_bytes()).unwrap();
}

/// The count of an eventfd, which is 0 afterwards.
fn taken(eventfd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match File::from(eventfd.try_clone().unwrap()).read_exact(&mut count) {
        Ok(()) => u64::from_ne_bytes(count),
        Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
        Err(error) => panic!("{error}"),
    }
}

/// Signals an eventfd when the guest has had time to halt.
fn signal_soon(eventfd: &OwnedFd) -> thread::JoinHandle<()> {
    let eventfd = eventfd.try_clone().unwrap();
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        signal(&eventfd);
    })
}

fn assert_refused<T: std::fmt::Debug>(result: Result<T, Error>, why: Refusal) {
    assert!(matches!(&result, Err(Error::InjectionRefused { source, .. }) if *source == why), "{why:?}: {result:?}");
}

fn assert_no_descriptor(result: Result<OwnedFd, Error>, why: &str) {
    assert!(matches!(&result, Err(Error::NoDescriptor(reason)) if reason.contains(why)), "{why}: {result:?}");
}

// Edges

#[test]
fn an_accepted_interrupt_arrives_once_when_the_guest_allows_it() {
    let Some(platform) = kvm() else { return };
    let mut guest = interruptible(&platform, |a| {
        for allowed in [false, true, true] {
            if allowed {
                a.sti()?;
            }
            wait(a)?;
            report_count(a)?;
        }
        a.end(0)
    });
    guest.vcpus[0].inject(Event::Interrupt(0x41)).unwrap();
    assert_eq!(guest.report(), 0, "interrupts are disabled");
    assert_eq!(guest.report(), 0x41);
    assert_eq!(guest.report(), 0x41, "it came twice");
    guest.end();
}

#[test]
fn interrupts_that_wait_arrive_one_after_the_other_the_highest_first() {
    let Some(platform) = kvm() else { return };
    let mut guest = interruptible(&platform, |a| {
        report_count(a)?;
        a.sti()?;
        wait(a)?;
        report_count(a)?;
        a.end(0)
    });
    assert_eq!(guest.report(), 0);
    // A vector that waits already is not there twice.
    for vector in [0x41, 0x7f, 0x41] {
        guest.vcpus[0].inject(Event::Interrupt(vector)).unwrap();
    }
    assert_eq!(guest.report(), 0x7f41);
    guest.end();
}

#[test]
fn a_guest_can_accept_a_vector_while_it_runs() {
    let Some(platform) = kvm() else { return };
    let mut guest = interruptible_under(InterruptPolicy::default(), &platform, |a| {
        a.report()?;
        a.mov(eax, 0x41u32)?;
        a.ring(control::ACCEPT)?;
        a.report()?;
        a.sti()?;
        wait(a)?;
        report_count(a)?;
        a.end(0)
    });
    guest.report();
    let refused = guest.vcpus[0].inject(Event::Interrupt(0x41));
    assert!(matches!(refused, Err(Error::InjectionRefused { source: Refusal::NotAccepted, .. })), "{refused:?}");
    guest.report();
    guest.vcpus[0].inject(Event::Interrupt(0x41)).unwrap();
    assert!(guest.vcpus[0].inject(Event::Interrupt(0x7f)).is_err(), "it accepted one vector only");
    assert_eq!(guest.report(), 0x41);
    guest.end();
}

#[test]
fn a_guest_has_no_more_interrupts_in_a_second_than_it_accepts() {
    let Some(platform) = kvm() else { return };
    let most = NonZeroU32::new(2).unwrap();
    let policy = InterruptPolicy::default().accept(0x41).unwrap().limit(most);
    let mut guest = interruptible_under(policy, &platform, |a| a.end(0));
    let begin = Instant::now();
    let results = [(); 3].map(|()| guest.vcpus[0].inject(Event::Interrupt(0x41)));
    if begin.elapsed() < Duration::from_secs(1) {
        assert!(
            matches!(&results[2], Err(Error::InjectionRefused { source: Refusal::TooMany { .. }, .. })),
            "{results:?}"
        );
    }
    assert!(results[0].is_ok() && results[1].is_ok());
    guest.end();
}

#[test]
fn an_interrupt_wakes_a_guest_that_halted() {
    let Some(platform) = kvm() else { return };
    let mut guest = interruptible(&platform, |a| {
        for _ in 0..2 {
            a.sti()?;
            a.hlt()?;
            report_count(a)?;
        }
        a.end(0)
    });
    for count in [0x41, 0x4141] {
        assert_eq!(guest.run(), Exit::Halted);
        guest.vcpus[0].inject(Event::Interrupt(0x41)).unwrap();
        assert_eq!(guest.report(), count);
    }
    guest.end();
}

#[test]
fn an_interrupt_does_not_disturb_a_read_that_is_answered() {
    let Some(platform) = kvm() else { return };
    let mut guest = interruptible(&platform, |a| {
        a.sti()?;
        a.nop()?;
        a.listen(REPORT)?;
        a.nop()?;
        a.report()?;
        report_count(a)?;
        a.end(0)
    });
    assert_eq!(guest.run(), Exit::DoorbellRead { register: REPORT });
    guest.vcpus[0].inject(Event::Interrupt(0x41)).unwrap();
    guest.vcpus[0].answer_read(0x1111).unwrap();
    assert_eq!(guest.report(), 0x1111);
    assert_eq!(guest.report(), 0x41);
    guest.end();
}

#[test]
fn the_guard_refuses_what_the_guest_does_not_accept() {
    let Some(platform) = kvm() else { return };
    let mut guest = interruptible(&platform, |a| {
        a.sti()?;
        wait(a)?;
        report_count(a)?;
        a.end(0)
    });
    for (event, why) in [
        (Event::Interrupt(0x40), Refusal::NotAccepted),
        (Event::Interrupt(0xff), Refusal::NotAccepted),
        (Event::Interrupt(31), Refusal::Reserved),
        (Event::Interrupt(2), Refusal::Reserved),
        (Event::Nmi, Refusal::NotAnInterrupt),
        (Event::Exception(0x41), Refusal::NotAnInterrupt),
        (Event::Exception(14), Refusal::NotAnInterrupt),
        (Event::Smi, Refusal::NotAnInterrupt),
        (Event::Init, Refusal::NotAnInterrupt),
        (Event::Startup, Refusal::NotAnInterrupt),
    ] {
        let error = guest.vcpus[0].inject(event).unwrap_err();
        assert!(
            matches!(error, Error::InjectionRefused { vcpu: 0, event: e, source } if e == event && source == why),
            "{error}"
        );
    }
    assert_eq!(guest.report(), 0);
    guest.end();
}

// Levels

#[test]
fn an_asserted_line_interrupts_again_until_it_is_lowered() {
    let Some(platform) = kvm() else { return };
    let mut guest = interruptible_under(policy().accept_level(LEVEL).unwrap(), &platform, |a| {
        a.sti()?;
        a.hlt()?;
        wait(a)?;
        report_count(a)?;
        a.end(0)
    });
    assert_eq!(guest.run(), Exit::Halted);
    guest.vcpus[0].inject(Event::Line { vector: LEVEL, asserted: true }).unwrap();
    // The handler reports each time.
    for count in [0x62, 0x6262, 0x62_6262] {
        assert_eq!(guest.report(), count);
    }
    guest.vcpus[0].inject(Event::Line { vector: LEVEL, asserted: false }).unwrap();
    assert_eq!(guest.report(), 0x62_6262, "it came after it was lowered");
    guest.end();
}

#[test]
fn a_line_that_is_lowered_before_the_guest_takes_it_does_not_interrupt() {
    let Some(platform) = kvm() else { return };
    let mut guest = interruptible_under(policy().accept_level(LEVEL).unwrap(), &platform, |a| {
        report_count(a)?;
        a.sti()?;
        wait(a)?;
        report_count(a)?;
        a.end(0)
    });
    guest.vcpus[0].inject(Event::Line { vector: LEVEL, asserted: true }).unwrap();
    assert_eq!(guest.report(), 0, "interrupts are disabled");
    guest.vcpus[0].inject(Event::Line { vector: LEVEL, asserted: false }).unwrap();
    assert_eq!(guest.report(), 0);
    guest.end();
}

#[test]
fn an_event_with_the_wrong_trigger_is_refused() {
    let Some(platform) = kvm() else { return };
    let mut guest = interruptible_under(policy(), &platform, |a| {
        a.mov(eax, u32::from(LEVEL) | control::ACCEPT_LEVEL)?;
        a.ring(control::ACCEPT)?;
        a.report()?;
        a.mov(eax, 0x41 | control::ACCEPT_LEVEL)?;
        a.ring(control::ACCEPT)?;
        a.end(1)
    });
    let vcpu = &mut guest.vcpus[0];
    assert_refused(vcpu.inject(Event::Line { vector: LEVEL, asserted: true }), Refusal::NotAccepted);
    guest.report();
    let vcpu = &mut guest.vcpus[0];
    assert_refused(vcpu.inject(Event::Interrupt(LEVEL)), Refusal::WrongTrigger);
    for asserted in [true, false] {
        assert_refused(vcpu.inject(Event::Line { vector: 0x41, asserted }), Refusal::WrongTrigger);
        vcpu.inject(Event::Line { vector: LEVEL, asserted }).unwrap();
    }
    // A vector keeps its trigger, whatever the guest says later.
    let ended = vcpu.run();
    assert!(matches!(&ended, Err(Error::Crashed { reason, .. }) if reason.contains("other trigger")), "{ended:?}");
}

#[test]
fn an_apic_takes_no_levels() {
    let Some(platform) = kvm() else { return };
    let Some(config) = with_apic(&platform, 1) else { return };
    let levels = VmConfig { interrupts: config.interrupts.accept_level(LEVEL).unwrap(), ..config.clone() };
    assert!(matches!(platform.launch(levels), Err(Error::Config(_))));
    let mut guest = interruptible_with(config, &platform, |a| {
        a.mov(eax, u32::from(LEVEL) | control::ACCEPT_LEVEL)?;
        a.ring(control::ACCEPT)?;
        a.end(1)
    });
    let vcpu = &mut guest.vcpus[0];
    assert_refused(vcpu.inject(Event::Line { vector: 0x41, asserted: true }), Refusal::EdgesOnly);
    let ended = vcpu.run();
    assert!(matches!(&ended, Err(Error::Crashed { reason, .. }) if reason.contains("edges only")), "{ended:?}");
}

// Local APICs, and interrupts by descriptor

#[test]
fn a_guest_that_halted_is_woken_once_for_each_write_of_a_descriptor() {
    let Some(platform) = kvm() else { return };
    let Some(config) = with_apic(&platform, 1) else { return };
    let mut guest = interruptible_with(config, &platform, |a| {
        for _ in 0..3 {
            halt(a)?;
            report_count(a)?;
        }
        a.sti()?;
        wait(a)?;
        report_count(a)?;
        a.end(0)
    });
    let eventfd = guest.vm.interrupt_fd(0, 0x41).unwrap();
    for count in [0x41, 0x4141, 0x41_4141] {
        let signalled = signal_soon(&eventfd);
        assert_eq!(guest.report(), count);
        signalled.join().unwrap();
    }
    assert_eq!(guest.report(), 0x41_4141, "it came more often than it was written");
    guest.end();
    assert_eq!(guest.vm.dropped_interrupts().unwrap(), 0);
}

#[test]
fn a_descriptor_interrupts_a_guest_that_spins() {
    let Some(platform) = kvm() else { return };
    let Some(config) = with_apic(&platform, 1) else { return };
    let mut guest = interruptible_with(config, &platform, |a| {
        a.sti()?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        count(a)?;
        a.test(eax, eax)?;
        a.je(again)?;
        a.report()?;
        a.end(0)
    });
    let signalled = signal_soon(&guest.vm.interrupt_fd(0, 0x7f).unwrap());
    assert_eq!(guest.report(), 0x7f);
    guest.end();
    signalled.join().unwrap();
}

#[test]
fn each_descriptor_raises_its_vector_on_its_vcpu() {
    let Some(platform) = kvm() else { return };
    let Some(config) = with_apic(&platform, 2) else { return };
    let mut guest = interruptible_with(config, &platform, |a| {
        for _ in 0..2 {
            halt(a)?;
            report_count(a)?;
        }
        a.end(0)
    });
    let (tell, told) = mpsc::channel();
    let vcpus = std::mem::take(&mut guest.vcpus);
    let threads = vcpus.into_iter().map(|mut vcpu| {
        let tell = tell.clone();
        thread::spawn(move || {
            loop {
                match vcpu.run().unwrap() {
                    Exit::DoorbellWrite { register: REPORT, value } => tell.send((vcpu.index(), value)).unwrap(),
                    Exit::Ended { code: 0 } => return,
                    other => panic!("{other:?}"),
                }
            }
        })
    });
    let threads = threads.collect::<Vec<_>>();
    for (vcpu, vector, count) in [(1, 0x7f, 0x7f), (0, 0x41, 0x41), (1, 0x41, 0x7f41), (0, 0x7f, 0x417f)] {
        signal(&guest.vm.interrupt_fd(vcpu, vector).unwrap());
        assert_eq!(told.recv_timeout(Duration::from_secs(20)), Ok((vcpu, count)));
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(told.try_recv().is_err(), "there were more reports than interrupts");
}

#[test]
fn a_vcpu_with_an_index_above_255_has_its_own_interrupts() {
    let Some(platform) = kvm() else { return };
    let Some(config) = with_apic(&platform, 258) else { return };
    let mut guest = interruptible_with(config, &platform, |a| {
        halt(a)?;
        report_count(a)?;
        a.end(0)
    });
    // Their ids have the same low byte.
    for vcpu in [1, 257] {
        signal(&guest.vm.interrupt_fd(vcpu, if vcpu == 1 { 0x41 } else { 0x7f }).unwrap());
    }
    for (vcpu, vector) in [(1, 0x41), (257, 0x7f)] {
        let reported = guest.vcpus[vcpu].run().unwrap();
        assert_eq!(reported, Exit::DoorbellWrite { register: REPORT, value: vector });
    }
}

#[test]
fn injected_interrupts_go_through_the_apic_the_highest_first() {
    let Some(platform) = kvm() else { return };
    let Some(config) = with_apic(&platform, 1) else { return };
    let mut guest = interruptible_with(config, &platform, |a| {
        report_count(a)?;
        a.sti()?;
        wait(a)?;
        report_count(a)?;
        halt(a)?;
        report_count(a)?;
        a.end(0)
    });
    for vector in [0x41, 0x7f, 0x41] {
        guest.vcpus[0].inject(Event::Interrupt(vector)).unwrap();
    }
    assert_refused(guest.vcpus[0].inject(Event::Interrupt(0x40)), Refusal::NotAccepted);
    assert_refused(guest.vcpus[0].inject(Event::Nmi), Refusal::NotAnInterrupt);
    assert_eq!(guest.report(), 0, "interrupts are disabled");
    assert_eq!(guest.report(), 0x7f41);
    // A halt stays in the kernel, so the thread must be called out of it.
    let kicker = guest.vcpus[0].kicker();
    let kicked = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        kicker.kick();
    });
    assert_eq!(guest.run(), Exit::Kicked);
    kicked.join().unwrap();
    guest.vcpus[0].inject(Event::Interrupt(0x7f)).unwrap();
    assert_eq!(guest.report(), 0x7f_417f);
    guest.end();
}

#[test]
fn an_apic_that_the_guest_has_turned_off_loses_interrupts_and_nothing_fails() {
    let Some(platform) = kvm() else { return };
    let Some(config) = with_apic(&platform, 1) else { return };
    let mut guest = interruptible_with(config, &platform, |a| {
        // The spurious-interrupt vector register without its enable bit, and then with it again.
        for value in [0xffu32, 0x1ff] {
            a.mov(ecx, 0x80fu32)?;
            a.mov(eax, value)?;
            a.xor(edx, edx)?;
            a.wrmsr()?;
            report_count(a)?;
        }
        a.sti()?;
        wait(a)?;
        report_count(a)?;
        a.end(0)
    });
    let eventfd = guest.vm.interrupt_fd(0, 0x41).unwrap();
    assert_eq!(guest.report(), 0);
    signal(&eventfd);
    guest.vcpus[0].inject(Event::Interrupt(0x41)).unwrap();
    assert_eq!(guest.report(), 0);
    signal(&guest.vm.interrupt_fd(0, 0x7f).unwrap());
    assert_eq!(guest.report(), 0x7f);
    guest.end();
}

#[test]
fn there_is_a_descriptor_only_for_what_the_guest_accepts() {
    let Some(platform) = kvm() else { return };
    let guest = Guest::new(&platform, VmConfig { interrupts: policy(), ..config(1) }, |a| a.end(0));
    assert_no_descriptor(guest.vm.interrupt_fd(0, 0x41), "launch with the apic");

    let Some(config) = with_apic(&platform, 2) else { return };
    let guest = Guest::new(&platform, config, |a| a.end(0));
    for vector in 0..32 {
        assert_refused(guest.vm.interrupt_fd(0, vector), Refusal::Reserved);
    }
    for vector in [0x20, 0x40, 0x42, LEVEL, 0xff] {
        assert_refused(guest.vm.interrupt_fd(1, vector), Refusal::NotAccepted);
    }
    assert_no_descriptor(guest.vm.interrupt_fd(2, 0x41), "no such vcpu");
    assert_no_descriptor(guest.vm.interrupt_fd(u32::MAX, 0x41), "no such vcpu");
    guest.vm.interrupt_fd(1, 0x41).unwrap();
}

#[test]
fn a_vector_that_is_accepted_at_run_time_gets_a_descriptor_on_that_vcpu() {
    let Some(platform) = kvm() else { return };
    let Some(config) = with_apic(&platform, 2) else { return };
    let config = VmConfig { interrupts: InterruptPolicy::default(), ..config };
    let mut guest = interruptible_with(config, &platform, |a| {
        a.mov(eax, 0x41u32)?;
        a.ring(control::ACCEPT)?;
        a.report()?;
        halt(a)?;
        report_count(a)?;
        a.end(0)
    });
    assert_refused(guest.vm.interrupt_fd(0, 0x41), Refusal::NotAccepted);
    guest.report();
    assert_refused(guest.vm.interrupt_fd(1, 0x41), Refusal::NotAccepted);
    assert_refused(guest.vm.interrupt_fd(0, 0x7f), Refusal::NotAccepted);
    signal(&guest.vm.interrupt_fd(0, 0x41).unwrap());
    assert_eq!(guest.report(), 0x41);
    guest.end();
}

#[test]
fn a_rate_limit_holds_for_descriptors_too() {
    let Some(platform) = kvm() else { return };
    let Some(config) = with_apic(&platform, 1) else { return };
    let most = NonZeroU32::new(2).unwrap();
    let config = VmConfig { interrupts: policy().limit(most), ..config };
    let mut guest = interruptible_with(config, &platform, |a| {
        for _ in 0..3 {
            halt(a)?;
            report_count(a)?;
        }
        a.end(0)
    });
    let edge = guest.vm.interrupt_fd(0, 0x41).unwrap();
    let begin = Instant::now();
    for count in [0x41, 0x4141] {
        signal(&edge);
        assert_eq!(guest.report(), count);
    }
    // By whatever way: they are counted together, and for each vCPU.
    signal(&guest.vm.interrupt_fd(0, 0x7f).unwrap());
    while guest.vm.dropped_interrupts().unwrap() == 0 && begin.elapsed() < Duration::from_secs(5) {
        thread::sleep(Duration::from_millis(1));
    }
    let injected = guest.vcpus[0].inject(Event::Interrupt(0x41));
    if begin.elapsed() >= Duration::from_secs(1) {
        return skip("three interrupts took this host more than a second");
    }
    assert_refused(injected, Refusal::TooMany { most });
    assert_eq!(guest.vm.dropped_interrupts().unwrap(), 1);
    thread::sleep(Duration::from_millis(1100));
    signal(&edge);
    assert_eq!(guest.report(), 0x41_4141, "what was dropped came later");
    guest.end();

    drop(guest);
    let threads = fs::read_dir("/proc/self/task").unwrap();
    let names = threads.filter_map(|thread| fs::read_to_string(thread.unwrap().path().join("comm")).ok());
    assert!(!names.into_iter().any(|name| name.trim_end() == "vm-interrupts"), "its thread outlives the vm");
}

#[test]
fn a_guest_finds_its_apic_on_and_cannot_turn_to_another_mode() {
    let Some(platform) = kvm() else { return };
    let Some(config) = with_apic(&platform, 2) else { return };
    let mut guest = interruptible_with(config, &platform, |a| {
        // IA32_APIC_BASE, the APIC's id, and its spurious-interrupt vector register.
        for msr in [0x1b, 0x802, 0x80f] {
            a.mov(ecx, msr as u32)?;
            a.rdmsr()?;
            a.report()?;
        }
        a.mov(ecx, 0x1bu32)?;
        a.rdmsr()?;
        a.and(eax, !0xc00u32)?;
        a.wrmsr()?;
        a.end(1)
    });
    for (index, base) in [(0, 0xfee0_0d00), (1, 0xfee0_0c00)] {
        let vcpu = &mut guest.vcpus[index as usize];
        let mut report = || match vcpu.run().unwrap() {
            Exit::DoorbellWrite { register: REPORT, value } => value,
            other => panic!("{other:?}"),
        };
        assert_eq!([report(), report(), report()], [base, index, 0x1ff]);
        // There is no handler for general-protection faults.
        assert!(matches!(vcpu.run(), Err(Error::Crashed { .. })));
    }
}

#[test]
fn nothing_is_emulated_where_an_apics_page_would_be() {
    let Some(platform) = kvm() else { return };
    let Some(config) = with_apic(&platform, 1) else { return };
    // Page tables reach as far as memory does.
    let memory = vec![range(0, MEMORY / PAGE_SIZE), range(APIC_PAGE.0 + PAGE_SIZE, 1)];
    let mut guest = Guest::new(&platform, VmConfig { memory, ..config }, |a| {
        a.load(APIC_PAGE.0 + 0x30)?;
        a.report()
    });
    match guest.vcpus[0].run() {
        Err(Error::MmioRefused { gpa, write: false, .. }) => assert_eq!(gpa, Gpa(APIC_PAGE.0 + 0x30)),
        // KVM cannot find the instruction if it is private, and so does not say what it accesses.
        Err(Error::Crashed { .. }) if isolation() != Protection::None => {}
        other => panic!("{other:?}"),
    }
}

// Doorbells by descriptor

#[test]
fn writes_of_a_register_with_a_descriptor_are_counted_and_make_no_exit() {
    let Some(platform) = kvm() else { return };
    let notify = device_base(3) + 0x50;
    let mut guest = Guest::new(&platform, config(1), |a| {
        for value in [0, 7, u32::MAX] {
            a.mov(eax, value)?;
            a.ring(notify)?;
        }
        a.ring(notify + 4)?;
        a.ring(notify)?;
        a.listen(notify)?;
        a.report()?;
        // Half a register is none.
        a.mov(dx, (PORT_BASE + notify) as i32)?;
        a.out(dx, ax)
    });
    let eventfd = guest.vm.doorbell_fd(notify).unwrap();
    assert_eq!(taken(&eventfd), 0);
    assert_eq!(guest.run(), Exit::DoorbellWrite { register: notify + 4, value: u32::MAX });
    assert_eq!(taken(&eventfd), 3);
    assert_eq!(guest.run(), Exit::DoorbellRead { register: notify });
    assert_eq!(taken(&eventfd), 1);
    guest.vcpus[0].answer_read(0x55).unwrap();
    assert_eq!(guest.report(), 0x55);
    let half = guest.vcpus[0].run();
    assert!(
        matches!(half, Err(Error::UnknownDoorbell { register, access: Access::Write(_), .. }) if register == notify),
        "{half:?}"
    );
    assert_eq!(taken(&eventfd), 0);
}

#[test]
fn a_register_gets_a_descriptor_while_the_guest_runs() {
    let Some(platform) = kvm() else { return };
    let notify = device_base(0) + 0x50;
    let mut guest = Guest::new(&platform, config(1), |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.ring(notify)?;
        a.jmp(again)
    });
    let mut vcpu = guest.vcpus.remove(0);
    let kicker = vcpu.kicker();
    let (tell, told) = mpsc::channel();
    let runs = thread::spawn(move || {
        while vcpu.run().unwrap() != Exit::Kicked {
            let _ = tell.send(());
        }
    });
    told.recv_timeout(Duration::from_secs(20)).unwrap();
    let eventfd = guest.vm.doorbell_fd(notify).unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while taken(&eventfd) == 0 {
        assert!(Instant::now() < end, "the guest's writes do not arrive");
        thread::sleep(Duration::from_millis(1));
    }
    kicker.kick();
    runs.join().unwrap();
}

#[test]
fn only_a_devices_register_gets_a_descriptor_and_only_once() {
    let Some(platform) = kvm() else { return };
    let guest = Guest::new(&platform, config(1), |a| a.end(0));
    for register in [0, control::CONVERT, control::END, SPACE, SPACE + 4, u16::MAX] {
        assert_no_descriptor(guest.vm.doorbell_fd(register), "no register of a device");
    }
    for offset in 1..4 {
        assert_no_descriptor(guest.vm.doorbell_fd(device_base(1) + offset), "no register of a device");
    }
    for register in [device_base(1), device_base(1) + 4] {
        let _eventfd = guest.vm.doorbell_fd(register).unwrap();
        assert_no_descriptor(guest.vm.doorbell_fd(register), "has one already");
    }
    let by_msr = Guest::new(&platform, VmConfig { doorbell: Doorbell::Msr, ..config(1) }, |a| a.end(0));
    assert_no_descriptor(by_msr.vm.doorbell_fd(device_base(1)), "msrs");
}
