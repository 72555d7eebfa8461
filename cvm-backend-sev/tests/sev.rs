//! SEV and SEV-ES guests on Linux with KVM.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod in_place;

use cvm_core::{Answer, Protection, Side, Vm};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use in_place::*;
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
