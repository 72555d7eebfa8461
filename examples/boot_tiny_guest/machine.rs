//! The run loop: exits of the guest, and what the VMM does about each.

use crate::attempts::{self, Attempt, Observer};
use crate::block::BlockDevice;
use crate::program::chain;
use cvm::memory::Allocated;
use cvm::{Answer, BoxError, Error, Exit, Kick, Vcpu, Vm, Watchdog, doorbell};
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tiny_guest::{BLOCK_DEVICE, REPORT, REPORT_DEVICE, Report, TRYING_MMIO};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use zerocopy::FromBytes;

/// How a vCPU came to its end.
#[derive(Debug)]
pub enum End {
    /// It waits for interrupts, of which there are none.
    Halted,
    /// The guest gave this code.
    Ended(u32),
    /// It did something that it must not, or the host failed.
    Failed(Error),
    /// It ran too long.
    TimedOut,
    /// Another vCPU came to an end that is the VM's.
    Stopped,
}

/// What the VMM saw when the guest reported.
pub struct Finding {
    /// What the guest says.
    pub report: Report,
    /// How much memory the VM occupied, or why that is not known.
    pub allocated: Result<Allocated, String>,
    /// The same, counted in the page-state map.
    pub shared_pages: u64,
    /// What the VMM tried.
    pub attempts: Vec<Attempt>,
}

/// How many reasons of refused conversions are kept.
const MOST_REASONS: usize = 16;

