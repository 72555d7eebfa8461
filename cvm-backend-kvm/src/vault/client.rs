//! The VMM's side: handles that ask the vault.

use super::page::Pages;
use super::process::Vault;
use super::protocol::{Order, Reply, Report, Request};
use super::vcpu::VaultVcpu;
use super::{MOST_LOADED, Program, socket};
use crate::error::failed;
use crate::local::{Backing, Isolation, Layout, lifecycle, shared_view};
use crate::{Error, eventfd, lock};
use cvm_core::doorbell::Transport;
use cvm_core::interrupt::{Guarding, Refusal};
use cvm_core::launch::{Loader, Transcript, VmConfig};
use cvm_core::memory::{Allocated, ConversionEngine, ConversionTotals, Converter, ConverterError, LeftAs};
use cvm_core::x86::VcpuState;
use cvm_core::{
    BoxError, Conversion, ConversionListener, ConversionRequest, Error as CoreError, Event, GpaRange, Kick, Lifecycle,
    LifecycleAnswer, Measurement, PageKind, SharedMemory, Side, Trigger, Vcpu, Vm,
};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Starts a vault, and in it the launch of a VM that uses `transport`. The vault finds out by itself that KVM has
/// `isolation` for private memory; `guarding` says whether the VMM can reach into the vault.
pub(crate) fn launch(
    program: &Program,
    device: &Path,
    config: &VmConfig,
    transport: Transport,
    isolation: Isolation,
    guarding: Guarding,
    deadline: Duration,
) -> Result<VaultLoader, BoxError> {
    let layout = Layout::new(&config.memory)?;
    let shared = Backing::new("cvm-shared", layout.bytes())?;
    let pages = Backing::new("cvm-vcpu-pages", Pages::bytes(config.vcpus))?;
    let vault = Vault::new(program, device, config.vcpus, &pages, deadline)?;
    let (kicks, theirs) = socket::kick_pair().map_err(Error::vault("make a socket for kicks"))?;
    for slot in &config.memory {
        vault.order_done(&Order::Slot(*slot), &[])?;
    }
    let (accepted, levels) = (config.interrupts.bits(), config.interrupts.level_bits());
    let most_per_second = config.interrupts.most_per_second();
    let edges = std::array::from_fn(|word| accepted[word] & !levels[word]);
    for (vectors, trigger) in [(edges, Trigger::Edge), (levels, Trigger::Level)] {
        vault.order_done(&Order::Accept { vectors, trigger, most_per_second }, &[])?;
    }
    let VmConfig { vcpus, policy, doorbell, interrupt_controller, .. } = *config;
    let create = Order::Create { vcpus, policy, doorbell, transport, interrupt_controller };
    vault.order_done(&create, &[shared.file().as_fd(), pages.file().as_fd(), theirs.as_fd()])?;
    Ok(VaultLoader { vault, kicks, shared, layout, isolation, guarding })
}

/// Loads the pages of a VM that a vault holds.
#[derive(Debug)]
pub(crate) struct VaultLoader {
    vault: Vault,
    kicks: OwnedFd,
    shared: Backing,
    layout: Layout,
    isolation: Isolation,
    guarding: Guarding,
}

impl Loader for VaultLoader {
    type Vm = VaultVm;

    fn load(&mut self, range: GpaRange, contents: &[u8], kind: PageKind) -> Result<(), BoxError> {
        if kind == PageKind::Zero {
            return Ok(self.vault.order_done(&Order::Load { range, kind }, &[])?);
        }
        for (part, contents) in (0..).zip(contents.chunks(MOST_LOADED as usize)) {
            let range = GpaRange::new(range.start().0 + part * MOST_LOADED, contents.len() as u64)?;
            let offset = self.layout.find(range).ok_or("these pages are in no slot")?.in_file;
            self.shared.file().write_all_at(contents, offset).map_err(Error::memory("stage", range))?;
            self.vault.order_done(&Order::Load { range, kind }, &[])?;
        }
        Ok(())
    }

    fn set_vcpu(&mut self, index: u32, state: &VcpuState) -> Result<(), BoxError> {
        Order::set_vcpu(index, state).try_for_each(|order| self.vault.order_done(&order, &[]))?;
        Ok(())
    }

    fn seal(self, transcript: Transcript) -> Result<VaultVm, BoxError> {
        let measured = match self.vault.order(&Order::Seal, &[])? {
            Report::Sealed(measurement) if measurement == transcript.measurement() => measurement,
            Report::Sealed(_) => return Err(self.vault.broken("it has measured something else").into()),
            _ => return Err(self.vault.unfit_report().into()),
        };
        let view = shared_view(&self.shared, &self.layout)?;
        let vcpus = self.vault.vcpus();
        let held = Arc::new(Held { vault: self.vault, kicks: self.kicks, interrupts: Mutex::default() });
        let engine = ConversionEngine::new(ByVault(Arc::clone(&held)), view);
        let shared = Arc::new(Shared { engine, held });
        let vcpus: Vec<_> = (0..vcpus).map(|index| VaultVcpu::new(index, Arc::clone(&shared))).collect();
        let kickers = vcpus.iter().map(Vcpu::kicker).collect();
        Ok(VaultVm { shared, vcpus, kickers, isolation: self.isolation, guarding: self.guarding, measured, transcript })
    }
}

