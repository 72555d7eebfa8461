//! The guest's work.

#![allow(unsafe_code, reason = "it starts without a stack, shares memory that it owns, and tries what is forbidden")]

use crate::disk::{self, ForgetfulHal};
use core::arch::asm;
use core::arch::x86_64::{__cpuid, _rdtsc};
use core::fmt::Write;
use core::hint::spin_loop;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use cvm_core::boot::{BootPage, FreshMemory};
use cvm_core::x86::VcpuState;
use cvm_core::{GpaRange, PAGE_SIZE, Side};
use cvm_guest::sev::{BlockRecord, Fault, GhcbPage, Protection, Reporter, SecretsPage, StatePage};
use cvm_guest::virtio::DoorbellTransport;
use cvm_guest::{Error, Machine, Platform, Processor};
use sha2::{Digest, Sha256};
use spin::Mutex;
use tiny_guest::*;
use virtio_drivers::device::blk::VirtIOBlk;
use zerocopy::{FromZeros, IntoBytes};

/// Where the image ends at the latest, which is loaded, and memory begins that nothing is in.
const LOADED_END: u64 = 4 << 20;

const STACK_LEN: usize = 32 << 10;

cvm_guest::entry!(main, vcpus: MAX_VCPUS, stack: STACK_LEN);

/// How many cycles the host may put off a request: some ten seconds.
const PATIENCE: u64 = 30_000_000_000;

/// Whether a request that the host has put off is to be repeated.
fn patience(tries: u64) -> bool {
    /// When the first of the requests that are put off now was made, on any vCPU.
    static BEGIN: AtomicU64 = AtomicU64::new(0);
    // SAFETY: every 64-bit processor has it.
    let now = unsafe { _rdtsc() };
    if tries == 1 {
        BEGIN.store(now, Ordering::Relaxed);
    }
    now.saturating_sub(BEGIN.load(Ordering::Relaxed)) < PATIENCE
}

/// The secret, in private memory for good.
#[repr(C, align(4096))]
struct Secret([u8; SECRET_LEN]);

static SECRET: Mutex<Secret> = Mutex::new(Secret([0; SECRET_LEN]));

/// What a vCPU of SEV-ES and SEV-SNP talks to its host by, and what memory SEV-SNP's accept.
static GHCBS: [GhcbPage; MAX_VCPUS as usize] = [const { GhcbPage::new() }; _];
static BLOCKS: [BlockRecord; (MMIO >> 21) as usize] = [const { BlockRecord::new() }; _];

static VCPUS_DONE: AtomicU32 = AtomicU32::new(0);
static CONVERTED_BY_OTHERS: AtomicU64 = AtomicU64::new(0);

/// The state that vCPU 1 starts from if the guest starts it, whether it was, and whether it is ready for that.
static mut STATE: StatePage = StatePage::new();
static STARTED: AtomicBool = AtomicBool::new(false);
static PARKED: AtomicBool = AtomicBool::new(false);

extern "C" fn main(index: u64, boot_page: *const BootPage) {
    // SAFETY: the VMM's convention is that RSI has the address of the boot page, a private page that nobody changes.
    let boot = unsafe { boot_page.read() };
    let task = Task::from_u64(boot.argument[0]);
    if index > 0 && task == Some(Task::StartVcpu) && !STARTED.load(Ordering::Acquire) {
        PARKED.store(true, Ordering::Release);
        // A vCPU that has halted is not entered again before an interrupt.
        loop {
            spin_loop();
        }
    }
    let Some(ghcb) = GHCBS.get(index as usize) else { panic!() };
    // SAFETY: this is ring 0, the boot page is the host's, all memory is mapped as the launch contract says, and the GHCB is
    // this vCPU's alone.
    let Ok(processor) = (unsafe { Processor::new(&boot, ghcb, &BLOCKS) }) else { panic!() };
    let Ok(platform) = Platform::new(&boot, processor, patience) else { panic!() };
    if index > 0 {
        convert_back_and_forth(&platform, &boot, index);
        return;
    }
    match task {
        Some(Task::Work) => work(&platform, &boot),
        Some(Task::Spin) => loop {
            spin_loop();
        },
        // SAFETY: without an interrupt descriptor table, an exception cannot be delivered.
        Some(Task::TripleFault) => unsafe { asm!("lidt [{table}]", "ud2", table = in(reg) &[0u16; 5]) },
        // SAFETY: the register is not one that converts.
        Some(Task::UnknownDoorbell) => unsafe { platform.machine().write(0x1fc, 0) },
        Some(Task::BadConversions) => {
            let top = boot.end_of_memory();
            let bad = [(top, 1), (top - PAGE_SIZE, 2), (1 << 40, 1)];
            let bad = bad.into_iter().flat_map(|(start, pages)| GpaRange::from_pages(start, pages).ok());
            // SAFETY: nothing of the guest is there. That holds for the last page of memory too.
            let refused = |range: &GpaRange| unsafe { platform.convert(*range, Side::Shared) }.is_err();
            let refused = bad.filter(refused).count() as u32;
            platform.end(code::REFUSED + refused);
        }
        Some(Task::Panic) => panic!(),
        Some(Task::Hello) => {
            let _ = writeln!(platform.console(), "hello from a protected guest");
            send(&platform, pool(&boot), GREETING);
            platform.end(0);
        }
        Some(Task::StrayCpuid) => {
            __cpuid(0);
            platform.end(code::CPUID);
        }
        Some(Task::ReadReplaced) => read_replaced(&platform),
        Some(Task::StartVcpu) => start_vcpu(&platform, boot_page),
        None => platform.end(code::PLATFORM),
    }
    platform.end(code::PLATFORM)
}

