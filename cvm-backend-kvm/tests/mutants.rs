//! The conformance suite notices a backend that breaks the contract: plain KVM behind a layer that gets one thing wrong.

use cvm_backend_kvm::KvmPlatform;
use cvm_conformance::{Bench, Verdict, clauses};
use cvm_core::doorbell::Transport;
use cvm_core::export::Export;
use cvm_core::interrupt::Guarding;
use cvm_core::launch::{Loader, Transcript};
use cvm_core::memory::{Allocated, Conversion, ConversionListener, ConversionRequest, ConversionTotals};
use cvm_core::platform::Powers;
use cvm_core::x86::{Register, VcpuState};
use cvm_core::{
    BoxError, Error, Event, Exit, GpaRange, Kick, Launch, Lifecycle, LifecycleAnswer, Offer, PageKind, Platform,
    Policy, Protection, RegisterRead, SharedMemory, TrustModel, Vcpu, Vm, VmConfig,
};
use std::fs::File;
use std::io::Write;
use std::mem;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

/// What a backend gets wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Nothing.
    Nothing,
    /// It trusts nobody, and shows registers to everybody.
    TrustsTooLittle,
    /// It launches what it does not offer.
    IgnoresTransport,
    /// It launches whatever is demanded, and enforces nothing.
    IgnoresPolicy,
    /// It loads pages without their contents.
    LoadsZeros,
    /// It leaves unmeasured pages out.
    LosesUnmeasured,
    /// It gives a vCPU the state of another.
    SwapsStates,
    /// It forgets the last thing that was submitted.
    CutsTranscript,
    /// It hands out the vCPUs in another order.
    ReversesVcpus,
    /// It converts what was asked for by another name.
    ShiftsVcpu,
    /// It has no listeners.
    LosesListeners,
    /// It counts no refusals.
    MiscountsConversions,
    /// It has memory on both sides.
    AllocatesTwice,
    /// It says what it cannot do.
    PromisesMigration,
    /// It gives no reason.
    GivesNoReason,
    /// It lets the host inject anything.
    InjectsAnything,
    /// It injects nothing.
    InjectsNothing,
    /// It has a descriptor for every interrupt.
    InventsDescriptors,
    /// It shows a register that is not the one.
    ConfusesRegisters,
    /// It shows a byte of what the guest has written.
    TruncatesWrites,
    /// It takes an answer to nothing.
    TakesAnyAnswer,
    /// It runs a vCPU whose question is open: by answering it.
    AnswersByItself,
    /// It loses what a guest gave as the reason of its end.
    LosesEndCode,
    /// It takes something up for each VM, and does not give it back.
    Leaks,
    /// It refuses with a word that says nothing.
    Mumbles,
}

/// Each fault, and a clause that has to notice it.
const FAULTS: [(Fault, &str); 24] = [
    (Fault::TrustsTooLittle, "6.1"),
    (Fault::IgnoresTransport, "2.10"),
    (Fault::IgnoresPolicy, "8.1"),
    (Fault::LoadsZeros, "2.6"),
    (Fault::LosesUnmeasured, "2.7"),
    (Fault::SwapsStates, "2.8"),
    (Fault::CutsTranscript, "2.12"),
    (Fault::ReversesVcpus, "2.5"),
    (Fault::ShiftsVcpu, "4.14"),
    (Fault::LosesListeners, "4.19"),
    (Fault::MiscountsConversions, "4.23"),
    (Fault::AllocatesTwice, "3.8"),
    (Fault::PromisesMigration, "9.2"),
    (Fault::GivesNoReason, "9.1"),
    (Fault::InjectsAnything, "7.2"),
    (Fault::InjectsNothing, "7.7"),
    (Fault::InventsDescriptors, "7.21"),
    (Fault::ConfusesRegisters, "6.2"),
    (Fault::TruncatesWrites, "5.4"),
    (Fault::TakesAnyAnswer, "5.8"),
    (Fault::AnswersByItself, "5.8"),
    (Fault::LosesEndCode, "5.2"),
    (Fault::Leaks, "10.1"),
    (Fault::Mumbles, "12.1"),
];

type Inner = KvmPlatform;
type InnerLoader = <Inner as Platform>::Loader;
type InnerVm = <InnerLoader as Loader>::Vm;
type InnerVcpu = <InnerVm as Vm>::Vcpu;

struct Mutant {
    inner: Inner,
    fault: Fault,
}

impl Platform for Mutant {
    type Loader = MutantLoader;

    fn probe() -> Vec<Offer> {
        Inner::probe()
    }

    fn trust_model(&self) -> TrustModel {
        match self.fault {
            Fault::TrustsTooLittle => TrustModel::new(|_, _| Powers::empty()),
            _ => self.inner.trust_model(),
        }
    }