/// A VM with its devices.
pub struct Machine<'a, V: Vm> {
    pub vm: &'a V,
    observer: Observer,
    echo: bool,
    disk: Mutex<BlockDevice>,
    exits: Mutex<BTreeMap<&'static str, u64>>,
    refused: Mutex<Vec<String>>,
    finding: Mutex<Option<Finding>>,
    /// Whether the last exit of vCPU 0 before its end said that it is about to try MMIO.
    tries_mmio: AtomicBool,
    stopping: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a, V: Vm> Machine<'a, V> {
    /// `vm` with `disk`; `echo` shows the guest's console.
    pub fn new(vm: &'a V, disk: BlockDevice, observer: Observer, echo: bool) -> Self {
        Self {
            vm,
            observer,
            echo,
            disk: Mutex::new(disk),
            exits: Mutex::default(),
            refused: Mutex::default(),
            finding: Mutex::default(),
            tries_mmio: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        }
    }

    /// What the VMM knows when it tries to reach the secret.
    pub fn observer(&self) -> &Observer {
        &self.observer
    }

    /// The disk's device.
    pub fn disk(&self) -> MutexGuard<'_, BlockDevice> {
        lock(&self.disk)
    }

    /// Exits by kind.
    pub fn exits(&self) -> BTreeMap<&'static str, u64> {
        lock(&self.exits).clone()
    }

    /// Why conversions were refused.
    pub fn refused(&self) -> Vec<String> {
        lock(&self.refused).clone()
    }

    /// Whether vCPU 0 said that it is about to try MMIO, and did nothing since but end.
    pub fn tries_mmio(&self) -> bool {
        self.tries_mmio.load(Ordering::SeqCst)
    }

    /// What was found when the guest reported.
    pub fn finding(&self) -> MutexGuard<'_, Option<Finding>> {
        lock(&self.finding)
    }

    /// Runs every vCPU on a thread until it comes to an end, at most for `limit`.
    pub fn run(&self, vcpus: Vec<V::Vcpu>, limit: Duration) -> Result<Vec<End>, BoxError> {
        let kickers: Vec<_> = vcpus.iter().map(Vcpu::kicker).collect();
        let watchdog = Watchdog::new(limit, kickers.clone())?;
        std::thread::scope(|scope| {
            let threads: Vec<_> = vcpus
                .into_iter()
                .map(|vcpu| {
                    let (kickers, watchdog) = (&kickers, &watchdog);
                    scope.spawn(move || self.run_vcpu(vcpu, kickers, watchdog))
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().map_err(|_| "a vcpu's thread panicked".into())).collect()
        })
    }

    fn run_vcpu(&self, mut vcpu: V::Vcpu, kickers: &[Arc<dyn Kick>], watchdog: &Watchdog) -> End {
        loop {
            match self.step(&mut vcpu, watchdog) {
                Ok(None) => {}
                Ok(Some(end @ (End::Halted | End::Stopped))) => return end,
                ending => {
                    self.stopping.store(true, Ordering::SeqCst);
                    kickers.iter().for_each(|kicker| kicker.kick());
                    return ending.map_or_else(End::Failed, |end| end.unwrap_or(End::Stopped));
                }
            }
        }
    }

    /// Runs the guest up to its next exit, and does what the exit asks for.
    fn step(&self, vcpu: &mut V::Vcpu, watchdog: &Watchdog) -> Result<Option<End>, Error> {
        let exit = vcpu.run()?;
        *lock(&self.exits).entry(kind(&exit)).or_default() += 1;
        if vcpu.index() == 0 && !matches!(exit, Exit::Kicked | Exit::Ended { .. }) {
            let tries = matches!(exit, Exit::DoorbellWrite { register: TRYING_MMIO, .. });
            self.tries_mmio.store(tries, Ordering::SeqCst);
        }
        match exit {
            Exit::Conversion(request) => {
                let outcome = self.vm.convert(&request);
                if let (Answer::Invalid, Some(cause)) = (outcome.answer(), outcome.cause()) {
                    let mut refused = lock(&self.refused);
                    // A guest can go on with this for long.
                    if refused.len() < MOST_REASONS {
                        refused.push(chain(cause));
                    }
                }
                vcpu.answer_conversion(outcome)?;
            }
            Exit::Console(byte) if self.echo => {
                // A console that cannot be shown is no reason to stop the guest.
                let _ = std::io::stdout().write_all(&[byte]);
            }
            Exit::Console(_) => {}
            Exit::DoorbellRead { register } => {
                let value = match doorbell::device_of(register) {
                    Some((BLOCK_DEVICE, offset)) => self.disk().read(offset),
                    _ => 0,
                };
                vcpu.answer_read(value.into())?;
            }
            Exit::DoorbellWrite { register: REPORT, value } if self.finding().is_none() => {
                let finding = self.look(vcpu, u64::from(value) << 12)?;
                *self.finding() = Some(finding);
            }
            Exit::DoorbellWrite { register, value } => match doorbell::device_of(register) {
                Some((BLOCK_DEVICE, offset)) => self.disk().write(offset, value, self.vm.memory()),
                Some((REPORT_DEVICE, _)) | None => {}
                Some((device, _)) => {
                    let reason = format!("it wrote to device {device}, which does not exist");
                    return Err(Error::Crashed { vcpu: vcpu.index(), reason });
                }
            },
            Exit::Halted => return Ok(Some(End::Halted)),
            Exit::Ended { code } => return Ok(Some(End::Ended(code))),
            Exit::Kicked if self.stopping.load(Ordering::SeqCst) => return Ok(Some(End::Stopped)),
            Exit::Kicked if watchdog.fired() => return Ok(Some(End::TimedOut)),
            Exit::Kicked => {}
            other => {
                let reason = format!("it uses what this vmm does not have: {other:x?}");
                return Err(Error::Crashed { vcpu: vcpu.index(), reason });
            }
        }
        Ok(None)
    }

    /// Takes the report from the shared page at `gpa`, counts memory, and tries to reach the secret.
    fn look(&self, vcpu: &mut V::Vcpu, gpa: u64) -> Result<Finding, Error> {
        let mut bytes = [0; size_of::<Report>()];
        let unreadable = |why| {
            let reason = format!("its report at {gpa:#x} cannot be read: {why}");
            Error::Crashed { vcpu: vcpu.index(), reason }
        };
        let read = self.vm.memory().memory().read_slice(&mut bytes, GuestAddress(gpa));
        read.map_err(|error| unreadable(chain(&error)))?;
        let report = Report::read_from_bytes(&bytes).map_err(|error| unreadable(error.to_string()))?;
        let allocated = self.vm.allocated().map_err(|error| chain(&error));
        let shared_pages = self.vm.memory().map().count(cvm::PageState::Shared);
        let attempts = attempts::all(self.vm, vcpu, &self.observer, report.secret);
        Ok(Finding { report, allocated, shared_pages, attempts })
    }
}

/// What an exit is counted as.
fn kind(exit: &Exit) -> &'static str {
    match exit {
        Exit::Conversion(_) => "conversion",
        Exit::Console(_) => "console",
        Exit::DoorbellRead { .. } => "doorbell read",
        Exit::DoorbellWrite { .. } => "doorbell write",
        Exit::Halted => "halted",
        Exit::Ended { .. } => "ended",
        Exit::Kicked => "kicked",
        _ => "other",
    }
}
