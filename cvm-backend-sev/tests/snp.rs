//! SEV-SNP guests on Linux KVM: launches and exits.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(unsafe_code, reason = "the standard library has no locks of open file descriptions")]

mod common;

use common::*;
use cvm_backend_sev::id_block::PrivateKey;
use cvm_backend_sev::kvm::{Error as SevError, SnpOptions};
use cvm_backend_sev::snp::{HostData, of_transcript};
use cvm_backend_sev::{FirmwareError, IdAuth, IdBlock, SnpFlags, SnpPolicy, Vmsa};
use cvm_conformance::Converted;
use cvm_core::doorbell::Transport;
use cvm_core::launch::Entry;
use cvm_core::platform::{Asset, Party, Powers};
use cvm_core::{Answer, Error, Gpa, GpaRange, Measurement, PageKind, Platform, Policy, Protection, Side, Vm, VmConfig};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// The guest policy of launches without options.
const POLICY: SnpPolicy = SnpPolicy { least_abi: (0, 0), flags: SnpFlags::SMT };

#[test]
fn the_firmware_measures_what_is_predicted_whatever_is_loaded() {
    let Some(host) = host(Protection::SevSnp) else { return };
    for vcpus in 1..=4 {
        let mut launch = host.platform.launch(config(vcpus)).unwrap();
        let code = host.assemble(&launch, CODE, |a| a.end(0));
        launch.load(Gpa(CODE), &code, PageKind::Measured).unwrap();
        launch.load(Gpa(DATA), &[7; 0x3010], PageKind::Measured).unwrap();
        launch.load(Gpa(DATA + 0x8000), &[9; 0x1001], PageKind::Unmeasured).unwrap();
        launch.zero(range(DATA + 0x1_0000, 5)).unwrap();
        launch.start_in_long_mode(Gpa(CODE), Gpa(TABLES), Gpa(BOOT_PAGE)).unwrap();
        launch.load_boot_page(Gpa(BOOT_PAGE), [1, 2, 3, 4]).unwrap();
        let mut guest = Guest::from_launch(launch);
        let transcript = guest.vm.transcript();
        let predicted = of_transcript(transcript, host.platform.features());
        if processor::is_faked() {
            let finish = processor::snp_finish();
            let expected =
                [format!("ld={predicted} "), format!("vmsas={vcpus} "), format!("policy={:#x} ", POLICY.bits())];
            assert!(expected.iter().all(|part| finish.contains(part)), "{expected:?}: {finish}");
            // The last sixteen states, the newest at the end.
            let kept = fs::read("/proc/fakepsp_vmsa").unwrap();
            let states = transcript.entries().iter().filter_map(|entry| match entry {
                Entry::Vcpu { index, state } => Some((index, Vmsa::of(state, host.platform.features()))),
                _ => None,
            });
            let made = kept.chunks_exact(4096).skip(kept.len() / 4096 - vcpus as usize);
            for ((vcpu, predicted), made) in states.zip(made) {
                let pairs = (0..).zip(predicted.as_bytes().iter().zip(made));
                let differing: Vec<(usize, _)> = pairs.filter(|(_, (predicted, made))| predicted != made).collect();
                assert!(differing.is_empty(), "the state of vcpu {vcpu}: {differing:x?}");
            }
        }
        guest.end();
    }
}

/// Asks for a conversion of one page by the MSR (AMD publication 56421, section 2.3.1); the upper half of the answer,
/// which is 0 for success, is in RAX.
fn ask(a: &mut Assembler, gpa: u64, to: Side) -> Result<(), IcedError> {
    let operation = if to == Side::Private { 1 } else { 2 };
    a.request_by_msr(operation << 52 | gpa | 0x14)?;
    a.shr(rax, 32)
}

/// What the first vCPU asks for next, and hears.
fn converted(guest: &mut Guest) -> (GpaRange, Side, Answer) {
    let Converted { request, answer, .. } = guest.convert();
    (range(request.gpa().0, request.pages()), request.to(), answer)
}

