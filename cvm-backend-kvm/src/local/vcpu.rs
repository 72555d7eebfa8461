//! A vCPU: from KVM's exits to those of the contract.

#![allow(unsafe_code, reason = "an answer goes to the place in the vcpu's page that its exit showed")]

mod snapshot;

pub use snapshot::VcpuSnapshot;

use super::failed;
use super::kick::Kicker;
use super::memory::GuestMemory;
use super::vcpu_fd::{self, PortAnswer};
use super::vm::Shared;
use crate::Error;
use crate::host::HC_MAP_GPA_RANGE;
use cvm_core::doorbell::{self, Access, Registers, Ring, Transport};
use cvm_core::memory::{ConversionEngine, Ticket};
use cvm_core::x86::{Register, VcpuState};
use cvm_core::{
    Answer, Conversion, ConversionRequest, Error as CoreError, Event, Exit, Gpa, InterruptController, Kick, Policy,
    RegisterRead, Side, Vcpu, VmConfig,
};
use kvm_bindings::{CpuId, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::sync::Arc;

/// Control-register bits of a vCPU that starts in 64-bit mode (AMD64 APM volume 2, sections 3.1 and 3.1.7).
const CR0_PE_MP_ET_NE_WP_PG: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
/// The second is machine checks: KVM for AMD adds them where the host has them on, and the state is to be the same on all hosts.
const CR4_PAE_MCE: u64 = 1 << 5 | 1 << 6;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

/// Whether a processor has AMD's hypercall instruction.
pub(crate) fn is_amd(cpuid: &CpuId) -> bool {
    // EBX holds the first four letters of the vendor's name: of "AuthenticAMD" or "HygonGenuine".
    let first = cpuid.as_slice().iter().find(|entry| entry.function == 0).map(|entry| entry.ebx.to_le_bytes());
    first.is_some_and(|letters| letters == *b"Auth" || letters == *b"Hygo")
}

/// Bits of CPUID leaf 1 that speak of a local APIC: in ECX x2APIC and the TSC deadline timer, in EDX the APIC itself
/// (Intel SDM, volume 2, CPUID).
const X2APIC_ECX: u32 = 1 << 21;
const DEADLINE_ECX: u32 = 1 << 24;
const APIC_EDX: u32 = 1 << 9;

/// The leaves that describe performance counters (Intel SDM, volume 2, CPUID; AMD64 APM volume 3, section E.4).
const CPUID_COUNTERS: u32 = 0xa;
const CPUID_AMD_COUNTERS: u32 = 0x8000_0022;

/// The leaf of KVM's features, and the one that says that `KVM_HC_MAP_GPA_RANGE` works
/// (Linux arch/x86/include/uapi/asm/kvm_para.h).
const KVM_CPUID_FEATURES: u32 = 0x4000_0001;
const KVM_FEATURE_HC_MAP_GPA_RANGE: u32 = 1 << 16;

/// Shows the processor `cpuid` to the guest, with the vCPU's index as its APIC id.
pub(crate) fn set_cpuid(
    mut cpuid: CpuId,
    vcpu: &VcpuFd,
    index: u32,
    transport: Transport,
    config: &VmConfig,
) -> Result<(), Error> {
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0x00ff_ffff | index << 24;
                match config.interrupt_controller {
                    InterruptController::None => {
                        entry.ecx &= !(X2APIC_ECX | DEADLINE_ECX);
                        entry.edx &= !APIC_EDX;
                    }
                    InterruptController::Apic => {
                        entry.ecx |= X2APIC_ECX;
                        entry.edx |= APIC_EDX;
                    }
                }
            }
            CPUID_COUNTERS | CPUID_AMD_COUNTERS if config.policy.contains(Policy::NO_PERFORMANCE_COUNTERS) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            KVM_CPUID_FEATURES if transport == Transport::Hypercall => entry.eax |= KVM_FEATURE_HC_MAP_GPA_RANGE,
            0xb | 0x1f => entry.edx = index,
            _ => {}
        }
    }
    vcpu.set_cpuid2(&cpuid).map_err(Error::kvm("set the cpuid leaves"))
}

