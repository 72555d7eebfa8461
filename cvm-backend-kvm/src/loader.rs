use crate::guest_memory::GuestMemory;
use crate::vcpu::{self, KvmVcpu};
use crate::vm::{KvmVm, Shared};
use crate::{Error, hypercall};
use cvm_core::doorbell::Transport;
use cvm_core::launch::{Loader, Transcript, VmConfig};
use cvm_core::memory::ConversionEngine;
use cvm_core::x86::VcpuState;
use cvm_core::{BoxError, GpaRange, PageKind};
use kvm_bindings::{KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN, kvm_enable_cap};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::sync::Arc;

/// Loads the pages of a VM on plain KVM.
#[derive(Debug)]
pub struct KvmLoader {
    // Dropped before the memory that they see.
    vcpus: Vec<VcpuFd>,
    vm: VmFd,
    memory: GuestMemory,
    config: VmConfig,
}

impl KvmLoader {
    pub(crate) fn new(kvm: &Kvm, config: VmConfig, transport: Transport) -> Result<Self, Error> {
        let memory = GuestMemory::new(&config.memory)?;
        let vm = kvm.create_vm().map_err(Error::kvm("create a vm"))?;
        let mut msrs = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..Default::default() };
        msrs.args[0] = KVM_MSR_EXIT_REASON_UNKNOWN.into();
        vm.enable_cap(&msrs).map_err(Error::kvm("enable exits for msr accesses"))?;
        if transport == Transport::Hypercall {
            hypercall::enable(&vm)?;
        }
        memory.attach(&vm)?;
        let mut vcpus = Vec::new();
        for index in 0..config.vcpus {
            let vcpu = vm.create_vcpu(index.into()).map_err(Error::kvm("create a vcpu"))?;
            vcpu::set_cpuid(kvm, &vcpu, index, transport)?;
            vcpus.push(vcpu);
        }
        Ok(Self { vcpus, vm, memory, config })
    }
}

impl Loader for KvmLoader {
    type Vm = KvmVm;

    fn load(&mut self, range: GpaRange, contents: &[u8], kind: PageKind) -> Result<(), BoxError> {
        match kind {
            // Fresh memory is zero.
            PageKind::Zero => Ok(()),
            PageKind::Measured | PageKind::Unmeasured => Ok(self.memory.write_private(range, contents)?),
        }
    }

    fn set_vcpu(&mut self, index: u32, state: &VcpuState) -> Result<(), BoxError> {
        let vcpu = self.vcpus.get(index as usize).ok_or("there is no such vcpu")?;
        Ok(vcpu::set_state(vcpu, state)?)
    }

    fn seal(self, transcript: Transcript) -> Result<KvmVm, BoxError> {
        let view = self.memory.shared_view()?;
        let engine = ConversionEngine::new(self.memory, view);
        let shared = Arc::new(Shared { engine, vm: self.vm });
        let vcpus = (0..).zip(self.vcpus);
        let vcpus = vcpus
            .map(|(index, fd)| KvmVcpu::new(index, fd, Arc::clone(&shared), self.config.interrupts))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(KvmVm::new(shared, vcpus, transcript))
    }
}