#[test]
fn a_guest_shares_pages_by_the_msr_and_by_the_ghcb_and_takes_them_back() {
    let Some(host) = host(Protection::SevSnp) else { return };
    let mut guest = host.bench().guest(config(1), |a| {
        ask(a, DATA, Side::Shared)?;
        a.report()?;
        a.store(DATA, Side::Shared, 0x5566_7788)?;
        a.store(DATA + 4, Side::Shared, 0x1122_3344)?;
        a.load(DATA, Side::Shared)?;
        a.report()?;
        a.load(DATA + 8, Side::Shared)?;
        a.report()?;
        // Three entries, of which the first two are neighbours.
        a.page_states_by_page(&[DATA + 0x1000, DATA + 0x2000, DATA + 0x8000].map(|page| (page, Side::Shared)))?;
        a.report()?;
        ask(a, DATA, Side::Private)?;
        a.report()?;
        a.accept(DATA, 1)?;
        a.load(DATA, Side::Private)?;
        a.report()?;
        // Memory that is not there.
        ask(a, MEMORY, Side::Shared)?;
        a.report()?;
        a.end(0)
    });
    assert_eq!(converted(&mut guest), (range(DATA, 1), Side::Shared, Answer::Done));
    assert_eq!((guest.report(), guest.report()), (0, 0x5566_7788));
    let memory = guest.vm.memory().memory();
    assert_eq!(memory.read_obj::<u64>(GuestAddress(DATA)).unwrap(), 0x1122_3344_5566_7788);
    memory.write_obj(0xabcd_u64, GuestAddress(DATA + 8)).unwrap();
    drop(memory);
    assert_eq!(guest.report(), 0xabcd);
    assert_eq!(converted(&mut guest), (range(DATA + 0x1000, 2), Side::Shared, Answer::Done));
    assert_eq!(converted(&mut guest), (range(DATA + 0x8000, 1), Side::Shared, Answer::Done));
    assert_eq!(guest.report(), 0);
    assert_eq!(converted(&mut guest), (range(DATA, 1), Side::Private, Answer::Done));
    assert_eq!((guest.report(), guest.report()), (0, 0));
    assert!(guest.vm.memory().memory().read_obj::<u8>(GuestAddress(DATA)).is_err());
    assert_eq!(converted(&mut guest), (range(MEMORY, 1), Side::Shared, Answer::Invalid));
    assert_ne!(guest.report(), 0);
    guest.end();
}

#[test]
fn of_an_end_that_is_asked_for_by_the_ghcb_kvm_tells_no_reason() {
    let Some(host) = host(Protection::SevSnp) else { return };
    let mut guest = host.bench().guest(config(1), |a| a.terminate_by_page(0, 0x42));
    let error = guest.try_run(0).unwrap_err();
    assert!(matches!(error, Error::Terminated { vcpu: 0, reason: None }), "{error}");
}

#[test]
fn whom_to_trust_follows_from_the_guest_policy() {
    let Some(host) = host(Protection::SevSnp) else { return };
    let model = host.platform.trust_model();
    assert_eq!(model.powers(Party::Root, Asset::PrivateMemory), Powers::empty());
    assert_eq!(model.powers(Party::HostKernel, Asset::Interrupts), Powers::all());
    let debugged = SnpPolicy { flags: SnpFlags::SMT | SnpFlags::DEBUG, ..POLICY };
    let model = host.with_snp(SnpOptions::default().policy(debugged)).platform.trust_model();
    assert_eq!(model.powers(Party::HostKernel, Asset::PrivateMemory), Powers::all());
    assert_eq!(model.powers(Party::VmmProcess, Asset::PrivateMemory), Powers::empty());
}

/// What the launch of a guest that ends at once is measured as.
fn digest_of_ending_guest(host: &Host) -> Measurement {
    let guest = host.bench().guest(config(1), |a| a.terminate(0, 0));
    of_transcript(guest.vm.transcript(), host.platform.features())
}

/// The numbers 1 to 48 as a private key, in PKCS #8.
const ID: &str = "\
-----BEGIN PRIVATE KEY-----
MIG2AgEAMBAGByqGSM49AgEGBSuBBAAiBIGeMIGbAgEBBDABAgMEBQYHCAkKCwwN
Dg8QERITFBUWFxgZGhscHR4fICEiIyQlJicoKSorLC0uLzChZANiAATHbyKD3alc
1JsO2ecz0pBEdONyFvEk4T0smrTPAQIcSa2cq7PQuXSZrvLwqzE/oCgmvB+DRRtc
iWKnXK/3NYjUQApilkNhVPs0PDk+kQSKbHvLrcg82KXyb+rogxVvkqE=
-----END PRIVATE KEY-----";

/// The numbers 2 to 49, in SEC 1.
const AUTHOR: &str = "\
-----BEGIN EC PRIVATE KEY-----
MIGkAgEBBDACAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygp
KissLS4vMDGgBwYFK4EEACKhZANiAAQ+wq3lIyTK9KGQwBusyCgCSYRKshXrk37U
ZFNwVio4IDppA2msb89Yx3nolJqFdjssPe7pmuZgVVpTjE89rk+2yAwlo2rYhECT
F/y5EktLq1fq3Ap4xFtABiJ36O6nRx4=
-----END EC PRIVATE KEY-----";

