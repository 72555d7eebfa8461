//! A vCPU: from KVM's exits to those of the contract.

#![allow(unsafe_code, reason = "an answer goes to the place in the vcpu's page that its exit showed")]

mod exit;
mod pending;
mod snapshot;
mod start;

pub use snapshot::VcpuSnapshot;
pub(crate) use start::{set_cpuid, set_state, without_encryption};

use super::kick::Kicker;
use super::memory::GuestMemory;
use super::vcpu_fd::{self, PortAnswer};
use super::vm::Shared;
use crate::Error;
use crate::error::failed;
use crate::host::HC_MAP_GPA_RANGE;
use crate::questions::Questions;
use cvm_core::doorbell::{self, Access, Registers, Ring, Transport};
use cvm_core::memory::ConversionEngine;
use cvm_core::x86::Register;
use cvm_core::{
    Answer, Conversion, ConversionRequest, Error as CoreError, Event, Exit, Gpa, InterruptController, Kick,
    RegisterRead, Vcpu,
};
use exit::{Raw, side, string_io};
use kvm_ioctls::VcpuFd;
use pending::Pending;
use std::sync::Arc;

/// How what a guest reads reaches it.
#[derive(Debug)]
enum Read {
    Port(PortAnswer),
    /// From an MSR, of which the guest sees these bits.
    Msr {
        mask: u64,
    },
}

/// A vCPU whose descriptor this process holds.
pub struct LocalVcpu {
    index: u32,
    // Dropped before the memory that it sees.
    fd: VcpuFd,
    shared: Arc<Shared>,
    kicker: Arc<Kicker>,
    doorbell: Registers,
    questions: Questions<Read, Transport>,
    /// Whether it waits for an interrupt.
    halted: bool,
    /// What the exit under way shows of registers.
    exposed: Vec<(Register, u64)>,
    /// Empty with an interrupt controller.
    pending: Pending,
}

impl LocalVcpu {
    pub(crate) fn new(index: u32, fd: VcpuFd, shared: Arc<Shared>) -> Result<Self, Error> {
        Ok(Self {
            index,
            kicker: Kicker::new(&fd)?,
            fd,
            shared,
            doorbell: Registers::new(index),
            questions: Questions::new(index),
            halted: false,
            exposed: Vec::new(),
            pending: Pending::default(),
        })
    }

    /// The engine of this vCPU's VM.
    pub(crate) fn engine(&self) -> &ConversionEngine<GuestMemory> {
        &self.shared.engine
    }

    /// What the exit under way shows of a register, or nothing.
    pub(crate) fn exposed(&self, register: Register) -> Option<u64> {
        self.exposed.iter().find(|(exposed, _)| *exposed == register).map(|(_, value)| *value)
    }

    /// Hands the highest waiting vector to the guest if it can take one now, and else asks KVM to say when.
    fn offer_interrupt(&mut self) -> Result<(), Error> {
        let Some(vector) = self.pending.next() else {
            self.fd.get_kvm_run().request_interrupt_window = 0;
            return Ok(());
        };
        if self.fd.get_kvm_run().ready_for_interrupt_injection != 0 {
            vcpu_fd::interrupt(&self.fd, vector)?;
            self.pending.taken(vector);
        }
        self.fd.get_kvm_run().request_interrupt_window = self.pending.next().is_some().into();
        Ok(())
    }

    /// An access to a doorbell register; `read` is how a read gets its answer.
    fn ring(&mut self, register: u16, access: Access, read: Option<Read>) -> Result<Option<Exit>, CoreError> {
        match self.doorbell.access(register, access)? {
            Ring::Latched => Ok(None),
            Ring::Accept(vector, trigger) => {
                self.shared.interrupts.accept(self.index, vector, trigger)?;
                Ok(None)
            }
            Ring::Value(value) => {
                if let Some(read) = read {
                    self.give(read, value.into());
                }
                Ok(None)
            }
            Ring::Exit(exit @ Exit::Conversion(request)) => {
                self.ask(request, Transport::Doorbell);
                Ok(Some(exit))
            }
            Ring::Exit(exit) => {
                if let Some(read) = read {
                    self.questions.read(read);
                }
                Ok(Some(exit))
            }
        }
    }

    /// Hands the guest what it reads.
    fn give(&mut self, read: Read, value: u64) {
        match read {
            // SAFETY: the place was taken from an exit of this vCPU.
            Read::Port(answer) => unsafe { answer.give(&mut self.fd, value) },
            Read::Msr { mask } => vcpu_fd::answer_msr(&mut self.fd, value & mask),
        }
    }

    /// Remembers what the guest asks for, and allows it to be carried out.
    fn ask(&mut self, request: ConversionRequest, transport: Transport) {
        self.questions.conversion(self.shared.engine.ask(request), transport);
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
        self.pending.next().is_some() && self.fd.get_kvm_run().if_flag != 0
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
                let read = Read::Port(answer);
                match doorbell_register(port.into(), doorbell::PORT_BASE.into()) {
                    Some(register) if width == 4 => return self.ring(register, Access::Read, Some(read)),
                    Some(register) => {
                        return Err(CoreError::UnknownDoorbell { vcpu, register, access: Access::Read });
                    }
                    None => {
                        self.questions.read(read);
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
                    return self.ring(register, Access::Read, Some(Read::Msr { mask: u32::MAX.into() }));
                }
                None => {
                    self.questions.read(Read::Msr { mask: u64::MAX });
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
        self.questions.check_none()?;
        self.run_on().inspect_err(|_| self.questions.fail())
    }

    fn answer_read(&mut self, value: u64) -> Result<(), CoreError> {
        let read = self.questions.close_read()?;
        self.give(read, value);
        Ok(())
    }

    fn answer_conversion(&mut self, conversion: Conversion) -> Result<(), CoreError> {
        let transport = self.questions.close_conversion(Some(&conversion))?;
        self.answer_request(transport, conversion.answer(), conversion.reached());
        Ok(())
    }

    fn refuse_conversion(&mut self) -> Result<(), CoreError> {
        let transport = self.questions.close_conversion(None)?;
        self.shared.engine.withdraw(self.index);
        self.answer_request(transport, Answer::Invalid, Gpa(0));
        Ok(())
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
            (Event::Interrupt(vector), InterruptController::None) => self.pending.edge(vector),
            (Event::Line { vector, asserted }, _) => self.pending.line(vector, asserted),
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
    use std::path::Path;
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
        let _watchdog = Watchdog::new(Duration::from_secs(120), vec![vcpu.kicker()]).unwrap();
        vcpu.run().unwrap_err()
    }

    #[test]
    fn a_poisoned_page_is_out_of_the_guests_reach() {
        let platform = match KvmPlatform::local(Path::new("/dev/kvm")) {
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
