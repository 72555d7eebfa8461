//! A vCPU that a vault holds, as its VMM finds it.

use super::client::{Held, Shared};
use super::protocol::{Failure, Given, Reply, Request};
use crate::Error;
use crate::local::failed;
use cvm_core::memory::Ticket;
use cvm_core::x86::Register;
use cvm_core::{Answer, Conversion, Error as CoreError, Event, Exit, Kick, RegisterRead, Vcpu};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What the guest waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Question {
    None,
    Read,
    Conversion(Ticket),
}

/// A vCPU that a vault holds.
pub(crate) struct VaultVcpu {
    index: u32,
    shared: Arc<Shared>,
    question: Question,
    /// What the next run hands to the guest.
    given: Given,
    /// Whether what it stopped for last was an exit in the vault, and no kick that was noticed here.
    exited: bool,
    /// Whether it failed, so that it cannot go on.
    failed: bool,
}

impl VaultVcpu {
    pub(super) fn new(index: u32, shared: Arc<Shared>) -> Self {
        Self { index, shared, question: Question::None, given: Given::Nothing, exited: false, failed: false }
    }

    fn protocol<T>(&self, problem: &'static str) -> Result<T, CoreError> {
        Err(CoreError::Protocol { vcpu: self.index, problem })
    }

    fn kicks(&self) -> Result<&Kicker, CoreError> {
        let kicker = self.shared.kickers.get(self.index as usize);
        kicker.map(|kicker| &**kicker).ok_or(CoreError::Protocol { vcpu: self.index, problem: "there is no such vcpu" })
    }

    fn ask(&self, step: &'static str, request: &Request) -> Result<Reply, CoreError> {
        self.shared.held.vault.ask(self.index, request).map_err(failed(step))
    }

    fn no_fit<T>(&self, step: &'static str) -> Result<T, CoreError> {
        Err(failed(step)(self.shared.held.vault.disown("its reply does not fit the request")))
    }

    fn run_on(&mut self) -> Result<Exit, CoreError> {
        loop {
            self.exited = false;
            if self.shared.engine.is_lost() {
                return Err(CoreError::Lost);
            }
            if !self.kicks()?.enter() {
                return Ok(Exit::Kicked);
            }
            let given = std::mem::replace(&mut self.given, Given::Nothing);
            let was_done = matches!(given, Given::Answer(Answer::Done));
            let mut reply = self.shared.held.vault.ask(self.index, &Request::Run(given));
            if was_done && matches!(reply, Err(Error::VaultRefused { .. })) {
                // Another vCPU has taken pages back since, so that it is not true any more: this one may ask again.
                let retry = Request::Run(Given::Answer(Answer::Retry));
                reply = self.shared.held.vault.ask(self.index, &retry);
            }
            self.kicks()?.leave();
            let reply = reply.map_err(failed("run a vcpu"));
            self.exited = true;
            let vcpu = self.index;
            match reply? {
                // A kick that was noticed here already.
                Reply::Exit(Exit::Kicked) if !self.kicks()?.take() => {}
                Reply::Exit(exit) => return Ok(exit),
                Reply::Failed(failure) => {
                    return Err(match failure {
                        Failure::Mmio { gpa, write } => CoreError::MmioRefused { vcpu, gpa, write },
                        Failure::MissingConversion { gpa } => CoreError::MissingConversion { vcpu, gpa },
                        Failure::UnknownDoorbell { register, access } => {
                            CoreError::UnknownDoorbell { vcpu, register, access }
                        }
                        Failure::Crashed(reason) => CoreError::Crashed { vcpu, reason },
                        Failure::Lost => CoreError::Lost,
                        Failure::Host(reason) => failed("run a vcpu")(Error::VaultRefused { reason }),
                    });
                }
                _ => return self.no_fit("run a vcpu"),
            }
        }
    }
}

impl Vcpu for VaultVcpu {
    fn index(&self) -> u32 {
        self.index
    }

