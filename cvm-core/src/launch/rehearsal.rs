//! A launch that nothing comes of but its transcript.

use super::{Launch, Loader, Transcript, VmConfig};
use crate::boot::Interface;
use crate::interrupt::Guarding;
use crate::memory::{Allocated, Conversion, ConversionListener, ConversionRequest, ConversionTotals, SharedMemory};
use crate::x86::{Register, VcpuState};
use crate::{
    BoxError, Error, Event, Exit, GpaRange, Kick, Lifecycle, LifecycleAnswer, PageKind, RegisterRead, Vcpu, Vm,
};
use std::sync::Arc;

/// A loader that loads nothing, for whoever wants to know what a launch will be measured as before there is one, on whatever
/// machine: to sign an ID block, or to check evidence.
#[derive(Debug, Clone, Copy)]
pub struct Rehearsal;

impl Launch<Rehearsal> {
    /// A launch of what `config` says on a platform like this.
    ///
    /// # Errors
    /// As [`VmConfig::check`].
    pub fn rehearse(config: VmConfig, interface: impl Into<Interface>) -> Result<Self, Error> {
        Self::new(Rehearsal, config, interface)
    }

    /// Ends it, with what was submitted.
    ///
    /// # Errors
    /// As [`Launch::seal`].
    pub fn transcript(mut self) -> Result<Transcript, Error> {
        self.complete()?;
        Ok(self.transcript)
    }
}

impl Loader for Rehearsal {
    type Vm = Never;

    fn load(&mut self, _: GpaRange, _: &[u8], _: PageKind) -> Result<(), BoxError> {
        Ok(())
    }

    fn set_vcpu(&mut self, _: u32, _: &VcpuState) -> Result<(), BoxError> {
        Ok(())
    }

    fn seal(self, _: Transcript) -> Result<Never, BoxError> {
        Err("a rehearsed launch cannot be sealed: it ends with its transcript".into())
    }
}

/// The VM that a [`Rehearsal`] becomes: there is none.
#[derive(Debug, Clone, Copy)]
pub enum Never {}

impl Vm for Never {
    type Vcpu = Self;

    fn take_vcpus(&mut self) -> Vec<Self> {
        match *self {}
    }
    fn memory(&self) -> &SharedMemory {
        match *self {}
    }
    fn convert(&self, _: &ConversionRequest) -> Conversion {
        match *self {}
    }
    fn add_listener(&self, _: Arc<dyn ConversionListener>) {
        match *self {}
    }
    fn conversions(&self) -> ConversionTotals {
        match *self {}
    }
    fn allocated(&self) -> Result<Allocated, Error> {
        match *self {}
    }
    fn transcript(&self) -> &Transcript {
        match *self {}
    }
    fn lifecycle(&self, _: Lifecycle) -> LifecycleAnswer {
        match *self {}
    }
    fn guarding(&self) -> Guarding {
        match *self {}
    }
    #[cfg(unix)]
    fn doorbell_fd(&self, _: u16) -> Result<std::os::fd::OwnedFd, Error> {
        match *self {}
    }
    #[cfg(unix)]
    fn interrupt_fd(&self, _: u32, _: u8) -> Result<std::os::fd::OwnedFd, Error> {
        match *self {}
    }
    fn dropped_interrupts(&self) -> Result<u64, Error> {
        match *self {}
    }
}

impl Vcpu for Never {
    fn index(&self) -> u32 {
        match *self {}
    }
    fn run(&mut self) -> Result<Exit, Error> {
        match *self {}
    }
    fn answer_read(&mut self, _: u64) -> Result<(), Error> {
        match *self {}
    }
    fn answer_conversion(&mut self, _: Conversion) -> Result<(), Error> {
        match *self {}
    }
    fn refuse_conversion(&mut self) -> Result<(), Error> {
        match *self {}
    }
    fn register(&self, _: Register) -> Result<RegisterRead, Error> {
        match *self {}
    }
    fn inject(&mut self, _: Event) -> Result<(), Error> {
        match *self {}
    }
    fn kicker(&self) -> Arc<dyn Kick> {
        match *self {}
    }
}
