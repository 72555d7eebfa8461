//! The vault itself: it holds the VM, and does for its VMM what the guest and the rules allow.

use super::page::{self, Answering, Page, Pages};
use super::protocol::{Failure, Given, Malformed, Order, Reply, Report, Request};
use super::socket::{self, Received};
use super::{MOST_LOADED, sandbox};
use crate::local::{Backing, Layout, LocalLoader, LocalVcpu, LocalVm};
use crate::{Error, KvmPlatform, eventfd};
use cvm_core::launch::VmConfig;
use cvm_core::memory::LeftAs;
use cvm_core::{
    BoxError, Error as CoreError, GpaRange, InterruptPolicy, Kick, Launch, PageKind, PageState, Trigger, Vcpu, Vm,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// How many requests that no honest VMM makes a vault refuses before it gives up on its VMM.
const PATIENCE: u32 = 1 << 16;

/// An error with all its sources.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(error.source(), |error| error.source())
        .fold(error.to_string(), |text, source| format!("{text}: {source}"))
}

/// Serves the VMM at the other end of `socket`, with a VM of the KVM device at `device`, until it is gone.
pub(super) fn serve(socket: BorrowedFd<'static>, device: &Path) -> ! {
    // A thread that panics must not leave its VMM waiting.
    std::panic::set_hook(Box::new(|_| process::abort()));
    let greeting = prepare(device);
    let report = match &greeting {
        Ok(_) => Report::Done,
        Err(error) => Report::Failed(chain(error)),
    };
    let told = socket::send(socket, 0, report.encode(), &[]);
    let status = match (greeting, told) {
        (Ok(platform), Ok(())) => Server::new(socket, platform).run(),
        _ => 1,
    };
    process::exit(status)
}

fn prepare(device: &Path) -> Result<KvmPlatform, Error> {
    sandbox::close_the_doors(0)?;
    let platform = KvmPlatform::local(device)?;
    page::worth_looking();
    sandbox::lock_down()?;
    Ok(platform)
}

/// How far the VM is.
enum Stage {
    /// Its configuration is being told.
    Configured {
        memory: Vec<GpaRange>,
        interrupts: InterruptPolicy,
    },
    Loading {
        launch: Box<Launch<LocalLoader>>,
        pages: Arc<Pages>,
        shared: Backing,
        layout: Layout,
    },
    Running {
        vm: LocalVm,
        pages: Arc<Pages>,
        kickers: Arc<[Arc<dyn Kick>]>,
    },
    /// A step failed: nothing is left of it.
    Over,
}

struct Server {
    socket: BorrowedFd<'static>,
    platform: KvmPlatform,
    stage: Stage,
    kicks: Option<OwnedFd>,
    /// What goes with the next report.
    handed_over: Option<OwnedFd>,
    last: u32,
    /// How many more senseless requests are put up with.
    patience: Arc<AtomicU32>,
}

/// Counts a request that no honest VMM makes.
fn lose_patience(patience: &AtomicU32) {
    if patience.fetch_sub(1, Ordering::Relaxed) <= 1 {
        process::exit(2);
    }
}

impl Server {
    fn new(socket: BorrowedFd<'static>, platform: KvmPlatform) -> Self {
        Self {
            socket,
            platform,
            stage: Stage::Configured { memory: Vec::new(), interrupts: InterruptPolicy::default() },
            kicks: None,
            handed_over: None,
            last: 0,
            patience: Arc::new(AtomicU32::new(PATIENCE)),
        }
    }

    /// Takes orders and kicks until the VMM is gone; returns the exit status.
    fn run(mut self) -> i32 {
        loop {
            let mut waiting = vec![PollFd::new(&self.socket, PollFlags::IN)];
            waiting.extend(self.kicks.as_ref().map(|kicks| PollFd::new(kicks, PollFlags::IN)));
            match poll(&mut waiting, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return 1,
            }
            let [for_orders, for_kicks] = [0, 1].map(|at| waiting.get(at).map_or(PollFlags::empty(), PollFd::revents));
            if !for_kicks.is_empty() {
                self.pass_kicks_on();
            }
            if !for_orders.is_empty() {
                match socket::receive(self.socket, RecvFlags::DONTWAIT) {
                    Ok(Some(received)) => {
                        if self.obey(received).is_err() {
                            return 1;
                        }
                    }
                    Ok(None) => return 0,
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(_) => return 1,
                }
            }
        }
    }

