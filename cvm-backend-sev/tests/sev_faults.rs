//! What comes of launches of SEV and SEV-ES guests that fail, are dropped or killed.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::*;
use cvm_backend_kvm::backend::chain;
use cvm_backend_sev::FirmwareError;
use cvm_backend_sev::kvm::{Error, Session, SevOptions};
use cvm_backend_sev::{SevFeatures, SevFlags, SevPolicy};
use cvm_core::doorbell::Transport;
use cvm_core::{Error as CoreError, Gpa, GpaRange, PageKind, Platform, Protection, Vcpu, Vm, VmConfig};
use iced_x86::IcedError;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

/// Numbers of the firmware's commands (Linux include/linux/psp-sev.h, `enum sev_cmd`), with what errors call them.
const DECOMMISSION: u32 = 0x20;
const DEACTIVATE: u32 = 0x22;
const ACTIVATE: (u32, &str) = (0x21, "LAUNCH_START");
const LAUNCH_START: (u32, &str) = (0x30, "LAUNCH_START");
const LAUNCH_UPDATE_DATA: (u32, &str) = (0x31, "LAUNCH_UPDATE_DATA");
const LAUNCH_UPDATE_VMSA: (u32, &str) = (0x32, "LAUNCH_UPDATE_VMSA");
const LAUNCH_MEASURE: (u32, &str) = (0x33, "LAUNCH_MEASURE");
const LAUNCH_SECRET: (u32, &str) = (0x34, "LAUNCH_SECRET");
const LAUNCH_FINISH: (u32, &str) = (0x35, "LAUNCH_FINISH");
const PLATFORM_STATUS: (u32, &str) = (0x04, "PLATFORM_STATUS");

fn nothing(a: &mut Assembler) -> Result<(), IcedError> {
    a.end(0)
}

/// A platform whose guests are given a secret.
fn with_secret(host: Host) -> Host {
    let policy = policy(host.protection);
    let options = SevOptions { policy, session: Some(session(policy)), ..SevOptions::default() };
    host.with_sev(options.with_owner(|launch, _| Ok(vec![keys().seal(launch, b"a secret", [7; 16])?.at(Gpa(DATA))])))
}

/// Launches a guest with two vCPUs, of which a secret is a part.
fn launch(host: &Host) -> Result<Guest, CoreError> {
    Ok(Guest::from_vm(host.bench().load(config(2), nothing)?.seal()?))
}

#[test]
fn every_command_that_the_firmware_fails_is_named_with_its_status_and_leaves_nothing() {
    for protection in BOTH {
        let Some(host) = host(protection) else { return };
        let host = with_secret(host);
        let before = processor::asids();
        let commands = [
            (LAUNCH_START, 0),
            (ACTIVATE, 0),
            (LAUNCH_UPDATE_DATA, 0),
            (LAUNCH_UPDATE_DATA, 1),
            (LAUNCH_UPDATE_VMSA, 0),
            (LAUNCH_UPDATE_VMSA, 1),
            (PLATFORM_STATUS, 0),
            (LAUNCH_MEASURE, 0),
            (LAUNCH_SECRET, 0),
            (LAUNCH_FINISH, 0),
        ];
        for ((number, name), after) in commands {
            if number == LAUNCH_UPDATE_VMSA.0 && !host.es() {
                continue;
            }
            for status in [FirmwareError::InvalidGuestState, FirmwareError::ResourceLimit] {
                processor::fail(number, status.status(), after);
                let error = launch(&host).err().unwrap_or_else(|| panic!("{name} was not noticed"));
                assert!(!processor::fails(), "{name} was not called");
                let Error::Command { step, range, firmware, .. } = cause(&error) else { panic!("{name}: {error:?}") };
                assert!(step.contains(name), "{name}: {step}");
                assert_eq!(*firmware, Some(status), "{name}");
                assert_eq!(
                    range.is_some(),
                    [LAUNCH_UPDATE_DATA.0, LAUNCH_SECRET.0].contains(&number),
                    "{name}: {error}"
                );
                assert_eq!(processor::asids(), before, "{name} has left something");
            }
        }
        launch(&host).unwrap();
        assert_eq!(processor::asids(), before);
    }
}

