//! SEV guests that leave one VM and go on in another.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::*;
use cvm_backend_kvm::backend::{LocalVm, VcpuSnapshot};
use cvm_backend_sev::kvm::{Error, Receiving, SevOptions};
use cvm_backend_sev::{FirmwareError, SevFlags, SevPolicy};
use cvm_core::export::{Exporting, Origin, SealedPage, Target};
use cvm_core::memory::PageState;
use cvm_core::{
    Answer, Error as CoreError, Exit, Gpa, GpaRange, PAGE_SIZE, Platform, Protection, Side, Transcript, Vcpu, Vm,
};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// A page that the guest shares.
const SHARED: u64 = DATA + 0x10000;

/// Shares a page, and then counts without end: in a register, in private memory and in shared memory, and tells the sum.
fn counting(a: &mut Assembler) -> Result<(), IcedError> {
    a.convert(SHARED, 1, Side::Shared)?;
    a.mov(r8, 100u64)?;
    a.mov(r10, DATA)?;
    a.mov(r11, cvm_core::x86::SHARED_AT + SHARED)?;
    a.mov(dword_ptr(r10), 1000)?;
    a.mov(dword_ptr(r11), 10000)?;
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.inc(r8)?;
    a.inc(dword_ptr(r10))?;
    a.inc(dword_ptr(r11))?;
    a.mov(eax, r8d)?;
    a.add(eax, dword_ptr(r10))?;
    a.add(eax, dword_ptr(r11))?;
    a.report()?;
    a.jmp(again)
}

/// What the `count`th report of it is.
fn sum(count: u32) -> u32 {
    11100 + 3 * count
}

/// A guest that has told three sums.
fn source(host: &Host) -> Guest {
    let mut guest = host.bench().guest(config(1), counting);
    assert_eq!(guest.convert().answer, Answer::Done);
    assert_eq!([1, 2, 3].map(|_| guest.report()), [1, 2, 3].map(sum));
    guest
}

/// This platform as a target.
fn target(host: &Host) -> Target {
    let keys = host.platform.keys().unwrap();
    // The maker's certificates do not come from the platform; nobody looks at them here.
    Target { key: keys.certificate, chain: keys.chain, maker: vec![0xad; 64] }
}

/// All that moves.
struct Moved {
    origin: Origin,
    pages: Vec<SealedPage>,
    vcpu: VcpuSnapshot,
    shared: Vec<(GpaRange, Vec<u8>)>,
    transcript: Transcript,
}

/// Takes all out of a guest that an export is under way of.
fn take(vm: &LocalVm, export: &mut dyn Exporting<cvm_backend_kvm::backend::LocalVcpu>) -> Moved {
    let all = GpaRange::new(0, MEMORY).unwrap();
    let (mut pages, mut shared) = (Vec::new(), Vec::new());
    for (run, state) in vm.memory().map().runs(all) {
        match state {
            PageState::Private => {
                let gpas = (run.start().0..run.end().0).step_by(PAGE_SIZE as usize);
                pages.extend(gpas.map(|gpa| export.page(Gpa(gpa)).unwrap()));
            }
            _ => {
                let mut contents = vec![0; run.len() as usize];
                vm.memory().memory().read_slice(&mut contents, GuestAddress(run.start().0)).unwrap();
                shared.push((run, contents));
            }
        }
    }
    let vcpu = export.vcpus()[0].snapshot().unwrap();
    Moved { origin: export.origin().clone(), pages, vcpu, shared, transcript: vm.transcript().clone() }
}

/// Exports all of a guest.
fn export(host: &Host, mut guest: Guest) -> Moved {
    let mut export = guest.vm.export().expect("it cannot be exported").begin(&mut guest.vcpus, &target(host)).unwrap();
    let moved = take(&guest.vm, &mut *export);
    export.finish().unwrap();
    assert!(matches!(guest.vcpus[0].run(), Err(CoreError::Protocol { .. })), "it runs in two places");
    moved
}

fn receive(host: &Host, origin: &Origin) -> Receiving {
    host.platform.receive(config(1), origin).unwrap()
}

/// The guest that has arrived.
fn arrive(mut receiving: Receiving, moved: &Moved, pages: &[SealedPage]) -> Guest {
    pages.iter().for_each(|page| receiving.page(page).unwrap());
    let shared: Vec<_> = moved.shared.iter().map(|(range, _)| *range).collect();
    let vm = receiving.finish(&shared, moved.transcript.clone()).unwrap();
    for (range, contents) in &moved.shared {
        vm.memory().memory().write_slice(contents, GuestAddress(range.start().0)).unwrap();
    }
    let mut guest = Guest::from_vm(vm);
    guest.vcpus[0].restore(&moved.vcpu).unwrap();
    guest
}

fn firmware(error: Error) -> Option<FirmwareError> {
    match error {
        Error::Command { firmware, .. } => firmware,
        other => panic!("{other:?} is not the firmware's"),
    }
}