/// Sets the state that a vCPU starts from.
pub(crate) fn set_state(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("read the system registers"))?;
    let code =
        kvm_segment { limit: u32::MAX, selector: 8, type_: 11, present: 1, s: 1, l: 1, g: 1, ..Default::default() };
    let data = kvm_segment { selector: 16, type_: 3, db: 1, l: 0, ..code };
    (sregs.cs, sregs.ss) = (code, data);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4) = (CR0_PE_MP_ET_NE_WP_PG, state.cr3, CR4_PAE_MCE);
    sregs.efer = EFER_LME_LMA;
    vcpu.set_sregs(&sregs).map_err(Error::kvm("set the system registers"))?;
    let regs =
        kvm_regs { rip: state.rip, rsp: state.rsp, rdi: state.rdi, rsi: state.rsi, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(Error::kvm("set the registers"))
}

/// What the guest waits for.
#[derive(Debug)]
enum Question {
    Port(PortAnswer),
    /// An MSR, of which the guest sees these bits.
    Msr {
        mask: u64,
    },
    Conversion(Ticket, Transport),
}

fn string_io(port: u16) -> String {
    format!("it used string i/o on port {port:#x}")
}

/// A KVM exit, taken out of the page that is shared with KVM.
#[derive(Debug)]
enum Raw {
    PortOut {
        port: u16,
        width: u8,
        value: u32,
    },
    PortIn {
        port: u16,
        width: u8,
        answer: PortAnswer,
    },
    MsrWrite {
        index: u32,
        value: u64,
    },
    MsrRead {
        index: u32,
    },
    Hypercall {
        number: u64,
        arguments: [u64; 6],
    },
    Mmio {
        gpa: Gpa,
        write: bool,
    },
    Fault {
        gpa: Gpa,
    },
    Halt,
    InterruptWindow,
    Interrupted,
    /// What plain KVM does not have.
    Foreign,
    Crash(String),
}

impl Raw {
    fn from_kvm(exit: Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Result<Self, Error> {
        let width = |data: &[u8]| match data.len() {
            width @ (1 | 2 | 4) => Some(width as u8),
            _ => None,
        };
        let string = |port| Self::Crash(string_io(port));
        Ok(match exit {
            Ok(VcpuExit::IoOut(port, data)) => match width(data) {
                Some(width) => {
                    let value = data.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
                    Self::PortOut { port, width, value }
                }
                None => string(port),
            },
            Ok(VcpuExit::IoIn(port, data)) => match width(data) {
                Some(width) => Self::PortIn { port, width, answer: PortAnswer::new(data) },
                None => string(port),
            },
            Ok(VcpuExit::X86Wrmsr(msr)) => Self::MsrWrite { index: msr.index, value: msr.data },
            Ok(VcpuExit::X86Rdmsr(msr)) => Self::MsrRead { index: msr.index },
            Ok(VcpuExit::Hypercall(call)) => Self::Hypercall { number: call.nr, arguments: call.args },
            Ok(VcpuExit::MmioRead(gpa, _)) => Self::Mmio { gpa: Gpa(gpa), write: false },
            Ok(VcpuExit::MmioWrite(gpa, _)) => Self::Mmio { gpa: Gpa(gpa), write: true },
            Ok(VcpuExit::MemoryFault { gpa, .. }) => Self::Fault { gpa: Gpa(gpa) },
            Ok(VcpuExit::Hlt) => Self::Halt,
            Ok(VcpuExit::IrqWindowOpen) => Self::InterruptWindow,
            // The guest lowered its task priority, which matters to a local APIC only.
            Ok(VcpuExit::Intr | VcpuExit::SetTpr) => Self::Interrupted,
            Ok(VcpuExit::Shutdown) => Self::Crash("it shut down, as after a triple fault".into()),
            Ok(VcpuExit::InternalError) => Self::Crash("kvm could not execute an instruction".into()),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                Self::Crash(format!("the processor refused to enter it: {reason:#x}"))
            }
            Ok(_) => Self::Foreign,
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => Self::Interrupted,
            Err(error) if error.errno() == libc::EFAULT => {
                Self::Crash("it touched memory that is not there, and kvm does not say where".into())
            }
            Err(error) => return Err(Error::kvm("run a vcpu")(error)),
        })
    }
}

