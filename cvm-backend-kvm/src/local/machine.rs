//! A VM in the making, whatever protects it.

use super::apic;
use super::interrupts::Interrupts;
use super::kick;
use super::memory::GuestMemory;
use super::traits::Traits;
use super::vcpu::{self, LocalVcpu};
use super::vm::{LocalVm, Shared};
use crate::host::Host;
use crate::{Error, hypercall, policy};
use cvm_core::doorbell::Transport;
use cvm_core::launch::{Transcript, VmConfig};
use cvm_core::memory::{ConversionEngine, Converter};
use cvm_core::x86::VcpuState;
use cvm_core::{BoxError, ConversionRequest, Error as CoreError, GpaRange, InterruptController, Side};
use kvm_bindings::{CpuId, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN, kvm_enable_cap};
use kvm_ioctls::{VcpuFd, VmFd};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A VM that has vCPUs and memory, and is being loaded. Dropping it leaves nothing of it.
#[derive(Debug)]
pub struct Machine {
    // Dropped before the memory that they see.
    vcpus: Vec<VcpuFd>,
    vm: Arc<VmFd>,
    memory: GuestMemory,
    config: VmConfig,
    transport: Transport,
    states: BTreeMap<u32, VcpuState>,
}

impl Machine {
    /// Gives `vm`, whose memory is `memory`, what `config` says of interrupts, policy and vCPUs, and the exits that
    /// conversions by `transport` need. The configuration has to be one that the host was [asked](Host::check) about. vCPUs
    /// are the processor `cpuid`, but for what the configuration changes of it and technologies that no guest has.
    ///
    /// # Errors
    /// [`Error::Kvm`] with the step that failed.
    pub fn new(
        host: &Host,
        vm: Arc<VmFd>,
        memory: GuestMemory,
        config: VmConfig,
        transport: Transport,
        cpuid: &CpuId,
    ) -> Result<Self, Error> {
        let mut msrs = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..Default::default() };
        msrs.args[0] = KVM_MSR_EXIT_REASON_UNKNOWN.into();
        vm.enable_cap(&msrs).map_err(Error::kvm("enable exits for msr accesses"))?;
        if transport != Transport::Doorbell {
            hypercall::enable(&vm)?;
        }
        policy::enforce(&host.facts, &vm, config.policy)?;
        if config.interrupt_controller == InterruptController::Apic {
            apic::enable(&vm)?;
        }
        let mut vcpus = Vec::new();
        for index in 0..config.vcpus {
            let vcpu = vm.create_vcpu(index.into()).map_err(Error::kvm("create a vcpu"))?;
            vcpu::set_cpuid(cpuid.clone(), &vcpu, index, transport, &config)?;
            vcpus.push(vcpu);
        }
        Ok(Self { vcpus, vm, memory, config, transport, states: BTreeMap::new() })
    }

    /// The VM.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// What it was configured as.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Its memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Its vCPUs, the first one first.
    pub fn vcpus(&mut self) -> &mut [VcpuFd] {
        &mut self.vcpus
    }

    /// Remembers the state that a vCPU is to start from.
    pub fn set_vcpu(&mut self, index: u32, state: &VcpuState) {
        self.states.insert(index, *state);
    }

    /// Gives the vCPUs the states that they start from.
    ///
    /// # Errors
    /// [`Error::Kvm`] with the step that failed.
    pub fn set_states(&self) -> Result<(), Error> {
        for (vcpu, state) in (0..).zip(&self.vcpus).filter_map(|(index, fd)| Some((fd, self.states.get(&index)?))) {
            vcpu::set_state(vcpu, state)?;
            if self.config.interrupt_controller == InterruptController::Apic {
                apic::start(vcpu)?;
            }
        }
        Ok(())
    }

    /// Has KVM bring the states up to date that it keeps for the processor: some of it KVM writes there when it is told, and
    /// some only when a vCPU is about to run. For who measures them. No vCPU runs.
    ///
    /// # Errors
    /// [`Error::Kvm`] if a vCPU cannot be kept from running.
    pub fn settle_states(&mut self) -> Result<(), Error> {
        self.vcpus.iter_mut().try_for_each(kick::call_off)
    }

    /// The VM, which runs from here on, with what is particular to it. All of its memory is private but for `shared`: pages that
    /// were shared already where the VM comes from.
    ///
    /// # Errors
    /// When the shared side cannot be mapped, when a page of `shared` cannot be shared, or when vCPUs cannot be interrupted.
    pub fn finish(
        self,
        traits: Box<dyn Traits>,
        transcript: Transcript,
        shared: &[GpaRange],
    ) -> Result<LocalVm, BoxError> {
        let view = self.memory.shared_view()?;
        let engine = ConversionEngine::new(self.memory, view);
        shared.iter().try_for_each(|range| share(&engine, *range))?;
        let VmConfig { vcpus, interrupts, interrupt_controller, doorbell, .. } = self.config;
        let interrupts = Interrupts::new(Arc::clone(&self.vm), vcpus, interrupts, interrupt_controller);
        let shared = Arc::new(Shared { interrupts, traits, transport: self.transport, engine, vm: self.vm });
        let vcpus = (0..).zip(self.vcpus);
        let vcpus =
            vcpus.map(|(index, fd)| LocalVcpu::new(index, fd, Arc::clone(&shared))).collect::<Result<Vec<_>, _>>()?;
        Ok(LocalVm::new(shared, vcpus, doorbell, transcript))
    }
}