fn work(platform: &Platform<Processor>, boot: &BootPage) {
    let nonce = boot.argument[1];
    let mut console = platform.console();
    let _ = writeln!(console, "tiny guest: {} vcpus", boot.vcpus);
    let protection = platform.machine().protection();
    match platform.machine().cpuid(0, 0) {
        Ok([_, b, c, d]) => {
            let name = [b, d, c].map(u32::to_le_bytes);
            let name = core::str::from_utf8(name.as_flattened()).unwrap_or("of an unknown make");
            let _ = writeln!(console, "tiny guest: the processor is {name}, sev protection {protection:?}");
        }
        Err(_) => platform.end(code::PLATFORM),
    }
    let secret = {
        let mut secret = SECRET.lock();
        for (index, byte) in secret.0.iter_mut().enumerate() {
            *byte = pattern(nonce, SECRET_STREAM, index);
        }
        secret.0.as_ptr().expose_provenance() as u64
    };

    let pool = pool(boot);
    let Ok(range) = GpaRange::new(pool, POOL_LEN) else { platform.end(code::PLATFORM) };
    // SAFETY: all memory is mapped to its own addresses, and nothing of the guest is at its end.
    let Ok(region) = (unsafe { platform.share(range) }) else { platform.end(code::PLATFORM) };
    if disk::use_chunk(region).is_err() {
        platform.end(code::PLATFORM);
    }
    let _ = writeln!(console, "tiny guest: pool shared at {range}");

    let accepted = accept(platform, boot, pool).unwrap_or_else(|_| platform.end(code::PLATFORM));
    let Some(mut report) = use_disk(platform, nonce) else { platform.end(code::DISK) };
    let _ = writeln!(console, "tiny guest: disk of {} bytes read, written and read back", report.disk_len);

    VCPUS_DONE.fetch_add(1, Ordering::Relaxed);
    while VCPUS_DONE.load(Ordering::Acquire) < boot.vcpus {
        spin_loop();
    }
    report.vcpus = VCPUS_DONE.load(Ordering::Relaxed);
    report.converted_by_others = CONVERTED_BY_OTHERS.load(Ordering::Relaxed);
    report.secret = secret;
    report.accepted = accepted;
    if protection == Protection::SevSnp {
        match attest(platform, boot, pool, nonce) {
            Ok(bytes) => (report.attestation, report.attested) = (bytes, 1),
            Err(error) => {
                let _ = writeln!(console, "tiny guest: no report: {error}");
            }
        }
    }
    (report.bounced_to_device, report.bounced_from_device) = disk::bounced();
    send(platform, pool, report.as_bytes());

    let _ = writeln!(console, "tiny guest: trying mmio at {MMIO:#x}");
    if platform.device(REPORT_DEVICE).map(|device| device.write(TRYING_MMIO - REPORT, 1)).is_err() {
        platform.end(code::PLATFORM);
    }
    // SAFETY: nothing is there, so nothing of ours can change.
    let value = unsafe { core::ptr::with_exposed_provenance::<u32>(MMIO as usize).read_volatile() };
    let _ = writeln!(console, "tiny guest: mmio gave {value:#x}");
    platform.end(code::MMIO)
}