#[test]
fn a_page_that_cannot_be_encrypted_is_named() {
    let Some(host) = host(Protection::Sev) else { return };
    let mut launch = host.platform.launch(config(1)).unwrap();
    launch.load(Gpa(0x5000), &[1; 0x3000], PageKind::Measured).unwrap();
    processor::fail(LAUNCH_UPDATE_DATA.0, FirmwareError::InvalidAddress.status(), 0);
    let error = launch.zero(GpaRange::from_pages(0x9000, 2).unwrap()).unwrap_err();
    let Error::Command { range, .. } = cause(&error) else { panic!("{error:?}") };
    assert_eq!(*range, Some(GpaRange::from_pages(0x9000, 2).unwrap()));
    assert!(matches!(launch.load(Gpa(0), &[1], PageKind::Measured), Err(CoreError::LaunchFailed)));
}

#[test]
fn what_sev_cannot_load_or_give_is_refused_before_the_firmware_is_asked() {
    let Some(mut host) = host(Protection::Sev) else { return };
    let mut launch = host.platform.launch(config(1)).unwrap();
    let error = launch.load(Gpa(0x5000), &[1], PageKind::Unmeasured).unwrap_err();
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("measures the contents of every page"));
    drop(launch);

    let policy = policy(host.protection);
    for gpa in [DATA + 8, DATA + 0xff8, MEMORY, !0xf] {
        let options = SevOptions { policy, session: Some(session(policy)), ..SevOptions::default() };
        host = host.with_sev(
            options.with_owner(move |launch, _| Ok(vec![keys().seal(launch, &[1; 16], [7; 16])?.at(Gpa(gpa))])),
        );
        let lines = processor::log().lines().count();
        assert!(host.bench().load(config(1), nothing).unwrap().seal().is_err(), "{gpa:#x}");
        let log = processor::log();
        assert!(!log.lines().skip(lines).any(|line| line.starts_with("LAUNCH_SECRET")), "{gpa:#x}");
    }
    let options = SevOptions { session: Some(session(policy)), ..SevOptions::default() };
    let other =
        SevOptions { session: options.session.clone().map(|s| Session { session: vec![0; 0x4001], ..s }), ..options };
    host = host.with_sev(other);
    let error = host.platform.launch(config(1)).unwrap_err();
    assert!(matches!(cause(&error), Error::Blob { len: 0x4001, .. }), "{error:?}");
}

#[test]
fn a_session_for_another_policy_is_refused_by_the_firmware() {
    let Some(host) = host(Protection::Sev) else { return };
    let before = processor::asids();
    let lax = SevPolicy { flags: SevFlags::empty(), ..policy(host.protection) };
    let options = SevOptions { policy: lax, session: Some(session(policy(host.protection))), ..SevOptions::default() };
    let host = host.with_sev(options);
    let error = host.platform.launch(config(1)).unwrap_err();
    let Error::Command { firmware, .. } = cause(&error) else { panic!("{error:?}") };
    assert_eq!(*firmware, Some(FirmwareError::BadMeasurement));
    assert_eq!(processor::asids(), before);
}

#[test]
fn an_owner_who_does_not_approve_ends_the_launch() {
    for protection in BOTH {
        let Some(host) = host(protection) else { return };
        let before = processor::asids();
        let policy = policy(protection);
        let options = SevOptions { policy, session: Some(session(policy)), ..SevOptions::default() };
        let host = host.with_sev(options.with_owner(|launch, _| {
            let other = cvm_backend_sev::sev::SevDigest([0; 32]);
            if keys().approves(launch, &other) { Ok(Vec::new()) } else { Err("it is not what i have sent".into()) }
        }));
        let error = launch(&host).err().expect("the guest was started");
        assert!(matches!(cause(&error), Error::Owner(reason) if reason.to_string().contains("not what i have sent")));
        assert_eq!(processor::asids(), before);
    }
}

/// Linux does not look at what these commands give: it has an identifier back that the firmware may not have, and flushes
/// the caches before it gives that to another guest.
#[test]
fn what_the_firmware_does_not_let_go_of_costs_no_identifier_and_the_next_launch_works() {
    for protection in BOTH {
        let Some(host) = host(protection) else { return };
        let host = with_secret(host);
        let before = processor::asids();
        for command in [DEACTIVATE, DECOMMISSION] {
            let loaded = host.bench().load(config(2), nothing).unwrap();
            processor::fail(command, FirmwareError::InvalidGuestState.status(), 0);
            drop(loaded);
            assert!(!processor::fails(), "{command:#x} was not called");
            assert_eq!(processor::asids(), before, "{command:#x}");
            launch(&host).unwrap().end();
            assert_eq!(processor::asids(), before, "{command:#x}");
        }
    }
}

