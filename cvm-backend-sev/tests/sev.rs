//! SEV and SEV-ES guests on Linux with KVM.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod in_place;

use cvm_backend_sev::kvm::SevOptions;
use cvm_backend_sev::{SevFlags, SevPolicy};
use cvm_core::memory::Allocated;
use cvm_core::platform::{Asset, Party, Powers};
use cvm_core::x86::Register;
use cvm_core::{
    Answer, Error, Exit, Gpa, Lifecycle, LifecycleAnswer, Platform, Protection, RegisterRead, Side, Vcpu, Vm,
};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use in_place::*;
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// What both have.
const BOTH: [Protection; 2] = [Protection::Sev, Protection::SevEs];

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
            let (launch, loaded) = load(&host, config(vcpus), hello).unwrap();
            let vm = launch.seal().unwrap();
            let expected = expected(&host, vm.transcript(), &loaded).to_string();
            assert_eq!(processor::digest(), Some(expected), "{protection} with {vcpus} vcpus");
        }
    }
}

#[test]
fn a_guest_runs() {
    for protection in BOTH {
        let Some(host) = host(protection) else { return };
        let mut guest = Guest::new(&host, hello);
        assert_eq!(guest.report(), 0x1234_5678);
        guest.end();
    }
}

#[test]
fn a_page_changes_sides_by_hypercall_and_only_its_shared_side_is_shown() {
    for protection in BOTH {
        let Some(host) = host(protection) else { return };
        let mut guest = Guest::new(&host, |a| {
            a.store(DATA, 0x5ec2e7)?;
            a.convert(DATA, 2, Side::Shared)?;
            a.report()?;
            a.load_shared(DATA)?;
            a.report()?;
            a.store_shared(DATA, 0x600d)?;
            a.convert(DATA, 1, Side::Private)?;
            a.report()?;
            a.end(0)
        });
        let view = guest.vm.memory().clone();
        let read = |gpa: u64| view.memory().read_obj::<u32>(GuestAddress(gpa)).ok();
        assert_eq!(read(DATA), None);
        assert_eq!(guest.convert(), Answer::Done);
        assert_eq!(read(DATA), Some(0), "the page has kept its private contents");
        assert_eq!((guest.report(), guest.report()), (0, 0));
        assert_eq!(guest.convert(), Answer::Done);
        assert_eq!((read(DATA), read(DATA + 0x1000)), (None, Some(0)));
        assert_eq!(guest.report(), 0);
        guest.end();
        drop(guest);
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
        let host = host.with(options.with_owner(move |launch, digest| {
            *told.lock().unwrap() = Some((*launch, *digest));
            Ok(vec![keys().seal(launch, &0x5ec2_e7e5u32.to_le_bytes(), [7; 16])?.at(Gpa(DATA + 0x40))])
        }));
        let (launch, loaded) = load(&host, config(1), |a| {
            a.load(DATA + 0x40)?;
            a.report()?;
            a.end(0)
        })
        .unwrap();
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
fn registers_are_seen_with_sev_and_hidden_with_sev_es_but_for_what_an_exit_shows() {
    for protection in BOTH {
        let Some(host) = host(protection) else { return };
        let mut guest = Guest::new(&host, |a| {
            a.mov(r9, 0x005e_c2e7_u64)?;
            a.mov(eax, 0x77u32)?;
            a.report()?;
            a.end(0)
        });
        guest.report();
        let read = |register| guest.vcpus[0].register(register).unwrap();
        let (secret, shown) = (read(Register::R9), read(Register::Rax));
        if host.es() {
            assert_eq!((secret, shown), (RegisterRead::Hidden, RegisterRead::Exposed(0x77)));
        } else {
            assert_eq!((secret, shown), (RegisterRead::Visible(0x005e_c2e7), RegisterRead::Visible(0x77)));
        }
        guest.end();
    }
}

#[test]
fn what_can_be_done_with_a_guest_is_said_with_a_reason() {
    for protection in BOTH {
        let Some(host) = host(protection) else { return };
        let guest = Guest::new(&host, hello);
        for what in Lifecycle::ALL {
            let can = guest.vm.lifecycle(what) == LifecycleAnswer::Yes;
            assert_eq!(can, what == Lifecycle::Migrate && !host.es(), "{protection}: {what:?}");
        }
    }
}

#[test]
fn private_memory_is_pinned_and_all_there() {
    let Some(host) = host(Protection::Sev) else { return };
    let guest = Guest::new(&host, hello);
    assert_eq!(guest.vm.allocated().unwrap(), Allocated { private: Some(MEMORY), shared: 0 });
}

#[test]
fn each_vcpu_talks_to_its_host_for_itself() {
    for protection in BOTH {
        let Some(host) = host(protection) else { return };
        let (launch, _) = load(&host, config(3), |a| {
            a.listen(REPORT)?;
            a.add(eax, edi)?;
            a.report()?;
            a.end(0)
        })
        .unwrap();
        let mut guest = Guest::from_launch(launch);
        for index in [1, 0, 2] {
            assert_eq!(guest.vcpus[index].run().unwrap(), Exit::DoorbellRead { register: REPORT });
            guest.vcpus[index].answer_read(100 * (index as u64 + 1)).unwrap();
        }
        assert_eq!([2, 0, 1].map(|index| guest.report_of(index)), [302, 100, 201]);
        guest.vcpus.iter_mut().for_each(|vcpu| assert_eq!(vcpu.run().unwrap(), Exit::Ended { code: 0 }));
    }
}

#[test]
fn a_request_for_what_is_no_memory_is_refused_and_the_guest_hears_it() {
    for protection in BOTH {
        let Some(host) = host(protection) else { return };
        let mut guest = Guest::new(&host, |a| {
            for (gpa, pages) in [(MEMORY, 1), (MEMORY - 0x1000, 2), (DATA, 0)] {
                a.convert(gpa, pages, Side::Shared)?;
                a.report()?;
            }
            a.end(0)
        });
        let mut refused = 0;
        loop {
            match guest.run() {
                Exit::Conversion(request) => {
                    let conversion = guest.vm.convert(&request);
                    assert_eq!(conversion.answer(), Answer::Invalid, "{request:?}");
                    guest.vcpus[0].answer_conversion(conversion).unwrap();
                }
                Exit::DoorbellWrite { register: REPORT, value } => {
                    // KVM answers itself what is no range of pages.
                    assert_ne!(value, 0);
                    refused += 1;
                }
                Exit::Ended { code: 0 } => break,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(refused, 3);
    }
}

#[test]
fn a_guest_that_gives_up_tells_why() {
    let Some(host) = host(Protection::SevEs) else { return };
    let mut guest = Guest::new(&host, |a| a.terminate(1, 0x2a));
    match guest.vcpus[0].run() {
        Err(Error::Terminated { vcpu: 0, reason: Some((1, 0x2a)) }) => {}
        other => panic!("{other:?}"),
    }
    assert!(matches!(guest.vcpus[0].run(), Err(Error::Protocol { .. })));
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
        let lax = host.with(SevOptions { policy, ..SevOptions::default() });
        assert!(powers(&lax, Asset::PrivateMemory).contains(Powers::READ));
    }
}