/// Makes `range` shared although no guest asks for it, in as many requests as it takes.
fn share<C: Converter>(engine: &ConversionEngine<C>, range: GpaRange) -> Result<(), CoreError> {
    let mut rest = Ok(range);
    while let Ok(range) = rest {
        let request = ConversionRequest::from_guest(0, range.start().0, range.pages(), Side::Shared);
        engine.ask(request);
        let conversion = engine.convert(&request);
        let reached = conversion.reached();
        match conversion.into_cause() {
            None => break,
            // It has converted one run of pages at least.
            Some(CoreError::Unfinished { .. }) => rest = GpaRange::new(reached.0, range.end().0 - reached.0),
            Some(cause) => return Err(cause),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use cvm_core::memory::{ConverterError, LeftAs, Slots};
    use cvm_core::{Gpa, PAGE_SIZE, PageState, PageStateMap, SharedMemory};
    use std::error::Error as _;
    use std::sync::atomic::{AtomicU32, Ordering};
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    /// Fails after so many conversions.
    struct Fails(AtomicU32);

    impl Converter for Fails {
        fn convert(&self, _: u32, _: GpaRange, _: Side) -> Result<(), ConverterError> {
            if self.0.fetch_sub(1, Ordering::Relaxed) > 0 {
                return Ok(());
            }
            Err(ConverterError { step: "show the shared side", left_as: LeftAs::Before, source: "no memory".into() })
        }

        fn poison(&self, _: u32, _: GpaRange) -> Result<(), BoxError> {
            Ok(())
        }

        fn most_runs(&self) -> u64 {
            u64::MAX
        }
    }

    fn engine(pages: u64, conversions: u32) -> ConversionEngine<Fails> {
        let slot = GpaRange::from_pages(0, pages).unwrap();
        let map = Arc::new(PageStateMap::new(Slots::new(&[slot]).unwrap()).unwrap());
        let backing = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), slot.len() as usize)]).unwrap();
        ConversionEngine::new(Fails(AtomicU32::new(conversions)), SharedMemory::new(backing, map).unwrap())
    }

    #[test]
    fn a_range_of_more_runs_than_a_request_converts_is_shared_in_several() {
        let engine = engine(2000, 2000);
        for page in (0..2000).step_by(2) {
            share(&engine, GpaRange::from_pages(page * PAGE_SIZE, 1).unwrap()).unwrap();
        }
        share(&engine, GpaRange::from_pages(0, 2000).unwrap()).unwrap();
        assert_eq!(engine.memory().map().count(PageState::Shared), 2000);
    }

    #[test]
    fn pages_that_cannot_be_shared_fail_with_the_cause_and_its_source() {
        let error = share(&engine(4, 0), GpaRange::from_pages(0, 4).unwrap()).unwrap_err();
        assert!(matches!(error, CoreError::Backend { step: "show the shared side", .. }), "{error:?}");
        assert_eq!(error.source().unwrap().to_string(), "no memory");
        let error = share(&engine(4, 9), GpaRange::from_pages(0, 8).unwrap()).unwrap_err();
        assert!(matches!(error, CoreError::OutsideMemory { gpa: Gpa(0x4000) }), "{error:?}");
    }
}