/// Reads a private page after the VMM was told where it is.
fn read_replaced(platform: &Platform<Processor>) -> ! {
    let mut secret = SECRET.lock();
    secret.0.fill(0xa5);
    let gpa = secret.0.as_ptr().expose_provenance() as u64;
    if platform.device(REPORT_DEVICE).map(|it| it.write(PRIVATE_FRAME - REPORT, (gpa / PAGE_SIZE) as u32)).is_err() {
        platform.end(code::PLATFORM);
    }
    // SAFETY: the page is that of the lock. The read is volatile, because somebody else may have changed it.
    let now = unsafe { secret.0.as_ptr().cast::<u64>().read_volatile() };
    platform.end(if now == u64::from_ne_bytes([0xa5; 8]) { code::UNCHANGED } else { code::CHANGED })
}

/// Starts vCPU 1 from a state in a page of the guest's, and waits for it.
fn start_vcpu(platform: &Platform<Processor>, boot: *const BootPage) -> ! {
    unsafe extern "C" {
        fn start() -> !;
    }
    while !PARKED.load(Ordering::Acquire) {
        spin_loop();
    }
    let cr3: u64;
    // SAFETY: ring 0 can read the register.
    unsafe { asm!("mov {}, cr3", out(reg) cr3, options(nomem, nostack, preserves_flags)) };
    let rip = (start as *const ()).expose_provenance() as u64;
    let state = VcpuState { rip, rsp: 0, rdi: 1, rsi: boot.expose_provenance() as u64, cr3, ..VcpuState::LONG_MODE };
    STARTED.store(true, Ordering::Release);
    // SAFETY: this runs once, and nothing else refers to the page.
    let page = unsafe { &mut *(&raw mut STATE) };
    // SAFETY: `start` is made for new vCPUs and takes a stack of its own; vCPU 1 has nothing, and its stack is free.
    if unsafe { platform.machine().start_vcpu(1, page, &state) }.is_err() {
        platform.end(code::VCPUS);
    }
    while VCPUS_DONE.load(Ordering::Acquire) == 0 {
        spin_loop();
    }
    platform.end(0)
}

/// Uses memory that was not loaded. Returns how many bytes of it; none if there are too few, or if it is not zero at first.
fn accept(platform: &Platform<Processor>, boot: &BootPage, pool: u64) -> Result<u64, Error> {
    let start = pool - 2 * POOL_LEN;
    if start < LOADED_END {
        return Ok(0);
    }
    let range = GpaRange::new(start, POOL_LEN).map_err(|_| Error::BootPage("memory"))?;
    // SAFETY: it is memory that nothing of the guest is in, mapped to its own address.
    unsafe { platform.accept(range)? };
    let word = |at: u64| core::ptr::with_exposed_provenance_mut::<u64>((start + at) as usize);
    let offsets = || (0..POOL_LEN).step_by(PAGE_SIZE as usize);
    // SAFETY: as above.
    let is_zero = || offsets().all(|at| unsafe { word(at).read_volatile() } == 0);
    let mut is_as_said = is_zero();
    for at in offsets() {
        // SAFETY: it is memory that nothing else of the guest is in, mapped to its own address.
        unsafe { word(at).write_volatile(!at) };
    }
    // SAFETY: as above.
    let kept = offsets().all(|at| unsafe { word(at).read_volatile() } == !at);
    is_as_said &= kept;
    if boot.fresh_memory() == Some(FreshMemory::Undefined) {
        // Emulators have zeros there at first, so only a second time shows who writes them.
        // SAFETY: as above.
        unsafe { platform.accept(range)? };
        is_as_said &= is_zero();
    }
    Ok(if is_as_said { POOL_LEN } else { 0 })
}

/// Has the secure processor report about this guest, with the nonce in it.
fn attest(
    platform: &Platform<Processor>,
    boot: &BootPage,
    pool: u64,
    nonce: u64,
) -> Result<[u8; ATTESTATION_LEN], Error> {
    let vcpu = platform.machine().ghcb().ok_or(Error::BootPage("ghcb"))?;
    let messages = GpaRange::from_pages(messages(pool), 2).map_err(|_| Error::BootPage("memory"))?;
    // SAFETY: all memory is mapped as the launch contract says, and nothing else of the guest is there.
    let messages = unsafe { platform.share(messages)? };
    // SAFETY: the boot page says that the secrets are there; nobody else uses the page, and this is the only time.
    let secrets = unsafe { &mut *core::ptr::with_exposed_provenance_mut(boot.secrets as usize) };
    let mut reporter = Reporter::new(SecretsPage::new(secrets), messages)?;
    loop {
        // The VMM stops a guest whose host is busy for too long.
        match reporter.report(vcpu, &report_data(nonce), None) {
            Err(Error::Sev(Fault::Busy)) => spin_loop(),
            report => return Ok(report?.bytes),
        }
    }
}

