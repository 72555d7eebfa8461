//! A vCPU that a vault holds, as its VMM finds it.

use super::client::{Held, Shared};
use super::protocol::{Failure, Given, Reply, Request};
use super::socket;
use crate::Error;
use crate::error::failed;
use crate::questions::Questions;
use cvm_core::x86::Register;
use cvm_core::{Answer, Conversion, Error as CoreError, Event, Exit, Kick, RegisterRead, Vcpu};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A vCPU that a vault holds.
pub(crate) struct VaultVcpu {
    index: u32,
    shared: Arc<Shared>,
    kicker: Arc<Kicker>,
    questions: Questions<(), ()>,
    /// What the next run hands to the guest.
    given: Given,
    /// Whether what it stopped for last was an exit in the vault, and no kick that was noticed here.
    exited: bool,
}

impl VaultVcpu {
    pub(super) fn new(index: u32, shared: Arc<Shared>) -> Self {
        let kicker = Arc::new(Kicker::new(index, Arc::clone(&shared.held)));
        Self { index, shared, kicker, questions: Questions::new(index), given: Given::Nothing, exited: false }
    }

    fn ask(&self, step: &'static str, request: &Request) -> Result<Reply, CoreError> {
        self.shared.held.vault.ask(self.index, request).map_err(failed(step))
    }

    fn no_fit<T>(&self, step: &'static str) -> Result<T, CoreError> {
        Err(failed(step)(self.shared.held.vault.unfit_reply()))
    }

    fn run_on(&mut self) -> Result<Exit, CoreError> {
        loop {
            self.exited = false;
            if self.shared.engine.is_lost() {
                return Err(CoreError::Lost);
            }
            if !self.kicker.enter() {
                return Ok(Exit::Kicked);
            }
            let given = std::mem::replace(&mut self.given, Given::Nothing);
            let was_done = matches!(given, Given::Answer(Answer::Done));
            let run = |given| self.shared.held.vault.run(self.index, given, &|| self.kicker.is_asked());
            let mut reply = run(given);
            if was_done && matches!(reply, Ok(Reply::Outdated(_))) {
                // Another vCPU has taken pages back since, so that it is not true any more: this one may ask again.
                reply = run(Given::Answer(Answer::Retry));
            }
            self.kicker.leave();
            let reply = reply.map_err(failed("run a vcpu"));
            self.exited = true;
            let vcpu = self.index;
            match reply? {
                // A kick that was noticed here already.
                Reply::Exit(Exit::Kicked) if !self.kicker.take() => {}
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
        self.questions.check_none()?;
        let exit = self.run_on().inspect_err(|_| self.questions.fail())?;
        match &exit {
            Exit::Conversion(request) => self.questions.conversion(self.shared.engine.ask(*request), ()),
            Exit::DoorbellRead { .. } | Exit::PortRead { .. } | Exit::MsrRead { .. } => self.questions.read(()),
            _ => {}
        }
        Ok(exit)
    }

    fn answer_read(&mut self, value: u64) -> Result<(), CoreError> {
        self.questions.close_read()?;
        self.given = Given::Value(value);
        Ok(())
    }

    fn answer_conversion(&mut self, conversion: Conversion) -> Result<(), CoreError> {
        self.questions.close_conversion(Some(&conversion))?;
        self.given = Given::Answer(conversion.answer());
        Ok(())
    }

    fn refuse_conversion(&mut self) -> Result<(), CoreError> {
        self.questions.close_conversion(None)?;
        self.shared.engine.withdraw(self.index);
        self.given = Given::Answer(Answer::Invalid);
        Ok(())
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
            Reply::InjectionRefused(reason) => Err(CoreError::InjectionRefused { vcpu: self.index, event, reason }),
            Reply::Failed(Failure::Host(reason)) => Err(failed("inject an event")(Error::VaultRefused { reason })),
            _ => self.no_fit("inject an event"),
        }
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kicker) as _
    }
}

/// Kicks a vCPU.
#[derive(Debug)]
struct Kicker {
    index: u32,
    held: Arc<Held>,
    /// Whether a kick was asked for that no run has ended for yet.
    asked: AtomicBool,
    /// Whether the vault runs the vCPU, or is about to, or has just done so.
    running: AtomicBool,
}

impl Kicker {
    fn new(index: u32, held: Arc<Held>) -> Self {
        Self { index, held, asked: AtomicBool::new(false), running: AtomicBool::new(false) }
    }

    fn take(&self) -> bool {
        self.asked.swap(false, Ordering::SeqCst)
    }

    fn is_asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
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
            socket::signal(&self.held.kicks);
        }
    }
}
