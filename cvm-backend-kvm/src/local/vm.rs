use super::interrupts::Interrupts;
use super::memory::GuestMemory;
use super::traits::{self, Traits};
use super::vcpu::LocalVcpu;
use super::vm_fd;
use crate::error::failed;
use crate::eventfd;
use cvm_core::doorbell::{self, Doorbell, Transport};
use cvm_core::export::Export;
use cvm_core::interrupt::Guarding;
use cvm_core::launch::Transcript;
use cvm_core::memory::{Allocated, ConversionEngine, ConversionTotals};
use cvm_core::{
    Conversion, ConversionListener, ConversionRequest, Error, Kick, Lifecycle, LifecycleAnswer, SharedMemory, Vcpu, Vm,
};
use kvm_ioctls::VmFd;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// What a VM and its vCPUs keep alive together.
pub(crate) struct Shared {
    // Dropped first, with the thread that it may have.
    pub(crate) interrupts: Interrupts,
    pub(crate) traits: Box<dyn Traits>,
    pub(crate) transport: Transport,
    pub(crate) engine: ConversionEngine<GuestMemory>,
    pub(crate) vm: Arc<VmFd>,
}

/// A VM whose descriptors this process holds.
pub struct LocalVm {
    shared: Arc<Shared>,
    vcpus: Vec<LocalVcpu>,
    kickers: Vec<Arc<dyn Kick>>,
    doorbell: Doorbell,
    transcript: Transcript,
}

impl LocalVm {
    pub(crate) fn new(shared: Arc<Shared>, vcpus: Vec<LocalVcpu>, doorbell: Doorbell, transcript: Transcript) -> Self {
        let kickers = vcpus.iter().map(Vcpu::kicker).collect();
        Self { shared, vcpus, kickers, doorbell, transcript }
    }

    /// Has the kernel signal `eventfd` when the guest writes `register`, with the errors of [`Vm::doorbell_fd`].
    pub(crate) fn connect_doorbell(&self, register: u16, eventfd: impl AsFd) -> Result<(), Error> {
        if self.doorbell != Doorbell::Port {
            return Err(Error::NoDescriptor(
                "the kernel knows no descriptors for msrs: launch with the port doorbell".into(),
            ));
        }
        if doorbell::device_of(register).is_none() || !register.is_multiple_of(4) {
            return Err(Error::NoDescriptor("it is no register of a device".into()));
        }
        match vm_fd::signal_on_write(&self.shared.vm, doorbell::PORT_BASE + register, eventfd) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                Err(Error::NoDescriptor("the register has one already".into()))
            }
            connected => connected.map_err(failed("connect a doorbell register")),
        }
    }

    /// Has `eventfd` raise `vector` on `vcpu`, with the errors of [`Vm::interrupt_fd`].
    pub(crate) fn connect_interrupt(&self, vcpu: u32, vector: u8, eventfd: OwnedFd) -> Result<(), Error> {
        self.shared.interrupts.connect(vcpu, vector, eventfd)
    }
}

impl Vm for LocalVm {
    type Vcpu = LocalVcpu;

    fn take_vcpus(&mut self) -> Vec<LocalVcpu> {
        std::mem::take(&mut self.vcpus)
    }

    fn memory(&self) -> &SharedMemory {
        self.shared.engine.memory()
    }

    fn convert(&self, request: &ConversionRequest) -> Conversion {
        let outcome = self.shared.engine.convert(request);
        if self.shared.engine.is_lost() {
            self.kickers.iter().for_each(|kicker| kicker.kick());
        }
        outcome
    }

    fn add_listener(&self, listener: Arc<dyn ConversionListener>) {
        self.shared.engine.add_listener(listener);
    }

    fn conversions(&self) -> ConversionTotals {
        self.shared.engine.totals()
    }

    fn allocated(&self) -> Result<Allocated, Error> {
        let allocated = self.shared.engine.converter().allocated();
        allocated.map_err(|error| Error::Backend { step: "count the memory", range: None, source: error.into() })
    }

    fn transcript(&self) -> &Transcript {
        &self.transcript
    }

    fn lifecycle(&self, what: Lifecycle) -> LifecycleAnswer {
        let particular = self.shared.traits.lifecycle(what);
        particular.unwrap_or_else(|| traits::lifecycle(what, self.shared.engine.converter().swap()))
    }

    fn export(&self) -> Option<&dyn Export<LocalVcpu>> {
        self.shared.traits.export()
    }

    fn guarding(&self) -> Guarding {
        Guarding::Library
    }

    fn doorbell_fd(&self, register: u16) -> Result<OwnedFd, Error> {
        let signalled = eventfd::new().map_err(failed("make an eventfd"))?;
        self.connect_doorbell(register, &signalled)?;
        Ok(signalled)
    }

    fn interrupt_fd(&self, vcpu: u32, vector: u8) -> Result<OwnedFd, Error> {
        self.shared.interrupts.descriptor(vcpu, vector)
    }

    fn dropped_interrupts(&self) -> Result<u64, Error> {
        Ok(self.shared.interrupts.dropped())
    }
}