impl Raw {
    /// What it shows of registers: its operands, and of a register that is wider no more than these.
    ///
    /// By a GHCB a guest says what it wants to exit for: a port is no register then, nor is what page state changes.
    fn expose(&self, exposed: &mut Vec<(Register, u64)>, by_ghcb: bool, transport: Transport) {
        exposed.clear();
        // Ports above 255 can be named by DX alone (Intel SDM, volume 2, IN and OUT).
        let by_register = |port: u16| (port > 0xff && !by_ghcb).then_some((Register::Rdx, port.into()));
        match self {
            Self::PortOut { port, value, .. } => {
                exposed.push((Register::Rax, (*value).into()));
                exposed.extend(by_register(*port));
            }
            Self::PortIn { port, .. } => exposed.extend(by_register(*port)),
            Self::MsrWrite { index, value } => exposed.extend([
                (Register::Rcx, (*index).into()),
                (Register::Rax, value & u64::from(u32::MAX)),
                (Register::Rdx, value >> 32),
            ]),
            Self::MsrRead { index } => exposed.push((Register::Rcx, (*index).into())),
            Self::Hypercall { .. } if transport == Transport::PageState => {}
            Self::Hypercall { number, arguments: [gpa, pages, attributes, ..] } => exposed.extend([
                (Register::Rax, *number),
                (Register::Rbx, *gpa),
                (Register::Rcx, *pages),
                (Register::Rdx, *attributes),
            ]),
            _ => {}
        }
    }
}

/// A vCPU whose descriptor this process holds.
pub struct LocalVcpu {
    index: u32,
    // Dropped before the memory that it sees.
    fd: VcpuFd,
    shared: Arc<Shared>,
    kicker: Arc<Kicker>,
    doorbell: Registers,
    question: Option<Question>,
    /// Whether it waits for an interrupt.
    halted: bool,
    /// Whether it failed, so that it cannot go on.
    failed: bool,
    /// What the exit under way shows of registers.
    exposed: Vec<(Register, u64)>,
    /// Without interrupt controller: injected edges that the guest has not taken yet, vector 0 first.
    edges: [u64; 4],
    /// Without interrupt controller: the vectors whose lines are asserted, vector 0 first.
    lines: [u64; 4],
}

impl LocalVcpu {
    pub(crate) fn new(index: u32, fd: VcpuFd, shared: Arc<Shared>) -> Result<Self, Error> {
        Ok(Self {
            index,
            kicker: Kicker::new(&fd)?,
            fd,
            shared,
            doorbell: Registers::new(index),
            question: None,
            halted: false,
            failed: false,
            exposed: Vec::new(),
            edges: [0; 4],
            lines: [0; 4],
        })
    }

    fn protocol<T>(&self, problem: &'static str) -> Result<T, CoreError> {
        Err(CoreError::Protocol { vcpu: self.index, problem })
    }

    /// The engine of this vCPU's VM.
    pub(crate) fn engine(&self) -> &ConversionEngine<GuestMemory> {
        &self.shared.engine
    }

    /// What the exit under way shows of a register, or nothing.
    pub(crate) fn exposed(&self, register: Register) -> Option<u64> {
        self.exposed.iter().find(|(exposed, _)| *exposed == register).map(|(_, value)| *value)
    }

    /// The vectors that wait for the guest.
    fn pending(&self) -> [u64; 4] {
        std::array::from_fn(|word| self.edges[word] | self.lines[word])
    }

