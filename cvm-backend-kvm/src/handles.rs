//! What a VMM holds of a VM: each handle leads to a VM of this process or of a vault.

use crate::local::{LocalLoader, LocalVcpu, LocalVm};
use crate::vault::{VaultLoader, VaultVcpu, VaultVm};
use cvm_core::interrupt::Guarding;
use cvm_core::launch::{Loader, Transcript};
use cvm_core::memory::{Allocated, ConversionTotals};
use cvm_core::x86::{Register, VcpuState};
use cvm_core::{
    BoxError, Conversion, ConversionListener, ConversionRequest, Error, Event, Exit, GpaRange, Kick, Lifecycle,
    LifecycleAnswer, Measurement, PageKind, RegisterRead, SharedMemory, Vcpu, Vm,
};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Calls the same on whichever it is.
macro_rules! either {
    ($handle:expr, $of:ident, $it:ident => $call:expr) => {
        match $handle {
            $of::Local($it) => $call,
            $of::Vault($it) => $call,
        }
    };
}

/// Loads the pages of a VM.
#[derive(Debug)]
pub struct KvmLoader(pub(crate) LoaderOf);

#[derive(Debug)]
pub(crate) enum LoaderOf {
    Local(Box<LocalLoader>),
    Vault(VaultLoader),
}

impl Loader for KvmLoader {
    type Vm = KvmVm;

    fn load(&mut self, range: GpaRange, contents: &[u8], kind: PageKind) -> Result<(), BoxError> {
        either!(&mut self.0, LoaderOf, loader => loader.load(range, contents, kind))
    }

    fn set_vcpu(&mut self, index: u32, state: &VcpuState) -> Result<(), BoxError> {
        either!(&mut self.0, LoaderOf, loader => loader.set_vcpu(index, state))
    }

    fn seal(self, transcript: Transcript) -> Result<KvmVm, BoxError> {
        Ok(KvmVm(match self.0 {
            LoaderOf::Local(loader) => VmOf::Local(loader.seal(transcript)?),
            LoaderOf::Vault(loader) => VmOf::Vault(loader.seal(transcript)?),
        }))
    }
}

/// A VM on plain KVM.
pub struct KvmVm(VmOf);

enum VmOf {
    Local(LocalVm),
    Vault(VaultVm),
}

impl KvmVm {
    /// The measurement that the vault which holds the VM has computed by itself; nothing without a vault. No hardware vouches for
    /// it: the vault is a process of this host.
    pub fn measured_by_vault(&self) -> Option<Measurement> {
        match &self.0 {
            VmOf::Local(_) => None,
            VmOf::Vault(vm) => Some(vm.measured()),
        }
    }
}

impl Vm for KvmVm {
    type Vcpu = KvmVcpu;

    fn take_vcpus(&mut self) -> Vec<KvmVcpu> {
        match &mut self.0 {
            VmOf::Local(vm) => vm.take_vcpus().into_iter().map(VcpuOf::Local).map(KvmVcpu).collect(),
            VmOf::Vault(vm) => vm.take_vcpus().into_iter().map(VcpuOf::Vault).map(KvmVcpu).collect(),
        }
    }

    fn memory(&self) -> &SharedMemory {
        either!(&self.0, VmOf, vm => vm.memory())
    }

    fn convert(&self, request: &ConversionRequest) -> Conversion {
        either!(&self.0, VmOf, vm => vm.convert(request))
    }

    fn add_listener(&self, listener: Arc<dyn ConversionListener>) {
        either!(&self.0, VmOf, vm => vm.add_listener(listener))
    }

    fn conversions(&self) -> ConversionTotals {
        either!(&self.0, VmOf, vm => vm.conversions())
    }

    fn allocated(&self) -> Result<Allocated, Error> {
        either!(&self.0, VmOf, vm => vm.allocated())
    }

    fn transcript(&self) -> &Transcript {
        either!(&self.0, VmOf, vm => vm.transcript())
    }

    fn lifecycle(&self, what: Lifecycle) -> LifecycleAnswer {
        either!(&self.0, VmOf, vm => vm.lifecycle(what))
    }

    fn guarding(&self) -> Guarding {
        either!(&self.0, VmOf, vm => vm.guarding())
    }

    fn doorbell_fd(&self, register: u16) -> Result<OwnedFd, Error> {
        either!(&self.0, VmOf, vm => vm.doorbell_fd(register))
    }

    fn interrupt_fd(&self, vcpu: u32, vector: u8) -> Result<OwnedFd, Error> {
        either!(&self.0, VmOf, vm => vm.interrupt_fd(vcpu, vector))
    }

    fn dropped_interrupts(&self) -> Result<u64, Error> {
        either!(&self.0, VmOf, vm => vm.dropped_interrupts())
    }
}

/// A vCPU on plain KVM.
pub struct KvmVcpu(pub(crate) VcpuOf);

pub(crate) enum VcpuOf {
    Local(LocalVcpu),
    Vault(VaultVcpu),
}

impl Vcpu for KvmVcpu {
    fn index(&self) -> u32 {
        either!(&self.0, VcpuOf, vcpu => vcpu.index())
    }

    fn run(&mut self) -> Result<Exit, Error> {
        either!(&mut self.0, VcpuOf, vcpu => vcpu.run())
    }

    fn answer_read(&mut self, value: u64) -> Result<(), Error> {
        either!(&mut self.0, VcpuOf, vcpu => vcpu.answer_read(value))
    }

    fn answer_conversion(&mut self, conversion: Conversion) -> Result<(), Error> {
        either!(&mut self.0, VcpuOf, vcpu => vcpu.answer_conversion(conversion))
    }

    fn refuse_conversion(&mut self) -> Result<(), Error> {
        either!(&mut self.0, VcpuOf, vcpu => vcpu.refuse_conversion())
    }

    fn register(&self, register: Register) -> Result<RegisterRead, Error> {
        either!(&self.0, VcpuOf, vcpu => vcpu.register(register))
    }

    fn inject(&mut self, event: Event) -> Result<(), Error> {
        either!(&mut self.0, VcpuOf, vcpu => vcpu.inject(event))
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        either!(&self.0, VcpuOf, vcpu => vcpu.kicker())
    }
}
