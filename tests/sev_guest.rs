//! Guests of SEV-ES and SEV-SNP whose processor enforces what hardware does: #VC, valid pages, states of vCPUs. On hardware,
//! or in L1 with a kernel that models the processor; elsewhere these tests are skipped, loudly.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use cvm::doorbell::Doorbell;
use cvm::image::Image;
use cvm::sev::kvm::SevPlatform;
use cvm::{Error, Exit, Gpa, PAGE_SIZE, Platform, Protection, Vcpu, Vm, VmConfig, Watchdog};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tiny_guest::{BOOT_PAGE, PAGE_TABLES, PRIVATE_FRAME, ROUNDS, Task, VCPU_PAGES, code};

const MEMORY: u64 = 64 << 20;

/// How long a guest may take where processors are emulated.
const LIMIT: Duration = Duration::from_secs(240);

/// Sets of reasons of guests that end themselves: error codes of #VC, and those above 0x400.
const VC: u8 = 0xe;
const VC_PAGE: u8 = 0xf;

/// The platform, if this host offers it with a processor that does what hardware does.
fn platform(protection: Protection) -> Option<SevPlatform> {
    // L1's model of the secure processor is there without one of the processor in some kernels, and can be switched off.
    let model = fs::read_to_string("/sys/module/kvm_amd/parameters/fakepsp_guest").unwrap_or_default();
    let required = std::env::var_os("CVM_REQUIRE_SEV").is_some();
    if Path::new("/proc/fakepsp").exists() && !matches!(model.trim(), "1" | "2") {
        assert!(!required, "#VC is required, and this kernel runs {protection} guests without");
        eprintln!("SKIPPED: {protection} guests, which this kernel runs without #VC");
        return None;
    }
    match SevPlatform::open(protection) {
        Ok(platform) => Some(platform),
        Err(error) if required => panic!("{protection} is required: {error}"),
        Err(error) => {
            eprintln!("SKIPPED: {protection} guests: {error}");
            None
        }
    }
}

/// One guest at a time is in this process, so that the files of its memory are the only ones.
static ONE: Mutex<()> = Mutex::new(());

/// A guest, and what its VMM does.
struct Run<'a> {
    protection: Protection,
    doorbell: Doorbell,
    vcpus: u32,
    task: Task,
    /// What the VMM does when the guest names a private page.
    on_private: &'a (dyn Fn(Gpa) + Sync),
}

