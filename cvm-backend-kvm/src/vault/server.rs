//! The vault itself: it holds the VM, and does for its VMM what the guest and the rules allow.

use super::page::{self, Pages};
use super::protocol::{Order, Report};
use super::socket::{self, Descriptors, Received};
use super::vcpu_thread::VcpuThread;
use super::{MOST_LOADED, sandbox};
use crate::error::chain;
use crate::local::{Backing, Layout, LocalLoader, LocalVm};
use crate::{Error, KvmPlatform};
use cvm_core::launch::VmConfig;
use cvm_core::x86::VcpuState;
use cvm_core::{BoxError, Error as CoreError, GpaRange, InterruptPolicy, Kick, Launch, PageKind, Trigger, Vcpu, Vm};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// How many messages that no honest VMM sends a vault refuses before it ends. An order that is understood and merely fails, such as
/// one for more memory than the host has, costs nothing.
const REFUSALS: u32 = 1 << 12;

/// How many more refusals there will be. An honest VMM uses none up, so that it needs no refill.
#[derive(Debug)]
pub(super) struct RefusalBudget(AtomicU32);

impl RefusalBudget {
    /// Counts a refusal of what no honest VMM asks for; ends the vault after too many.
    pub(super) fn spend(&self) {
        if self.0.fetch_sub(1, Ordering::Relaxed) <= 1 {
            process::exit(2);
        }
    }
}

/// Why an order is not carried out.
enum Refusal {
    /// No honest VMM gives it, for this reason.
    Senseless(String),
    /// It failed.
    Failed(BoxError),
}

impl<E: Into<BoxError>> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// A refusal of an order that no honest VMM gives.
fn senseless<T>(reason: impl ToString) -> Result<T, Refusal> {
    Err(Refusal::Senseless(reason.to_string()))
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
    sandbox::drop_privileges()?;
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
        /// The numbers of the next vCPU's initial state.
        state: [u64; VcpuState::WORDS],
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
    /// The VMM's kicks arrive here.
    kicks: Option<OwnedFd>,
    last: u32,
    budget: Arc<RefusalBudget>,
}