    fn launch(&self, config: VmConfig) -> Result<Launch<MutantLoader>, Error> {
        let mut inner = config.clone();
        match self.fault {
            Fault::IgnoresTransport => inner.transport = Some(Transport::Doorbell),
            Fault::IgnoresPolicy => inner.policy = Policy::empty(),
            _ => {}
        }
        let launch = self.inner.launch(inner).map_err(|error| match (self.fault, error) {
            (Fault::Mumbles, Error::Config(_)) => Error::Config(String::new()),
            (_, error) => error,
        })?;
        let interface = *launch.interface();
        if self.fault == Fault::Leaks {
            mem::forget(File::open("/dev/null").unwrap());
        }
        Launch::new(MutantLoader { launch, fault: self.fault }, config, interface)
    }
}

/// A launch inside the one that the suite sees.
struct MutantLoader {
    launch: Launch<InnerLoader>,
    fault: Fault,
}

impl Loader for MutantLoader {
    type Vm = MutantVm;

    fn load(&mut self, range: GpaRange, contents: &[u8], kind: PageKind) -> Result<(), BoxError> {
        match (kind, self.fault) {
            (PageKind::Zero, _) => self.launch.zero(range)?,
            (_, Fault::LoadsZeros) => self.launch.load(range.start(), &vec![0; contents.len()], kind)?,
            (PageKind::Unmeasured, Fault::LosesUnmeasured) => {}
            _ => self.launch.load(range.start(), contents, kind)?,
        }
        Ok(())
    }

    fn set_vcpu(&mut self, index: u32, state: &VcpuState) -> Result<(), BoxError> {
        let index = match self.fault {
            Fault::SwapsStates if self.launch.config().vcpus > 1 => index ^ 1,
            _ => index,
        };
        Ok(self.launch.set_vcpu(index, state)?)
    }

    fn seal(self, transcript: Transcript) -> Result<MutantVm, BoxError> {
        let mut entries = transcript.entries().to_vec();
        if self.fault == Fault::CutsTranscript {
            entries.pop();
        }
        Ok(MutantVm { inner: self.launch.seal()?, transcript: entries.into_iter().collect(), fault: self.fault })
    }
}

struct MutantVm {
    inner: InnerVm,
    transcript: Transcript,
    fault: Fault,
}

impl Vm for MutantVm {
    type Vcpu = MutantVcpu;

    fn take_vcpus(&mut self) -> Vec<MutantVcpu> {
        let fault = self.fault;
        let vcpus = self.inner.take_vcpus().into_iter();
        let mut vcpus: Vec<_> = vcpus.map(|inner| MutantVcpu { inner, fault, asks: false }).collect();
        if fault == Fault::ReversesVcpus {
            vcpus.reverse();
        }
        vcpus
    }

    fn memory(&self) -> &SharedMemory {
        self.inner.memory()
    }

    fn convert(&self, request: &ConversionRequest) -> Conversion {
        if self.fault != Fault::ShiftsVcpu {
            return self.inner.convert(request);
        }
        // Whoever asks, it was somebody who may.
        let pages = (request.gpa().0, request.pages(), request.to());
        let asked = (0..4).map(|vcpu| ConversionRequest::from_guest(vcpu, pages.0, pages.1, pages.2));
        let mut outcomes = asked.map(|request| self.inner.convert(&request));
        let first = outcomes.next().unwrap();
        if !matches!(first.cause(), Some(Error::NotAsked { .. })) {
            return first;
        }
        outcomes.find(|outcome| !matches!(outcome.cause(), Some(Error::NotAsked { .. }))).unwrap_or(first)
    }

    fn add_listener(&self, listener: Arc<dyn ConversionListener>) {
        if self.fault != Fault::LosesListeners {
            self.inner.add_listener(listener);
        }
    }

    fn conversions(&self) -> ConversionTotals {
        let totals = self.inner.conversions();
        match self.fault {
            Fault::MiscountsConversions => ConversionTotals { refused: 0, ..totals },
            _ => totals,
        }
    }

    fn allocated(&self) -> Result<Allocated, Error> {
        let allocated = self.inner.allocated()?;
        let twice = if self.fault == Fault::AllocatesTwice { allocated.shared } else { 0 };
        Ok(Allocated { private: allocated.private.map(|private| private + twice), ..allocated })
    }

    fn transcript(&self) -> &Transcript {
        &self.transcript
    }

    fn lifecycle(&self, what: Lifecycle) -> LifecycleAnswer {
        match (self.fault, what, self.inner.lifecycle(what)) {
            (Fault::PromisesMigration, Lifecycle::StopAndCopy, _) => LifecycleAnswer::Yes,
            (Fault::GivesNoReason, _, LifecycleAnswer::No(_)) => LifecycleAnswer::No(""),
            (_, _, answer) => answer,
        }
    }