/// Reads the whole disk, writes some sectors of it and reads them back.
fn use_disk(platform: &Platform<Processor>, nonce: u64) -> Option<Report> {
    let transport = DoorbellTransport::new(platform.device(BLOCK_DEVICE).ok()?).ok()?;
    let mut disk = VirtIOBlk::<ForgetfulHal, _>::new(transport).ok()?;
    let sectors = usize::try_from(disk.capacity()).ok()?;
    let mut report = Report { disk_len: disk.capacity() * SECTOR as u64, ..Report::new_zeroed() };

    let mut hash = Sha256::new();
    let mut chunk = [0; READ_LEN];
    for first in (0..sectors).step_by(READ_LEN / SECTOR) {
        let chunk = &mut chunk[..READ_LEN.min((sectors - first) * SECTOR)];
        disk.read_blocks(first, chunk).ok()?;
        hash.update(&*chunk);
    }
    report.sha256 = hash.finalize().into();

    report.private_descriptor_refused = disk::refuses_private_descriptors(&mut disk).into();

    let written_at = (sectors / 2).min(sectors.checked_sub(WRITTEN_SECTORS)?);
    let written: [u8; WRITTEN_SECTORS * SECTOR] = core::array::from_fn(|index| pattern(nonce, DISK_STREAM, index));
    disk.write_blocks(written_at, &written).ok()?;
    disk.flush().ok()?;
    let mut back = [0; WRITTEN_SECTORS * SECTOR];
    disk.read_blocks(written_at, &mut back).ok()?;
    report.written_at = written_at as u64;
    report.read_back = (back == written).into();
    Some(report)
}

/// Where the pool begins: at the last multiple of its length from which there is as much.
fn pool(boot: &BootPage) -> u64 {
    (boot.end_of_memory() / POOL_LEN).wrapping_sub(1).wrapping_mul(POOL_LEN)
}

/// Where the pages for messages to the secure processor begin: below those of the last vCPU there can be.
fn messages(pool: u64) -> u64 {
    pool - PAGE_SIZE - u64::from(MAX_VCPUS) * VCPU_PAGES * PAGE_SIZE - 2 * PAGE_SIZE
}

/// Shares the page below the pool with `report` in it, tells the VMM, and takes the page back.
fn send(platform: &Platform<Processor>, pool: u64, report: &[u8]) {
    let Ok(page) = GpaRange::new(pool - PAGE_SIZE, PAGE_SIZE) else { platform.end(code::PLATFORM) };
    // SAFETY: as for the pool.
    let Ok(region) = (unsafe { platform.share(page) }) else { platform.end(code::PLATFORM) };
    if region.write(0, report).is_err() {
        platform.end(code::PLATFORM);
    }
    let sent = platform.device(REPORT_DEVICE).map(|device| device.write(0, (page.start().0 / PAGE_SIZE) as u32));
    if sent.and_then(|()| platform.unshare(region)).is_err() {
        platform.end(code::PLATFORM);
    }
}

/// What a vCPU other than the first does: shares pages of its own, sees that it can use them, and takes them back.
fn convert_back_and_forth(platform: &Platform<Processor>, boot: &BootPage, index: u64) {
    let start = pool(boot) - PAGE_SIZE - index * VCPU_PAGES * PAGE_SIZE;
    let Ok(range) = GpaRange::from_pages(start, VCPU_PAGES) else { platform.end(code::VCPUS) };
    for round in 0..ROUNDS {
        // SAFETY: all memory is mapped to its own addresses, and the page belongs to this vCPU.
        let Ok(region) = (unsafe { platform.share(range) }) else { platform.end(code::VCPUS) };
        let sent = [index as u8 ^ round as u8; 64];
        let mut back = [0; 64];
        let copied =
            region.write(PAGE_SIZE as usize - 32, &sent).and_then(|()| region.read(PAGE_SIZE as usize - 32, &mut back));
        if copied.is_err() || back != sent || platform.unshare(region).is_err() {
            platform.end(code::VCPUS);
        }
        CONVERTED_BY_OTHERS.fetch_add(2 * VCPU_PAGES, Ordering::Relaxed);
    }
    VCPUS_DONE.fetch_add(1, Ordering::Release);
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    // SAFETY: this is ring 0.
    unsafe { cvm_guest::end_after_panic(code::PANIC) }
}
