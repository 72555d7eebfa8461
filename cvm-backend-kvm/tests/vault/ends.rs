//! When a vault ends by itself.

use crate::common::skip;
use crate::guests::{spin, witness};
use crate::hostile_vmm::{FIRST, Hostage, Vault};
use crate::{LIMIT, PATIENCE, vaults};
use cvm_backend_kvm::vault::protocol::{Given, Message, Order, Report, Request};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::{ReadWriteFlags, preadv2};
use std::io::IoSliceMut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

#[test]
fn a_vault_gives_up_on_a_vmm_that_makes_no_sense() {
    let Some(_vaults) = vaults() else { return };
    let mut guest = Hostage::start(1, witness);
    let begin = Instant::now();
    for sequence in (2..).step_by(2) {
        guest.ring(FIRST, sequence & !(1 << 31));
        if guest.hear(FIRST, sequence & !(1 << 31)).is_none() {
            break;
        }
        if begin.elapsed() > LIMIT / 6 {
            return skip("its patience is too long for this machine");
        }
    }
    assert_eq!(guest.vault.end(PATIENCE).code(), Some(2));
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
        guest.vault.end(Duration::from_secs(2));
    }
    let mut vault = Vault::start();
    vault.socket = None;
    vault.end(Duration::from_secs(2));
}

#[test]
fn a_vmm_that_takes_kicks_back_does_not_keep_the_vault_waiting_for_them() {
    let Some(_vaults) = vaults() else { return };
    const ROUNDS: u32 = 5000;
    let mut guest = Hostage::start(1, spin);
    // Both ends of an eventfd are one, with the same flags.
    fcntl_setfl(&guest.kicks, OFlags::empty()).unwrap();
    let kicks = guest.kicks.try_clone().unwrap();
    let round = Arc::new(AtomicU32::new(0));
    let now = Arc::clone(&round);
    let thief = thread::spawn(move || {
        for next in 1..=ROUNDS {
            while now.load(Ordering::SeqCst) < next {
                std::hint::spin_loop();
            }
            // The vault has not woken up yet, or has taken it, or is about to and finds nothing.
            (0..next % 500).for_each(|_| std::hint::spin_loop());
            let _ = preadv2(&kicks, &mut [IoSliceMut::new(&mut [0; 8])], u64::MAX, ReadWriteFlags::NOWAIT);
        }
    });
    for next in 1..=ROUNDS {
        round.store(next, Ordering::SeqCst);
        rustix::io::write(&guest.kicks, &1u64.to_ne_bytes()).unwrap();
        thread::sleep(Duration::from_micros(20));
        assert!(matches!(guest.vault.order(&Order::Count), Report::Memory { .. }));
    }
    thief.join().unwrap();
    guest.vault.socket = None;
    guest.vault.end(Duration::from_secs(2));
}
