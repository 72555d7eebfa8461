//! A guest with its devices, and how one case is run in it.

use crate::block::BlockDevice;
use crate::cpu;
use crate::disk::Disk;
use crate::net::NetDevice;
use crate::responder::Responder;
use crate::worker::Worker;
use cvm::image::Image;
use cvm::{BoxError, Error, Exit, Gpa, Platform, SharedMemory, Vcpu, Vm, VmConfig, Watchdog, doorbell};
use io_guest::*;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use zerocopy::{FromBytes, FromZeros};

/// How long a guest may take for one case.
const LIMIT: Duration = Duration::from_secs(300);

/// What one case came to in one round.
#[derive(Debug, Clone)]
pub struct Sample {
    /// How long it took.
    pub wall: Duration,
    /// What the vCPU's thread and the vault used.
    pub guest_cpu: Duration,
    /// What the devices' threads used.
    pub host_cpu: Duration,
    /// What the guest says.
    pub report: Report,
    /// Whether the VMM found what it was to find: on the disk, or in frames.
    pub verified: bool,
}

/// The clocks, at the begin of a case.
struct Begin {
    wall: Instant,
    guest: Duration,
    host: Duration,
}

/// A guest that waits for its next case.
pub struct Guest<V: Vm> {
    vcpu: V::Vcpu,
    net: Worker<NetDevice<Responder>>,
    blk: Worker<BlockDevice>,
    disk: Disk,
    memory: SharedMemory,
    /// Where its reports are.
    page: u64,
    // Last, so that it outlives the rest.
    vm: V,
}

impl<V: Vm> Guest<V> {
    /// Launches a guest, and runs it until it asks for its first case.
    pub fn new<P>(platform: &P, bounce: bool, nonce: u64) -> Result<Self, BoxError>
    where
        P: Platform,
        P::Loader: cvm::launch::Loader<Vm = V>,
    {
        let config = VmConfig::new(MEMORY, 1)?;
        let mut launch = platform.launch(config)?;
        let image = Image::from_elf(IMAGE)?;
        launch.load_image(&image)?;
        launch.load_boot_page(Gpa(BOOT_PAGE), [bounce.into(), nonce, 0, 0])?;
        launch.start_in_long_mode(image.entry(), Gpa(PAGE_TABLES), Gpa(BOOT_PAGE))?;
        let mut vm = launch.seal()?;

        let disk = Disk::new(nonce)?;
        let bell = |device| vm.doorbell_fd(doorbell::device_base(device) + VIRTIO_MMIO_QUEUE_NOTIFY as u16);
        let card = NetDevice::new(GUEST_MAC, MAX_FRAME, Responder::new(nonce));
        let net = Worker::start("net", card, vm.memory().named("net"), bell(NET)?)?;
        let blk = Worker::start("disk", disk.device()?, vm.memory().named("disk"), bell(DISK)?)?;
        let vcpu = vm.take_vcpus().remove(0);
        let memory = vm.memory().named("reports");
        let mut guest = Self { vcpu, net, blk, disk, memory, page: 0, vm };
        guest.run_until_it_asks(None)?;
        Ok(guest)
    }

    /// Has the guest do what `case` says.
    pub fn measure(&mut self, case: &Case) -> Result<Sample, BoxError> {
        self.net.device().responder.begin(*case);
        self.vcpu.answer_read(case.operation as u64)?;
        let mut sample = self.run_until_it_asks(Some(case))?.ok_or("the guest did not report")?;
        if sample.report.failure != 0 {
            let why = ["", "it is none", "the device failed", "the device did not answer", "it got the wrong bytes"];
            let why = why.get(sample.report.failure as usize).unwrap_or(&"unknown failure");
            return Err(format!("{case:?} failed in the guest: {why}").into());
        }
        sample.verified = match case.operation {
            operation if operation.is_write() => self.disk.holds(case)?,
            operation if operation.is_disk() => true,
            _ => self.net.device().responder.is_satisfied() && self.net.device().refused() == 0,
        };
        Ok(sample)
    }

    /// How many pages the guest has shared.
    pub fn shared_pages(&self) -> u64 {
        self.vm.memory().map().count(cvm::PageState::Shared)
    }

    fn now(&self) -> Begin {
        let guest = cpu::this_thread() + cpu::children();
        Begin { wall: Instant::now(), guest, host: self.net.used() + self.blk.used() }
    }

    /// Runs the guest until it asks for a case, the answer to which is still due.
    fn run_until_it_asks(&mut self, case: Option<&Case>) -> Result<Option<Sample>, BoxError> {
        let _watchdog = Watchdog::new(LIMIT, vec![self.vcpu.kicker()])?;
        let (mut begin, mut sample) = (None, None::<Sample>);
        loop {
            match self.vcpu.run()? {
                Exit::Conversion(request) => {
                    let outcome = self.vm.convert(&request);
                    self.vcpu.answer_conversion(outcome)?;
                }
                Exit::DoorbellRead { register } => {
                    let value = match (doorbell::device_of(register), case) {
                        (Some((CONTROL, register::OPERATION)), _) => return Ok(sample),
                        (Some((CONTROL, register::SIZE)), Some(case)) => case.size,
                        (Some((CONTROL, register::COUNT)), Some(case)) => case.count,
                        (Some((CONTROL, register::SEQUENCE)), Some(case)) => case.sequence,
                        (Some((DISK, offset)), _) => self.blk.device().read(offset),
                        (Some((NET, offset)), _) => self.net.device().read(offset),
                        _ => 0,
                    };
                    self.vcpu.answer_read(value.into())?;
                }
                Exit::DoorbellWrite { register, value } => match (doorbell::device_of(register), value) {
                    (Some((DISK, offset)), _) => self.blk.device().write(offset, value, self.blk.memory()),
                    (Some((NET, offset)), _) => self.net.device().write(offset, value, self.net.memory()),
                    (Some((CONTROL, register::REPORT)), _) => self.page = u64::from(value) << 12,
                    (Some((CONTROL, register::MARK)), 1) => {
                        begin = Some(self.now());
                        self.net.ring();
                    }
                    (Some((CONTROL, register::MARK)), 2) => {
                        let Some(begin) = begin.take() else { continue };
                        let Begin { wall, guest, host } = self.now();
                        sample = Some(Sample {
                            wall: wall - begin.wall,
                            guest_cpu: guest.saturating_sub(begin.guest),
                            host_cpu: host.saturating_sub(begin.host),
                            report: Report::new_zeroed(),
                            verified: false,
                        });
                    }
                    (Some((CONTROL, register::MARK)), 3) => {
                        let report = self.report()?;
                        // A case that made no sense was never begun.
                        let none = Duration::ZERO;
                        let sample = sample.get_or_insert(Sample {
                            wall: none,
                            guest_cpu: none,
                            host_cpu: none,
                            report,
                            verified: false,
                        });
                        sample.report = report;
                    }
                    _ => {}
                },
                Exit::Console(_) => {}
                Exit::Ended { code } => return Err(format!("the guest ended with code {code}").into()),
                Exit::Kicked => return Err(format!("one case took longer than {LIMIT:?}: try fewer --ios").into()),
                other => {
                    let reason = format!("it uses what this vmm does not have: {other:x?}");
                    return Err(Error::Crashed { vcpu: self.vcpu.index(), reason }.into());
                }
            }
        }
    }

    fn report(&self) -> Result<Report, BoxError> {
        let mut bytes = [0; size_of::<Report>()];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(self.page))?;
        Report::read_from_bytes(&bytes).map_err(|_| "a report has another size".into())
    }
}
