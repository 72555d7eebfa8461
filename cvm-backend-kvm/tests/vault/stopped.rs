//! Vaults that are stopped while their VMM waits for them, in each way in which it can wait.

use crate::common::{CODE, DATA, Guest, config, load};
use crate::death::open_files;
use crate::guests::{POOL, POOL_PAGES, spin, witness};
use crate::hostile_vmm::{FIRST, Hostage, Loading};
use crate::{PATIENCE, Vaults, children, vaults};
use cvm_backend_kvm::Error as KvmError;
use cvm_backend_kvm::vault::protocol::{Given, Message, Request};
use cvm_core::doorbell::device_base;
use cvm_core::x86::{Register, VcpuState};
use cvm_core::{Answer, Error, Event, Exit, Gpa, PageKind, Platform, Side, Vcpu, Vm};
use rustix::process::{Signal, WaitId, WaitIdOptions, kill_process, waitid};
use std::thread;
use std::time::Duration;

/// How long the VMMs wait here: longer than anything takes that does not wait for a stopped vault.
const DEADLINE: Duration = Duration::from_secs(5);

fn stop_all(count: usize) {
    let vaults = children();
    assert_eq!(vaults.len(), count, "{vaults:?}");
    for vault in vaults {
        kill_process(vault, Signal::STOP).unwrap();
        // The signal has been sent, and the vault's threads may go on until each of them has seen it.
        let status = waitid(WaitId::Pid(vault), WaitIdOptions::STOPPED).unwrap().expect("it is waited for");
        assert!(status.stopped(), "{status:?}");
    }
}

