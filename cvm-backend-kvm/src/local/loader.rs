use super::apic;
use super::interrupts::Interrupts;
use super::memory::{Backing, FilesMemory, GmemMemory, GuestMemory, Layout};
use super::staging::Staging;
use super::vcpu::{self, LocalVcpu};
use super::vm::{LocalVm, Shared};
use crate::host::Host;
use crate::{Error, hypercall, policy};
use cvm_core::doorbell::Transport;
use cvm_core::launch::{Loader, Transcript, VmConfig};
use cvm_core::memory::ConversionEngine;
use cvm_core::x86::VcpuState;
use cvm_core::{BoxError, Gpa, GpaRange, InterruptController, PageKind};
use kvm_bindings::{KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN, kvm_enable_cap};
use kvm_ioctls::{VcpuFd, VmFd};
use std::collections::BTreeMap;
use std::sync::Arc;

/// How private memory is kept private from this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isolation {
    None,
    GuestMemfd,
}

/// Loads the pages of a VM.
#[derive(Debug)]
pub(crate) struct LocalLoader {
    // Dropped before the memory that they see.
    vcpus: Vec<VcpuFd>,
    /// How contents get into memory that the host cannot write.
    staging: Option<Staging>,
    vm: Arc<VmFd>,
    memory: GuestMemory,
    config: VmConfig,
    states: BTreeMap<u32, VcpuState>,
}

/// `KVM_X86_SW_PROTECTED_VM` (Linux arch/x86/include/uapi/asm/kvm.h).
const SW_PROTECTED_VM: u64 = 1;

impl LocalLoader {
    /// A VM that uses `transport`. `shared` is behind the shared side; without it, a file of this process.
    pub(crate) fn new(
        host: &Host,
        isolation: Isolation,
        config: VmConfig,
        transport: Transport,
        shared: Option<Backing>,
    ) -> Result<Self, BoxError> {
        let kvm = &host.kvm;
        let layout = Layout::new(&config.memory)?;
        let shared = shared.map_or_else(|| Backing::new("cvm-shared", layout.bytes()), Ok)?;
        let (vm, memory) = match isolation {
            Isolation::None => {
                let memory = FilesMemory::new(layout, shared, host.most_runs)?;
                let vm = Arc::new(kvm.create_vm().map_err(Error::kvm("create a vm"))?);
                memory.attach(&vm)?;
                (vm, GuestMemory::Files(memory))
            }
            Isolation::GuestMemfd => {
                let vm = kvm.create_vm_with_type(SW_PROTECTED_VM).map_err(Error::kvm("create a protected vm"))?;
                let vm = Arc::new(vm);
                let memory = GmemMemory::new(Arc::clone(&vm), layout, shared, host.most_runs)?;
                (vm, GuestMemory::Gmem(memory))
            }
        };
        let mut msrs = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..Default::default() };
        msrs.args[0] = KVM_MSR_EXIT_REASON_UNKNOWN.into();
        vm.enable_cap(&msrs).map_err(Error::kvm("enable exits for msr accesses"))?;
        if transport == Transport::Hypercall {
            hypercall::enable(&vm)?;
        }
        policy::enforce(kvm, &vm, config.policy)?;
        if config.interrupt_controller == InterruptController::Apic {
            apic::enable(&vm)?;
        }
        let cpuid = vcpu::supported_cpuid(kvm)?;
        let mut vcpus = Vec::new();
        for index in 0..config.vcpus {
            let vcpu = vm.create_vcpu(index.into()).map_err(Error::kvm("create a vcpu"))?;
            vcpu::set_cpuid(cpuid.clone(), &vcpu, index, transport, &config)?;
            vcpus.push(vcpu);
        }
        let staging = match isolation {
            Isolation::None => None,
            Isolation::GuestMemfd => {
                let top = config.memory.iter().map(|range| range.end()).max().unwrap_or(Gpa(0));
                Some(Staging::new(&vm, top, config.memory.len() as u32)?)
            }
        };
        Ok(Self { vcpus, staging, vm, memory, config, states: BTreeMap::new() })
    }
}

impl Loader for LocalLoader {
    type Vm = LocalVm;

    fn load(&mut self, range: GpaRange, contents: &[u8], kind: PageKind) -> Result<(), BoxError> {
        // Fresh memory is zero.
        if kind == PageKind::Zero {
            return Ok(());
        }
        match (&self.memory, &self.staging, self.vcpus.first_mut()) {
            (GuestMemory::Files(memory), ..) => Ok(memory.write_private(range, contents)?),
            (GuestMemory::Gmem(_), Some(staging), Some(vcpu)) => staging.load(vcpu, range, contents),
            (GuestMemory::Pinned(memory), ..) => Ok(memory.write(range, contents)?),
            (GuestMemory::Gmem(_), ..) => Err("there is nothing to load by".into()),
        }
    }

    fn set_vcpu(&mut self, index: u32, state: &VcpuState) -> Result<(), BoxError> {
        self.states.insert(index, *state);
        Ok(())
    }

    fn seal(self, transcript: Transcript) -> Result<LocalVm, BoxError> {
        if let Some(staging) = self.staging {
            staging.remove(&self.vm)?;
        }
        // Only now, because the first vCPU may have run to load the others' memory.
        for (index, state) in &self.states {
            let vcpu = self.vcpus.get(*index as usize).ok_or("there is no such vcpu")?;
            vcpu::set_state(vcpu, state)?;
            if self.config.interrupt_controller == InterruptController::Apic {
                apic::start(vcpu)?;
            }
        }
        let view = self.memory.shared_view()?;
        let engine = ConversionEngine::new(self.memory, view);
        let VmConfig { vcpus, interrupts, interrupt_controller, doorbell, .. } = self.config;
        let interrupts = Interrupts::new(Arc::clone(&self.vm), vcpus, interrupts, interrupt_controller);
        let shared = Arc::new(Shared { interrupts, engine, vm: self.vm });
        let vcpus = (0..).zip(self.vcpus);
        let vcpus =
            vcpus.map(|(index, fd)| LocalVcpu::new(index, fd, Arc::clone(&shared))).collect::<Result<Vec<_>, _>>()?;
        Ok(LocalVm::new(shared, vcpus, doorbell, transcript))
    }
}
