//! The VMM's side: handles that ask the vault.

use super::page::{Asking, NoReply, Page, Pages};
use super::protocol::{Failure, Given, Malformed, Message, Order, Reply, Report, Request};
use super::socket::{self, Received};
use super::{MARK, MOST_LOADED, NAME, Program};
use crate::Error;
use crate::local::{Backing, Layout, shared_view};
use cvm_core::doorbell::Transport;
use cvm_core::interrupt::{Guarding, Refusal};
use cvm_core::launch::{Loader, Transcript, VmConfig};
use cvm_core::memory::{Allocated, ConversionEngine, ConversionTotals, Converter, ConverterError, LeftAs, Ticket};
use cvm_core::x86::{Register, VcpuState};
use cvm_core::{
    Answer, BoxError, Conversion, ConversionListener, ConversionRequest, Error as CoreError, Event, Exit, GpaRange,
    Kick, Lifecycle, LifecycleAnswer, PageKind, RegisterRead, SharedMemory, Side, Trigger, Vcpu, Vm,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::RecvFlags;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

/// How long a vault may take to say that it is there, where processors are emulated and files come over a network.
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

fn failed<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Vault { step, source: error.into() }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a thread that panicked leaves behind is a sequence number that is in order or is refused.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The socket with the number of the last order.
#[derive(Debug)]
struct Orders {
    socket: OwnedFd,
    last: u32,
}

/// A vault that was started.
#[derive(Debug)]
struct Vault {
    orders: Mutex<Orders>,
    process: OwnedFd,
    /// What came of it.
    end: Arc<OnceLock<String>>,
    watcher: Option<JoinHandle<()>>,
    pages: Arc<Pages>,
    asking: Vec<Mutex<Asking>>,
}

/// Starts the process; the socket is its standard input.
fn start(program: &Program, device: &Path) -> Result<(Child, OwnedFd), Error> {
    let (ours, theirs) = socket::pair().map_err(failed("make a socket"))?;
    let mut command = Command::new(program.path());
    // An absolute path, for the vault leaves its directory.
    command.arg0(NAME).arg(std::path::absolute(device).map_err(failed("find the device"))?);
    command.env_clear().env(MARK, "1");
    // A program whose libraries are found by it could not start without.
    command.envs(std::env::var_os("LD_LIBRARY_PATH").map(|path| ("LD_LIBRARY_PATH", path)));
    command.stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null());
    // What a terminal sends to the VMM is not for the vault.
    command.process_group(0);
    let child = command.spawn().map_err(failed("start its process"))?;
    Ok((child, ours))
}

impl Vault {
    fn new(program: &Program, device: &Path, vcpus: u32, pages: &Backing) -> Result<Self, Error> {
        let pages = Arc::new(Pages::map(pages, vcpus)?);
        let (mut child, socket) = start(program, device)?;
        let process = Pid::from_raw(child.id() as i32).ok_or(io::Error::from(ErrorKind::NotFound));
        let process = process.and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
        let process = process.inspect_err(|_| drop(child.kill())).map_err(failed("get hold of its process"))?;
        let end = Arc::<OnceLock<String>>::default();
        let watcher = {
            let (end, pages) = (Arc::clone(&end), Arc::clone(&pages));
            std::thread::Builder::new().name("vault-watcher".into()).spawn(move || {
                let status = child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
                let _ = end.set(status);
                (0..pages.count()).for_each(|index| pages.page(index).bury());
            })
        };
        let mut vault = Self {
            orders: Mutex::new(Orders { socket, last: 0 }),
            process,
            end,
            watcher: None,
            asking: (0..vcpus).map(|_| Mutex::default()).collect(),
            pages,
        };
        // Without its watcher the process is killed and not waited for: there is no thread to be had to do so.
        vault.watcher = Some(watcher.map_err(failed("start a thread that watches it"))?);
        vault.await_greeting()?;
        Ok(vault)
    }

