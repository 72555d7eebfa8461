//! Guests with an interrupt table.

use crate::clause::Verdict;
use crate::guest::{Assembler, DATA, EXTRA};
use crate::quality;
use crate::subject::{Bench, VmOf};
use crate::vmm::Guest;
use cvm_core::interrupt::Refusal;
use cvm_core::{
    Error, Event, Gpa, InterruptController, InterruptPolicy, Launch, PAGE_SIZE, PageKind, Platform, Vm, VmConfig,
};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;
use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

const TABLE: u64 = EXTRA;
const IDT: u64 = EXTRA + PAGE_SIZE;
const HANDLERS: u64 = EXTRA + 2 * PAGE_SIZE;
/// Where the stack of the first vCPU ends; those of the others follow.
const STACK_TOP: u64 = DATA + PAGE_SIZE;
/// The size of a stack as a power of two.
const STACK_SHIFT: u32 = 8;
/// Where the handlers of each vCPU keep what came: 8 bytes for each.
const CAME: u64 = DATA + 0x2_0000;

/// The interrupts that guests have handlers for; [`EDGE`] and [`HIGH`] are accepted as edges unless a clause says otherwise.
/// The handler of [`LEVEL`] also reports.
pub(super) const EDGE: u8 = 0x41;
pub(super) const LEVEL: u8 = 0x62;
pub(super) const HIGH: u8 = 0x7f;
pub(super) const INTERRUPTS: [u8; 3] = [EDGE, LEVEL, HIGH];
/// A general-protection fault, whose handler goes on behind an instruction of two bytes.
pub(super) const FAULT: u8 = 13;

/// The MSR by which a guest ends an interrupt (Intel SDM, volume 3, section 12.12).
const EOI: u32 = 0x80b;

/// The edges that guests accept.
pub(super) fn edges() -> InterruptPolicy {
    InterruptPolicy::default().accept(EDGE).and_then(|policy| policy.accept(HIGH)).expect("no exceptions")
}

/// The same and [`LEVEL`].
pub(super) fn levels() -> InterruptPolicy {
    edges().accept_level(LEVEL).expect("no exception")
}

/// VMs without interrupt controller.
pub(super) fn config<P: Platform>(bench: &Bench<'_, P>, vcpus: u32, interrupts: InterruptPolicy) -> VmConfig {
    VmConfig { interrupts, ..bench.config(vcpus) }
}

/// VMs with local APICs, if the backend has them.
pub(super) fn with_apic<P: Platform>(bench: &Bench<'_, P>, vcpus: u32) -> Result<VmConfig, Verdict> {
    let interrupt_controller = InterruptController::Apic;
    let config = VmConfig { interrupt_controller, ..config(bench, vcpus, edges()) };
    match bench.platform.launch(config.clone()) {
        Ok(_) => Ok(config),
        Err(Error::Config(reason)) => Err(Verdict::NotOffered(reason)),
        Err(error) => panic!("{}", quality::told(&error)),
    }
}

/// A guest whose vCPUs have stacks and an interrupt table before `write`, with a handler for each interrupt: it puts its vector
/// below what [`came`] to the vCPU before. A handler changes no register; it must not interrupt an exit in the making.
pub(super) fn interruptible<P: Platform>(
    bench: &Bench<'_, P>,
    config: VmConfig,
    write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
) -> Guest<VmOf<P>> {
    handling(bench, config, &INTERRUPTS, write).unwrap_or_else(|error| panic!("{}", quality::told(&error)))
}

/// The same with handlers for these vectors alone.
///
/// # Errors
/// What the launch failed with.
pub(super) fn handling<P: Platform>(
    bench: &Bench<'_, P>,
    config: VmConfig,
    vectors: &[u8],
    write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
) -> Result<Guest<VmOf<P>>, Error> {
    let launch = bench.load_after(
        config,
        |bench, launch| load_tables(bench, launch, vectors),
        |a| {
            a.mov(rsp, rdi)?;
            a.shl(rsp, STACK_SHIFT)?;
            a.mov(rbx, STACK_TOP)?;
            a.add(rsp, rbx)?;
            a.mov(rbx, TABLE + 24)?;
            a.lgdt(ptr(rbx))?;
            a.lidt(ptr(rbx + 10))?;
            write(a)
        },
    );
    launch.map(Guest::from_launch)
}

fn load_tables<P: Platform>(bench: &Bench<'_, P>, launch: &mut Launch<P::Loader>, vectors: &[u8]) -> Result<(), Error> {
    // A null, a 64-bit code and a data descriptor, and behind them the operands of lgdt and lidt.
    let mut table = [0u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff].map(u64::to_le_bytes).concat();
    for (limit, base) in [(23u16, TABLE), (4095, IDT)] {
        table.extend(limit.to_le_bytes());
        table.extend(base.to_le_bytes());
    }
    let mut idt = vec![0u8; PAGE_SIZE as usize];
    let mut handlers = Vec::new();
    let ends = launch.config().interrupt_controller == InterruptController::Apic;
    for &vector in vectors {
        let at = HANDLERS + handlers.len() as u64;
        // A 64-bit interrupt gate (AMD64 APM volume 2, section 4.8.4), present, to the code segment.
        let gate = at & 0xffff | 8 << 16 | 0x8e00 << 32 | (at >> 16 & 0xffff) << 48;
        idt[usize::from(vector) * 16..][..8].copy_from_slice(&gate.to_le_bytes());
        handlers.extend(bench.assemble(launch, at, |a| handle(a, vector, ends)));
    }
    launch.load(Gpa(TABLE), &table, PageKind::Measured)?;
    launch.load(Gpa(IDT), &idt, PageKind::Measured)?;
    launch.load(Gpa(HANDLERS), &handlers, PageKind::Measured)
}

