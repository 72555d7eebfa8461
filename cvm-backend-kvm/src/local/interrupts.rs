//! The ways of interrupts into a VM, past its guards: one guard for each vCPU, which its own thread and others share.

use super::{apic, vm_fd};
use crate::error::failed;
use crate::{Error, eventfd, lock};
use cvm_core::{Error as CoreError, Event, InterruptController, InterruptGuard, InterruptPolicy, Trigger};
use kvm_bindings::{KVM_MAX_IRQ_ROUTES, KvmIrqRouting};
use kvm_ioctls::VmFd;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// An eventfd that raises one interrupt. Its place among all of them is its GSI.
#[derive(Debug)]
struct Source {
    vcpu: u32,
    vector: u8,
    eventfd: OwnedFd,
}

/// The interrupts of a VM.
pub(crate) struct Interrupts {
    controller: InterruptController,
    gates: Arc<Gates>,
    relay: Mutex<Option<Relay>>,
    /// Whether the kernel cannot decide alone, because it does not count.
    counted: bool,
}

/// What the relay's thread sees of them.
struct Gates {
    vm: Arc<VmFd>,
    guards: Vec<Mutex<InterruptGuard>>,
    sources: Mutex<Vec<Arc<Source>>>,
    dropped: AtomicU64,
    /// Whether the VM is gone.
    over: AtomicBool,
}

impl Interrupts {
    pub(crate) fn new(vm: Arc<VmFd>, vcpus: u32, policy: InterruptPolicy, controller: InterruptController) -> Self {
        let guards = (0..vcpus).map(|_| Mutex::new(InterruptGuard::new(policy, controller))).collect();
        let (sources, dropped, over) = (Mutex::default(), AtomicU64::new(0), AtomicBool::new(false));
        let gates = Arc::new(Gates { vm, guards, sources, dropped, over });
        Self { controller, gates, relay: Mutex::default(), counted: policy.most_per_second().is_some() }
    }

    pub(crate) fn controller(&self) -> InterruptController {
        self.controller
    }

    /// The guest accepts `vector` on `vcpu` from now on; it cannot go on where it must not.
    pub(crate) fn accept(&self, vcpu: u32, vector: u8, trigger: Trigger) -> Result<(), CoreError> {
        let accepted = self.gates.guard(vcpu)?.accept(vector, trigger);
        accepted.map_err(|refusal| {
            let reason = format!("it cannot accept interrupt {vector:#x} as it wants to: {refusal}");
            CoreError::Crashed { vcpu, reason }
        })
    }

    /// The guard of `vcpu`, as it is now.
    pub(crate) fn guard(&self, vcpu: u32) -> Result<InterruptGuard, CoreError> {
        Ok(self.gates.guard(vcpu)?.clone())
    }

    /// Puts another guard in the place of that of `vcpu`.
    pub(crate) fn set_guard(&self, vcpu: u32, guard: InterruptGuard) -> Result<(), CoreError> {
        *self.gates.guard(vcpu)? = guard;
        Ok(())
    }

    /// Asks the guard of `vcpu`, which counts.
    pub(crate) fn admit(&self, vcpu: u32, event: Event) -> Result<(), CoreError> {
        self.gates.admit(vcpu, event)
    }

    /// Raises `vector` on the APIC of `vcpu`, without asking.
    pub(crate) fn raise(&self, vcpu: u32, vector: u8) -> Result<(), CoreError> {
        self.gates.raise(vcpu, vector)
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.gates.dropped.load(Ordering::Relaxed)
    }

    /// An eventfd that raises `vector` on `vcpu`.
    pub(crate) fn descriptor(&self, vcpu: u32, vector: u8) -> Result<OwnedFd, CoreError> {
        self.check(vcpu, vector)?;
        let mut sources = lock(&self.gates.sources);
        if let Some(known) = Self::known(&sources, vcpu, vector) {
            return known.eventfd.try_clone().map_err(failed("copy an eventfd"));
        }
        let ours = eventfd::new().map_err(failed("make an eventfd"))?;
        let theirs = ours.try_clone().map_err(failed("copy an eventfd"))?;
        self.add(&mut sources, Source { vcpu, vector, eventfd: ours })?;
        Ok(theirs)
    }

    /// Has an eventfd of another process raise `vector` on `vcpu`.
    pub(crate) fn connect(&self, vcpu: u32, vector: u8, eventfd: OwnedFd) -> Result<(), CoreError> {
        self.check(vcpu, vector)?;
        let mut sources = lock(&self.gates.sources);
        if Self::known(&sources, vcpu, vector).is_some() {
            return Err(CoreError::NoDescriptor("the interrupt has one already".into()));
        }
        eventfd::check(&eventfd).map_err(failed("take an eventfd"))?;
        self.add(&mut sources, Source { vcpu, vector, eventfd })
    }

    /// Whether there may be a descriptor that raises `vector` on `vcpu`.
    fn check(&self, vcpu: u32, vector: u8) -> Result<(), CoreError> {
        if self.controller == InterruptController::None {
            return Err(CoreError::NoDescriptor(
                "without an interrupt controller no kernel interrupts a guest: launch with the apic".into(),
            ));
        }
        let accepted = self.gates.guard(vcpu)?.accepts(vector, Trigger::Edge);
        accepted.map_err(|reason| CoreError::InjectionRefused { vcpu, event: Event::Interrupt(vector), reason })
    }

