//! SEV and SEV-ES guests on Linux with KVM.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::*;
use cvm_backend_sev::kvm::SevOptions;
use cvm_backend_sev::{SevFlags, SevPolicy};
use cvm_core::memory::Allocated;
use cvm_core::platform::{Asset, Party, Powers};
use cvm_core::{Gpa, Platform, Protection, Side, Vm};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::sync::{Arc, Mutex};

/// Says hello and ends.
fn hello(a: &mut Assembler) -> Result<(), IcedError> {
    a.mov(eax, 0x1234_5678u32)?;
    a.report()?;
    a.end(0)
}

#[test]
fn the_digest_is_that_of_the_firmware_whatever_the_number_of_vcpus() {
    for protection in BOTH {
        let Some(host) = host(protection) else { return };
        for vcpus in [1, 2, 5] {
            let (launch, loaded) = load(&host, config(vcpus), hello);
            let vm = launch.seal().unwrap();
            let expected = expected(&host, vm.transcript(), &loaded).to_string();
            assert_eq!(processor::digest(), Some(expected), "{protection} with {vcpus} vcpus");
        }
    }
}

#[test]
fn a_secret_that_the_owner_gives_after_he_has_checked_the_measurement_is_in_the_guests_memory() {
    for protection in BOTH {
        let Some(host) = host(protection) else { return };
        let policy = policy(protection);
        let options = SevOptions { policy, session: Some(session(policy)), ..SevOptions::default() };
        let approved = Arc::new(Mutex::new(None));
        let told = Arc::clone(&approved);
        let host = host.with_sev(options.with_owner(move |launch, digest| {
            *told.lock().unwrap() = Some((*launch, *digest));
            Ok(vec![keys().seal(launch, &0x5ec2_e7e5u32.to_le_bytes(), [7; 16])?.at(Gpa(DATA + 0x40))])
        }));
        let (launch, loaded) = load(&host, config(1), |a| {
            a.load(DATA + 0x40, Side::Private)?;
            a.report()?;
            a.end(0)
        });
        let mut guest = Guest::from_launch(launch);
        let (launch, digest) = approved.lock().unwrap().take().expect("the owner was not asked");
        let expected = expected(&host, guest.vm.transcript(), &loaded);
        assert!(keys().approves(&launch, &expected), "{protection}: the measurement is another one");
        assert_eq!(digest, expected);
        assert_eq!((launch.policy, launch.api.major), (policy, 1));
        assert_eq!(guest.report(), 0x5ec2_e7e5);
        guest.end();
    }
}

#[test]
fn private_memory_is_pinned_and_all_there() {
    let Some(host) = host(Protection::Sev) else { return };
    let guest = host.bench().guest(config(1), hello);
    assert_eq!(guest.vm.allocated().unwrap(), Allocated { private: Some(MEMORY), shared: 0 });
}

#[test]
fn whom_a_guest_has_to_trust_depends_on_the_generation_and_on_its_policy() {
    for protection in BOTH {
        let Some(host) = host(protection) else { return };
        let powers = |host: &Host, asset| host.platform.trust_model().powers(Party::Root, asset);
        assert_eq!(powers(&host, Asset::Registers).is_empty(), host.es());
        assert_eq!(powers(&host, Asset::PrivateMemory).contains(Powers::STEER), !host.es());
        assert!(!powers(&host, Asset::PrivateMemory).contains(Powers::READ));
        let policy = SevPolicy { flags: SevFlags::empty(), ..policy(protection) };
        let lax = host.with_sev(SevOptions { policy, ..SevOptions::default() });
        assert!(powers(&lax, Asset::PrivateMemory).contains(Powers::READ));
    }
}