fn key(pem: &str) -> PrivateKey {
    PrivateKey::from_pem(pem).unwrap()
}

#[test]
fn the_firmware_takes_a_signed_id_block_and_refuses_a_launch_that_is_another() {
    let Some(mut host) = host(Protection::SevSnp) else { return };
    let digest = digest_of_ending_guest(&host);
    let block = IdBlock { digest, family: [1; 16], image: [2; 16], svn: 3, policy: POLICY };
    let seal = |host: &Host| {
        let launch = host.bench().load(config(1), |a| a.terminate(0, 0))?;
        launch.seal().map(drop)
    };
    for author in [None, Some(key(AUTHOR))] {
        let auth = IdAuth::sign(&block, &key(ID), author.as_ref());
        host = host.with_snp(
            SnpOptions::default().id_block(block, auth).host_data(HostData::Custom([0xab; 32])).without_vcek(),
        );
        seal(&host).unwrap();
        if processor::is_faked() {
            let (log, finish) = (processor::log(), processor::snp_finish());
            assert!(finish.contains("id_block_en=1"), "{finish}");
            assert!(finish.contains(&format!("auth_key_en={}", u8::from(author.is_some()))), "{finish}");
            assert!(finish.contains("vcek_disabled=1") && finish.contains(&"ab".repeat(32)), "{finish}");
            let digest: String = key(ID).public().digest().iter().map(|byte| format!("{byte:02x}")).collect();
            assert!(log.contains(&format!("id_key_digest={digest}")), "{log}");
        }
    }
    let other = IdBlock { digest: Measurement([5; 48]), ..block };
    let auth = IdAuth::sign(&other, &key(ID), None);
    host = host.with_snp(SnpOptions::default().id_block(other, auth));
    let error = seal(&host).unwrap_err();
    let SevError::Command { step, firmware, .. } = cause(&error) else { panic!("{error:?}") };
    assert!(step.contains("SNP_LAUNCH_FINISH"), "{step}");
    assert_eq!(*firmware, Some(FirmwareError::BadMeasurement));

    // What is unsound in itself is refused before anything is loaded.
    let auth = IdAuth::sign(&other, &key(ID), None);
    host = host.with_snp(SnpOptions::default().id_block(block, auth));
    assert!(matches!(seal(&host), Err(Error::Config(reason)) if reason.contains("signature")));
    let other = IdBlock { policy: SnpPolicy { least_abi: (1, 0), ..POLICY }, ..block };
    let auth = IdAuth::sign(&other, &key(ID), None);
    host = host.with_snp(SnpOptions::default().id_block(other, auth));
    assert!(matches!(seal(&host), Err(Error::Config(reason)) if reason.contains("policy")));
}

#[test]
fn what_the_firmware_corrects_about_the_processor_is_shown_and_not_taken_silently() {
    let Some(host) = host(Protection::SevSnp) else { return };
    let lie = |cpuid: &mut kvm_bindings::CpuId| {
        let leaf = cpuid.as_mut_slice().iter_mut().find(|leaf| leaf.function == 7 && leaf.index == 0);
        leaf.unwrap().ebx |= 1 << 1;
    };
    let host = host.with_snp(SnpOptions::default().cpuid(lie));
    let error = host.bench().load(config(1), |a| a.terminate(0, 0)).unwrap_err();
    let SevError::CpuidCorrected { corrections } = cause(&error) else { panic!("{error:?}") };
    assert_eq!(corrections.len(), 1, "{corrections:x?}");
    assert_eq!((corrections[0].leaf, corrections[0].subleaf), (7, 0));
    assert_eq!(corrections[0].given[1] & !corrections[0].corrected[1], 1 << 1);

    let (tell, told) = std::sync::mpsc::channel();
    let judge = move |corrections: &[cvm_backend_sev::kvm::CpuidCorrection]| tell.send(corrections.to_vec()).is_ok();
    let host = host.with_snp(SnpOptions::default().cpuid(lie).judge_cpuid(judge));
    let mut guest = host.bench().guest(config(1), |a| a.terminate(1, 2));
    assert!(matches!(guest.try_run(0), Err(Error::Terminated { .. })));
    assert_eq!(told.recv().unwrap().len(), 1);
}

/// An exclusive lock on the whole of a file, as who changes certificates has it, if it can be had at once.
fn lock_exclusively(file: &File) -> bool {
    let lock =
        libc::flock { l_type: libc::F_WRLCK as _, l_whence: libc::SEEK_SET as _, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the descriptor is open, and the kernel reads a flock.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) == 0 }
}