    /// Hands the highest waiting vector to the guest if it can take one now, and else asks KVM to say when.
    fn offer_interrupt(&mut self) -> Result<(), Error> {
        let Some(vector) = highest(self.pending()) else {
            self.fd.get_kvm_run().request_interrupt_window = 0;
            return Ok(());
        };
        if self.fd.get_kvm_run().ready_for_interrupt_injection != 0 {
            vcpu_fd::interrupt(&self.fd, vector)?;
            self.edges[usize::from(vector / 64)] &= !(1 << (vector % 64));
        }
        self.fd.get_kvm_run().request_interrupt_window = highest(self.pending()).is_some().into();
        Ok(())
    }

    /// An access to a doorbell register; `question` is how a read gets its answer.
    fn ring(&mut self, register: u16, access: Access, question: Option<Question>) -> Result<Option<Exit>, CoreError> {
        match self.doorbell.access(register, access)? {
            Ring::Latched => Ok(None),
            Ring::Accept(vector, trigger) => {
                self.shared.interrupts.accept(self.index, vector, trigger)?;
                Ok(None)
            }
            Ring::Value(value) => {
                self.answer(question, value.into())?;
                Ok(None)
            }
            Ring::Exit(exit @ Exit::Conversion(request)) => {
                self.ask(request, Transport::Doorbell);
                Ok(Some(exit))
            }
            Ring::Exit(exit) => {
                self.question = question;
                Ok(Some(exit))
            }
        }
    }

    fn answer(&mut self, question: Option<Question>, value: u64) -> Result<(), CoreError> {
        match question {
            // SAFETY: the question was taken from an exit of this vCPU.
            Some(Question::Port(answer)) => unsafe { answer.give(&mut self.fd, value) },
            Some(Question::Msr { mask }) => vcpu_fd::answer_msr(&mut self.fd, value & mask),
            Some(Question::Conversion(..)) | None => return self.protocol("there is no read to answer"),
        }
        Ok(())
    }

    /// Remembers what the guest asks for, and allows it to be carried out.
    fn ask(&mut self, request: ConversionRequest, transport: Transport) {
        self.question = Some(Question::Conversion(self.shared.engine.ask(request), transport));
    }

    fn answer_request(&mut self, transport: Transport, answer: Answer, reached: Gpa) {
        match transport {
            Transport::Doorbell => self.doorbell.answer(answer, reached),
            // Has no place for how far a request got: the guest repeats it, and what is done is skipped. KVM shows page
            // state changes as hypercalls.
            Transport::Hypercall | Transport::PageState => {
                // Positive error numbers: KVM passes them to the guest negated where its convention asks for that
                // (Linux arch/x86/kvm/svm/sev.c and vmx/tdx.c accept these three values only).
                let result = match answer {
                    Answer::Done => 0,
                    Answer::Invalid => libc::EINVAL,
                    Answer::Retry => libc::EAGAIN,
                };
                vcpu_fd::answer_hypercall(&mut self.fd, result as u64);
            }
        }
    }

    /// Runs the guest until it exits in a way that the VMM must know of.
    fn run_on(&mut self) -> Result<Exit, CoreError> {
        loop {
            self.exposed.clear();
            if self.kicker.take() {
                return Ok(Exit::Kicked);
            }
            if self.shared.engine.is_lost() {
                return Err(CoreError::Lost);
            }
            if self.halted && !self.can_wake() {
                return Ok(Exit::Halted);
            }
            self.halted = false;
            self.offer_interrupt().map_err(failed("offer an interrupt"))?;
            let raw = {
                let _entered = self.kicker.enter();
                Raw::from_kvm(self.fd.run())
            };
            let raw = raw.map_err(failed("run a vcpu"))?;
            raw.expose(&mut self.exposed, self.shared.traits.hides_registers(), self.shared.transport);
            if let Some(exit) = self.translate(raw)? {
                return Ok(exit);
            }
        }
    }

    /// Has KVM complete the exit under way, without letting the guest run.
    fn complete(&mut self) -> Result<(), CoreError> {
        let completed = {
            let _held = self.kicker.hold();
            self.fd.run().map(drop)
        };
        match completed {
            Err(error) if error.errno() == libc::EINTR => Ok(()),
            Err(error) => Err(failed("complete an exit")(Error::kvm("run a vcpu")(error))),
            Ok(()) => Err(failed("complete an exit")("the vcpu did not stop after it")),
        }
    }

