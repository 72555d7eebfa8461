//! A sealed VM and its vCPUs.

#[cfg(doc)]
use crate::InterruptController;
use crate::export::Export;
use crate::interrupt::Guarding;
use crate::launch::Transcript;
use crate::memory::{Allocated, Conversion, ConversionListener, ConversionRequest, ConversionTotals, SharedMemory};
use crate::x86::Register;
use crate::{Error, Event, Lifecycle, LifecycleAnswer};
#[cfg(unix)]
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Why a vCPU stopped, with just the values that are exposed to the host for it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// The guest asks for a conversion. Pass it to [`Vm::convert`], and the answer to [`Vcpu::answer_conversion`].
    Conversion(ConversionRequest),
    /// The guest writes a byte to its console.
    Console(u8),
    /// The guest writes a device's doorbell register.
    DoorbellWrite {
        /// The register, see [`doorbell`](crate::doorbell).
        register: u16,
        /// What it writes.
        value: u32,
    },
    /// The guest reads a device's doorbell register: [`Vcpu::answer_read`].
    DoorbellRead {
        /// The register, see [`doorbell`](crate::doorbell).
        register: u16,
    },
    /// The guest writes a port outside the doorbell space.
    PortWrite {
        /// The port.
        port: u16,
        /// How many bytes: 1, 2 or 4.
        width: u8,
        /// What it writes.
        value: u32,
    },
    /// The guest reads a port outside the doorbell space: [`Vcpu::answer_read`].
    PortRead {
        /// The port.
        port: u16,
        /// How many bytes: 1, 2 or 4.
        width: u8,
    },
    /// The guest writes an MSR that KVM does not know, outside the doorbell space.
    MsrWrite {
        /// The MSR.
        index: u32,
        /// What it writes.
        value: u64,
    },
    /// The guest reads an MSR that KVM does not know, outside the doorbell space: [`Vcpu::answer_read`].
    MsrRead {
        /// The MSR.
        index: u32,
    },
    /// The vCPU waits for an interrupt. With an [`InterruptController::Apic`] it waits in the kernel instead:
    /// [`Vcpu::run`] returns when it is [kicked](Kick), or after the interrupt that wakes it.
    Halted,
    /// The guest has ended, by its own will.
    Ended {
        /// What it gave as the reason; 0 is success.
        code: u32,
    },
    /// Somebody kicked the vCPU, see [`Kick`]. The guest notices nothing if it runs on.
    Kicked,
}

/// What a host learns when it reads a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RegisterRead {
    /// The value: this isolation does not hide registers.
    Visible(u64),
    /// The value, as the exit under way exposes it.
    Exposed(u64),
    /// Nothing. It is not zero; it is unknown.
    Hidden,
}

/// A VM after its launch. Safe to use from several threads.
pub trait Vm: Send + Sync {
    /// Its vCPUs.
    type Vcpu: Vcpu;

    /// Hands out the vCPUs, the first one first, to run on a thread each. The second call gets none.
    fn take_vcpus(&mut self) -> Vec<Self::Vcpu>;

    /// The shared side of its memory.
    fn memory(&self) -> &SharedMemory;

    /// Carries out what a guest has asked for by [`Exit::Conversion`], once. The result is for
    /// [`Vcpu::answer_conversion`].
    fn convert(&self, request: &ConversionRequest) -> Conversion;

    /// Adds a listener for conversions to come.
    fn add_listener(&self, listener: Arc<dyn ConversionListener>);

    /// What was converted so far.
    fn conversions(&self) -> ConversionTotals;

    /// How much memory it occupies now.
    ///
    /// # Errors
    /// [`Error::Backend`] if the host does not say.
    fn allocated(&self) -> Result<Allocated, Error>;

    /// What was submitted to the launch.
    fn transcript(&self) -> &Transcript;

    /// What can be done with this VM.
    fn lifecycle(&self, what: Lifecycle) -> LifecycleAnswer;

    /// How its private pages can leave it protected; nothing where its trusted entity has no way.
    fn export(&self) -> Option<&dyn Export<Self::Vcpu>> {
        None
    }

    /// Who keeps the host from injecting what the guest does not accept.
    fn guarding(&self) -> Guarding;

    /// An eventfd that the kernel signals whenever the guest writes the device doorbell register `register`, whatever
    /// the value: from now on without an [`Exit::DoorbellWrite`], and also while no vCPU's thread looks. It does not
    /// block, and its count is how many writes there were since the last read.
    ///
    /// # Errors
    /// [`Error::NoDescriptor`] for what is no register of a [device](crate::doorbell::device_of), for one that has a
    /// descriptor already, and for any where the doorbell is not [`Doorbell::Port`](crate::doorbell::Doorbell::Port): no
    /// kernel signals descriptors for MSRs. [`Error::Backend`] if the host failed.
    #[cfg(unix)]
    fn doorbell_fd(&self, register: u16) -> Result<OwnedFd, Error>;

    /// An eventfd whose every write raises the edge-triggered interrupt `vector` on vCPU `vcpu`, and wakes it if it has
    /// halted. It does not block. Each call for the same interrupt returns the same eventfd: the descriptors share one open
    /// file description, and so `O_NONBLOCK`. A holder that clears the flag makes the writes of all others block while
    /// the counter is full.
    ///
    /// The interrupt guard decides here: that the guest accepts the vector now is enough for all writes to come, as no
    /// guest takes an acceptance back. Where it accepts only so many interrupts in a second, the guard decides at each
    /// write, and those that it refuses are [dropped](Vm::dropped_interrupts). Writes that nobody has looked at yet are
    /// one interrupt.
    ///
    /// # Errors
    /// [`Error::InjectionRefused`] if the guard does not allow it; [`Error::NoDescriptor`] for a vCPU that is not there,
    /// without [`InterruptController::Apic`], and when the kernel has no more routes; [`Error::Backend`] if the host
    /// failed.
    #[cfg(unix)]
    fn interrupt_fd(&self, vcpu: u32, vector: u8) -> Result<OwnedFd, Error>;