    fn await_greeting(&self) -> Result<(), Error> {
        let orders = lock(&self.orders);
        let ready = poll(&mut [PollFd::new(&orders.socket, PollFlags::IN)], Some(&PATIENCE));
        if ready.map_err(failed("wait for it"))? == 0 {
            let what = "it did not answer: does main begin with cvm::kvm::vault::init()?";
            return Err(Error::VaultProtocol { what });
        }
        match self.receive(&orders, 0)? {
            (Report::Done, _) => Ok(()),
            (Report::Failed(reason), _) => Err(Error::VaultRefused { reason }),
            _ => Err(Error::VaultProtocol { what: "its greeting is none" }),
        }
    }

    /// What is to be said of a vault that does not answer.
    fn dead(&self) -> Error {
        // It closes its socket before it is done with dying; what is no vault may close it and live on.
        self.kill();
        let status = self.end.wait().clone();
        Error::VaultDied { status }
    }

    fn receive(&self, orders: &Orders, sequence: u32) -> Result<(Report, Vec<OwnedFd>), Error> {
        let received = match socket::receive(&orders.socket, RecvFlags::empty()) {
            Ok(Some(received)) => received,
            Ok(None) => return Err(self.dead()),
            Err(source) => return Err(failed("hear from it")(source)),
        };
        let Received { message, text, descriptors } = received;
        if message.sequence != sequence {
            return Err(self.disown("its report is out of order"));
        }
        let report = Report::decode(&message, &text).map_err(|_| self.disown("its report is malformed"))?;
        Ok((report, descriptors))
    }

    /// Gives an order, and waits for the report.
    fn order(&self, order: &Order, descriptors: &[BorrowedFd<'_>]) -> Result<(Report, Vec<OwnedFd>), Error> {
        let mut orders = lock(&self.orders);
        orders.last = orders.last.wrapping_add(1);
        match socket::send(&orders.socket, orders.last, order.encode(), descriptors) {
            Ok(()) => {}
            Err(error) if [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&error.kind()) => {
                return Err(self.dead());
            }
            Err(source) => return Err(failed("order something")(source)),
        }
        match self.receive(&orders, orders.last)? {
            (Report::Failed(reason), _) => Err(Error::VaultRefused { reason }),
            answer => Ok(answer),
        }
    }

    /// Gives an order that has no result.
    fn order_done(&self, order: &Order) -> Result<(), Error> {
        match self.order(order, &[])? {
            (Report::Done, _) => Ok(()),
            _ => Err(self.disown("its report does not fit the order")),
        }
    }

    fn page(&self, vcpu: u32) -> Page<'_> {
        self.pages.page(vcpu)
    }

    /// Asks on the page of `vcpu`, and waits for the answer.
    fn ask(&self, vcpu: u32, request: &Request) -> Result<Reply, Error> {
        let asking = self.asking.get(vcpu as usize);
        let asking = asking.ok_or(Error::VaultRefused { reason: "there is no such vcpu".into() })?;
        let answered: Result<(Message, Vec<u8>), _> =
            lock(asking).ask(self.page(vcpu), request.encode(), !matches!(request, Request::Run(_)));
        match answered {
            Ok((message, text)) => match Reply::decode(vcpu, &message, &text) {
                Ok(Reply::Refused(reason)) => Err(Error::VaultRefused { reason }),
                Ok(reply) => Ok(reply),
                Err(Malformed { .. }) => Err(self.disown("its reply is malformed")),
            },
            Err(NoReply::Dead) => Err(self.dead()),
            Err(NoReply::OutOfOrder) => Err(self.disown("its reply is out of order")),
        }
    }

    fn kill(&self) {
        // It fails if the process is dead already.
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
    }

    /// Kills a vault that does not keep to the protocol: it cannot be what was started.
    fn disown(&self, what: &'static str) -> Error {
        self.kill();
        Error::VaultProtocol { what }
    }
}