    fn pass_kicks_on(&self) {
        // First the counter, then the pages: what is asked for meanwhile counts again.
        self.kicks.as_ref().map(eventfd::take);
        if let Stage::Running { pages, kickers, .. } = &self.stage {
            for (index, kicker) in (0..).zip(&**kickers) {
                if pages.page(index).take_kick() {
                    kicker.kick();
                }
            }
        }
    }

    /// Carries out one order and reports.
    fn obey(&mut self, received: Received) -> std::io::Result<()> {
        let sequence = received.message.sequence;
        let order = Order::decode(&received.message, &received.text);
        let report = if sequence != self.last.wrapping_add(1) {
            Err("the order is out of order".into())
        } else {
            order.map_err(Into::into).and_then(|order| self.carry_out(order, received.descriptors))
        };
        self.last = sequence;
        let report = report.unwrap_or_else(|error: BoxError| {
            lose_patience(&self.patience);
            Report::Failed(chain(&*error))
        });
        let handed_over = self.handed_over.take();
        let descriptors: Vec<_> = handed_over.iter().map(AsFd::as_fd).collect();
        socket::send(self.socket, sequence, report.encode(), &descriptors)
    }

    fn carry_out(&mut self, order: Order, descriptors: Vec<OwnedFd>) -> Result<Report, BoxError> {
        if !descriptors.is_empty() && !matches!(order, Order::Create { .. }) {
            return Err("it takes no descriptors".into());
        }
        match (order, &mut self.stage) {
            (Order::Slot(range), Stage::Configured { memory, .. }) => {
                if memory.len() >= cvm_core::boot::MAX_RANGES {
                    return Err("there are too many slots".into());
                }
                memory.push(range);
                Ok(Report::Done)
            }
            (Order::Accept { vectors, trigger, most_per_second }, Stage::Configured { interrupts, .. }) => {
                let mut policy = *interrupts;
                for vector in 0..=255u8 {
                    if vectors[usize::from(vector / 64)] >> (vector % 64) & 1 == 1 {
                        policy = match trigger {
                            Trigger::Edge => policy.accept(vector)?,
                            Trigger::Level => policy.accept_level(vector)?,
                        };
                    }
                }
                *interrupts = most_per_second.map_or(policy, |most| policy.limit(most));
                Ok(Report::Done)
            }
            (
                Order::Create { vcpus, policy, doorbell, transport, interrupt_controller },
                Stage::Configured { memory, interrupts },
            ) => {
                let config = VmConfig {
                    memory: std::mem::take(memory),
                    vcpus,
                    interrupts: *interrupts,
                    interrupt_controller,
                    policy,
                    doorbell,
                    transport: Some(transport),
                };
                // Whatever fails from here on, there is no second try.
                self.stage = Stage::Over;
                self.create(config, descriptors)?;
                Ok(Report::Done)
            }
            (Order::Load { range, kind }, Stage::Loading { launch, shared, layout, .. }) => {
                load(launch, shared, layout, range, kind)?;
                Ok(Report::Done)
            }
            (Order::SetVcpu { index, state }, Stage::Loading { launch, .. }) => {
                launch.set_vcpu(index, &state)?;
                Ok(Report::Done)
            }
            (Order::Seal, stage @ Stage::Loading { .. }) => {
                let Stage::Loading { launch, pages, .. } = std::mem::replace(stage, Stage::Over) else {
                    return Err("nothing is being loaded".into());
                };
                self.start(*launch, pages)
            }
            (Order::Count, Stage::Running { vm, .. }) => {
                let allocated = vm.allocated()?;
                Ok(Report::Memory { private: allocated.private, shared: allocated.shared })
            }
            (Order::DoorbellFd(register), Stage::Running { vm, .. }) => {
                let eventfd = vm.doorbell_fd(register);
                self.hand_over(eventfd)
            }
            (Order::InterruptFd { vcpu, vector }, Stage::Running { vm, .. }) => {
                let eventfd = vm.interrupt_fd(vcpu, vector);
                self.hand_over(eventfd)
            }
            (Order::CountDropped, Stage::Running { vm, .. }) => Ok(Report::Dropped(vm.dropped_interrupts()?)),
            _ => Err("this is not the time for that".into()),
        }
    }