/// That an error, or what led to it, names the operation that the vault did not do.
#[track_caller]
fn assert_overdue(error: &(dyn std::error::Error + 'static), named: &str) {
    let chain = std::iter::successors(Some(error), |error| error.source());
    let told: Vec<_> = chain.clone().map(ToString::to_string).collect();
    let found = chain.filter_map(|error| error.downcast_ref()).find_map(|error| match error {
        KvmError::VaultOverdue { operation, waited } => Some((*operation, *waited)),
        _ => None,
    });
    assert_eq!(found, Some((named, DEADLINE)), "{told:?}");
}

#[test]
fn a_launch_whose_vault_is_stopped_fails_at_whatever_step_comes_next() {
    let Some(Vaults { platform, _alone }) = vaults() else { return };
    let platform = platform.with_vault_deadline(DEADLINE);
    let files = open_files();
    let launch = || platform.launch(config(1)).unwrap();
    let (mut loads, mut zeroes, mut sets, seals) = (launch(), launch(), launch(), load(&platform, config(1), spin));
    stop_all(4);
    thread::scope(|scope| {
        scope.spawn(|| {
            let error = loads.load(Gpa(CODE), &[0xf4], PageKind::Measured).unwrap_err();
            assert_overdue(&error, "load pages");
        });
        scope.spawn(|| assert_overdue(&zeroes.zero(crate::common::range(DATA, 1)).unwrap_err(), "load pages"));
        scope.spawn(|| {
            let state = VcpuState::long_mode(Gpa(CODE), Gpa(0), 0, Gpa(0));
            assert_overdue(&sets.set_vcpu(0, &state).unwrap_err(), "set the initial state of a vcpu");
        });
        scope.spawn(|| assert_overdue(&seals.seal().map(drop).unwrap_err(), "seal the launch"));
    });
    drop((loads, zeroes, sets));
    assert!(children().is_empty(), "{:?}", children());
    assert_eq!(open_files(), files);
}

#[test]
fn a_guest_whose_vault_is_stopped_fails_at_whatever_comes_next() {
    let Some(Vaults { platform, _alone }) = vaults() else { return };
    let platform = platform.with_vault_deadline(DEADLINE);
    let files = open_files();
    type Next = (&'static str, fn(&mut Guest) -> Error);
    let next: [Next; 6] = [
        ("count the memory in use", |guest| guest.vm.allocated().unwrap_err()),
        ("count dropped interrupts", |guest| guest.vm.dropped_interrupts().unwrap_err()),
        ("connect a doorbell register", |guest| guest.vm.doorbell_fd(device_base(1)).unwrap_err()),
        ("connect an interrupt", |guest| guest.vm.interrupt_fd(0, 0x41).unwrap_err()),
        ("show a register", |guest| guest.vcpus[0].register(Register::Rax).unwrap_err()),
        ("inject an event", |guest| guest.vcpus[0].inject(Event::Interrupt(0x41)).unwrap_err()),
    ];
    let guests = next.map(|next| (next, Guest::from_launch(load(&platform, config(1), witness))));
    stop_all(guests.len());
    thread::scope(|scope| {
        for ((named, next), mut guest) in guests {
            scope.spawn(move || {
                assert_overdue(&next(&mut guest), named);
                // What comes after that says why the vault is dead.
                let error = guest.vcpus[0].run().unwrap_err();
                let source = std::error::Error::source(&error).unwrap().to_string();
                assert!(
                    source.contains("the vault is dead: it was given up because") && source.contains(named),
                    "{source}"
                );
            });
        }
    });
    assert!(children().is_empty(), "{:?}", children());
    assert_eq!(open_files(), files);
}

#[test]
fn a_conversion_whose_vault_is_stopped_is_refused_and_its_pages_are_poisoned() {
    let Some(Vaults { platform, _alone }) = vaults() else { return };
    let platform = platform.with_vault_deadline(DEADLINE);
    let mut guest = Guest::from_launch(load(&platform, config(1), |a| a.convert(POOL, POOL_PAGES, Side::Shared)));
    let Exit::Conversion(request) = guest.vcpus[0].run().unwrap() else { panic!("no conversion") };
    stop_all(1);
    let conversion = guest.vm.convert(&request);
    assert_eq!(conversion.answer(), Answer::Invalid);
    let cause = conversion.cause().unwrap();
    assert_overdue(cause, "convert pages");
    // The vault has been killed, so no guest sees the pages.
    assert!(matches!(cause, Error::Poisoned { contained: true, .. }), "{cause:?}");
}

#[test]
fn a_vcpu_that_is_kicked_comes_back_although_its_vault_is_stopped() {
    let Some(Vaults { platform, _alone }) = vaults() else { return };
    let platform = platform.with_vault_deadline(DEADLINE);
    let files = open_files();
    let mut guest = Guest::from_launch(load(&platform, config(1), spin));
    let kicker = guest.vcpus[0].kicker();
    thread::scope(|scope| {
        let run = scope.spawn(|| guest.vcpus[0].run());
        // Before it runs the guest, or while it does.
        thread::sleep(Duration::from_millis(200));
        stop_all(1);
        kicker.kick();
        assert_overdue(&run.join().unwrap().unwrap_err(), "stop a vcpu that was kicked");
    });
    drop((guest, kicker));
    assert!(children().is_empty(), "{:?}", children());
    assert_eq!(open_files(), files);
}

#[test]
fn a_vm_whose_vault_is_stopped_is_dropped() {
    let Some(Vaults { platform, _alone }) = vaults() else { return };
    let files = open_files();
    let guest = Guest::from_launch(load(&platform, config(2), witness));
    let launch = platform.launch(config(1)).unwrap();
    stop_all(2);
    drop((guest, launch));
    assert!(children().is_empty(), "{:?}", children());
    assert_eq!(open_files(), files);
}

#[test]
fn a_vault_that_was_stopped_when_its_vmm_died_ends_when_it_goes_on() {
    let Some(_vaults) = vaults() else { return };
    let mut loading = Loading::start(1);
    loading.load_all(spin);
    let (mut guest, _): (Hostage, _) = loading.seal();
    let sequence = guest.next(FIRST);
    let (message, _) = Request::Run(Given::Nothing).encode();
    guest.post(FIRST, sequence, &Message { sequence, ..message }, &[]);
    stop_all(1);
    guest.vault.socket = None;
    children().into_iter().for_each(|vault| kill_process(vault, Signal::CONT).unwrap());
    assert!(guest.vault.end(PATIENCE).success());
}