impl Drop for Vault {
    fn drop(&mut self) {
        self.kill();
        if let Some(watcher) = self.watcher.take() {
            // It has panicked at worst, and then the process is dead all the same.
            let _ = watcher.join();
        }
    }
}

/// For `map_err`: `step` was what the vault was to do.
fn backend<E: Into<BoxError>>(step: &'static str) -> impl FnOnce(E) -> CoreError {
    move |error| CoreError::Backend { step, range: None, source: error.into() }
}

/// Starts a vault, and in it the launch of a VM that uses `transport`.
pub(crate) fn launch(
    program: &Program,
    device: &Path,
    config: &VmConfig,
    transport: Transport,
) -> Result<VaultLoader, BoxError> {
    let layout = Layout::new(&config.memory)?;
    let shared = Backing::new("cvm-shared", layout.bytes())?;
    let pages = Backing::new("cvm-vcpu-pages", Pages::bytes(config.vcpus))?;
    let vault = Vault::new(program, device, config.vcpus, &pages)?;
    for slot in &config.memory {
        vault.order_done(&Order::Slot(*slot))?;
    }
    let (accepted, levels) = (config.interrupts.bits(), config.interrupts.level_bits());
    let most_per_second = config.interrupts.most_per_second();
    let edges = std::array::from_fn(|word| accepted[word] & !levels[word]);
    for (vectors, trigger) in [(edges, Trigger::Edge), (levels, Trigger::Level)] {
        vault.order_done(&Order::Accept { vectors, trigger, most_per_second })?;
    }
    let VmConfig { vcpus, policy, doorbell, interrupt_controller, .. } = *config;
    let create = Order::Create { vcpus, policy, doorbell, transport, interrupt_controller };
    let (_, descriptors) = vault.order(&create, &[shared.file().as_fd(), pages.file().as_fd()])?;
    let Ok([kicks]) = <[OwnedFd; 1]>::try_from(descriptors) else {
        return Err(vault.disown("it gave no way to kick").into());
    };
    Ok(VaultLoader { vault, kicks, shared, layout })
}

/// Loads the pages of a VM that a vault holds.
#[derive(Debug)]
pub(crate) struct VaultLoader {
    vault: Vault,
    kicks: OwnedFd,
    shared: Backing,
    layout: Layout,
}

impl Loader for VaultLoader {
    type Vm = VaultVm;

    fn load(&mut self, range: GpaRange, contents: &[u8], kind: PageKind) -> Result<(), BoxError> {
        if kind == PageKind::Zero {
            return Ok(self.vault.order_done(&Order::Load { range, kind })?);
        }
        for (part, contents) in (0..).zip(contents.chunks(MOST_LOADED as usize)) {
            let range = GpaRange::new(range.start().0 + part * MOST_LOADED, contents.len() as u64)?;
            let offset = self.layout.offset(range).ok_or("these pages are in no slot")?;
            self.shared.file().write_all_at(contents, offset).map_err(Error::memory("stage", range))?;
            self.vault.order_done(&Order::Load { range, kind })?;
        }
        Ok(())
    }

    fn set_vcpu(&mut self, index: u32, state: &VcpuState) -> Result<(), BoxError> {
        Ok(self.vault.order_done(&Order::SetVcpu { index, state: *state })?)
    }

    fn seal(self, transcript: Transcript) -> Result<VaultVm, BoxError> {
        match self.vault.order(&Order::Seal, &[])?.0 {
            Report::Sealed(measurement) if measurement == transcript.measurement() => {}
            Report::Sealed(_) => return Err(self.vault.disown("it has measured something else").into()),
            _ => return Err(self.vault.disown("its report does not fit the order").into()),
        }
        let view = shared_view(&self.shared, &self.layout)?;
        let vcpus = self.vault.pages.count();
        let held = Arc::new(Held { vault: self.vault, kicks: self.kicks });
        let kickers = (0..vcpus).map(|index| {
            let (asked, running) = (AtomicBool::new(false), AtomicBool::new(false));
            Arc::new(Kicker { index, held: Arc::clone(&held), asked, running })
        });
        let kickers: Vec<_> = kickers.collect();
        let engine = ConversionEngine::new(ByVault(Arc::clone(&held)), view);
        let shared = Arc::new(Shared { engine, held, kickers });
        let vcpus = (0..vcpus).map(|index| VaultVcpu {
            index,
            shared: Arc::clone(&shared),
            question: Question::None,
            given: Given::Nothing,
            failed: false,
        });
        Ok(VaultVm { vcpus: vcpus.collect(), shared, transcript })
    }
}