#[test]
fn certificates_go_with_reports_and_are_locked_until_the_report_is_there() {
    let Some(host) = host(Protection::SevSnp) else { return };
    let file = tempfile::NamedTempFile::new().unwrap();
    let table: Vec<u8> = (0..5000u32).map(|byte| byte as u8).collect();
    fs::write(file.path(), &table).unwrap();
    let host = host.with_snp(SnpOptions::default().certificates(file.path()));
    const REQUEST: u64 = DATA;
    const RESPONSE: u64 = DATA + 0x1000;
    const CERTIFICATES: u64 = DATA + 0x2000;
    /// The exit for a request with certificates (AMD publication 56421, section 4.1).
    const EXTENDED_REQUEST: u64 = 0x8000_0012;
    let mut guest = host.bench().guest(config(1), |a| {
        a.convert(DATA, 4, Side::Shared)?;
        // The type of the message: a request for a report. Its contents are nothing that the firmware could read.
        a.store(REQUEST + 52, Side::Shared, 5)?;
        for pages in [1, 2, 2, 2] {
            let fields = [(Field::Rax, CERTIFICATES), (Field::Rbx, pages)];
            a.exit_by_page(EXTENDED_REQUEST, [REQUEST, RESPONSE], &fields)?;
            a.load_field(Field::Rbx)?;
            a.mov(r12, rax)?;
            a.shl(r12, 16)?;
            // The upper half is the host's answer, the lower one the firmware's.
            a.load_field(Field::ExitInfo2)?;
            a.shr(rax, 32)?;
            a.or(rax, r12)?;
            a.report()?;
        }
        a.end(0)
    });
    assert_eq!(converted(&mut guest), (range(DATA, 4), Side::Shared, Answer::Done));
    // What the host answers, below the pages that it says are there or needed.
    assert_eq!(guest.report(), 2 << 16 | 1, "too little room");
    assert_eq!(guest.report(), 2 << 16, "served");
    let mut served = vec![0; table.len()];
    guest.vm.memory().memory().read_slice(&mut served, GuestAddress(CERTIFICATES)).unwrap();
    assert!(served == table, "the guest has other certificates");
    let manager = File::options().write(true).open(file.path()).unwrap();
    assert!(lock_exclusively(&manager), "the certificates are still locked");
    assert_eq!(guest.report(), 2 << 16 | 2, "served while they were changed");
    drop(manager);
    assert_eq!(guest.report(), 2 << 16, "not served again");
    guest.end();
}

#[test]
fn a_guest_asks_the_firmware_when_its_platform_is_gone() {
    let Some(host) = host(Protection::SevSnp) else { return };
    /// The exit for a request (AMD publication 56421, section 4.1).
    const REQUEST: u64 = 0x8000_0011;
    let mut guest = host.bench().guest(config(1), |a| {
        a.convert(DATA, 2, Side::Shared)?;
        // The type of the message: a request for a report.
        a.store(DATA + 52, Side::Shared, 5)?;
        a.exit_by_page(REQUEST, [DATA, DATA + 0x1000], &[])?;
        a.load_field(Field::ExitInfo2)?;
        a.report()?;
        a.end(0)
    });
    // The lock that tests take turns by stays.
    drop(host.platform);
    assert_eq!(converted(&mut guest), (range(DATA, 2), Side::Shared, Answer::Done));
    // A message that is not encrypted is refused by a firmware that decrypts it: either way it was asked.
    let answer = guest.report();
    assert!([0, FirmwareError::InvalidParam.status()].contains(&answer), "{answer:#x}");
    guest.end();
}

#[test]
fn options_that_make_no_sense_start_nothing() {
    let Some(mut host) = host(Protection::SevSnp) else { return };
    let before = processor::asids();
    let policy = |flags| SnpOptions::default().policy(SnpPolicy { flags, ..POLICY });
    let no_such_feature = cvm_backend_sev::SevFeatures::RESTRICTED_INJECTION;
    for (options, config, reason) in [
        (policy(SnpFlags::SMT | SnpFlags::MIGRATE_MA), config(1), "0x40000"),
        (policy(SnpFlags::SMT), VmConfig { policy: Policy::NO_SMT, ..config(1) }, "smt"),
        (policy(SnpFlags::SMT | SnpFlags::DEBUG), VmConfig { policy: Policy::NO_DEBUG, ..config(1) }, "debug"),
        (SnpOptions::default().features(no_such_feature), config(1), "RESTRICTED_INJECTION"),
        (SnpOptions::default(), VmConfig { transport: Some(Transport::Hypercall), ..config(1) }, "page state"),
    ] {
        host = host.with_snp(options);
        let error = host.platform.launch(config).unwrap_err();
        assert!(matches!(&error, Error::Config(text) if text.contains(reason)), "{error}");
    }
    assert_eq!(processor::asids(), before);
}