#[test]
fn a_launch_among_signals_measures_everything_once_and_leaves_nothing() {
    signals::among(|| {
        for protection in BOTH {
            let Some(host) = host(protection) else { return };
            let before = processor::asids();
            let (mut launch, mut loaded) = load(&host, config(2), nothing);
            let (met, contents) = (signals::met(), vec![7; 0x8_0000]);
            launch.load(Gpa(DATA), &contents, PageKind::Measured).unwrap();
            assert!(signals::met() > met, "no signal has come while pages were loaded");
            loaded.add(DATA, &contents);
            let mut guest = Guest::from_launch(launch);
            let expected = expected(&host, guest.vm.transcript(), &loaded);
            assert_eq!(processor::digest(), Some(expected.to_string()));
            guest.end();
            drop(guest);
            assert_eq!(processor::asids(), before);
        }
    });
}

/// What a process is doing when it is killed.
const STEPS: [&str; 4] = ["made", "loaded", "sealed", "running"];

/// In a process of its own: gets as far as it is told, says so, and stays there.
fn get_to(step: &str) {
    let protection = if std::env::var_os("CVM_TEST_ES").is_some() { Protection::SevEs } else { Protection::Sev };
    let host = host(protection).unwrap();
    let stay = || -> ! {
        println!("\nhere");
        loop {
            std::thread::park();
        }
    };
    let made = host.platform.launch(config(1)).unwrap();
    if step == "made" {
        stay();
    }
    drop(made);
    let report_and_spin = |a: &mut Assembler| {
        let mut forever = a.create_label();
        a.report()?;
        a.set_label(&mut forever)?;
        a.jmp(forever)
    };
    let launch = host.bench().load(config(1), report_and_spin).unwrap();
    if step == "loaded" {
        stay();
    }
    let mut guest = Guest::from_launch(launch);
    if step == "sealed" {
        stay();
    }
    guest.report();
    println!("\nhere");
    _ = guest.vcpus[0].run();
}

#[test]
fn a_process_that_is_killed_at_any_step_leaves_nothing() {
    if let Ok(step) = std::env::var("CVM_TEST_STEP") {
        return get_to(&step);
    }
    for protection in BOTH {
        let Some(host) = host(protection) else { return };
        let before = processor::asids();
        for step in STEPS {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command
                .args(["--exact", "a_process_that_is_killed_at_any_step_leaves_nothing", "--nocapture"])
                .env("CVM_TEST_STEP", step);
            if protection == Protection::SevEs {
                command.env("CVM_TEST_ES", "1");
            }
            let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            assert!(lines.any(|line| line.unwrap() == "here"), "{step}: the process has not got there");
            assert_ne!(processor::asids(), before, "{step}: nothing is counted");
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!(processor::asids(), before, "{protection}, {step}");
        }
        host.bench().guest(config(1), nothing).end();
    }
}

#[test]
fn a_launch_that_meets_the_last_identifier_says_how_many_there_are() {
    for protection in BOTH {
        let Some(host) = host(protection) else { return };
        let before = processor::asids();
        let limit = processor::Limit::new(protection, 2).unwrap();
        let taken = [(); 2].map(|()| host.platform.launch(config(1)).unwrap());
        let error = host.platform.launch(config(1)).unwrap_err();
        let Error::Exhausted { protection: kind, asids, .. } = cause(&error) else { panic!("{error:?}") };
        assert_eq!((*kind, asids.free), (protection, Some(0)), "{error}");
        drop(taken);
        host.bench().guest(config(1), nothing).end();
        drop(limit);
        assert_eq!(processor::asids(), before);
    }
}

#[test]
fn memory_that_may_not_be_pinned_is_refused_with_the_limit_to_raise() {
    let Some(host) = host(Protection::Sev) else { return };
    let before = processor::asids();
    let error = processor::unprivileged(|| host.platform.launch(config(1)).unwrap_err());
    let refused = chain(&error);
    assert!(refused.contains("LimitMEMLOCK") && refused.contains("CAP_IPC_LOCK"), "{refused}");
    assert_eq!(processor::asids(), before);
}

#[test]
fn options_of_sev_es_are_refused_for_plain_sev_before_anything_is_made() {
    let Some(mut host) = host(Protection::Sev) else { return };
    let policy = SevPolicy { flags: SevFlags::ES, ..policy(host.protection) };
    for options in [
        SevOptions { policy, ..SevOptions::default() },
        SevOptions { features: SevFeatures::DEBUG_SWAP, ..SevOptions::default() },
    ] {
        host = host.with_sev(options);
        let error = host.platform.launch(config(1)).unwrap_err();
        assert!(matches!(cause(&error), Error::Options(_)), "{error:?}");
    }
    let page_state = VmConfig { transport: Some(Transport::PageState), ..config(1) };
    assert!(matches!(host.platform.launch(page_state), Err(CoreError::Config(_))));
}