    /// Puts a descriptor beside the report, or says why there is none.
    fn hand_over(&mut self, eventfd: Result<OwnedFd, CoreError>) -> Result<Report, BoxError> {
        match eventfd {
            Ok(eventfd) => {
                self.handed_over = Some(eventfd);
                Ok(Report::Descriptor)
            }
            Err(CoreError::NoDescriptor(reason)) => Ok(Report::NoDescriptor(reason)),
            Err(CoreError::InjectionRefused { reason, .. }) => Ok(Report::InjectionRefused(reason)),
            Err(error) => Err(error.into()),
        }
    }

    fn create(&mut self, config: VmConfig, descriptors: Vec<OwnedFd>) -> Result<(), BoxError> {
        config.check()?;
        let [shared, pages] = <[OwnedFd; 2]>::try_from(descriptors).map_err(|_| "it takes two descriptors")?;
        let layout = Layout::new(&config.memory)?;
        let shared = Backing::adopt(shared, layout.bytes())?;
        let pages = Pages::map(&Backing::adopt(pages, Pages::bytes(config.vcpus))?, config.vcpus)?;
        let kicks = eventfd::new().map_err(Error::vault("make an eventfd"))?;
        let theirs = kicks.try_clone().map_err(Error::vault("copy an eventfd"))?;
        let kept = shared.try_clone().map_err(Error::vault("copy the descriptor of shared memory"))?;
        let launch = self.platform.launch_in_vault(config, shared)?;
        self.handed_over = Some(theirs);
        self.kicks = Some(kicks);
        self.stage = Stage::Loading { launch: Box::new(launch), pages: Arc::new(pages), shared: kept, layout };
        Ok(())
    }

    fn start(&mut self, launch: Launch<LocalLoader>, pages: Arc<Pages>) -> Result<Report, BoxError> {
        let mut vm = launch.seal()?;
        let vcpus = vm.take_vcpus();
        let measurement = vm.transcript().measurement();
        let kickers: Arc<[_]> = vcpus.iter().map(Vcpu::kicker).collect();
        for vcpu in vcpus {
            let attendant = Attendant { vcpu, kickers: Arc::clone(&kickers), patience: Arc::clone(&self.patience) };
            let pages = Arc::clone(&pages);
            let name = format!("vcpu-{}", attendant.vcpu.index());
            let thread = std::thread::Builder::new().name(name).spawn(move || attendant.attend(&pages));
            thread.map_err(Error::vault("start a thread for a vcpu"))?;
        }
        self.stage = Stage::Running { vm, pages, kickers };
        Ok(Report::Sealed(measurement))
    }
}

/// Takes pages from the shared side into the launch, by one copy, so that what is measured is what is loaded.
fn load(
    launch: &mut Launch<LocalLoader>,
    shared: &Backing,
    layout: &Layout,
    range: GpaRange,
    kind: PageKind,
) -> Result<(), BoxError> {
    if kind == PageKind::Zero {
        return Ok(launch.zero(range)?);
    }
    if range.len() > MOST_LOADED {
        return Err("these are too many pages at once".into());
    }
    let offset = layout.find(range).ok_or("these pages are in no slot")?.in_file;
    let mut contents = vec![0; range.len() as usize];
    shared.file().read_exact_at(&mut contents, offset).map_err(Error::memory("read", range))?;
    launch.load(range.start(), &contents, kind)?;
    Ok(shared.free(offset, range.len()).map_err(Error::memory("free", range))?)
}