    fn run(&mut self) -> Result<Exit, CoreError> {
        if self.question != Question::None {
            return self.protocol("it cannot run before its last exit is answered");
        }
        if self.failed {
            return self.protocol("it has failed, and cannot run again");
        }
        let exit = self.run_on();
        self.failed = exit.is_err();
        self.question = match &exit {
            Ok(Exit::Conversion(request)) => Question::Conversion(self.shared.engine.ask(*request)),
            Ok(Exit::DoorbellRead { .. } | Exit::PortRead { .. } | Exit::MsrRead { .. }) => Question::Read,
            _ => Question::None,
        };
        exit
    }

    fn answer_read(&mut self, value: u64) -> Result<(), CoreError> {
        match self.question {
            Question::Read => {
                self.given = Given::Value(value);
                self.question = Question::None;
                Ok(())
            }
            Question::Conversion(_) => self.protocol("it asked for a conversion, not for a value"),
            Question::None => self.protocol("there is no read to answer"),
        }
    }

    fn answer_conversion(&mut self, conversion: Conversion) -> Result<(), CoreError> {
        match self.question {
            Question::Conversion(ticket) if conversion.answers(ticket) => {
                self.given = Given::Answer(conversion.answer());
                self.question = Question::None;
                Ok(())
            }
            Question::Conversion(_) => self.protocol("it asked for another conversion"),
            _ => self.protocol("it asked for no conversion"),
        }
    }

    fn refuse_conversion(&mut self) -> Result<(), CoreError> {
        match self.question {
            Question::Conversion(_) => {
                self.shared.engine.withdraw(self.index);
                self.given = Given::Answer(Answer::Invalid);
                self.question = Question::None;
                Ok(())
            }
            _ => self.protocol("it asked for no conversion"),
        }
    }

    fn register(&self, register: Register) -> Result<RegisterRead, CoreError> {
        match self.ask("read a register", &Request::Register(register))? {
            // What the vault knows of is the last exit that it had.
            Reply::Register(Some(value)) if self.exited => Ok(RegisterRead::Exposed(value)),
            Reply::Register(_) => Ok(RegisterRead::Hidden),
            _ => self.no_fit("read a register"),
        }
    }

    fn inject(&mut self, event: Event) -> Result<(), CoreError> {
        match self.ask("inject an event", &Request::Inject(event))? {
            Reply::Done => Ok(()),
            Reply::InjectionRefused(source) => Err(CoreError::InjectionRefused { vcpu: self.index, event, source }),
            Reply::Failed(Failure::Host(reason)) => Err(failed("inject an event")(Error::VaultRefused { reason })),
            _ => self.no_fit("inject an event"),
        }
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        // Every vCPU has one, from the seal on.
        Arc::clone(&self.shared.kickers[self.index as usize]) as _
    }
}

/// Kicks a vCPU.
#[derive(Debug)]
pub(super) struct Kicker {
    index: u32,
    held: Arc<Held>,
    /// Whether a kick was asked for and nobody has heard of it yet.
    asked: AtomicBool,
    /// Whether the vault runs the vCPU, or is about to, or has just done so.
    running: AtomicBool,
}

impl Kicker {
    pub(super) fn new(index: u32, held: Arc<Held>) -> Self {
        Self { index, held, asked: AtomicBool::new(false), running: AtomicBool::new(false) }
    }

    fn take(&self) -> bool {
        self.asked.swap(false, Ordering::SeqCst)
    }

    /// Before the vault runs it; false if it was kicked.
    fn enter(&self) -> bool {
        // Either this sees the kick, or the kick sees that it has to go to the vault.
        self.running.store(true, Ordering::SeqCst);
        let kicked = self.take();
        if kicked {
            self.leave();
        }
        !kicked
    }

    fn leave(&self) {
        self.running.store(false, Ordering::SeqCst);
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        self.asked.store(true, Ordering::SeqCst);
        if self.running.load(Ordering::SeqCst) {
            self.held.vault.page(self.index).ask_for_kick();
            // It fails if the vault is dead, or wakes up already.
            let _ = rustix::io::write(&self.held.kicks, &1u64.to_ne_bytes());
        }
    }
}
