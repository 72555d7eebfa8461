//! SEV-SNP launches that fail, are given up or killed: what is told, and what is left.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::*;
use cvm_backend_sev::FirmwareError;
use cvm_backend_sev::kvm::{Error as SevError, Resources, SevLoader, SevPlatform};
use cvm_backend_sev::snp::of_transcript;
use cvm_core::launch::{Launch, PageKind};
use cvm_core::{Error, Gpa, Platform, Protection, Vm, VmConfig};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

// Commands of the firmware (AMD publication 56860, chapter 8).
const DECOMMISSION: u32 = 0x90;
const ACTIVATE: u32 = 0x91;
const GCTX_CREATE: u32 = 0x93;
const LAUNCH_START: u32 = 0xa0;
const LAUNCH_UPDATE: u32 = 0xa1;
const LAUNCH_FINISH: u32 = 0xa2;
const PAGE_RECLAIM: u32 = 0xc7;

/// A guest that spins.
fn spin(a: &mut Assembler) -> Result<(), iced_x86::IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.jmp(again)
}

fn launch(host: &Host) -> Result<Launch<SevLoader>, Error> {
    let mut launch = host.bench().load(config(2), spin)?;
    launch.load(Gpa(DATA), &[1; 0x5000], PageKind::Measured)?;
    Ok(launch)
}

/// What takes a while to load, and a VM that it fits in.
fn much() -> (Vec<u8>, VmConfig) {
    (vec![7; MEMORY as usize], VmConfig::new(2 * MEMORY, 2).unwrap())
}

#[test]
fn every_command_of_the_firmware_that_fails_is_told_with_its_status_and_leaves_nothing() {
    let Some(host) = host(Protection::SevSnp) else { return };
    if !processor::is_faked() {
        return skip("this firmware cannot be made to fail");
    }
    let before = processor::asids();
    for (command, status, step) in [
        (GCTX_CREATE, 0x17, "SNP_LAUNCH_START"),
        (LAUNCH_START, 0x07, "SNP_LAUNCH_START"),
        (LAUNCH_START, 0x13, "SNP_LAUNCH_START"),
        (ACTIVATE, 0x0d, "SNP_LAUNCH_START"),
        (LAUNCH_UPDATE, 0x1a, "SNP_LAUNCH_UPDATE"),
        (LAUNCH_UPDATE, 0x19, "SNP_LAUNCH_UPDATE"),
        (LAUNCH_FINISH, 0x0b, "SNP_LAUNCH_FINISH"),
        (LAUNCH_FINISH, 0x27, "SNP_LAUNCH_FINISH"),
        (LAUNCH_FINISH, 0x5a, "SNP_LAUNCH_FINISH"),
    ] {
        processor::fail(command, status, 0);
        let error = launch(&host).and_then(Launch::seal).map(drop).unwrap_err();
        let SevError::Command { step: told, range: at, firmware, .. } = cause(&error) else {
            panic!("{command:#x}: {error:?}")
        };
        assert!(told.contains(step), "{command:#x}: {told}");
        // The kernel does not pass on what it meets when it makes a guest's context.
        if command != GCTX_CREATE {
            assert_eq!(*firmware, FirmwareError::from_status(status), "{command:#x}: {error:?}");
        }
        if command == LAUNCH_UPDATE {
            assert_eq!(at.map(|range| range.start()), Some(Gpa(CODE)), "{error:?}");
        }
        processor::assert_asids(&before);
    }
    processor::set_parameter("fail_cmd", 0);
    launch(&host).unwrap().seal().unwrap();
    processor::assert_asids(&before);
}