    fn export(&self) -> Option<&dyn Export<MutantVcpu>> {
        None
    }

    fn guarding(&self) -> Guarding {
        self.inner.guarding()
    }

    fn doorbell_fd(&self, register: u16) -> Result<OwnedFd, Error> {
        self.inner.doorbell_fd(register)
    }

    fn interrupt_fd(&self, vcpu: u32, vector: u8) -> Result<OwnedFd, Error> {
        match self.fault {
            Fault::InventsDescriptors => Ok(File::open("/dev/null").unwrap().into()),
            _ => self.inner.interrupt_fd(vcpu, vector),
        }
    }

    fn dropped_interrupts(&self) -> Result<u64, Error> {
        self.inner.dropped_interrupts()
    }
}

struct MutantVcpu {
    inner: InnerVcpu,
    fault: Fault,
    /// Whether the guest waits for what it reads.
    asks: bool,
}

impl Vcpu for MutantVcpu {
    fn index(&self) -> u32 {
        self.inner.index()
    }

    fn run(&mut self) -> Result<Exit, Error> {
        if self.fault == Fault::AnswersByItself && mem::take(&mut self.asks) {
            let _ = self.inner.answer_read(0);
        }
        let exit = self.inner.run()?;
        self.asks = matches!(exit, Exit::DoorbellRead { .. } | Exit::PortRead { .. } | Exit::MsrRead { .. });
        Ok(match (self.fault, exit) {
            (Fault::TruncatesWrites, Exit::PortWrite { port, width, value }) => {
                Exit::PortWrite { port, width, value: value & 0xff }
            }
            (Fault::LosesEndCode, Exit::Ended { .. }) => Exit::Ended { code: 0 },
            (_, exit) => exit,
        })
    }

    fn answer_read(&mut self, value: u64) -> Result<(), Error> {
        self.asks = false;
        match (self.fault, self.inner.answer_read(value)) {
            (Fault::TakesAnyAnswer, Err(Error::Protocol { .. })) => Ok(()),
            (_, result) => result,
        }
    }

    fn answer_conversion(&mut self, conversion: Conversion) -> Result<(), Error> {
        self.inner.answer_conversion(conversion)
    }

    fn refuse_conversion(&mut self) -> Result<(), Error> {
        self.inner.refuse_conversion()
    }

    fn register(&self, register: Register) -> Result<RegisterRead, Error> {
        match self.fault {
            Fault::ConfusesRegisters => self.inner.register(Register::Rbx),
            _ => self.inner.register(register),
        }
    }

    fn inject(&mut self, event: Event) -> Result<(), Error> {
        match self.fault {
            Fault::InjectsNothing => Ok(()),
            Fault::InjectsAnything => self.inner.inject(event).or(Ok(())),
            _ => self.inner.inject(event),
        }
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.inner.kicker()
    }
}

/// Whether a platform with this fault meets a clause.
fn meets(fault: Fault, number: &str) -> bool {
    let inner = KvmPlatform::open(Path::new("/dev/kvm"), Some(Protection::None)).unwrap();
    let platform = Mutant { inner, fault };
    let bench = Bench::new(&platform, Protection::None);
    let clauses = clauses::<Mutant>();
    let clause = clauses.iter().find(|clause| clause.number == number).expect("a clause of the contract");
    catch_unwind(AssertUnwindSafe(|| (clause.check)(&bench))).is_ok_and(|verdict| verdict == Verdict::Met)
}

#[test]
fn every_fault_is_noticed_by_the_clause_that_is_about_it() {
    if let Err(error) = KvmPlatform::open(Path::new("/dev/kvm"), Some(Protection::None)) {
        assert!(std::env::var_os("CVM_REQUIRE_KVM").is_none(), "{error}");
        writeln!(std::io::stderr(), "SKIPPED: every_fault_is_noticed_by_the_clause_that_is_about_it: {error}").unwrap();
        return;
    }
    // Clauses that fail say so, which is no news here.
    std::panic::set_hook(Box::new(|_| {}));
    let broken_anyway = FAULTS.iter().filter(|(_, clause)| !meets(Fault::Nothing, clause)).collect::<Vec<_>>();
    let unnoticed = FAULTS.iter().filter(|(fault, clause)| meets(*fault, clause)).collect::<Vec<_>>();
    let _ = std::panic::take_hook();
    assert!(broken_anyway.is_empty(), "this layer breaks what it should not: {broken_anyway:?}");
    assert!(unnoticed.is_empty(), "nobody notices {unnoticed:?}");
}
