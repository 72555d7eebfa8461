use super::machine::Machine;
use super::memory::{Backing, FilesMemory, GmemMemory, GuestMemory, Isolation, Kind, Layout};
use super::staging::Staging;
use super::traits::Plain;
use super::vcpu;
use super::vm::LocalVm;
use crate::host::Host;
use cvm_core::doorbell::Transport;
use cvm_core::launch::{Loader, Transcript, VmConfig};
use cvm_core::x86::VcpuState;
use cvm_core::{BoxError, Gpa, GpaRange, PageKind};
use kvm_bindings::{KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM};
use std::sync::Arc;

/// Loads the pages of a VM on plain KVM.
#[derive(Debug)]
pub(crate) struct LocalLoader {
    machine: Machine,
    /// How contents get into memory that the host cannot write. Dropped after the vCPUs that see it.
    staging: Option<Staging>,
}

impl LocalLoader {
    /// A VM that uses `transport`. `shared` is behind the shared side; without it, a file of this process.
    pub(crate) fn new(
        host: &Host,
        isolation: Isolation,
        config: VmConfig,
        transport: Transport,
        shared: Option<Backing>,
    ) -> Result<Self, BoxError> {
        let layout = Layout::new(&config.memory)?;
        let shared = shared.map_or_else(|| Backing::new("cvm-shared", layout.bytes()), Ok)?;
        let top = config.memory.iter().map(|range| range.end()).max().unwrap_or(Gpa(0));
        let slots = config.memory.len() as u32;
        let cpuid = &vcpu::without_encryption(host.supported_cpuid().clone());
        match isolation {
            Isolation::None => {
                let memory = FilesMemory::new(layout, shared, host.most_runs)?;
                let vm = host.create_vm(KVM_X86_DEFAULT_VM)?;
                memory.attach(&vm)?;
                let machine = Machine::new(host, vm, GuestMemory(Kind::Files(memory)), config, transport, cpuid)?;
                Ok(Self { machine, staging: None })
            }
            Isolation::GuestMemfd => {
                let vm = host.create_vm(KVM_X86_SW_PROTECTED_VM)?;
                let memory = GmemMemory::new(Arc::clone(&vm), layout, shared, host.most_runs)?;
                let machine = Machine::new(host, vm, GuestMemory(Kind::Gmem(memory)), config, transport, cpuid)?;
                let staging = Some(Staging::new(machine.vm(), top, slots)?);
                Ok(Self { machine, staging })
            }
        }
    }
}

impl Loader for LocalLoader {
    type Vm = LocalVm;

    fn load(&mut self, range: GpaRange, contents: &[u8], kind: PageKind) -> Result<(), BoxError> {
        // Fresh memory is zero.
        if kind == PageKind::Zero {
            return Ok(());
        }
        if let Kind::Files(memory) = &self.machine.memory().0 {
            return Ok(memory.write_private(range, contents)?);
        }
        match (&self.staging, self.machine.vcpus().first_mut()) {
            (Some(staging), Some(vcpu)) => staging.load(vcpu, range, contents),
            _ => Err("there is nothing to load by".into()),
        }
    }

    fn set_vcpu(&mut self, index: u32, state: &VcpuState) -> Result<(), BoxError> {
        self.machine.set_vcpu(index, state);
        Ok(())
    }

    fn seal(self, transcript: Transcript) -> Result<LocalVm, BoxError> {
        if let Some(staging) = self.staging {
            staging.remove(self.machine.vm())?;
        }
        // Only now, because the first vCPU may have run to load the others' memory.
        self.machine.set_states()?;
        self.machine.finish(Box::new(Plain), transcript, &[])
    }
}