    /// How many interrupts that came by [`Vm::interrupt_fd`] were dropped, because the guest accepts no more in a
    /// second.
    ///
    /// # Errors
    /// [`Error::Backend`] if whoever counts does not say.
    fn dropped_interrupts(&self) -> Result<u64, Error>;
}

/// A vCPU. It stays on the thread that runs it.
pub trait Vcpu: Send {
    /// Its index, from 0.
    fn index(&self) -> u32;

    /// Runs the guest until it exits. A vCPU that has [halted](Exit::Halted) goes on only when an injected interrupt
    /// wakes it.
    ///
    /// # Errors
    /// [`Error::MmioRefused`], [`Error::MissingConversion`], [`Error::UnknownDoorbell`], [`Error::Terminated`] and
    /// [`Error::Crashed`] for what the guest did, [`Error::Backend`] if the host failed, [`Error::Lost`] if another vCPU's
    /// conversion did: this vCPU cannot go on, and says so when it is run again. [`Error::Protocol`] if the last exit still
    /// waits for an answer.
    fn run(&mut self) -> Result<Exit, Error>;

    /// Answers a read exit; only as many low bytes count as the guest reads.
    ///
    /// # Errors
    /// [`Error::Protocol`] if the last exit was not a read.
    fn answer_read(&mut self, value: u64) -> Result<(), Error>;

    /// Answers [`Exit::Conversion`] with what [`Vm::convert`] made of it.
    ///
    /// # Errors
    /// [`Error::Protocol`] if the last exit was no conversion, or another one.
    fn answer_conversion(&mut self, conversion: Conversion) -> Result<(), Error>;

    /// Answers [`Exit::Conversion`] with [`Answer::Invalid`](crate::Answer::Invalid); the request cannot be carried out
    /// any more.
    ///
    /// # Errors
    /// [`Error::Protocol`] if the last exit was no conversion.
    fn refuse_conversion(&mut self) -> Result<(), Error>;

    /// What the host can see of a register.
    ///
    /// # Errors
    /// [`Error::Backend`] if the host failed.
    fn register(&self, register: Register) -> Result<RegisterRead, Error>;

    /// Injects an event when the guest can take it. With an [`InterruptController::Apic`] a guest that has turned its
    /// APIC off never can: the interrupt is lost.
    ///
    /// # Errors
    /// [`Error::InjectionRefused`] if the guard does not allow it, [`Error::Backend`] if the host failed.
    fn inject(&mut self, event: Event) -> Result<(), Error>;

    /// A way to stop this vCPU from another thread.
    fn kicker(&self) -> Arc<dyn Kick>;
}

/// Stops a vCPU from another thread.
pub trait Kick: Send + Sync {
    /// Makes the [`Vcpu::run`] that is under way, or else the next one, return [`Exit::Kicked`] soon.
    fn kick(&self);
}

#[derive(Debug, Default)]
struct WatchdogState {
    released: bool,
    fired: bool,
}

/// Kicks vCPUs when a time is over, so that a guest which spins does not hold its VMM forever.
#[derive(Debug)]
pub struct Watchdog {
    state: Arc<(Mutex<WatchdogState>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Kicks all of `vcpus` once when `limit` is over, unless it is dropped before. A limit beyond what the clock can
    /// count never is.
    ///
    /// # Errors
    /// If there can be no more threads.
    pub fn new(limit: Duration, vcpus: Vec<Arc<dyn Kick>>) -> std::io::Result<Self> {
        let state = Arc::<(Mutex<WatchdogState>, Condvar)>::default();
        let shared = Arc::clone(&state);
        let end = Instant::now().checked_add(limit);
        let thread = std::thread::Builder::new().name("vm-watchdog".into()).spawn(move || {
            let (state, wake) = &*shared;
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            while !state.released {
                let left = end.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
                if left.is_zero() {
                    state.fired = true;
                    vcpus.iter().for_each(|vcpu| vcpu.kick());
                    return;
                }
                state = wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        })?;
        Ok(Self { state, thread: Some(thread) })
    }

    /// Whether the time was over.
    pub fn fired(&self) -> bool {
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner).fired
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner).released = true;
        self.state.1.notify_all();
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked but inside a kick, and then there is nothing to be done about it here.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Kicked(AtomicUsize);

    impl Kick for Kicked {
        fn kick(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_watchdog_kicks_everybody_once() {
        let vcpus = [Arc::new(Kicked::default()), Arc::new(Kicked::default())];
        let kicks = vcpus.iter().map(|vcpu| Arc::clone(vcpu) as Arc<dyn Kick>).collect();
        let dog = Watchdog::new(Duration::from_millis(1), kicks).unwrap();
        while !dog.fired() {
            std::thread::yield_now();
        }
        drop(dog);
        assert!(vcpus.iter().all(|vcpu| vcpu.0.load(Ordering::SeqCst) == 1));
    }

    #[test]
    fn a_watchdog_that_is_dropped_in_time_kicks_nobody() {
        let vcpu = Arc::new(Kicked::default());
        let dog = Watchdog::new(Duration::from_secs(3600), vec![Arc::clone(&vcpu) as Arc<dyn Kick>]).unwrap();
        assert!(!dog.fired());
        drop(dog);
        assert_eq!(vcpu.0.load(Ordering::SeqCst), 0);
    }
}