#[test]
fn a_guest_goes_on_in_another_vm_where_it_has_stopped() {
    let Some(host) = host(Protection::Sev) else { return };
    let before = processor::asids();
    let guest = source(&host);
    let transcript = guest.vm.transcript().clone();
    let moved = export(&host, guest);
    assert_eq!(moved.pages.len() as u64, MEMORY / PAGE_SIZE - 1);
    let code = moved.pages.iter().find(|page| page.gpa.0 == CODE).unwrap();
    let plain = host.assemble(&host.platform.launch(config(1)).unwrap(), CODE, counting);
    assert!(!code.data.windows(16).any(|bytes| plain.windows(16).any(|code| code == bytes)), "it left unencrypted");

    let mut guest = arrive(receive(&host, &moved.origin), &moved, &moved.pages);
    assert_eq!([4, 5, 6].map(|_| guest.report()), [4, 5, 6].map(sum));
    assert_eq!(*guest.vm.transcript(), transcript);
    let view = guest.vm.memory().clone();
    assert_eq!(view.memory().read_obj::<u32>(GuestAddress(SHARED)).unwrap(), 10006);
    assert!(view.memory().read_obj::<u32>(GuestAddress(DATA)).is_err());
    drop(guest);
    assert_eq!(processor::asids(), before);
}

#[test]
fn a_guest_whose_export_is_cancelled_or_dropped_goes_on_at_home() {
    let Some(host) = host(Protection::Sev) else { return };
    let mut guest = source(&host);
    let target = target(&host);
    let mut export = guest.vm.export().unwrap().begin(&mut guest.vcpus, &target).unwrap();
    export.page(Gpa(CODE)).unwrap();
    export.cancel().unwrap();
    assert_eq!(guest.report(), sum(4));
    drop(guest.vm.export().unwrap().begin(&mut guest.vcpus, &target).unwrap());
    assert_eq!(guest.report(), sum(5));
    export_again(&host, guest);
}

fn export_again(host: &Host, guest: Guest) {
    let moved = export(host, guest);
    let mut guest = arrive(receive(host, &moved.origin), &moved, &moved.pages);
    assert_eq!(guest.report(), sum(6));
}

#[test]
fn a_page_that_is_changed_cut_or_of_another_export_is_refused_by_the_firmware() {
    let Some(host) = host(Protection::Sev) else { return };
    let moved = export(&host, source(&host));
    let other = export(&host, source(&host));
    let page = moved.pages.iter().find(|page| page.gpa.0 == CODE).unwrap();
    let mut receiving = receive(&host, &moved.origin);

    let mut changed = page.clone();
    changed.data[77] ^= 1;
    let mut proof = page.clone();
    proof.proof[5] ^= 1;
    let stranger = other.pages.iter().find(|page| page.gpa.0 == CODE).unwrap().clone();
    for wrong in [changed, proof, stranger] {
        assert_eq!(firmware(receiving.page(&wrong).unwrap_err()), Some(FirmwareError::BadMeasurement));
    }
    let mut cut = page.clone();
    cut.data.truncate(4080);
    assert!(matches!(receiving.page(&cut), Err(Error::Origin(_))));
    let mut short = page.clone();
    short.proof.truncate(51);
    assert_eq!(firmware(receiving.page(&short).unwrap_err()), Some(FirmwareError::InvalidLength));
    // Nothing of that has done harm.
    let mut guest = arrive(receiving, &moved, &moved.pages);
    assert_eq!(guest.report(), sum(4));
}

#[test]
fn a_page_that_is_held_back_or_sent_twice_is_noticed_by_the_host_alone() {
    let Some(host) = host(Protection::Sev) else { return };
    let moved = export(&host, source(&host));
    let mut receiving = receive(&host, &moved.origin);
    for page in &moved.pages[1..] {
        receiving.page(page).unwrap();
    }
    assert!(matches!(receiving.page(&moved.pages[1]), Err(Error::Origin(_))), "it came twice");
    let outside = SealedPage { gpa: Gpa(MEMORY), ..moved.pages[0].clone() };
    assert!(matches!(receiving.page(&outside), Err(Error::Origin(_))));
    let shared: Vec<_> = moved.shared.iter().map(|(range, _)| *range).collect();
    let error = receiving.finish(&shared, moved.transcript.clone()).err().expect("a page is missing");
    assert!(error.to_string().contains("a page is missing"), "{error}");
}

#[test]
fn pages_that_have_changed_places_are_noticed_by_nobody() {
    let Some(host) = host(Protection::Sev) else { return };
    let mut moved = export(&host, source(&host));
    let place = |gpa| moved.pages.iter().position(|page| page.gpa.0 == gpa).unwrap();
    let (counter, other) = (place(DATA), place(DATA + 0x1000));
    (moved.pages[counter].gpa, moved.pages[other].gpa) = (Gpa(DATA + 0x1000), Gpa(DATA));
    let mut guest = arrive(receive(&host, &moved.origin), &moved, &moved.pages);
    // What was counted in private memory is somewhere else.
    assert_eq!(guest.report(), sum(4) - 1003);
}

