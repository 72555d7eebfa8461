use super::memory::GuestMemory;
use super::vcpu::LocalVcpu;
use cvm_core::interrupt::Guarding;
use cvm_core::launch::Transcript;
use cvm_core::memory::{Allocated, ConversionEngine, ConversionTotals};
use cvm_core::{
    Conversion, ConversionListener, ConversionRequest, Error, Kick, Lifecycle, LifecycleAnswer, SharedMemory, Vcpu, Vm,
};
use kvm_ioctls::VmFd;
use std::sync::Arc;

/// What a VM and its vCPUs keep alive together.
pub(crate) struct Shared {
    pub(crate) engine: ConversionEngine<GuestMemory>,
    #[allow(dead_code, reason = "it keeps the vm, to which the vcpus belong")]
    pub(crate) vm: Arc<VmFd>,
}

/// A VM on plain KVM.
pub(crate) struct LocalVm {
    shared: Arc<Shared>,
    vcpus: Vec<LocalVcpu>,
    kickers: Vec<Arc<dyn Kick>>,
    transcript: Transcript,
}

impl LocalVm {
    pub(crate) fn new(shared: Arc<Shared>, vcpus: Vec<LocalVcpu>, transcript: Transcript) -> Self {
        let kickers = vcpus.iter().map(Vcpu::kicker).collect();
        Self { shared, vcpus, kickers, transcript }
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
        lifecycle(what)
    }

    fn guarding(&self) -> Guarding {
        Guarding::Library
    }
}

/// What can be done with a VM on plain KVM, whoever holds it.
pub(crate) fn lifecycle(what: Lifecycle) -> LifecycleAnswer {
    match what {
        // The kernel swaps the pages of both files as those of any other.
        Lifecycle::Swap => LifecycleAnswer::Yes,
        Lifecycle::Migrate | Lifecycle::Snapshot | Lifecycle::Dump => {
            LifecycleAnswer::No("there is no protected export of private memory and registers")
        }
        Lifecycle::Reset => LifecycleAnswer::No("the launch is measured once: launch a new vm"),
        Lifecycle::Hotplug => LifecycleAnswer::No("memory and vcpus are part of the measured launch"),
        Lifecycle::AssignDevice => LifecycleAnswer::No("no iommu mapping follows the conversions"),
    }
}