/// The vault of a VM that was launched.
#[derive(Debug)]
struct Held {
    vault: Vault,
    kicks: OwnedFd,
}

/// Has the vault carry out what a vCPU has asked for.
struct ByVault(Arc<Held>);

impl Converter for ByVault {
    fn convert(&self, vcpu: u32, range: GpaRange, to: Side) -> Result<(), ConverterError> {
        let failed = |left_as, source| Err(ConverterError { step: "have the vault convert", left_as, source });
        match self.0.vault.ask(vcpu, &Request::Convert { range, to }) {
            Ok(Reply::Done) => Ok(()),
            Ok(Reply::NotConverted { left_as, reason }) => failed(left_as, reason.into()),
            Ok(_) => failed(LeftAs::Unknown, self.0.vault.disown("its reply does not fit the request").into()),
            Err(error @ Error::VaultRefused { .. }) => failed(LeftAs::Before, error.into()),
            // With the vault, the guest is gone.
            Err(error) => failed(LeftAs::Unknown, error.into()),
        }
    }

    fn poison(&self, vcpu: u32, range: GpaRange) -> Result<(), BoxError> {
        match self.0.vault.ask(vcpu, &Request::Poison(range)) {
            // No guest sees anything without its vault.
            Ok(Reply::Done) | Err(Error::VaultDied { .. } | Error::VaultProtocol { .. }) => Ok(()),
            Ok(_) => Err(self.0.vault.disown("its reply does not fit the request").into()),
            Err(error) => Err(error.into()),
        }
    }

    fn most_runs(&self) -> u64 {
        // The vault knows how many mappings it has, and refuses what is too much.
        u64::MAX
    }
}

struct Shared {
    engine: ConversionEngine<ByVault>,
    held: Arc<Held>,
    kickers: Vec<Arc<Kicker>>,
}

/// A VM that a vault holds.
pub(crate) struct VaultVm {
    shared: Arc<Shared>,
    vcpus: Vec<VaultVcpu>,
    transcript: Transcript,
}

