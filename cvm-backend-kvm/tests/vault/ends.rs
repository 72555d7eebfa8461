//! When a vault ends by itself, and when it does not.

use crate::common::{Assembler, Guest};
use crate::common::{config, load};
use crate::guests::{POOL, spin, witness};
use crate::hostile_vmm::{FIRST, Hostage, Loading, Vault};
use crate::{PATIENCE, Vaults, vaults};
use cvm_backend_kvm::vault::protocol::{Given, Message, Order, Report, Request};
use cvm_core::{Answer, ConversionRequest, Exit, Side, Vcpu, Vm};
use iced_x86::IcedError;
use rustix::net::{Shutdown, shutdown};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// How many requests that no honest VMM makes a vault refuses before it ends.
const REFUSALS: u32 = 1 << 12;

#[test]
fn a_vault_ends_after_so_many_requests_that_make_no_sense() {
    let Some(_vaults) = vaults() else { return };
    let mut guest = Hostage::start(1, witness);
    for refusal in 1..=REFUSALS {
        let sequence = 2 * refusal;
        guest.ring(FIRST, sequence);
        assert_eq!(guest.hear(FIRST, sequence).is_some(), refusal < REFUSALS, "refusal {refusal}");
    }
    assert_eq!(guest.vault.end(PATIENCE).code(), Some(2));
}

#[test]
fn a_vault_ends_after_so_many_orders_that_make_no_sense() {
    let Some(_vaults) = vaults() else { return };
    let mut vault = Vault::start();
    for _ in 1..REFUSALS {
        vault.refused(&Order::Count);
    }
    vault.order_with(&Order::Count, &[]);
    assert_eq!(vault.end(PATIENCE).code(), Some(2));
}

/// A guest whose vCPUs move the same page to and fro.
fn contend(a: &mut Assembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.convert(POOL, 1, Side::Shared)?;
    a.convert(POOL, 1, Side::Private)?;
    a.jmp(again)
}

fn request(guest: &mut Guest, vcpu: usize) -> ConversionRequest {
    match guest.vcpus[vcpu].run() {
        Ok(Exit::Conversion(request)) => request,
        other => panic!("vcpu {vcpu}: {other:?}"),
    }
}

#[test]
fn two_vcpus_that_race_for_a_page_cost_an_honest_vmm_nothing() {
    let Some(Vaults { platform, _alone }) = vaults() else { return };
    let mut guest = Guest::from_launch(load(&platform, config(2), contend));
    // From here on the vCPUs want opposite sides.
    let first = request(&mut guest, 1);
    let conversion = guest.vm.convert(&first);
    guest.vcpus[1].answer_conversion(conversion).unwrap();
    for round in 0..REFUSALS + 100 {
        let (ours, theirs) = (request(&mut guest, 0), request(&mut guest, 1));
        assert_ne!(ours.to(), theirs.to(), "round {round}");
        for (vcpu, request) in [ours, theirs].iter().enumerate() {
            let conversion = guest.vm.convert(request);
            assert_eq!(conversion.answer(), Answer::Done, "round {round}");
            // Of the first vCPU it is not true any more when that runs again.
            guest.vcpus[vcpu].answer_conversion(conversion).unwrap();
        }
    }
}

#[test]
fn orders_that_fail_cost_nothing() {
    let Some(_vaults) = vaults() else { return };
    let mut loading = Loading::start(1);
    for _ in 0..REFUSALS + 100 {
        loading.vault.refused(&Loading::state(1));
    }
    loading.load_all(spin);
}

#[test]
fn a_vault_ends_with_its_vmm_even_while_the_guest_spins() {
    let Some(_vaults) = vaults() else { return };
    for spinning in [false, true] {
        let mut guest = Hostage::start(1, spin);
        if spinning {
            let sequence = guest.next(FIRST);
            let (message, _) = Request::Run(Given::Nothing).encode();
            guest.post(FIRST, sequence, &Message { sequence, ..message }, &[]);
            thread::sleep(Duration::from_millis(50));
        }
        guest.vault.socket = None;
        guest.vault.end(PATIENCE);
    }
    let mut vault = Vault::start();
    vault.socket = None;
    vault.end(PATIENCE);
}

#[test]
fn a_vmm_that_floods_its_vault_with_kicks_stops_nobody_but_itself() {
    let Some(_vaults) = vaults() else { return };
    let mut guest = Hostage::start(1, spin);
    let kicks = guest.kicks.try_clone().unwrap();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                // It fails while as many wait as there is room for.
                let _ = rustix::net::send(&kicks, &[0; 64], rustix::net::SendFlags::DONTWAIT);
            }
        });
        for _ in 0..500 {
            assert!(matches!(guest.vault.order(&Order::Count), Report::Memory { .. }));
        }
        is_over.store(true, Ordering::Relaxed);
    });
    // Its end, too, is no reason to look for ever.
    shutdown(&guest.kicks, Shutdown::Both).unwrap();
    assert!(matches!(guest.vault.order(&Order::Count), Report::Memory { .. }));
    guest.vault.socket = None;
    guest.vault.end(PATIENCE);
}