impl Server {
    fn new(socket: BorrowedFd<'static>, platform: KvmPlatform) -> Self {
        Self {
            socket,
            platform,
            stage: Stage::Configured { memory: Vec::new(), interrupts: InterruptPolicy::default() },
            kicks: None,
            last: 0,
            budget: Arc::new(RefusalBudget(AtomicU32::new(REFUSALS))),
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
                match socket::receive(self.socket, Descriptors::Some) {
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

    fn pass_kicks_on(&mut self) {
        // First the socket, then the pages: what is asked for meanwhile is signalled again.
        if self.kicks.as_ref().is_some_and(|kicks| socket::take_signals(kicks).is_err()) {
            self.kicks = None;
        }
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
            senseless("the order is out of order")
        } else {
            order.or_else(senseless).and_then(|order| self.carry_out(order, received.descriptors))
        };
        self.last = sequence;
        let report = report.unwrap_or_else(|refusal| match refusal {
            Refusal::Senseless(reason) => {
                self.budget.spend();
                Report::Failed(reason)
            }
            Refusal::Failed(error) => Report::Failed(chain(&*error)),
        });
        socket::send(self.socket, sequence, report.encode(), &[])
    }

    fn carry_out(&mut self, order: Order, mut descriptors: Vec<OwnedFd>) -> Result<Report, Refusal> {
        let expected = match order {
            // That too many or too few came is one of the ways to fail for good.
            Order::Create { .. } => descriptors.len(),
            Order::DoorbellFd(_) | Order::InterruptFd { .. } => 1,
            _ => 0,
        };
        if descriptors.len() != expected {
            return senseless(format_args!("it takes {expected} descriptors"));
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
            (Order::Registers { part, words }, Stage::Loading { state, .. }) => {
                Order::put(state, part, words);
                Ok(Report::Done)
            }
            (Order::SetVcpu { index }, Stage::Loading { launch, state, .. }) => {
                let state = VcpuState::from_words(state).ok_or("there is no such state of a vcpu")?;
                launch.set_vcpu(index, &state)?;
                Ok(Report::Done)
            }
            (Order::Seal, stage @ Stage::Loading { .. }) => {
                let Stage::Loading { launch, pages, .. } = std::mem::replace(stage, Stage::Over) else {
                    return senseless("nothing is being loaded");
                };
                Ok(self.start(*launch, pages)?)
            }
            (Order::Count, Stage::Running { vm, .. }) => {
                let allocated = vm.allocated()?;
                Ok(Report::Memory { private: allocated.private, shared: allocated.shared })
            }
            (Order::DoorbellFd(register), Stage::Running { vm, .. }) => {
                let Some(eventfd) = descriptors.pop() else { return senseless("it takes a descriptor") };
                connected(vm.connect_doorbell(register, eventfd))
            }
            (Order::InterruptFd { vcpu, vector }, Stage::Running { vm, .. }) => {
                let Some(eventfd) = descriptors.pop() else { return senseless("it takes a descriptor") };
                connected(vm.connect_interrupt(vcpu, vector, eventfd))
            }
            (Order::CountDropped, Stage::Running { vm, .. }) => Ok(Report::Dropped(vm.dropped_interrupts()?)),
            _ => senseless("this is not the time for that"),
        }
    }

    fn create(&mut self, config: VmConfig, descriptors: Vec<OwnedFd>) -> Result<(), BoxError> {
        config.check()?;
        let [shared, pages, kicks] = <[OwnedFd; 3]>::try_from(descriptors).map_err(|_| "it takes 3 descriptors")?;
        let layout = Layout::new(&config.memory)?;
        let shared = Backing::adopt(shared, layout.bytes())?;
        let pages = Pages::map(&Backing::adopt(pages, Pages::bytes(config.vcpus))?, config.vcpus)?;
        // To poll some other file may wait for the process that serves its file system.
        let status = fstat(&kicks).map_err(Error::vault("look at the socket for kicks"))?;
        if FileType::from_raw_mode(status.st_mode) != FileType::Socket {
            return Err("kicks come by a socket".into());
        }
        let kept = shared.try_clone().map_err(Error::vault("copy the descriptor of shared memory"))?;
        let launch = self.platform.launch_in_vault(config, shared)?;
        self.kicks = Some(kicks);
        let (launch, pages, state) = (Box::new(launch), Arc::new(pages), [0; VcpuState::WORDS]);
        self.stage = Stage::Loading { launch, pages, shared: kept, layout, state };
        Ok(())
    }

    fn start(&mut self, launch: Launch<LocalLoader>, pages: Arc<Pages>) -> Result<Report, BoxError> {
        let mut vm = launch.seal()?;
        let vcpus = vm.take_vcpus();
        let measurement = vm.transcript().measurement();
        let kickers: Arc<[_]> = vcpus.iter().map(Vcpu::kicker).collect();
        for vcpu in vcpus {
            let index = vcpu.index();
            let thread = VcpuThread::new(vcpu, Arc::clone(&kickers), Arc::clone(&self.budget));
            let pages = Arc::clone(&pages);
            let name = format!("vcpu-{index}");
            let thread = std::thread::Builder::new().name(name).spawn(move || thread.serve(&pages));
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

/// Reports whether a descriptor was connected.
fn connected(connected: Result<(), CoreError>) -> Result<Report, Refusal> {
    match connected {
        Ok(()) => Ok(Report::Done),
        Err(CoreError::NoDescriptor(reason)) => Ok(Report::NoDescriptor(reason)),
        Err(CoreError::InjectionRefused { reason, .. }) => Ok(Report::InjectionRefused(reason)),
        Err(error) => Err(error.into()),
    }
}