impl VaultVm {
    /// Gives an order for a descriptor.
    fn descriptor(
        &self,
        step: &'static str,
        order: &Order,
        refused: impl FnOnce(Refusal) -> CoreError,
    ) -> Result<OwnedFd, CoreError> {
        let vault = &self.shared.held.vault;
        let no_fit = || backend(step)(vault.disown("its report does not fit the order"));
        match vault.order(order, &[]).map_err(backend(step))? {
            (Report::Descriptor, descriptors) => {
                let [eventfd] = <[OwnedFd; 1]>::try_from(descriptors).map_err(|_| no_fit())?;
                Ok(eventfd)
            }
            (Report::NoDescriptor(reason), _) => Err(CoreError::NoDescriptor(reason)),
            (Report::InjectionRefused(refusal), _) => Err(refused(refusal)),
            _ => Err(no_fit()),
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
            self.shared.kickers.iter().for_each(|kicker| kicker.kick());
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
        match vault.order(&Order::Count, &[]).map_err(backend("count the memory"))?.0 {
            Report::Memory { private, shared } => Ok(Allocated { private, shared }),
            _ => Err(backend("count the memory")(vault.disown("its report does not fit the order"))),
        }
    }

    fn transcript(&self) -> &Transcript {
        &self.transcript
    }

    fn lifecycle(&self, what: Lifecycle) -> LifecycleAnswer {
        crate::local::lifecycle(what)
    }

    fn guarding(&self) -> Guarding {
        Guarding::Enforced
    }

    fn doorbell_fd(&self, register: u16) -> Result<OwnedFd, CoreError> {
        self.descriptor("connect a doorbell register", &Order::DoorbellFd(register), |refusal| {
            CoreError::NoDescriptor(refusal.to_string())
        })
    }

    fn interrupt_fd(&self, vcpu: u32, vector: u8) -> Result<OwnedFd, CoreError> {
        self.descriptor("connect an interrupt", &Order::InterruptFd { vcpu, vector }, |source| {
            CoreError::InjectionRefused { vcpu, event: Event::Interrupt(vector), source }
        })
    }

    fn dropped_interrupts(&self) -> Result<u64, CoreError> {
        let vault = &self.shared.held.vault;
        match vault.order(&Order::CountDropped, &[]).map_err(backend("count dropped interrupts"))?.0 {
            Report::Dropped(count) => Ok(count),
            _ => Err(backend("count dropped interrupts")(vault.disown("its report does not fit the order"))),
        }
    }
}

/// What the guest waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Question {
    None,
    Read,
    Conversion(Ticket),
}

/// A vCPU that a vault holds.
pub(crate) struct VaultVcpu {
    index: u32,
    shared: Arc<Shared>,
    question: Question,
    /// What the next run hands to the guest.
    given: Given,
    /// Whether it failed, so that it cannot go on.
    failed: bool,
}

impl VaultVcpu {
    fn protocol<T>(&self, problem: &'static str) -> Result<T, CoreError> {
        Err(CoreError::Protocol { vcpu: self.index, problem })
    }

    fn kicks(&self) -> Result<&Kicker, CoreError> {
        let kicker = self.shared.kickers.get(self.index as usize);
        kicker.map(|kicker| &**kicker).ok_or(CoreError::Protocol { vcpu: self.index, problem: "there is no such vcpu" })
    }

    fn ask(&self, step: &'static str, request: &Request) -> Result<Reply, CoreError> {
        self.shared.held.vault.ask(self.index, request).map_err(backend(step))
    }

    fn no_fit<T>(&self, step: &'static str) -> Result<T, CoreError> {
        Err(backend(step)(self.shared.held.vault.disown("its reply does not fit the request")))
    }

    fn run_on(&mut self) -> Result<Exit, CoreError> {
        loop {
            if self.shared.engine.is_lost() {
                return Err(CoreError::Lost);
            }
            if !self.kicks()?.enter() {
                return Ok(Exit::Kicked);
            }
            let given = std::mem::replace(&mut self.given, Given::Nothing);
            let reply = self.ask("run a vcpu", &Request::Run(given));
            self.kicks()?.leave();
            let vcpu = self.index;
            match reply? {
                // A kick that was noticed here already.
                Reply::Exit(Exit::Kicked) if !self.kicks()?.take() => {}
                Reply::Exit(exit) => return Ok(exit),
                Reply::Failed(failure) => {
                    return Err(match failure {
                        Failure::Mmio { gpa, write } => CoreError::MmioRefused { vcpu, gpa, write },
                        Failure::MissingConversion { gpa } => CoreError::MissingConversion { vcpu, gpa },
                        Failure::UnknownDoorbell { register, access } => {
                            CoreError::UnknownDoorbell { vcpu, register, access }
                        }
                        Failure::Crashed(reason) => CoreError::Crashed { vcpu, reason },
                        Failure::Lost => CoreError::Lost,
                        Failure::Host(reason) => backend("run a vcpu")(Error::VaultRefused { reason }),
                    });
                }
                _ => return self.no_fit("run a vcpu"),
            }
        }
    }
}

impl Vcpu for VaultVcpu {
    fn index(&self) -> u32 {
        self.index
    }