    /// Whether an injected interrupt ends a halt.
    fn can_wake(&mut self) -> bool {
        highest(self.pending()).is_some() && self.fd.get_kvm_run().if_flag != 0
    }

    /// What the contract makes of an exit: an exit of its own, an error, or nothing, and the guest goes on.
    fn translate(&mut self, raw: Raw) -> Result<Option<Exit>, CoreError> {
        let vcpu = self.index;
        Ok(Some(match raw {
            // A string of as many bytes as a wider operand has would pass for one.
            Raw::PortOut { port, .. } | Raw::PortIn { port, .. } if vcpu_fd::port_accesses(&mut self.fd) != 1 => {
                return Err(CoreError::Crashed { vcpu, reason: string_io(port) });
            }
            Raw::PortOut { port, width, value } => match doorbell_register(port.into(), doorbell::PORT_BASE.into()) {
                Some(register) if width == 4 => return self.ring(register, Access::Write(value), None),
                Some(register) => {
                    return Err(CoreError::UnknownDoorbell { vcpu, register, access: Access::Write(value) });
                }
                None => Exit::PortWrite { port, width, value },
            },
            Raw::PortIn { port, width, answer } => {
                let question = Some(Question::Port(answer));
                match doorbell_register(port.into(), doorbell::PORT_BASE.into()) {
                    Some(register) if width == 4 => return self.ring(register, Access::Read, question),
                    Some(register) => {
                        return Err(CoreError::UnknownDoorbell { vcpu, register, access: Access::Read });
                    }
                    None => {
                        self.question = question;
                        Exit::PortRead { port, width }
                    }
                }
            }
            Raw::MsrWrite { index, value } => {
                match (doorbell_register(index, doorbell::MSR_BASE), u32::try_from(value)) {
                    (Some(register), Ok(value)) => return self.ring(register, Access::Write(value), None),
                    (Some(register), Err(_)) => {
                        let access = Access::Write(value as u32);
                        return Err(CoreError::UnknownDoorbell { vcpu, register, access });
                    }
                    (None, _) => Exit::MsrWrite { index, value },
                }
            }
            Raw::MsrRead { index } => match doorbell_register(index, doorbell::MSR_BASE) {
                Some(register) => {
                    return self.ring(register, Access::Read, Some(Question::Msr { mask: u32::MAX.into() }));
                }
                None => {
                    self.question = Some(Question::Msr { mask: u64::MAX });
                    Exit::MsrRead { index }
                }
            },
            Raw::Hypercall { number, arguments: [gpa, pages, attributes, ..] } => {
                if number != u64::from(HC_MAP_GPA_RANGE) {
                    return Err(CoreError::Crashed { vcpu, reason: format!("it made hypercall {number}") });
                }
                let Some(to) = side(attributes) else {
                    self.answer_request(Transport::Hypercall, Answer::Invalid, Gpa(0));
                    return Ok(None);
                };
                let request = ConversionRequest::from_guest(vcpu, gpa, pages, to);
                self.ask(request, Transport::Hypercall);
                Exit::Conversion(request)
            }
            Raw::Mmio { gpa, .. } | Raw::Fault { gpa }
                if self.shared.engine.memory().map().slots().find(gpa).is_some() =>
            {
                return Err(CoreError::MissingConversion { vcpu, gpa });
            }
            Raw::Mmio { gpa, write } => return Err(CoreError::MmioRefused { vcpu, gpa, write }),
            // KVM does not say which of both it was.
            Raw::Fault { gpa } => return Err(CoreError::MmioRefused { vcpu, gpa, write: false }),
            Raw::Foreign => {
                let run = self.fd.get_kvm_run();
                if let Some(_kept) = self.shared.traits.exit(vcpu, run, self.shared.engine.memory())? {
                    self.complete()?;
                }
                return Ok(None);
            }
            Raw::Halt => {
                self.halted = true;
                Exit::Halted
            }
            Raw::InterruptWindow | Raw::Interrupted => return Ok(None),
            Raw::Crash(reason) => return Err(CoreError::Crashed { vcpu, reason }),
        }))
    }
}