/// Looks after one vCPU, on its thread.
struct Attendant {
    vcpu: LocalVcpu,
    /// Those of all vCPUs.
    kickers: Arc<[Arc<dyn Kick>]>,
    patience: Arc<AtomicU32>,
}

impl Attendant {
    fn attend(mut self, pages: &Pages) {
        let page: Page<'_> = pages.page(self.vcpu.index());
        let mut answering = Answering::default();
        loop {
            let reply = match answering.next(page).map(|(message, text)| Request::decode(&message, &text)) {
                Some(Ok(request)) => self.carry_out(request),
                Some(Err(malformed @ Malformed { .. })) => Reply::Refused(malformed.to_string()),
                None => Reply::Refused("the request is out of order".into()),
            };
            if matches!(reply, Reply::Refused(_)) {
                lose_patience(&self.patience);
            }
            answering.answer(page, reply.encode());
        }
    }

    fn carry_out(&mut self, request: Request) -> Reply {
        let index = self.vcpu.index();
        match request {
            Request::Run(given) => self.run(given),
            Request::Convert { range, to } => match self.vcpu.engine().convert_part(index, range, to) {
                Ok(()) => Reply::Done,
                Err(error @ CoreError::NotAsked { .. }) => Reply::Refused(chain(&error)),
                Err(error) => {
                    if self.vcpu.engine().is_lost() {
                        self.kickers.iter().for_each(|kicker| kicker.kick());
                    }
                    let map = self.vcpu.engine().memory().map();
                    let unchanged = map.first_not_in(range, PageState::from(to.other())).is_none();
                    let left_as = if unchanged { LeftAs::Before } else { LeftAs::Unknown };
                    Reply::NotConverted { left_as, reason: chain(&error) }
                }
            },
            Request::Poison(range) => {
                // Who could not convert has poisoned already, and pages that are well are nobody's to take.
                let map = self.vcpu.engine().memory().map();
                match map.first_not_in(range, PageState::Poisoned) {
                    None if !self.vcpu.engine().is_lost() => Reply::Done,
                    _ => Reply::Refused("the pages are not lost, or not out of the guest's reach".into()),
                }
            }
            Request::Register(register) => Reply::Register(self.vcpu.exposed(register)),
            Request::Inject(event) => match self.vcpu.inject(event) {
                Ok(()) => Reply::Done,
                Err(CoreError::InjectionRefused { reason, .. }) => Reply::InjectionRefused(reason),
                Err(error) => Reply::Failed(Failure::Host(chain(&error))),
            },
        }
    }

    fn run(&mut self, given: Given) -> Reply {
        let answered = match given {
            Given::Nothing => Ok(()),
            Given::Value(value) => self.vcpu.answer_read(value),
            Given::Answer(answer) => {
                let concluded = self.vcpu.engine().conclude(self.vcpu.index(), answer);
                concluded.and_then(|conversion| self.vcpu.answer_conversion(conversion))
            }
        };
        match answered.and_then(|()| self.vcpu.run()) {
            Ok(exit) => Reply::Exit(exit),
            Err(CoreError::MmioRefused { gpa, write, .. }) => Reply::Failed(Failure::Mmio { gpa, write }),
            Err(CoreError::MissingConversion { gpa, .. }) => Reply::Failed(Failure::MissingConversion { gpa }),
            Err(CoreError::UnknownDoorbell { register, access, .. }) => {
                Reply::Failed(Failure::UnknownDoorbell { register, access })
            }
            Err(CoreError::Crashed { reason, .. }) => Reply::Failed(Failure::Crashed(reason)),
            Err(CoreError::Lost) => Reply::Failed(Failure::Lost),
            Err(error @ (CoreError::Protocol { .. } | CoreError::NotAsked { .. })) => Reply::Refused(chain(&error)),
            Err(error) => Reply::Failed(Failure::Host(chain(&error))),
        }
    }
}