/// The vault of a VM that was launched.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) vault: Vault,
    /// This end of the socket for kicks.
    pub(super) kicks: OwnedFd,
    /// The eventfds that raise interrupts, by vCPU and vector.
    interrupts: Mutex<BTreeMap<(u32, u8), OwnedFd>>,
}

/// Has the vault carry out what a vCPU has asked for.
pub(super) struct ByVault(Arc<Held>);

impl Converter for ByVault {
    fn convert(&self, vcpu: u32, range: GpaRange, to: Side) -> Result<(), ConverterError> {
        let not_converted = |left_as, source| Err(ConverterError { step: "have the vault convert", left_as, source });
        match self.0.vault.ask(vcpu, &Request::Convert { range, to }) {
            Ok(Reply::Done) => Ok(()),
            Ok(Reply::NotConverted { left_as, reason }) => not_converted(left_as, reason.into()),
            Ok(Reply::Outdated(reason)) => not_converted(LeftAs::Before, reason.into()),
            Ok(_) => not_converted(LeftAs::Unknown, self.0.vault.unfit_reply().into()),
            Err(error @ Error::VaultRefused { .. }) => not_converted(LeftAs::Before, error.into()),
            // With the vault, the guest is gone.
            Err(error) => not_converted(LeftAs::Unknown, error.into()),
        }
    }

    fn poison(&self, vcpu: u32, range: GpaRange) -> Result<(), BoxError> {
        match self.0.vault.ask(vcpu, &Request::Poison(range)) {
            Ok(Reply::Done) => Ok(()),
            Ok(Reply::Outdated(reason)) => Err(reason.into()),
            Ok(_) => Err(self.0.vault.unfit_reply().into()),
            Err(error @ Error::VaultRefused { .. }) => Err(error.into()),
            // No guest sees anything without its vault; but one that is stopped and cannot be killed may go on.
            Err(_) if self.0.vault.is_gone() => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn most_runs(&self) -> u64 {
        // The vault knows how many mappings it has, and refuses what is too much.
        u64::MAX
    }
}

pub(super) struct Shared {
    pub(super) engine: ConversionEngine<ByVault>,
    pub(super) held: Arc<Held>,
}

/// A VM that a vault holds.
pub(crate) struct VaultVm {
    shared: Arc<Shared>,
    vcpus: Vec<VaultVcpu>,
    kickers: Vec<Arc<dyn Kick>>,
    isolation: Isolation,
    guarding: Guarding,
    measured: Measurement,
    transcript: Transcript,
}

impl VaultVm {
    /// What the vault has measured by itself.
    pub(crate) fn measured(&self) -> Measurement {
        self.measured
    }

    /// Has the vault connect an eventfd of this process, which the vault gets a copy of: a process that polls or writes an
    /// eventfd of its peer's making might find something else, which blocks.
    fn connect(&self, order: &Order, refused: impl FnOnce(Refusal) -> CoreError) -> Result<OwnedFd, CoreError> {
        let vault = &self.shared.held.vault;
        let eventfd = eventfd::new().map_err(failed("make an eventfd"))?;
        match vault.order(order, &[eventfd.as_fd()]).map_err(failed(order.name()))? {
            Report::Done => Ok(eventfd),
            Report::NoDescriptor(reason) => Err(CoreError::NoDescriptor(reason)),
            Report::InjectionRefused(refusal) => Err(refused(refusal)),
            _ => Err(failed(order.name())(vault.unfit_report())),
        }
    }
}

impl Vm for VaultVm {
    type Vcpu = VaultVcpu;

    fn take_vcpus(&mut self) -> Vec<VaultVcpu> {
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

    fn allocated(&self) -> Result<Allocated, CoreError> {
        let vault = &self.shared.held.vault;
        match vault.order(&Order::Count, &[]).map_err(failed("count the memory"))? {
            Report::Memory { private, shared } => Ok(Allocated { private, shared }),
            _ => Err(failed("count the memory")(vault.unfit_report())),
        }
    }

    fn transcript(&self) -> &Transcript {
        &self.transcript
    }

    fn lifecycle(&self, what: Lifecycle) -> LifecycleAnswer {
        lifecycle(what, self.isolation.swap())
    }

    fn guarding(&self) -> Guarding {
        self.guarding
    }

    fn doorbell_fd(&self, register: u16) -> Result<OwnedFd, CoreError> {
        self.connect(&Order::DoorbellFd(register), |refusal| CoreError::NoDescriptor(refusal.to_string()))
    }

    fn interrupt_fd(&self, vcpu: u32, vector: u8) -> Result<OwnedFd, CoreError> {
        let mut known = lock(&self.shared.held.interrupts);
        let eventfd = match known.entry((vcpu, vector)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let refused = |reason| CoreError::InjectionRefused { vcpu, event: Event::Interrupt(vector), reason };
                place.insert(self.connect(&Order::InterruptFd { vcpu, vector }, refused)?)
            }
        };
        eventfd.try_clone().map_err(failed("copy an eventfd"))
    }

    fn dropped_interrupts(&self) -> Result<u64, CoreError> {
        let vault = &self.shared.held.vault;
        match vault.order(&Order::CountDropped, &[]).map_err(failed("count dropped interrupts"))? {
            Report::Dropped(count) => Ok(count),
            _ => Err(failed("count dropped interrupts")(vault.unfit_report())),
        }
    }
}