/// The side that the attributes of `KVM_HC_MAP_GPA_RANGE` ask for: bits 0 to 3 are a page size, which is only a hint,
/// bit 4 is "encrypted", the others are reserved (Linux Documentation/virt/kvm/x86/hypercalls.rst).
fn side(attributes: u64) -> Option<Side> {
    match attributes >> 4 {
        0 => Some(Side::Shared),
        1 => Some(Side::Private),
        _ => None,
    }
}

/// The highest of these vectors.
fn highest(vectors: [u64; 4]) -> Option<u8> {
    let word = vectors.iter().rposition(|word| *word != 0)?;
    Some((64 * word as u32 + vectors[word].ilog2()) as u8)
}

/// The doorbell register behind a port or an MSR.
fn doorbell_register(number: u32, base: u32) -> Option<u16> {
    let offset = number.checked_sub(base)?;
    u16::try_from(offset).ok().filter(|register| *register < doorbell::SPACE)
}

impl Vcpu for LocalVcpu {
    fn index(&self) -> u32 {
        self.index
    }

    fn run(&mut self) -> Result<Exit, CoreError> {
        if self.question.is_some() {
            return self.protocol("it cannot run before its last exit is answered");
        }
        if self.failed {
            return self.protocol("it has failed, and cannot run again");
        }
        let exit = self.run_on();
        self.failed = exit.is_err();
        exit
    }

    fn answer_read(&mut self, value: u64) -> Result<(), CoreError> {
        match self.question.take() {
            Some(conversion @ Question::Conversion(..)) => {
                self.question = Some(conversion);
                self.protocol("it asked for a conversion, not for a value")
            }
            question => self.answer(question, value),
        }
    }

    fn answer_conversion(&mut self, conversion: Conversion) -> Result<(), CoreError> {
        match &self.question {
            Some(Question::Conversion(ticket, transport)) if conversion.answers(*ticket) => {
                self.answer_request(*transport, conversion.answer(), conversion.reached());
                self.question = None;
                Ok(())
            }
            Some(Question::Conversion(..)) => self.protocol("it asked for another conversion"),
            _ => self.protocol("it asked for no conversion"),
        }
    }

    fn refuse_conversion(&mut self) -> Result<(), CoreError> {
        match &self.question {
            Some(Question::Conversion(_, transport)) => {
                self.shared.engine.withdraw(self.index);
                self.answer_request(*transport, Answer::Invalid, Gpa(0));
                self.question = None;
                Ok(())
            }
            _ => self.protocol("it asked for no conversion"),
        }
    }

    fn register(&self, register: Register) -> Result<RegisterRead, CoreError> {
        if self.shared.traits.hides_registers() {
            return Ok(self.exposed(register).map_or(RegisterRead::Hidden, RegisterRead::Exposed));
        }
        let regs = self.fd.get_regs().map_err(failed("read the registers"))?;
        let sregs = self.fd.get_sregs().map_err(failed("read the system registers"))?;
        Ok(RegisterRead::Visible(match register {
            Register::Rax => regs.rax,
            Register::Rbx => regs.rbx,
            Register::Rcx => regs.rcx,
            Register::Rdx => regs.rdx,
            Register::Rsi => regs.rsi,
            Register::Rdi => regs.rdi,
            Register::Rsp => regs.rsp,
            Register::Rbp => regs.rbp,
            Register::R8 => regs.r8,
            Register::R9 => regs.r9,
            Register::R10 => regs.r10,
            Register::R11 => regs.r11,
            Register::R12 => regs.r12,
            Register::R13 => regs.r13,
            Register::R14 => regs.r14,
            Register::R15 => regs.r15,
            Register::Rip => regs.rip,
            Register::Rflags => regs.rflags,
            Register::Cr0 => sregs.cr0,
            Register::Cr2 => sregs.cr2,
            Register::Cr3 => sregs.cr3,
            Register::Cr4 => sregs.cr4,
            Register::Efer => sregs.efer,
        }))
    }