/// Launches the tiny guest and runs it until its first vCPU ends. Returns how that was, and how many pages became shared
/// and private.
fn run(run: &Run<'_>, platform: &SevPlatform) -> (Result<u32, Error>, (u64, u64)) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut config = VmConfig::new(MEMORY, run.vcpus).unwrap();
    config.doorbell = run.doorbell;
    let mut launch = platform.launch(config).unwrap();
    let image = Image::from_elf(tiny_guest::IMAGE).unwrap();
    launch.load_image(&image).unwrap();
    launch.load_boot_page(Gpa(BOOT_PAGE), [run.task as u64, 0, 0, 0]).unwrap();
    launch.start_in_long_mode(image.entry(), Gpa(PAGE_TABLES), Gpa(BOOT_PAGE)).unwrap();
    let mut vm = launch.seal().unwrap();
    let vcpus = vm.take_vcpus();
    let kickers: Vec<_> = vcpus.iter().map(Vcpu::kicker).collect();
    let watchdog = Watchdog::new(LIMIT, kickers.clone()).unwrap();
    let ended = AtomicBool::new(false);
    let ends: Vec<_> = std::thread::scope(|scope| {
        let (vm, ended, watchdog, kickers) = (&vm, &ended, &watchdog, &kickers);
        let threads: Vec<_> = vcpus
            .into_iter()
            .map(|mut vcpu| {
                scope.spawn(move || {
                    let end = loop {
                        match vcpu.run() {
                            Ok(Exit::Conversion(request)) => {
                                vcpu.answer_conversion(vm.convert(&request)).unwrap();
                            }
                            Ok(Exit::DoorbellWrite { register: PRIVATE_FRAME, value }) => {
                                (run.on_private)(Gpa(u64::from(value) * PAGE_SIZE));
                            }
                            Ok(Exit::Halted) if vcpu.index() > 0 => return Ok(0),
                            Ok(Exit::Kicked) if ended.load(Ordering::SeqCst) => break Ok(0),
                            Ok(Exit::Kicked) => assert!(!watchdog.fired(), "the guest ran too long"),
                            Ok(Exit::Ended { code }) => break Ok(code),
                            Ok(exit) => panic!("vcpu {}: {exit:?}", vcpu.index()),
                            Err(error) => break Err(error),
                        }
                    };
                    ended.store(true, Ordering::SeqCst);
                    kickers.iter().for_each(|kicker| kicker.kick());
                    end
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let totals = vm.conversions();
    let first = ends.into_iter().next().unwrap();
    (first, (totals.to_shared, totals.to_private))
}

fn nothing(gpa: Gpa) {
    panic!("the guest named the private page {gpa}");
}

/// Takes the memory of a private page away, as whoever holds the VM can. KVM has another page for the guest then.
fn replace(gpa: Gpa) {
    let mut replaced = 0;
    for entry in fs::read_dir("/proc/self/fd").unwrap() {
        let path = entry.unwrap().path();
        let Ok(name) = fs::read_link(&path) else { continue };
        if !name.to_string_lossy().contains("guest_memfd") && !name.to_string_lossy().contains("kvm-gmem") {
            continue;
        }
        // Such a file cannot be opened by its name, only duplicated.
        let number = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let file = duplicate(number);
        // Memory is one slot at 0, so an offset in the file is an address of the guest.
        fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, gpa.0, PAGE_SIZE).unwrap();
        replaced += 1;
    }
    assert_eq!(replaced, 1);
}

#[allow(unsafe_code, reason = "a descriptor by its number")]
fn duplicate(number: i32) -> File {
    // SAFETY: the directory of descriptors has just shown that it is open, and nothing here closes any.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
    borrowed.try_clone_to_owned().unwrap().into()
}

#[test]
fn a_stray_cpuid_ends_the_guest_with_its_exit_code() {
    for protection in [Protection::SevSnp, Protection::SevEs] {
        let Some(platform) = platform(protection) else { continue };
        for doorbell in [Doorbell::Port, Doorbell::Msr] {
            let setting = Run { protection, doorbell, vcpus: 1, task: Task::StrayCpuid, on_private: &nothing };
            let (end, _) = run(&setting, &platform);
            let Err(Error::Terminated { vcpu: 0, reason }) = end else { panic!("{}: {end:?}", setting.protection) };
            assert_eq!(reason, Some((VC, 0x72)), "{protection}");
        }
    }
}

#[test]
fn a_page_that_the_host_replaces_ends_the_guest_and_the_host_learns_why() {
    let protection = Protection::SevSnp;
    let Some(platform) = platform(protection) else { return };
    let doorbell = Doorbell::Port;
    let left_alone = Run { protection, doorbell, vcpus: 1, task: Task::ReadReplaced, on_private: &|_| {} };
    assert_eq!(run(&left_alone, &platform).0.unwrap(), code::UNCHANGED);
    let (end, _) = run(&Run { on_private: &replace, ..left_alone }, &platform);
    let Err(Error::Terminated { vcpu: 0, reason }) = end else { panic!("{end:?}") };
    assert_eq!(reason, Some((VC_PAGE, 4)));
}

#[test]
fn a_guest_starts_a_vcpu_from_a_state_that_it_made() {
    let protection = Protection::SevSnp;
    let Some(platform) = platform(protection) else { return };
    for doorbell in [Doorbell::Port, Doorbell::Msr] {
        let setting = Run { protection, doorbell, vcpus: 2, task: Task::StartVcpu, on_private: &nothing };
        let (end, converted) = run(&setting, &platform);
        assert_eq!(end.unwrap(), 0);
        // What vCPU 1 shares and takes back, and the GHCBs, which stay shared.
        let pages = ROUNDS * VCPU_PAGES;
        assert_eq!(converted, (pages + 2, pages));
    }
}
