//! What a vCPU's guest waits for, whoever holds the vCPU.

use cvm_core::memory::Ticket;
use cvm_core::{Conversion, Error};

/// What the guest of a vCPU has asked and was not told yet: one question at a time, without whose answer the vCPU does not run.
/// `R` is how a read is answered, `C` how a conversion is.
#[derive(Debug)]
pub(crate) struct Questions<R, C> {
    vcpu: u32,
    open: Option<Question<R, C>>,
    /// Whether the vCPU failed, so that it cannot go on.
    failed: bool,
}

#[derive(Debug)]
enum Question<R, C> {
    Read(R),
    Conversion(Ticket, C),
}

impl<R, C> Questions<R, C> {
    pub(crate) fn new(vcpu: u32) -> Self {
        Self { vcpu, open: None, failed: false }
    }

    fn protocol<T>(&self, problem: &'static str) -> Result<T, Error> {
        Err(Error::Protocol { vcpu: self.vcpu, problem })
    }

    /// Refuses to run a vCPU whose guest waits, or that has failed.
    pub(crate) fn check_none(&self) -> Result<(), Error> {
        match (&self.open, self.failed) {
            (Some(_), _) => self.protocol("it cannot run before its last exit is answered"),
            (None, true) => self.protocol("it has failed, and cannot run again"),
            (None, false) => Ok(()),
        }
    }

    /// Whether the guest waits for an answer.
    pub(crate) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// The vCPU cannot run again.
    pub(crate) fn fail(&mut self) {
        self.failed = true;
    }

    /// The guest reads something.
    pub(crate) fn read(&mut self, by: R) {
        self.open = Some(Question::Read(by));
    }

    /// The guest asks for a conversion.
    pub(crate) fn conversion(&mut self, ticket: Ticket, by: C) {
        self.open = Some(Question::Conversion(ticket, by));
    }

    /// What the guest reads is known.
    pub(crate) fn close_read(&mut self) -> Result<R, Error> {
        match self.open.take() {
            Some(Question::Read(by)) => Ok(by),
            None => self.protocol("there is no read to answer"),
            conversion => {
                self.open = conversion;
                self.protocol("it asked for a conversion, not for a value")
            }
        }
    }

    /// What became of the guest's conversion is known: this, or without it nothing.
    pub(crate) fn close_conversion(&mut self, became: Option<&Conversion>) -> Result<C, Error> {
        match self.open.take() {
            Some(Question::Conversion(ticket, by)) if became.is_none_or(|became| became.answers(ticket)) => Ok(by),
            other => {
                let is_conversion = matches!(other, Some(Question::Conversion(..)));
                self.open = other;
                self.protocol(if is_conversion {
                    "it asked for another conversion"
                } else {
                    "it asked for no conversion"
                })
            }
        }
    }
}