/// The opcode of `hlt`.
const HLT: u32 = 0xf4;

/// A handler, which skips a `hlt` that the interrupt came before, and ends the interrupt if an APIC waits for that.
fn handle(a: &mut Assembler, vector: u8, ends: bool) -> Result<(), IcedError> {
    let clobbered = [rax, rbx, rcx, rdx, r14, r15];
    for register in clobbered {
        a.push(register)?;
    }
    came(a)?;
    a.shl(eax, 8)?;
    a.or(eax, i32::from(vector))?;
    a.mov(dword_ptr(rbx), eax)?;
    if vector == LEVEL {
        a.report()?;
    }
    if ends && vector != FAULT {
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.msr_out(EOI)?;
    }
    if vector != FAULT {
        // Software that emulates SVM (QEMU's TCG up to now) forgets on an exit that `sti` holds interrupts back for one more
        // instruction. An interrupt that comes before the `hlt` of `halt` would leave the guest halted for ever.
        let interrupted_at = clobbered.len() * size_of::<u64>();
        let mut done = a.create_label();
        a.mov(rax, qword_ptr(rsp + interrupted_at))?;
        a.cmp(byte_ptr(rax), HLT)?;
        a.jne(done)?;
        a.inc(qword_ptr(rsp + interrupted_at))?;
        a.set_label(&mut done)?;
    }
    for register in clobbered.into_iter().rev() {
        a.pop(register)?;
    }
    if vector == FAULT {
        a.add(rsp, 8)?;
        a.add(qword_ptr(rsp), 2)?;
    }
    a.iretq()
}

/// Loads into EAX what came to the vCPU, the last four vectors, a byte each; and its address into RBX.
pub(super) fn came(a: &mut Assembler) -> Result<(), IcedError> {
    a.mov(rbx, CAME)?;
    a.mov(eax, dword_ptr(rbx + rdi * 8))?;
    a.lea(rbx, ptr(rbx + rdi * 8))
}

/// Reports what came to the vCPU.
pub(super) fn report_came(a: &mut Assembler) -> Result<(), IcedError> {
    came(a)?;
    a.report()
}

/// Some thousand instructions: hosts that emulate them do not look for interrupts after each one.
pub(super) fn wait(a: &mut Assembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(ecx, 5000u32)?;
    a.set_label(&mut again)?;
    a.dec(ecx)?;
    a.jne(again)
}

/// Allows interrupts for a while.
pub(super) fn allow(a: &mut Assembler) -> Result<(), IcedError> {
    a.sti()?;
    wait(a)?;
    a.cli()
}

/// Waits for an interrupt, and allows none but while it waits.
pub(super) fn halt(a: &mut Assembler) -> Result<(), IcedError> {
    a.sti()?;
    a.hlt()?;
    a.cli()
}

/// Writes EAX to a doorbell register that accepts this.
pub(super) fn accept(a: &mut Assembler, accepted: u32) -> Result<(), IcedError> {
    a.mov(eax, accepted)?;
    a.ring(cvm_core::doorbell::control::ACCEPT)
}

/// That a guard refuses `event` on `vcpu` for this reason.
#[track_caller]
pub(super) fn assert_refused<T: Debug>(result: Result<T, Error>, vcpu: u32, event: Event, why: Refusal) {
    let refused = result.expect_err("the guard lets it pass");
    match &refused {
        Error::InjectionRefused { vcpu: of, event: what, reason } => {
            assert_eq!((*of, *what, *reason), (vcpu, event, why));
        }
        other => panic!("{event} on vcpu {vcpu}: {}", quality::told(other)),
    }
    quality::assert_good(&refused);
}

/// That there is no descriptor for something, with a reason.
#[track_caller]
pub(super) fn assert_no_descriptor(result: Result<OwnedFd, Error>) {
    let refused = result.expect_err("there is a descriptor");
    assert!(matches!(refused, Error::NoDescriptor(_)), "{}", quality::told(&refused));
    quality::assert_good(&refused);
}

/// The descriptor that raises an interrupt: an eventfd that does not block.
#[track_caller]
pub(super) fn descriptor<V: Vm>(vm: &V, vcpu: u32, vector: u8) -> OwnedFd {
    let eventfd = vm.interrupt_fd(vcpu, vector).unwrap_or_else(|error| panic!("{}", quality::told(&error)));
    assert!(fcntl_getfl(&eventfd).unwrap().contains(OFlags::NONBLOCK), "its descriptor may block");
    eventfd
}

/// Signals an eventfd.
pub(super) fn signal(eventfd: &OwnedFd) {
    rustix::io::write(eventfd, &1u64.to_ne_bytes()).expect("an eventfd that can be written");
}

/// Signals an eventfd when a guest has had time to halt.
pub(super) fn signal_soon(eventfd: OwnedFd) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        signal(&eventfd);
    })
}

/// The count of an eventfd that does not block, which is 0 afterwards.
pub(super) fn taken(eventfd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(eventfd, &mut count) {
        Ok(8) => u64::from_ne_bytes(count),
        Err(Errno::AGAIN) => 0,
        other => panic!("{other:?} of an eventfd"),
    }
}
