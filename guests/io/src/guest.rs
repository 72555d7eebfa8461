//! The guest's frame: it gets cases, has them done, and reports.

#![allow(unsafe_code, reason = "it starts without a stack, and shares memory that it owns")]

use crate::hal::Copied;
use crate::{disk, exchange, hal, net, ring3};
use core::arch::x86_64::_rdtsc;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use cvm_core::boot::BootPage;
use cvm_core::doorbell::Doorbell;
use cvm_core::{GpaRange, PAGE_SIZE, Side};
use cvm_guest::sev::{BlockRecord, GhcbPage};
use cvm_guest::virtio::DoorbellTransport;
use cvm_guest::{DeviceRegisters, Platform, Processor, SharedRegion};
use io_guest::*;
use zerocopy::{FromZeros, IntoBytes};

cvm_guest::entry!(main, vcpus: 1, stack: 64 << 10);

/// What a vCPU of SEV-ES and SEV-SNP talks to its host by, and what of its memory SEV-SNP's accepts.
static GHCB: GhcbPage = GhcbPage::new();
static BLOCKS: [BlockRecord; (MEMORY >> 21) as usize] = [const { BlockRecord::new() }; _];

/// How many cycles a device may take for one answer: some ten seconds.
const PATIENCE: u64 = 30_000_000_000;

/// Whether a conversion that the host has put off is to be repeated. There is one vCPU.
fn patience(tries: u64) -> bool {
    static BEGIN: AtomicU64 = AtomicU64::new(0);
    if tries == 1 {
        BEGIN.store(cycles(), Relaxed);
    }
    cycles().wrapping_sub(BEGIN.load(Relaxed)) < PATIENCE
}

/// How long the memory is that the devices' buffers are in: below the page for reports, which is below the pool.
const ARENA_LEN: u64 = 11 << 20;

/// The registers of the device that gives out cases.
pub type Control<'a> = DeviceRegisters<&'a Processor>;
/// The way to a virtio device.
pub type Transport<'a> = DoorbellTransport<&'a Processor>;

/// Memory for buffers, handed out from its start.
pub struct Arena {
    next: u64,
    end: u64,
}

impl Arena {
    /// `len` bytes, from the next page on.
    pub fn take(&mut self, len: usize) -> Option<&'static mut [u8]> {
        let start = self.next.next_multiple_of(PAGE_SIZE);
        let end = start.checked_add(len as u64).filter(|end| *end <= self.end)?;
        self.next = end;
        // SAFETY: all memory is mapped to its own addresses; nothing else is in the arena, and each part of it is
        // handed out once.
        Some(unsafe { core::slice::from_raw_parts_mut(core::ptr::with_exposed_provenance_mut(start as usize), len) })
    }
}

/// The time-stamp counter.
pub fn cycles() -> u64 {
    // SAFETY: every 64-bit processor has it.
    unsafe { _rdtsc() }
}

/// Waits for something, but not forever.
pub fn wait<R>(mut ready: impl FnMut() -> Result<Option<R>, u64>) -> Result<R, u64> {
    let begin = cycles();
    loop {
        if let Some(result) = ready()? {
            return Ok(result);
        }
        if cycles().wrapping_sub(begin) > PATIENCE {
            return Err(failure::TIMEOUT);
        }
        core::hint::spin_loop();
    }
}

/// Tells the VMM when a case begins and ends, and takes the time in between, and what was copied.
pub struct Clock<'a> {
    control: &'a Control<'a>,
    copied: Copied,
    begin: u64,
}

impl<'a> Clock<'a> {
    /// The case begins.
    pub fn start(control: &'a Control<'a>) -> Self {
        let copied = Copied::now();
        control.write(register::MARK, 1);
        Self { control, copied, begin: cycles() }
    }

    /// All its I/Os are done.
    pub fn stop(self, report: &mut Report) {
        report.cycles = cycles().wrapping_sub(self.begin);
        self.control.write(register::MARK, 2);
        (Copied::now() - self.copied).report(report);
    }
}