#[test]
fn who_may_not_leave_or_cannot_is_not_asked() {
    let Some(mut host) = host(Protection::Sev) else { return };
    let policy = SevPolicy { least_api: (0, 0), flags: SevFlags::NO_DEBUG | SevFlags::NO_SEND };
    host = host.with_sev(SevOptions { policy, ..SevOptions::default() });
    assert!(host.bench().guest(config(1), counting).vm.export().is_none());
    drop(host);
    let Some(host) = common::host(Protection::SevEs) else { return };
    let mut guest = host.bench().guest(config(1), counting);
    assert!(guest.vm.export().is_none());
    assert_eq!(guest.convert().answer, Answer::Done);
    assert!(matches!(guest.vcpus[0].snapshot(), Err(CoreError::Config(_))));
    let origin = Origin { key: vec![1; 64], policy: 0, session: vec![1; 128] };
    assert!(matches!(host.platform.receive(config(1), &origin), Err(CoreError::Config(_))));
}

#[test]
fn an_export_takes_all_vcpus_of_its_vm_and_no_others_and_a_target_that_is_somebody() {
    let Some(host) = host(Protection::Sev) else { return };
    let (mut guest, mut stranger) = (source(&host), source(&host));
    let target = target(&host);
    let begin = |guest: &Guest, vcpus: &mut [_], target: &Target| guest.vm.export().unwrap().begin(vcpus, target).err();
    assert!(matches!(begin(&guest, &mut [], &target), Some(CoreError::Config(_))));
    assert!(matches!(begin(&guest, &mut stranger.vcpus, &target), Some(CoreError::Config(_))));
    let nobody = Target { key: Vec::new(), ..target.clone() };
    let mut vcpus = std::mem::take(&mut guest.vcpus);
    let error = begin(&guest, &mut vcpus, &nobody).unwrap();
    assert!(matches!(cause(&error), Error::Blob { len: 0, .. }), "{error:?}");
    let mut export = guest.vm.export().unwrap().begin(&mut vcpus, &target).unwrap();
    assert!(matches!(export.page(Gpa(MEMORY)), Err(CoreError::OutsideMemory { .. })));
    assert!(matches!(export.page(Gpa(CODE + 1)), Err(CoreError::OutsideMemory { .. })));
    drop(export);
    assert_eq!(vcpus[0].run().unwrap(), Exit::DoorbellWrite { register: REPORT, value: sum(4) });
}

#[test]
fn commands_of_an_export_that_the_firmware_fails_are_named_and_leave_nothing() {
    let Some(host) = host(Protection::Sev) else { return };
    let before = processor::asids();
    let status = FirmwareError::ResourceLimit;
    let is = |error: &Error, name: &str| match error {
        Error::Command { step, firmware, .. } => assert!(step.contains(name) && *firmware == Some(status), "{error:?}"),
        other => panic!("{other:?}"),
    };
    let mut guest = source(&host);
    let target = target(&host);
    processor::fail(0x40, status.status(), 0);
    let error = guest.vm.export().unwrap().begin(&mut guest.vcpus, &target).err().unwrap();
    is(cause(&error), "SEND_START");
    assert_eq!(guest.report(), sum(4), "it cannot go on");
    for (command, name) in [(0x41, "SEND_UPDATE_DATA"), (0x43, "SEND_FINISH"), (0x44, "SEND_CANCEL")] {
        let mut guest = source(&host);
        let mut export = guest.vm.export().unwrap().begin(&mut guest.vcpus, &target).unwrap();
        processor::fail(command, status.status(), 0);
        let error = match command {
            0x41 => {
                let error = export.page(Gpa(CODE)).unwrap_err();
                drop(export);
                error
            }
            0x43 => export.finish().unwrap_err(),
            _ => export.cancel().unwrap_err(),
        };
        is(cause(&error), name);
        assert_eq!(guest.report(), sum(4), "{name}: it cannot go on");
    }
    let moved = export(&host, guest);
    processor::fail(0x50, status.status(), 0);
    is(cause(&host.platform.receive(config(1), &moved.origin).unwrap_err()), "RECEIVE_START");
    let mut receiving = receive(&host, &moved.origin);
    processor::fail(0x51, status.status(), 0);
    is(&receiving.page(&moved.pages[0]).unwrap_err(), "RECEIVE_UPDATE_DATA");
    processor::fail(0x53, status.status(), 0);
    moved.pages.iter().for_each(|page| receiving.page(page).unwrap());
    let shared: Vec<_> = moved.shared.iter().map(|(range, _)| *range).collect();
    let error = receiving.finish(&shared, moved.transcript.clone()).err().unwrap();
    is(error.downcast_ref().unwrap(), "RECEIVE_FINISH");
    assert_eq!(processor::asids(), before);
}