#[test]
fn every_status_of_the_firmware_arrives_by_its_name() {
    let Some(host) = host(Protection::SevSnp) else { return };
    if !processor::is_faked() {
        return skip("this firmware cannot be made to fail");
    }
    for status in 1..=0x28 {
        processor::fail(LAUNCH_START, status, 0);
        let error = host.platform.launch(config(1)).map(drop).unwrap_err();
        let SevError::Command { firmware: Some(firmware), .. } = cause(&error) else { panic!("{error:?}") };
        assert_eq!(Some(*firmware), FirmwareError::from_status(status));
        let text = cause(&error).to_string();
        assert!(text.contains(firmware.name()) && text.contains(&format!("{status:#x}")), "{text}");
    }
}

#[test]
fn a_state_that_the_firmware_refuses_ends_the_launch_at_whichever_vcpu() {
    let Some(host) = host(Protection::SevSnp) else { return };
    if !processor::is_faked() {
        return skip("this firmware cannot be made to fail");
    }
    let before = processor::asids();
    for vcpu in 0..3 {
        // Without a boot page there are no holes to fill, so that the states are all that is left to load.
        let mut launch = host.platform.launch(config(3)).unwrap();
        launch.load(Gpa(CODE), &host.assemble(&launch, CODE, spin), PageKind::Measured).unwrap();
        launch.start_in_long_mode(Gpa(CODE), Gpa(TABLES), Gpa(BOOT_PAGE)).unwrap();
        processor::fail(LAUNCH_UPDATE, 0x1a, vcpu);
        let error = launch.seal().map(drop).unwrap_err();
        let SevError::Command { step, firmware, .. } = cause(&error) else { panic!("{error:?}") };
        assert!(step.contains("SNP_LAUNCH_FINISH"), "{step}");
        assert_eq!(*firmware, Some(FirmwareError::InvalidPageState));
        processor::assert_asids(&before);
    }
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let Some(_host) = host(Protection::SevSnp) else { return };
    let (kvm, nothing) = (Path::new("/dev/kvm"), Path::new("/dev/no-such-device"));
    for (kvm, firmware) in [(kvm, nothing), (nothing, Path::new("/dev/sev")), (Path::new("/dev/null"), nothing)] {
        let error = SevPlatform::open_at(kvm, firmware, Protection::SevSnp).unwrap_err().to_string();
        assert!(error.contains("/dev/n"), "{error}");
    }
    let error = SevPlatform::open(Protection::Tdx).unwrap_err().to_string();
    assert!(error.contains("tdx is not offered"), "{error}");
}

#[test]
fn a_page_that_fails_once_behind_others_is_given_again_and_measured_once() {
    let Some(host) = host(Protection::SevSnp) else { return };
    if !processor::is_faked() {
        return skip("this firmware cannot be made to fail");
    }
    let mut launch = host.bench().load(config(1), spin).unwrap();
    processor::fail(LAUNCH_UPDATE, 0x1a, 2);
    launch.load(Gpa(DATA), &[1; 0x5000], PageKind::Measured).unwrap();
    assert!(!processor::fails(), "it did not fail");
    let vm = launch.seal().unwrap();
    let predicted = of_transcript(vm.transcript(), host.platform.features());
    assert!(processor::log().contains(&format!("ld={predicted} ")));
}

#[test]
fn a_launch_among_signals_measures_every_page_once_and_leaves_nothing() {
    signals::among(|| {
        let Some(host) = host(Protection::SevSnp) else { return };
        let before = processor::asids();
        let (contents, config) = much();
        let mut launch = host.platform.launch(config).unwrap();
        let met = signals::met();
        launch.load(Gpa(DATA), &contents, PageKind::Measured).unwrap();
        assert!(signals::met() > met, "no signal has come while pages were loaded");
        launch.start_in_long_mode(Gpa(CODE), Gpa(TABLES), Gpa(BOOT_PAGE)).unwrap();
        launch.load_boot_page(Gpa(BOOT_PAGE), [0; 4]).unwrap();
        let vm = launch.seal().unwrap();
        let predicted = of_transcript(vm.transcript(), host.platform.features());
        drop(vm);
        processor::assert_asids(&before);
        if processor::is_faked() {
            assert!(processor::log().contains(&format!("ld={predicted} ")));
        }
    });
}