extern "C" fn main(_index: u64, boot: *const BootPage) {
    // SAFETY: the VMM's convention is that RSI has the address of the boot page, a private page that nobody changes.
    let boot = unsafe { boot.read() };
    let Some(doorbell) = boot.doorbell() else { panic!() };
    // SAFETY: this is ring 0, or by ports another one that may use them, the boot page is the host's, all memory is mapped as
    // the launch contract says, and there is one vCPU.
    let Ok(processor) = (unsafe { Processor::new(&boot, &GHCB, &BLOCKS) }) else { panic!() };
    let Ok(platform) = Platform::new(&boot, processor, patience) else { panic!() };
    let Some((page, arena)) = share(&platform, &boot) else { platform.end(code::PLATFORM) };
    let Ok(control) = platform.device(CONTROL) else { platform.end(code::PLATFORM) };
    control.write(register::REPORT, (page.range().start().0 / PAGE_SIZE) as u32);
    // Only ring 0 has registers for doorbells.
    if doorbell == Doorbell::Port && platform.machine().ghcb().is_none() {
        // SAFETY: the launch contract says ring 0, interrupts off and such tables; this is the only vCPU, and what is left
        // to do is the devices', by ports.
        unsafe { ring3::enter(boot.end_of_memory()) };
    }
    match measure(&platform, &control, &page, arena, boot.argument[1]) {
        Some(()) => platform.end(0),
        None => platform.end(code::DEVICE),
    }
}

/// Shares the pool, a page for reports, and, if nothing is to bounce, the buffers.
fn share(platform: &Platform<Processor>, boot: &BootPage) -> Option<(SharedRegion, Arena)> {
    let end = boot.end_of_memory();
    let below = |end: u64, len: u64| GpaRange::new(end.checked_sub(len)?, len).ok();
    let pool = below(end, hal::POOL_LEN)?;
    let page = below(pool.start().0, PAGE_SIZE)?;
    let arena = below(page.start().0, ARENA_LEN)?;
    let bounce = boot.argument[0] != 0;
    hal::set_up(platform, pool, bounce).ok()?;
    match (bounce, boot.shared_at) {
        // SAFETY: it is memory that nothing of the guest is in yet, mapped to its own addresses.
        (true, _) => unsafe { platform.accept(arena) }.ok()?,
        // SAFETY: nothing of the guest is in the arena yet. Its buffers are the devices' from then on.
        (false, 0) => unsafe { platform.convert(arena, Side::Shared) }.ok()?,
        // The devices' buffers are used at their own addresses.
        (false, _) => return None,
    }
    // SAFETY: all memory is mapped to its own addresses, and nothing of the guest is there.
    let page = unsafe { platform.share(page).ok()? };
    Some((page, Arena { next: arena.start().0, end: arena.end().0 }))
}

/// Does what the VMM asks for until it asks no more.
fn measure<'a>(
    platform: &'a Platform<Processor>,
    control: &Control<'a>,
    page: &SharedRegion,
    mut arena: Arena,
    nonce: u64,
) -> Option<()> {
    let transport = |device| DoorbellTransport::new(platform.device(device).ok()?).ok();
    let mut disk = disk::Disk::new(transport(DISK)?, &mut arena, nonce)?;
    let mut net = net::Card::new(transport(NET)?, &mut arena, nonce)?;
    loop {
        let operation = control.read(register::OPERATION);
        if operation == 0 {
            return Some(());
        }
        let (size, count) = (control.read(register::SIZE), control.read(register::COUNT));
        let sequence = control.read(register::SEQUENCE);
        let mut report = Report::new_zeroed();
        let done = match Operation::from_u32(operation).map(|operation| Case { operation, size, count, sequence }) {
            Some(case) if case.operation.is_disk() => disk.run(&case, control, &mut report),
            Some(case) if case.operation == Operation::Exchange => exchange::run(&mut net, &case, control, &mut report),
            Some(case) => net.run(&case, control, &mut report),
            None => Err(failure::CASE),
        };
        report.failure = done.err().unwrap_or(0);
        report.pool_used = hal::trim();
        page.write(0, report.as_bytes()).ok()?;
        control.write(register::MARK, 3);
    }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    // SAFETY: this is ring 0, or the ports can be used all the same.
    unsafe { cvm_guest::end_after_panic(code::PANIC) }
}