    fn known(sources: &[Arc<Source>], vcpu: u32, vector: u8) -> Option<&Arc<Source>> {
        sources.iter().find(|source| (source.vcpu, source.vector) == (vcpu, vector))
    }

    fn add(&self, sources: &mut Vec<Arc<Source>>, source: Source) -> Result<(), CoreError> {
        if sources.len() == KVM_MAX_IRQ_ROUTES {
            return Err(CoreError::NoDescriptor("the kernel has no more interrupt routes".into()));
        }
        sources.push(Arc::new(source));
        let connected = if self.counted { self.relay() } else { self.gates.connect(sources) };
        // A route that is left over leads from nowhere, and the next table is without it.
        connected.inspect_err(|_| drop(sources.pop()))
    }

    /// Has the relay look at the sources, all of them.
    fn relay(&self) -> Result<(), CoreError> {
        let mut relay = lock(&self.relay);
        match &*relay {
            Some(relay) => relay.wake(),
            None => *relay = Some(Relay::new(&self.gates).map_err(failed("start the relay of interrupts"))?),
        }
        Ok(())
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        self.gates.over.store(true, Ordering::SeqCst);
        if let Some(mut relay) = lock(&self.relay).take() {
            relay.wake();
            // It cannot have panicked, and if it has, it is gone all the same.
            let _ = relay.thread.take().map(JoinHandle::join);
        }
    }
}

impl Gates {
    fn guard(&self, vcpu: u32) -> Result<MutexGuard<'_, InterruptGuard>, CoreError> {
        self.guards.get(vcpu as usize).map(lock).ok_or_else(|| CoreError::NoDescriptor("there is no such vcpu".into()))
    }

    fn admit(&self, vcpu: u32, event: Event) -> Result<(), CoreError> {
        let admitted = self.guard(vcpu)?.admit(event, Instant::now());
        admitted.map_err(|reason| CoreError::InjectionRefused { vcpu, event, reason })
    }

    fn raise(&self, vcpu: u32, vector: u8) -> Result<(), CoreError> {
        // That the guest has turned its APIC off, and so does not take it, is no failure.
        self.vm
            .signal_msi(apic::msi(vcpu, vector))
            .map(drop)
            .map_err(Error::kvm("raise an interrupt"))
            .map_err(failed("interrupt a vcpu"))
    }

    /// Connects the last of `sources` to the kernel's APICs.
    fn connect(&self, sources: &[Arc<Source>]) -> Result<(), CoreError> {
        let Some(source) = sources.last() else { return Ok(()) };
        let routes = (0..).zip(sources).map(|(gsi, source)| apic::route(gsi, source.vcpu, source.vector));
        let routes = KvmIrqRouting::from_entries(&routes.collect::<Vec<_>>());
        let routes = routes.map_err(|error| failed("list the interrupt routes")(format!("{error:?}")))?;
        self.vm
            .set_gsi_routing(&routes)
            .map_err(Error::kvm("set the interrupt routes"))
            .map_err(failed("route an interrupt"))?;
        let gsi = sources.len() as u32 - 1;
        vm_fd::raise_on_signal(&self.vm, gsi, &source.eventfd).map_err(failed("connect an eventfd"))
    }

    /// Passes on what is written to the sources, if the guards allow it, until the VM is gone.
    fn relay(&self, wake: &OwnedFd) {
        while !self.over.load(Ordering::SeqCst) {
            let sources = lock(&self.sources).clone();
            let eventfds = sources.iter().map(|source| &source.eventfd);
            let mut ready = std::iter::once(wake)
                .chain(eventfds)
                .map(|eventfd| PollFd::new(eventfd, PollFlags::IN))
                .collect::<Vec<_>>();
            match poll(&mut ready, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                // The kernel has no memory for the moment.
                Err(_) => {
                    thread::sleep(Duration::from_millis(10));
                    continue;
                }
            }
            eventfd::take(wake);
            let signalled = ready.iter().skip(1).map(|eventfd| eventfd.revents().contains(PollFlags::IN));
            for (source, signalled) in sources.iter().zip(signalled) {
                let event = Event::Interrupt(source.vector);
                if signalled
                    && eventfd::take(&source.eventfd)
                    && self.admit(source.vcpu, event).and_then(|()| self.raise(source.vcpu, source.vector)).is_err()
                {
                    self.dropped.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}

/// The thread that reads the eventfds of a VM whose guest accepts only so many interrupts.
struct Relay {
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    fn new(gates: &Arc<Gates>) -> io::Result<Self> {
        let wake = Arc::new(eventfd::new()?);
        let (theirs, gates) = (Arc::clone(&wake), Arc::clone(gates));
        let thread = thread::Builder::new().name("vm-interrupts".into()).spawn(move || gates.relay(&theirs))?;
        Ok(Self { wake, thread: Some(thread) })
    }

    /// Makes the thread look at what has changed.
    fn wake(&self) {
        eventfd::signal(&self.wake);
    }
}
