//! What a VMM finds when its vault dies, or was never one.

use crate::common::{CODE, Guest, config, load};
use crate::guests::{POOL, POOL_PAGES, SAYS_SECRET, spin, witness};
use crate::{children, vaults};
use cvm_backend_kvm::backend::chain;
use cvm_backend_kvm::{Error as KvmError, KvmPlatform};
use cvm_core::x86::Register;
use cvm_core::{Answer, Error, Event, Exit, Gpa, PageKind, Platform, Protection, Side, Vcpu, Vm};
use rustix::process::{Signal, kill_process};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

pub fn assert_dead<T>(outcome: Result<T, Error>, what: &str) {
    let Err(error) = outcome else { panic!("{what} goes on without a vault") };
    assert_says_dead(&error, what);
}

/// That an error, or what led to it, is the death of the vault.
fn assert_says_dead(error: &(dyn std::error::Error + 'static), what: &str) {
    let mut chain = std::iter::successors(Some(error), |error| error.source());
    let died = |error: &(dyn std::error::Error + 'static)| {
        matches!(error.downcast_ref(), Some(KvmError::VaultDied { .. })) && error.to_string().contains("vault is dead")
    };
    assert!(chain.any(died), "{what}: {error}: {:?}", error.source().map(ToString::to_string));
}

/// Kills the vault, the only child of this process.
fn kill_vault() {
    let [vault] = children()[..] else { panic!("one vault") };
    kill_process(vault, Signal::KILL).unwrap();
}

/// That all that can be asked of a VM says that its vault is dead.
fn assert_all_dead(guest: &mut Guest) {
    for vcpu in &mut guest.vcpus {
        assert_dead(vcpu.inject(Event::Interrupt(0x41)), "inject");
        assert_dead(vcpu.register(Register::Rax), "register");
    }
    assert_dead(guest.vm.allocated(), "allocated");
}

pub fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// That a VM leaves nothing of its vault when it goes.
fn assert_leaves_nothing(guest: Guest, files_before: usize) {
    drop(guest);
    assert!(children().is_empty(), "{:?}", children());
    assert_eq!(open_files(), files_before);
}

#[test]
fn every_vcpu_hears_that_the_vault_dies_while_they_spin() {
    let Some(vaults) = vaults() else { return };
    let files = open_files();
    let mut guest = Guest::from_launch(load(&vaults.platform, config(2), spin));
    thread::scope(|scope| {
        let vcpus: Vec<_> = guest.vcpus.iter_mut().map(|vcpu| scope.spawn(|| vcpu.run())).collect();
        thread::sleep(Duration::from_millis(200));
        assert!(vcpus.iter().all(|vcpu| !vcpu.is_finished()), "they spin");
        kill_vault();
        {
            vcpus.into_iter().for_each(|vcpu| assert_dead(vcpu.join().unwrap(), "run"));
        };
    });
    assert!(!guest.is_overdue());
    assert_all_dead(&mut guest);
    for vcpu in &mut guest.vcpus {
        assert!(matches!(vcpu.run(), Err(Error::Protocol { .. })), "it has failed");
    }
    assert_leaves_nothing(guest, files);
}

#[test]
fn a_vault_that_dies_between_exits_is_noticed_by_whatever_comes_next() {
    let Some(vaults) = vaults() else { return };
    let files = open_files();
    let next: [fn(&mut Guest); 3] = [
        |guest| assert_dead(guest.vcpus[0].run(), "run"),
        |guest| assert_dead(guest.vcpus[0].register(Register::Rax), "register"),
        |guest| assert_dead(guest.vm.allocated(), "allocated"),
    ];
    for next in next {
        let mut guest = Guest::from_launch(load(&vaults.platform, config(2), witness));
        assert_eq!(guest.run(), SAYS_SECRET);
        kill_vault();
        next(&mut guest);
        assert_all_dead(&mut guest);
        assert_dead(guest.vcpus[1].run(), "run");
        assert_leaves_nothing(guest, files);
    }
}

#[test]
fn a_vault_that_dies_while_a_guest_waits_for_an_answer_converts_nothing() {
    let Some(vaults) = vaults() else { return };
    let files = open_files();
    let mut guest =
        Guest::from_launch(load(&vaults.platform, config(1), |a| a.convert(POOL, POOL_PAGES, Side::Shared)));
    let Exit::Conversion(request) = guest.run() else { panic!("no conversion") };
    kill_vault();
    let conversion = guest.vm.convert(&request);
    assert_eq!(conversion.answer(), Answer::Invalid);
    assert_says_dead(conversion.cause().unwrap(), "convert");
    guest.vcpus[0].answer_conversion(conversion).unwrap();
    assert_dead(guest.vcpus[0].run(), "run");
    assert_all_dead(&mut guest);
    assert_leaves_nothing(guest, files);
}

#[test]
fn a_vault_that_dies_while_it_is_loaded_ends_the_launch() {
    let Some(vaults) = vaults() else { return };
    let files = open_files();
    let mut launch = vaults.platform.launch(config(1)).unwrap();
    kill_vault();
    assert_dead(launch.load(Gpa(CODE), &[0xf4], PageKind::Measured), "load");
    drop(launch);
    let launch = load(&vaults.platform, config(1), witness);
    kill_vault();
    let sealed = launch.seal().map(drop);
    assert_dead(sealed, "seal");
    assert!(children().is_empty(), "{:?}", children());
    assert_eq!(open_files(), files);
}

/// A script that the kernel runs as a program.
fn script(directory: &Path, name: &str, lines: &str) -> String {
    let path = directory.join(name);
    fs::write(&path, format!("#!/bin/sh\n{lines}\n")).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_program_that_is_no_vault_is_told_from_one() {
    let Some(_vaults) = vaults() else { return };
    let directory = tempfile::tempdir().unwrap();
    let closes = script(directory.path(), "closes", "exec <&-\nexec sleep 1000");
    let silent = script(directory.path(), "silent", "exec sleep 1000");
    let patient = Duration::from_secs(60);
    for (program, deadline, says) in [
        (&*closes, patient, "the vault is dead"),
        (&*silent, Duration::from_secs(1), "the vault did not greet its vmm"),
        ("/bin/true", patient, "the vault is dead: exit status: 0"),
        ("/bin/false", patient, "the vault is dead: exit status: 1"),
        ("/bin/cat", patient, "the vault is dead"),
        ("/nonexistent", patient, "the vault failed to start its process"),
        ("/etc/passwd", patient, "the vault failed to start its process"),
    ] {
        // The next test names the right one again.
        cvm_backend_kvm::vault::use_program(program);
        let platform = KvmPlatform::open(Path::new("/dev/kvm"), Some(Protection::Vault)).unwrap();
        let error = platform.with_vault_deadline(deadline).launch(config(1)).unwrap_err();
        let told = chain(&error);
        assert!(told.contains(says), "{program}: {told}");
        assert!(children().is_empty(), "{program}: {:?}", children());
    }
}