    fn run(&mut self) -> Result<Exit, CoreError> {
        if self.question != Question::None {
            return self.protocol("it cannot run before its last exit is answered");
        }
        if self.failed {
            return self.protocol("it has failed, and cannot run again");
        }
        let exit = self.run_on();
        self.failed = exit.is_err();
        self.question = match &exit {
            Ok(Exit::Conversion(request)) => Question::Conversion(self.shared.engine.ask(*request)),
            Ok(Exit::DoorbellRead { .. } | Exit::PortRead { .. } | Exit::MsrRead { .. }) => Question::Read,
            _ => Question::None,
        };
        exit
    }

    fn answer_read(&mut self, value: u64) -> Result<(), CoreError> {
        match self.question {
            Question::Read => {
                self.given = Given::Value(value);
                self.question = Question::None;
                Ok(())
            }
            Question::Conversion(_) => self.protocol("it asked for a conversion, not for a value"),
            Question::None => self.protocol("there is no read to answer"),
        }
    }

    fn answer_conversion(&mut self, conversion: Conversion) -> Result<(), CoreError> {
        match self.question {
            Question::Conversion(ticket) if conversion.answers(ticket) => {
                self.given = Given::Answer(conversion.answer());
                self.question = Question::None;
                Ok(())
            }
            Question::Conversion(_) => self.protocol("it asked for another conversion"),
            _ => self.protocol("it asked for no conversion"),
        }
    }

    fn refuse_conversion(&mut self) -> Result<(), CoreError> {
        match self.question {
            Question::Conversion(_) => {
                self.shared.engine.withdraw(self.index);
                self.given = Given::Answer(Answer::Invalid);
                self.question = Question::None;
                Ok(())
            }
            _ => self.protocol("it asked for no conversion"),
        }
    }

    fn register(&self, register: Register) -> Result<RegisterRead, CoreError> {
        match self.ask("read a register", &Request::Register(register))? {
            Reply::Register(Some(value)) => Ok(RegisterRead::Exposed(value)),
            Reply::Register(None) => Ok(RegisterRead::Hidden),
            _ => self.no_fit("read a register"),
        }
    }

    fn inject(&mut self, event: Event) -> Result<(), CoreError> {
        match self.ask("inject an event", &Request::Inject(event))? {
            Reply::Done => Ok(()),
            Reply::InjectionRefused(source) => Err(CoreError::InjectionRefused { vcpu: self.index, event, source }),
            Reply::Failed(Failure::Host(reason)) => Err(backend("inject an event")(Error::VaultRefused { reason })),
            _ => self.no_fit("inject an event"),
        }
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        // Every vCPU has one, from the seal on.
        Arc::clone(&self.shared.kickers[self.index as usize]) as _
    }
}

/// Kicks a vCPU.
#[derive(Debug)]
struct Kicker {
    index: u32,
    held: Arc<Held>,
    /// Whether a kick was asked for and nobody has heard of it yet.
    asked: AtomicBool,
    /// Whether the vault runs the vCPU, or is about to, or has just done so.
    running: AtomicBool,
}

impl Kicker {
    fn take(&self) -> bool {
        self.asked.swap(false, Ordering::SeqCst)
    }

    /// Before the vault runs it; false if it was kicked.
    fn enter(&self) -> bool {
        // Either this sees the kick, or the kick sees that it has to go to the vault.
        self.running.store(true, Ordering::SeqCst);
        let kicked = self.take();
        if kicked {
            self.leave();
        }
        !kicked
    }

    fn leave(&self) {
        self.running.store(false, Ordering::SeqCst);
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        self.asked.store(true, Ordering::SeqCst);
        if self.running.load(Ordering::SeqCst) {
            self.held.vault.page(self.index).ask_for_kick();
            // It fails if the vault is dead, or wakes up already.
            let _ = rustix::io::write(&self.held.kicks, &1u64.to_ne_bytes());
        }
    }
}