/// Linux gives up for good what the firmware does not let go of: the identifier of a guest whose context it keeps (and with
/// it what the control group is charged), or the page that it does not give back.
#[test]
fn what_the_firmware_does_not_let_go_of_is_lost_to_the_kernel_and_the_next_launch_works() {
    let Some(host) = host(Protection::SevSnp) else { return };
    if !processor::is_faked() {
        return skip("this firmware cannot be made to fail");
    }
    for (command, after, lost) in [(PAGE_RECLAIM, 0, 0), (PAGE_RECLAIM, 1, 0), (DECOMMISSION, 0, 1)] {
        for seal in [false, true] {
            let before = processor::asids();
            let launch = launch(&host).unwrap();
            if seal {
                let vm = launch.seal().unwrap();
                processor::fail(command, 0x07, after);
                drop(vm);
            } else {
                processor::fail(command, 0x07, after);
                drop(launch);
            }
            let start = std::time::Instant::now();
            while processor::fails() {
                assert!(start.elapsed().as_secs() < 120, "{command:#x} was not called");
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            processor::assert_asids(&processor::with_more(&before, lost));
            let vm = self::launch(&host).unwrap().seal().unwrap();
            let predicted = of_transcript(vm.transcript(), host.platform.features());
            assert!(processor::log().contains(&format!("ld={predicted} ")));
            drop(vm);
            processor::assert_asids(&processor::with_more(&before, lost));
        }
    }
}

/// The variable that makes this program stop at a step, to be killed there.
const PARK: &str = "CVM_TEST_PARK";

fn park(step: &str) -> ! {
    let host = host(Protection::SevSnp).unwrap();
    let wait = || -> ! {
        println!("parked");
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(1)
    };
    if step == "started" {
        let _launch = host.platform.launch(config(2)).unwrap();
        wait();
    }
    if step == "loading" {
        let (contents, config) = much();
        let mut launch = host.platform.launch(config).unwrap();
        println!("parked");
        let _ = launch.load(Gpa(DATA), &contents, PageKind::Measured);
        std::process::exit(1);
    }
    let launch = launch(&host).unwrap();
    if step == "loaded" {
        wait();
    }
    let mut guest = Guest::from_launch(launch);
    if step == "sealed" {
        wait();
    }
    let _running = std::thread::spawn(move || guest.try_run(0).map(drop));
    wait()
}

#[test]
fn a_killed_process_leaves_nothing_wherever_it_is() {
    if let Ok(step) = std::env::var(PARK) {
        park(&step);
    }
    let Some(_host) = host(Protection::SevSnp) else { return };
    let before = processor::asids();
    for step in ["started", "loading", "loaded", "sealed", "running"] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_killed_process_leaves_nothing_wherever_it_is", "--nocapture"])
            .env(PARK, step)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().ends_with("parked")), "{step}: the child has ended");
        assert_eq!(processor::asids(), processor::with_more(&before, 1), "{step}");
        child.kill().unwrap();
        child.wait().unwrap();
        processor::assert_asids(&before);
    }
}

#[test]
fn a_launch_beyond_the_limit_says_how_many_identifiers_are_free() {
    let Some(host) = host(Protection::SevSnp) else { return };
    let limit = match processor::Limit::new(host.protection, 1) {
        Ok(limit) => limit,
        Err(error) => return skip(&format!("there can be no control group: {error}")),
    };
    let free = Resources::of_host().sev_snp.free;
    let first = host.platform.launch(config(1));
    let second = host.platform.launch(config(1)).map(drop);
    drop(first.unwrap());
    drop(limit);
    let error = second.unwrap_err();
    let SevError::Exhausted { asids, .. } = cause(&error) else { panic!("{error:?}") };
    assert_eq!((free, asids.free), (Some(1), Some(0)), "{asids}");
    assert!(asids.capacity > Some(1) && asids.in_use >= Some(1), "{asids}");
}