    fn inject(&mut self, event: Event) -> Result<(), CoreError> {
        let interrupts = &self.shared.interrupts;
        interrupts.admit(self.index, event)?;
        match (event, interrupts.controller()) {
            (Event::Interrupt(vector), InterruptController::Apic) => return interrupts.raise(self.index, vector),
            (Event::Interrupt(vector), InterruptController::None) => {
                self.edges[usize::from(vector / 64)] |= 1 << (vector % 64);
            }
            (Event::Line { vector, asserted: true }, _) => self.lines[usize::from(vector / 64)] |= 1 << (vector % 64),
            (Event::Line { vector, asserted: false }, _) => {
                self.lines[usize::from(vector / 64)] &= !(1 << (vector % 64));
            }
            // The guard lets nothing else pass.
            _ => {}
        }
        Ok(())
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kicker) as _
    }
}
#[cfg(test)]
mod tests {
    use super::*;
    use crate::KvmPlatform;
    use crate::handles::VcpuOf;
    use cvm_core::memory::Sides;
    use cvm_core::{GpaRange, PageKind, Platform, Vm, VmConfig, Watchdog};
    use iced_x86::code_asm::*;
    use std::time::Duration;

    const POISONED: u64 = 0x30_0000;

    /// What comes of a guest that touches a page which a failed conversion has taken away.
    fn touch_poisoned(platform: &KvmPlatform, touch: impl FnOnce(&mut CodeAssembler)) -> CoreError {
        let mut code = CodeAssembler::new(64).unwrap();
        code.mov(rbx, POISONED).unwrap();
        touch(&mut code);
        code.hlt().unwrap();
        let config = VmConfig { transport: Some(Transport::Doorbell), ..VmConfig::new(4 << 20, 1).unwrap() };
        let mut launch = platform.launch(config).unwrap();
        launch.load(Gpa(0x20_0000), &code.assemble(0x20_0000).unwrap(), PageKind::Measured).unwrap();
        launch.load(Gpa(POISONED), &[0xf4], PageKind::Measured).unwrap();
        launch.start_in_long_mode(Gpa(0x20_0000), Gpa(0x10_0000), Gpa(0)).unwrap();

        let mut vm = launch.seal().unwrap();
        let mut vcpu = vm.take_vcpus().remove(0);
        let VcpuOf::Local(vcpu) = &mut vcpu.0 else { panic!("it is not of this process") };
        vcpu.shared.engine.converter().poison(GpaRange::from_pages(POISONED, 1).unwrap()).unwrap();
        let _watchdog = Watchdog::new(Duration::from_secs(10), vec![vcpu.kicker()]).unwrap();
        vcpu.run().unwrap_err()
    }

    #[test]
    fn a_poisoned_page_is_out_of_the_guests_reach() {
        let platform = match KvmPlatform::new() {
            Ok(platform) => platform,
            Err(error) if std::env::var_os("CVM_REQUIRE_KVM").is_some() => panic!("{error}"),
            Err(error) => return eprintln!("SKIPPED: {error}"),
        };
        let touches: [fn(&mut CodeAssembler); 3] = [
            |code| code.mov(eax, dword_ptr(rbx)).unwrap(),
            |code| code.mov(dword_ptr(rbx), eax).unwrap(),
            |code| code.jmp(rbx).unwrap(),
        ];
        for touch in touches {
            let error = touch_poisoned(&platform, touch);
            match error {
                CoreError::MissingConversion { vcpu: 0, gpa } => assert_eq!(gpa.0 & !0xfff, POISONED),
                // Not every KVM says where.
                CoreError::Crashed { vcpu: 0, .. } => {}
                other => panic!("{other}"),
            }
        }
    }
}
