//! A system call that fails is an error that says so, or is made up for; either way nothing is left of the VM. This is a
//! process of its own, for nobody else to open files.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::*;
use cvm_backend_kvm::KvmPlatform;
use cvm_backend_kvm::backend::chain;
use cvm_conformance::faults::{Fault, available, with_fault};
use cvm_core::doorbell::device_base;
use cvm_core::{Answer, BoxError, Exit, Gpa, PageKind, Platform, Protection, Side, Vcpu, Vm, Watchdog};
use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, waitid};
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::Duration;

const FAULT: i32 = libc::EIO;

/// `KVM_CHECK_EXTENSION` (Linux include/uapi/linux/kvm.h).
const CHECK_EXTENSION: &str = "ioctl 0xae03";

fn open(protection: Protection) -> Result<KvmPlatform, BoxError> {
    Ok(KvmPlatform::open(Path::new("/dev/kvm"), Some(protection))?)
}

/// Launches a guest that shares a page and takes it back, and runs it to its end.
fn launch_and_run(protection: Protection) -> Result<(), BoxError> {
    let code = assemble(&config(2), CODE, |a| {
        a.convert(DATA, 1, Side::Shared)?;
        a.convert(DATA, 1, Side::Private)?;
        a.end(0)
    });
    let mut launch = open(protection)?.launch(config(2))?;
    launch.load(Gpa(CODE), &code, PageKind::Measured)?;
    launch.load_boot_page(Gpa(BOOT_PAGE), [0; 4])?;
    launch.start_in_long_mode(Gpa(CODE), Gpa(TABLES), Gpa(BOOT_PAGE))?;
    let mut vm = launch.seal()?;
    let mut vcpus = vm.take_vcpus();
    let _watchdog = Watchdog::new(Duration::from_secs(60), vcpus.iter().map(Vcpu::kicker).collect())?;
    vm.doorbell_fd(device_base(1))?;
    vm.allocated()?;
    let mut refused = None;
    loop {
        match vcpus[0].run()? {
            Exit::Conversion(request) => {
                let conversion = vm.convert(&request);
                assert_eq!(conversion.answer() == Answer::Done, conversion.cause().is_none());
                // The guest goes on without.
                refused = refused.or(conversion.cause().map(|cause| chain(cause)));
                vcpus[0].answer_conversion(conversion)?;
            }
            Exit::Ended { code: 0 } => return refused.map_or(Ok(()), |refused| Err(refused.into())),
            other => return Err(format!("the guest did not end well: {other:?}").into()),
        }
    }
}

/// How many files are open, how many threads there are, how many mappings of guest memory and vCPUs, and whether there
/// are child processes.
fn held() -> (usize, usize, usize, bool) {
    let count = |what: &str| fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let ours = |line: &&str| line.contains("memfd:cvm-") || line.contains("kvm-vcpu");
    let ended = waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT);
    (count("fd"), count("task"), maps.lines().filter(ours).count(), !matches!(ended, Err(Errno::CHILD)))
}

/// Has each call that `work` makes fail in turn.
fn sweep(protection: Protection, work: impl Fn(Protection) -> Result<(), BoxError> + Sync) {
    let work = || work(protection).map_err(|error| chain(&*error));
    // The signal handler and whatever else is there once.
    work().unwrap();
    let before = held();
    let calls = with_fault(None, work).unwrap().calls;
    let mut failures = 0;
    for nth in 0..calls {
        let outcome = with_fault(Some(Fault { nth, errno: FAULT }), work).unwrap();
        let failed = outcome.failed.unwrap_or_default();
        let result = outcome.result.unwrap_or_else(|_| panic!("call {nth}, {failed}: a panic"));
        let settled = (0..12_000).any(|_| held() == before || (sleep(Duration::from_millis(10)), false).1);
        assert!(settled, "call {nth}, {failed}: files, threads, mappings, processes: {:?}, not {before:?}", held());
        assert!(!outcome.outlived, "call {nth}, {failed}: something is still there");
        if let Err(error) = result {
            // A process that dies of it cannot say why, and a capability that KVM does not tell of is one that it lacks.
            let silent = failed.ends_with("of another process") || failed == CHECK_EXTENSION;
            let told = error.contains(&format!("os error {FAULT}")) || silent;
            assert!(told, "call {nth}, {failed}: {error}");
            failures += 1;
        }
    }
    // The smallest launch cannot do without as many; how many calls it can do without is up to the system's libraries.
    assert!(failures > 20, "of {calls} calls only {failures} were errors");
}

/// Only one test at a time counts files, threads and processes.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn a_platform_is_not_opened_while_kvm_does_not_say_what_isolates_its_guests() {
    if kvm().is_none() {
        return;
    }
    if let Err(why) = available() {
        return skip(&why);
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let open = || open(Protection::None).map(drop).map_err(|error| chain(&*error));
    let (mut refused, mut opened) = (0, 0);
    for nth in 0..with_fault(None, open).unwrap().calls {
        let outcome = with_fault(Some(Fault { nth, errno: FAULT }), open).unwrap();
        if outcome.failed.as_deref() != Some(CHECK_EXTENSION) {
            continue;
        }
        match outcome.result.expect("no panic") {
            Err(error) => {
                assert!(error.contains(&format!("os error {FAULT}")), "{error}");
                refused += 1;
            }
            Ok(()) => opened += 1,
        }
    }
    // Performance counters that KVM does not tell of are ones that it cannot leave out: a policy about them is refused.
    assert_eq!(opened, 1, "and {refused} times it was refused");
    assert!(refused > 0);
}

#[test]
fn a_call_that_fails_is_an_error_that_says_so_and_leaves_nothing() {
    if kvm().is_none() {
        return;
    }
    if let Err(why) = available() {
        return skip(&why);
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    sweep(isolation(), launch_and_run);
    // Where vaults are tested, this was a part of it.
    if isolation() != Protection::Vault {
        sweep(Protection::Vault, |protection| Ok(open(protection)?.launch(config(1)).map(drop)?));
    }
}
