//! The contract as guests on real vCPUs find it: each test assembles a guest of a few instructions and plays its VMM.

mod common;

use common::*;
use cvm_backend_kvm::{Error as KvmError, KvmPlatform, KvmVm};
use cvm_core::doorbell::{Access, Doorbell, MSR_BASE, PORT_BASE, SPACE, Transport, control};
use cvm_core::interrupt::Guarding;
use cvm_core::launch::MAX_VCPUS;
use cvm_core::linux::{Kernel, LinuxImage};
use cvm_core::memory::{Allocated, ConversionTotals};
use cvm_core::x86::{Register, VcpuState};
use cvm_core::{
    Answer, ConversionRequest, Error, Event, Exit, Gpa, GpaRange, InterruptPolicy, PAGE_SIZE, PageKind, PageState,
    Platform, Policy, Protection, RegisterRead, Side, Vcpu, Vm, VmConfig, Watchdog,
};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Barrier;
use std::sync::mpsc::{self, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryError};

/// What the VMM reads through the view of the shared side.
fn read(vm: &KvmVm, gpa: u64) -> Result<u32, GuestMemoryError> {
    vm.memory().memory().read_obj(GuestAddress(gpa))
}

fn write(vm: &KvmVm, gpa: u64, value: u32) {
    vm.memory().memory().write_obj(value, GuestAddress(gpa)).unwrap();
}

/// That the view refuses all pages of `range`, for reads and for writes, each with its own address.
fn assert_refused(vm: &KvmVm, range: GpaRange) {
    let memory = vm.memory().memory();
    for page in 0..range.pages() {
        let gpa = GuestAddress(range.start().0 + page * PAGE_SIZE);
        for error in [memory.read_obj::<u8>(gpa).unwrap_err(), memory.write_obj(1u8, gpa).unwrap_err()] {
            assert!(matches!(error, GuestMemoryError::InvalidGuestAddress(named) if named == gpa), "{gpa:?}: {error}");
        }
    }
}

// Conversions

fn a_page_goes_there_and_back(config: VmConfig) {
    let Some(platform) = kvm() else { return };
    let mut guest = Guest::new(&platform, config, |a| {
        a.store(DATA, 0x1111)?;
        a.load(DATA)?;
        a.report()?;
        for _ in 0..2 {
            a.convert(DATA, 1, Side::Shared)?;
            a.report()?;
            a.load(DATA)?;
            a.report()?;
            a.store(DATA, 0x2222)?;
            a.report()?;
            a.load(DATA)?;
            a.report()?;
        }
        a.convert(DATA, 1, Side::Private)?;
        a.report()?;
        a.load(DATA)?;
        a.report()?;
        a.store(DATA, 0x4444)?;
        a.load(DATA)?;
        a.report()?;
        a.end(0)
    });
    let done = Answer::Done as u32;

    assert_eq!(guest.report(), 0x1111);
    let before = guest.vm.allocated().unwrap();
    assert_eq!(before.shared, 0);

    assert_eq!(guest.convert().pages, 1);
    assert_eq!(guest.report(), done);
    let gone = Allocated { private: before.private.map(|private| private - PAGE_SIZE), shared: 0 };
    assert_eq!(guest.vm.allocated().unwrap(), gone, "the private page is freed, and the shared one is not touched yet");
    assert_eq!(guest.report(), 0, "private contents were kept");
    guest.report();
    assert_eq!(read(&guest.vm, DATA).unwrap(), 0x2222);
    let shared = Allocated { shared: PAGE_SIZE, ..gone };
    assert_eq!(guest.vm.allocated().unwrap(), shared);
    write(&guest.vm, DATA, 0x3333);
    assert_eq!(guest.report(), 0x3333);

    // The same request again costs nothing, and keeps the contents.
    assert_eq!(guest.convert().pages, 0);
    assert_eq!(guest.report(), done);
    assert_eq!(guest.vm.allocated().unwrap(), shared);
    assert_eq!(guest.report(), 0x3333);
    guest.report();
    assert_eq!(read(&guest.vm, DATA).unwrap(), 0x2222);
    assert_eq!(guest.report(), 0x2222);

    assert_eq!(guest.convert().pages, 1);
    assert_eq!(guest.report(), done);
    assert_eq!(guest.vm.allocated().unwrap(), gone);
    assert_refused(&guest.vm, range(DATA, 1));
    assert_eq!(guest.report(), 0, "shared contents were kept");
    assert_eq!(guest.report(), 0x4444);
    assert_eq!(guest.vm.allocated().unwrap(), before);
    assert_refused(&guest.vm, range(DATA, 1));
    guest.end();
    let totals = ConversionTotals { requests: 3, refused: 0, to_private: 1, to_shared: 1 };
    assert_eq!(guest.vm.conversions(), totals);
}

#[test]
fn a_page_goes_there_and_back_by_port_doorbell() {
    a_page_goes_there_and_back(config(1));
}

#[test]
fn a_page_goes_there_and_back_by_msr_doorbell() {
    a_page_goes_there_and_back(VmConfig { doorbell: Doorbell::Msr, ..config(1) });
}

/// A configuration with hypercalls, where they work; elsewhere it is checked that they are refused.
fn with_hypercalls() -> Option<VmConfig> {
    let platform = kvm()?;
    let config = VmConfig { transport: Some(Transport::Hypercall), ..config(1) };
    if platform.hypercalls_work() {
        return Some(config);
    }
    skip("a guest's hypercall does not arrive on this kvm");
    assert!(matches!(platform.launch(config), Err(Error::Config(_))));
    None
}

#[test]
fn a_page_goes_there_and_back_by_hypercall() {
    let Some(config) = with_hypercalls() else { return };
    a_page_goes_there_and_back(config);
}

#[test]
fn the_transport_is_the_best_that_works() {
    let Some(platform) = kvm() else { return };
    let launch = platform.launch(VmConfig::new(MEMORY, 1).unwrap()).unwrap();
    let best = if platform.hypercalls_work() { Transport::Hypercall } else { Transport::Doorbell };
    assert_eq!(launch.transport(), best);
}

#[test]
fn all_memory_is_private_by_default() {
    let Some(platform) = kvm() else { return };
    let mut guest = Guest::new(&platform, config(1), |a| {
        a.store(DATA, 1)?;
        a.end(0)
    });
    let all = range(0, MEMORY / PAGE_SIZE);
    assert_refused(&guest.vm, all);
    guest.end();
    assert_refused(&guest.vm, all);
    assert_eq!(guest.vm.memory().map().count(PageState::Private), all.pages());
    assert_eq!(guest.vm.allocated().unwrap().shared, 0);
    let guarding = if isolation() == Protection::Vault { Guarding::Enforced } else { Guarding::Library };
    assert_eq!(guest.vm.guarding(), guarding);
}

#[test]
fn a_senseless_request_is_answered_invalid_and_changes_nothing() {
    let Some(platform) = kvm() else { return };
    const END: u64 = MEMORY;
    let requests = [
        (DATA, 0),
        (END, 1),
        (END - PAGE_SIZE, 2),
        (DATA, u64::from(u32::MAX)),
        (u64::from(u32::MAX) * PAGE_SIZE, 1),
        (u64::from(u32::MAX) * PAGE_SIZE, u64::from(u32::MAX)),
    ];
    let mut guest = Guest::new(&platform, config(1), |a| {
        a.store(DATA, 0x1111)?;
        a.listen(control::CONVERT)?;
        a.report()?;
        for (gpa, pages) in requests {
            a.convert(gpa, pages, Side::Shared)?;
            a.report()?;
        }
        a.load(DATA)?;
        a.report()?;
        a.end(0)
    });
    assert_eq!(guest.report(), Answer::Invalid as u32, "nothing was asked for yet");
    let before = guest.vm.allocated().unwrap();
    for (gpa, pages) in requests {
        let outcome = guest.convert();
        assert_eq!((outcome.answer, outcome.pages), (Answer::Invalid, 0), "{pages} pages at {gpa:#x}");
        let cause =
            if pages == 0 { "vcpu 0 asked to convert what is no page range" } else { "outside the guest's memory" };
        assert!(outcome.cause.contains(cause), "{pages} pages at {gpa:#x}: {outcome:?}");
        assert_eq!(guest.report(), Answer::Invalid as u32);
    }
    assert_eq!(guest.report(), 0x1111);
    guest.end();
    assert_eq!(guest.vm.allocated().unwrap(), before);
    assert_eq!(guest.vm.memory().map().count(PageState::Private), MEMORY / PAGE_SIZE);
    let count = requests.len() as u64;
    assert_eq!(guest.vm.conversions(), ConversionTotals { requests: count, refused: count, ..Default::default() });
}

#[test]
fn a_senseless_hypercall_is_refused_by_kvm_or_by_us() {
    let Some(platform) = kvm() else { return };
    let Some(config) = with_hypercalls() else { return };
    let by_kvm = [(DATA + 1, 1), (DATA, 0), (DATA, u64::MAX)];
    let by_us = [(MEMORY, 1), (DATA, 1 << 52)];
    let mut guest = Guest::new(&platform, config, |a| {
        for (gpa, pages) in by_kvm.into_iter().chain(by_us) {
            a.convert(gpa, pages, Side::Shared)?;
            a.report()?;
        }
        a.end(0)
    });
    // KVM's own error numbers are negative.
    for _ in by_kvm {
        assert_eq!(guest.report() as i32, -22);
    }
    let outside = guest.convert();
    assert!(outside.cause.starts_with("0x400000 lies outside"), "{outside:?}");
    assert_eq!(guest.report(), 22);
    let too_long = guest.convert();
    assert!(too_long.cause.contains("no page range"), "{too_long:?}");
    assert_eq!(guest.report(), 22);
    guest.end();
    assert_eq!(guest.vm.memory().map().count(PageState::Private), MEMORY / PAGE_SIZE);
}

#[test]
fn a_hypercall_with_reserved_attributes_is_refused_and_one_with_a_page_size_is_not() {
    let Some(platform) = kvm() else { return };
    let Some(config) = with_hypercalls() else { return };
    let mut guest = Guest::new(&platform, config, |a| {
        for attributes in [1 << 5, 1 << 63, 1 << 5 | 1 << 4, 1] {
            a.map_gpa_range(DATA, 1, attributes)?;
            a.report()?;
        }
        a.end(0)
    });
    for _ in 0..3 {
        assert_eq!(guest.report(), 22);
    }
    assert_eq!(guest.vm.conversions(), ConversionTotals::default());
    assert_eq!(guest.convert().pages, 1);
    assert_eq!(guest.report(), 0);
    guest.end();
}

#[test]
fn a_forged_or_repeated_request_is_refused() {
    let Some(platform) = kvm() else { return };
    let mut guest = Guest::new(&platform, config(2), |a| {
        a.convert(DATA, 2, Side::Shared)?;
        a.report()?;
        a.end(0)
    });
    let forged = |vm: &KvmVm, vcpu, gpa, pages, to| {
        let outcome = vm.convert(&ConversionRequest::from_guest(vcpu, gpa, pages, to));
        assert_eq!((outcome.answer(), outcome.pages()), (Answer::Invalid, 0));
        assert!(
            matches!(outcome.cause(), Some(Error::NotAsked { vcpu: named, gpa: at }) if (*named, at.0) == (vcpu, gpa))
        );
    };
    forged(&guest.vm, 0, DATA, 2, Side::Shared);
    let Exit::Conversion(request) = guest.run() else { panic!("no conversion") };
    forged(&guest.vm, 1, DATA, 2, Side::Shared);
    forged(&guest.vm, 0, DATA - PAGE_SIZE, 2, Side::Shared);
    forged(&guest.vm, 0, DATA, 3, Side::Shared);
    forged(&guest.vm, 0, DATA, 2, Side::Private);
    assert_eq!(guest.vm.conversions().requests, 0);

    let outcome = guest.vm.convert(&request);
    assert_eq!((outcome.answer(), outcome.pages()), (Answer::Done, 2), "{:?}", outcome.cause());
    forged(&guest.vm, 0, DATA, 2, Side::Shared);
    guest.vcpus[0].answer_conversion(outcome).unwrap();
    assert_eq!(guest.report(), Answer::Done as u32);
    forged(&guest.vm, 0, DATA, 2, Side::Shared);
    assert_eq!(guest.vm.conversions().requests, 1);
    assert_eq!(guest.vm.memory().map().count(PageState::Shared), 2);
    guest.end();
}

#[test]
fn a_guest_that_was_refused_is_not_converted_behind_its_back() {
    let Some(platform) = kvm() else { return };
    let mut guest = Guest::new(&platform, config(1), |a| {
        a.convert(DATA, 1, Side::Shared)?;
        a.report()?;
        a.store(DATA, 0x1111)?;
        a.load(DATA)?;
        a.report()?;
        a.end(0)
    });
    let Exit::Conversion(request) = guest.run() else { panic!("no conversion") };
    guest.vcpus[0].refuse_conversion().unwrap();
    assert_eq!(guest.report(), Answer::Invalid as u32);
    assert!(matches!(guest.vm.convert(&request).cause(), Some(Error::NotAsked { .. })));
    assert_eq!(guest.report(), 0x1111);
    assert_refused(&guest.vm, range(DATA, 1));
    guest.end();
}

#[test]
fn a_halted_vcpu_stays_halted_until_an_interrupt_can_wake_it() {
    let Some(platform) = kvm() else { return };
    let accepting = VmConfig { interrupts: InterruptPolicy::default().accept(0x41).unwrap(), ..config(1) };
    let mut guest = Guest::new(&platform, accepting, |a| {
        a.cli()?;
        a.hlt()?;
        a.end(1)
    });
    assert_eq!(guest.run(), Exit::Halted);
    assert_eq!(guest.run(), Exit::Halted);
    guest.vcpus[0].inject(Event::Interrupt(0x41)).unwrap();
    assert_eq!(guest.run(), Exit::Halted, "interrupts are off");
}

#[test]
fn a_conversion_waits_for_a_pinned_view_and_the_guest_may_try_again() {
    let Some(platform) = kvm() else { return };
    let mut guest = Guest::new(&platform, config(1), |a| {
        a.convert(DATA, 1, Side::Shared)?;
        a.store(DATA, 0x1111)?;
        for _ in 0..2 {
            a.convert(DATA, 1, Side::Private)?;
            a.report()?;
        }
        a.end(0)
    });
    assert_eq!(guest.convert().pages, 1);
    let pinned = guest.vm.memory().memory();
    let outcome = guest.convert();
    assert!(outcome.cause.contains("pinned") && outcome.cause.contains("0x300000..0x301000"), "{outcome:?}");
    assert_eq!(pinned.read_obj::<u32>(GuestAddress(DATA)).unwrap(), 0x1111, "it stayed as it was");
    drop(pinned);
    assert_eq!(guest.report(), Answer::Retry as u32);
    assert_eq!(guest.convert().pages, 1);
    assert_eq!(guest.report(), Answer::Done as u32);
    assert_refused(&guest.vm, range(DATA, 1));
    guest.end();
}

#[test]
fn several_vcpus_convert_at_the_same_time() {
    const VCPUS: u32 = 4;
    const PAGES: u32 = 10;
    let Some(platform) = kvm() else { return };
    // The pages of all vCPUs alternate, so that each word of the page-state map has pages of everybody. Every third
    // page goes back.
    let mut guest = Guest::new(&platform, config(VCPUS), |a| {
        for page in 0..PAGES {
            let sides: &[Side] = if page.is_multiple_of(3) { &[Side::Shared, Side::Private] } else { &[Side::Shared] };
            for side in sides {
                a.lea(ebx, edi + (DATA / PAGE_SIZE) as u32 + page * VCPUS)?;
                a.convert_frame(1, *side)?;
            }
            // What each vCPU leaves in each of its pages.
            a.mov(eax, edi)?;
            a.shl(rbx, 12)?;
            a.mov(dword_ptr(rbx), eax)?;
        }
        a.end(0)
    });
    let Guest { vcpus, vm, .. } = &mut guest;
    let start = Barrier::new(vcpus.len());
    thread::scope(|scope| {
        for vcpu in vcpus {
            scope.spawn(|| {
                start.wait();
                assert_eq!(drive(vm, vcpu).unwrap(), Exit::Ended { code: 0 });
            });
        }
    });
    for page in 0..PAGES {
        for vcpu in 0..VCPUS {
            let gpa = DATA + u64::from(page * VCPUS + vcpu) * PAGE_SIZE;
            let private = page.is_multiple_of(3);
            let state = if private { PageState::Private } else { PageState::Shared };
            assert_eq!(guest.vm.memory().map().get(Gpa(gpa)), Some(state), "page {page} of vcpu {vcpu}");
            match read(&guest.vm, gpa) {
                Ok(value) => assert!(!private && value == vcpu, "page {page} of vcpu {vcpu} gave {value}"),
                Err(error) => assert!(private, "page {page} of vcpu {vcpu}: {error}"),
            }
        }
    }
    let (back, there) = (u64::from(PAGES.div_ceil(3) * VCPUS), u64::from(PAGES * VCPUS));
    let totals = ConversionTotals { requests: back + there, refused: 0, to_private: back, to_shared: there };
    assert_eq!(guest.vm.conversions(), totals);
}

#[test]
fn conversions_do_not_disturb_the_pages_next_to_them() {
    const NEIGHBOUR: u64 = DATA + PAGE_SIZE;
    const STOP: u64 = NEIGHBOUR + 8;
    const ROUNDS: u32 = 50;
    let Some(platform) = kvm() else { return };
    // The first vCPU converts a page to and fro while the second one writes and reads the one behind it.
    let mut guest = Guest::new(&platform, config(2), |a| {
        let mut neighbour = a.create_label();
        a.test(edi, edi)?;
        a.jne(neighbour)?;

        let mut again = a.create_label();
        a.mov(r8d, ROUNDS)?;
        a.set_label(&mut again)?;
        a.convert(DATA, 1, Side::Shared)?;
        a.store(DATA, 1)?;
        a.convert(DATA, 1, Side::Private)?;
        a.store(DATA, 2)?;
        a.dec(r8d)?;
        a.jne(again)?;
        a.store(STOP, 1)?;
        a.end(0)?;

        let (mut again, mut wrong) = (a.create_label(), a.create_label());
        a.set_label(&mut neighbour)?;
        a.mov(rbx, NEIGHBOUR)?;
        a.set_label(&mut again)?;
        a.inc(r8d)?;
        a.mov(dword_ptr(rbx), r8d)?;
        a.mov(eax, dword_ptr(rbx))?;
        a.cmp(eax, r8d)?;
        a.jne(wrong)?;
        a.mov(eax, dword_ptr(rbx + 8))?;
        a.test(eax, eax)?;
        a.je(again)?;
        a.end(0)?;
        a.set_label(&mut wrong)?;
        a.end(1)
    });
    let Guest { vcpus, vm, .. } = &mut guest;
    thread::scope(|scope| {
        for vcpu in vcpus {
            scope.spawn(|| assert_eq!(drive(vm, vcpu).unwrap(), Exit::Ended { code: 0 }));
        }
    });
    let rounds = u64::from(ROUNDS);
    let totals = ConversionTotals { requests: 2 * rounds, refused: 0, to_private: rounds, to_shared: rounds };
    assert_eq!(guest.vm.conversions(), totals);
}

#[test]
fn a_conversion_crosses_the_border_of_adjoining_slots_but_no_gap() {
    const BORDER: u64 = MEMORY;
    const GAP: u64 = MEMORY + 0x10_0000;
    const BEHIND: u64 = MEMORY + 0x20_0000;
    let Some(platform) = kvm() else { return };
    let slots = vec![range(BEHIND, 256), range(0, BORDER / PAGE_SIZE), range(BORDER, 256)];
    let mut guest = Guest::new(&platform, VmConfig { memory: slots, ..config(1) }, |a| {
        a.convert(BORDER - 2 * PAGE_SIZE, 4, Side::Shared)?;
        a.report()?;
        a.load(BORDER - 4)?;
        a.report()?;
        a.load(BORDER)?;
        a.report()?;
        a.convert(GAP - PAGE_SIZE, 2, Side::Shared)?;
        a.report()?;
        a.convert(GAP - PAGE_SIZE, (BEHIND - GAP) / PAGE_SIZE + 2, Side::Shared)?;
        a.report()?;
        a.convert(BEHIND, 1, Side::Shared)?;
        a.report()?;
        a.store(BEHIND, 0x1111)?;
        a.store(GAP, 1)?;
        a.end(0)
    });
    assert_eq!(guest.convert().pages, 4);
    assert_eq!(guest.report(), Answer::Done as u32);
    let both = 0x4444_3333_2222_1111u64;
    guest.vm.memory().memory().write_obj(both, GuestAddress(BORDER - 4)).unwrap();
    assert_eq!((guest.report(), guest.report()), (0x2222_1111, 0x4444_3333));
    for _ in 0..2 {
        let outcome = guest.convert();
        assert!(outcome.cause.starts_with(&format!("{GAP:#x} lies outside")), "{outcome:?}");
        assert_eq!(guest.report(), Answer::Invalid as u32);
    }
    assert_eq!(guest.vm.memory().map().count(PageState::Shared), 4, "nothing before the gap was converted");
    assert_eq!(guest.convert().pages, 1);
    assert_eq!(guest.report(), Answer::Done as u32);
    let error = guest.vcpus[0].run().unwrap_err();
    if can_be_emulated(&error) {
        assert!(matches!(error, Error::MmioRefused { vcpu: 0, gpa: Gpa(GAP), write: true }), "{error}");
    }
    assert_eq!(read(&guest.vm, BEHIND).unwrap(), 0x1111);
    assert_refused(&guest.vm, range(GAP, 1));
}

// Exits

/// Whether KVM can see an instruction that it has to emulate, as for MMIO and string I/O. It cannot where it is in
/// private memory, and the guest shuts down instead; that is what `error` must say then.
fn can_be_emulated(error: &Error) -> bool {
    // A vault takes what is best.
    let offers = KvmPlatform::probe();
    let guest_memfd = offers.iter().any(|offer| offer.protection == Protection::GuestMemfd && offer.missing.is_empty());
    if isolation() == Protection::None || !guest_memfd {
        return true;
    }
    assert!(matches!(error, Error::Crashed { reason, .. } if reason.contains("shut down")), "{error}");
    false
}

/// A guest of two vCPUs: the second does what `wrong` wrote, and fails; the first must not notice.
fn fails_alone(
    platform: &KvmPlatform,
    doorbell: Doorbell,
    wrong: impl FnOnce(&mut common::Assembler) -> Result<(), IcedError>,
) -> Error {
    let mut guest = Guest::new(platform, VmConfig { doorbell, ..config(2) }, |a| {
        let mut second = a.create_label();
        a.test(edi, edi)?;
        a.jne(second)?;
        a.mov(eax, 7u32)?;
        a.report()?;
        a.end(0)?;
        a.set_label(&mut second)?;
        wrong(a)?;
        a.end(0)
    });
    let error = guest.vcpus[1].run().unwrap_err();
    assert!(!guest.overdue());
    let again = guest.vcpus[1].run();
    assert!(matches!(again, Err(Error::Protocol { vcpu: 1, .. })), "it went on after: {error}; {again:?}");
    assert_eq!(guest.report(), 7);
    guest.end();
    error
}

#[test]
fn an_access_outside_memory_is_refused_and_says_where_and_by_whom() {
    let Some(platform) = kvm() else { return };
    let read = fails_alone(&platform, Doorbell::Port, |a| a.load(0xd000_0010));
    let write = fails_alone(&platform, Doorbell::Port, |a| a.store(MEMORY, 1));
    if !can_be_emulated(&read) || !can_be_emulated(&write) {
        return;
    }
    assert!(matches!(read, Error::MmioRefused { vcpu: 1, gpa: Gpa(0xd000_0010), write: false }), "{read:?}");
    assert!(read.to_string().contains("vcpu 1 touched 0xd0000010"), "{read}");
    assert!(matches!(write, Error::MmioRefused { vcpu: 1, gpa: Gpa(MEMORY), write: true }), "{write:?}");
    assert!(write.to_string().contains("vcpu 1 wrote to 0x400000"), "{write}");
}

#[test]
fn a_triple_fault_stops_one_vcpu_only() {
    let Some(platform) = kvm() else { return };
    let error = fails_alone(&platform, Doorbell::Port, |a| a.ud2());
    assert!(matches!(&error, Error::Crashed { vcpu: 1, reason } if reason.contains("triple fault")), "{error}");
}

#[test]
fn an_unknown_doorbell_stops_one_vcpu_only() {
    let Some(platform) = kvm() else { return };
    let unknown = |error: Error, register: u16, access: Access| match error {
        Error::UnknownDoorbell { vcpu: 1, register: named, access: how } => {
            assert_eq!((named, how), (register, access));
        }
        other => panic!("register {register:#x}: {other}"),
    };
    for doorbell in [Doorbell::Port, Doorbell::Msr] {
        // Between two registers, one that nobody has, and known ones used the wrong way around.
        for register in [control::END + 1, REPORT + 2, 0x1fc, SPACE - 1] {
            unknown(fails_alone(&platform, doorbell, |a| a.listen(register)), register, Access::Read);
        }
        for (register, value) in [(control::CONSOLE, 0x100), (control::CONVERT, 2), (0x1fc, 0)] {
            let ring = |a: &mut common::Assembler| {
                a.mov(eax, value)?;
                a.ring(register)
            };
            unknown(fails_alone(&platform, doorbell, ring), register, Access::Write(value));
        }
        unknown(fails_alone(&platform, doorbell, |a| a.listen(control::END)), control::END, Access::Read);
    }

    // Registers are 32 bits wide.
    let port = |a: &mut common::Assembler| {
        a.mov(edx, u32::from(PORT_BASE + control::CONSOLE))?;
        a.mov(eax, 0x6665u32)
    };
    let narrow = fails_alone(&platform, Doorbell::Port, |a| port(a).and_then(|()| a.out(dx, al)));
    unknown(narrow, control::CONSOLE, Access::Write(0x65));
    let narrow = fails_alone(&platform, Doorbell::Port, |a| port(a).and_then(|()| a.out(dx, ax)));
    unknown(narrow, control::CONSOLE, Access::Write(0x6665));
    let narrow = fails_alone(&platform, Doorbell::Port, |a| port(a).and_then(|()| a.in_(al, dx)));
    unknown(narrow, control::CONSOLE, Access::Read);
    let wide = fails_alone(&platform, Doorbell::Msr, |a| {
        a.mov(ecx, MSR_BASE + u32::from(control::CONSOLE))?;
        a.mov(eax, 0x65u32)?;
        a.mov(edx, 1u32)?;
        a.wrmsr()
    });
    unknown(wide, control::CONSOLE, Access::Write(0x65));
}

#[test]
fn string_input_stops_one_vcpu_only() {
    let Some(platform) = kvm() else { return };
    // Some of these have as many bytes as a read that is no string.
    for (port, count) in [(0x1230, 2), (0x1230, 3), (0x1230, 4), (PORT_BASE + control::CONVERT, 4)] {
        let error = fails_alone(&platform, Doorbell::Port, |a| {
            a.mov(edx, u32::from(port))?;
            a.mov(ecx, count)?;
            a.mov(rdi, DATA)?;
            a.rep().insb()
        });
        if !can_be_emulated(&error) {
            continue;
        }
        let Error::Crashed { vcpu: 1, reason } = &error else { panic!("{count} bytes from port {port:#x}: {error}") };
        assert!(reason.contains("string i/o") && reason.contains(&format!("{port:#x}")), "{reason}");
    }
}

#[test]
fn string_output_to_a_doorbell_by_bytes_stops_one_vcpu_only() {
    let Some(platform) = kvm() else { return };
    let error = fails_alone(&platform, Doorbell::Port, |a| {
        a.mov(edx, u32::from(PORT_BASE + control::CONSOLE))?;
        a.mov(ecx, 4u32)?;
        a.mov(rsi, CODE)?;
        a.rep().outsb()
    });
    match &error {
        // KVM may hand over the bytes one by one, which looks like so many instructions.
        Error::UnknownDoorbell { vcpu: 1, register: control::CONSOLE, access: Access::Write(0..256) } => {}
        Error::Crashed { vcpu: 1, reason } if can_be_emulated(&error) => {
            assert!(reason.contains("string i/o"), "{reason}");
        }
        error if !can_be_emulated(error) => {}
        other => panic!("{other}"),
    }
}

#[test]
fn ports_outside_the_doorbells_show_what_the_guest_does_and_take_no_more_than_it_reads() {
    let Some(platform) = kvm() else { return };
    // In the wild, and next to the doorbells on both sides.
    let ports = [0x1230, PORT_BASE - 4, PORT_BASE + SPACE];
    let mut guest = Guest::new(&platform, config(1), |a| {
        for port in ports {
            for width in [1, 2, 4] {
                a.mov(edx, u32::from(port))?;
                a.mov(rax, u64::MAX)?;
                match width {
                    1 => a.in_(al, dx)?,
                    2 => a.in_(ax, dx)?,
                    _ => a.in_(eax, dx)?,
                }
                a.mov(rbx, rax)?;
                match width {
                    1 => a.out(dx, al)?,
                    2 => a.out(dx, ax)?,
                    _ => a.out(dx, eax)?,
                }
                a.mov(eax, ebx)?;
                a.report()?;
                a.mov(rax, rbx)?;
                a.shr(rax, 32)?;
                a.report()?;
            }
        }
        a.end(0)
    });
    const ANSWER: u64 = 0x8877_6655_4433_2211;
    for port in ports {
        for (width, value, whole) in [
            (1, 0x11, 0xffff_ffff_ffff_ff11u64),
            (2, 0x2211, 0xffff_ffff_ffff_2211),
            // 32-bit results clear the upper half.
            (4, 0x4433_2211, 0x0000_0000_4433_2211),
        ] {
            assert_eq!(guest.run(), Exit::PortRead { port, width });
            guest.vcpus[0].answer_read(ANSWER).unwrap();
            assert_eq!(guest.run(), Exit::PortWrite { port, width, value });
            assert_eq!([guest.report(), guest.report()], [whole as u32, (whole >> 32) as u32]);
        }
    }
    guest.end();
}

#[test]
fn msrs_outside_the_doorbells_show_what_the_guest_does() {
    let Some(platform) = kvm() else { return };
    let msrs = [0x4355_0000, MSR_BASE - 1, MSR_BASE + u32::from(SPACE)];
    let mut guest = Guest::new(&platform, config(1), |a| {
        for index in msrs {
            a.mov(ecx, index)?;
            a.rdmsr()?;
            a.wrmsr()?;
        }
        a.end(0)
    });
    const ANSWER: u64 = 0x8877_6655_4433_2211;
    for index in msrs {
        assert_eq!(guest.run(), Exit::MsrRead { index });
        guest.vcpus[0].answer_read(ANSWER).unwrap();
        assert_eq!(guest.run(), Exit::MsrWrite { index, value: ANSWER });
    }
    guest.end();
}

#[test]
fn a_device_register_has_32_bits_by_whatever_doorbell() {
    const UNKNOWN_MSR: u32 = 0x4355_0000;
    let Some(platform) = kvm() else { return };
    for doorbell in [Doorbell::Port, Doorbell::Msr] {
        let mut guest = Guest::new(&platform, VmConfig { doorbell, ..config(1) }, |a| {
            a.mov(rax, u64::MAX)?;
            a.mov(rdx, u64::MAX)?;
            a.listen(REPORT)?;
            if a.is_by_port() {
                // Like the upper half of an MSR.
                a.mov(rdx, rax)?;
                a.shr(rdx, 32)?;
            }
            a.mov(ecx, UNKNOWN_MSR)?;
            a.wrmsr()?;
            a.end(0)
        });
        assert_eq!(guest.run(), Exit::DoorbellRead { register: REPORT });
        guest.vcpus[0].answer_read(0x8877_6655_4433_2211).unwrap();
        assert_eq!(guest.run(), Exit::MsrWrite { index: UNKNOWN_MSR, value: 0x4433_2211 }, "{doorbell:?}");
        guest.end();
    }
}

#[test]
fn the_console_shows_bytes() {
    let Some(platform) = kvm() else { return };
    let mut guest = Guest::new(&platform, config(1), |a| {
        for byte in *b"hi\xff" {
            a.mov(eax, u32::from(byte))?;
            a.ring(control::CONSOLE)?;
        }
        a.mov(eax, 42u32)?;
        a.ring(control::END)
    });
    for byte in *b"hi\xff" {
        assert_eq!(guest.run(), Exit::Console(byte));
    }
    assert_eq!(guest.run(), Exit::Ended { code: 42 });
}

#[test]
fn each_vcpu_starts_with_its_index_and_the_boot_page() {
    let Some(platform) = kvm() else { return };
    let mut guest = Guest::new(&platform, config(3), |a| {
        a.mov(eax, dword_ptr(rsi))?;
        a.report()?;
        a.mov(eax, edi)?;
        a.report()?;
        a.mov(eax, esi)?;
        a.report()?;
        a.mov(rax, cr3)?;
        a.report()?;
        a.end(0)
    });
    for (index, vcpu) in (0..).zip(&mut guest.vcpus) {
        assert_eq!(vcpu.index(), index);
        for value in [u32::from_le_bytes(*b"CVMB"), index, BOOT_PAGE as u32, TABLES as u32] {
            assert_eq!(vcpu.run().unwrap(), Exit::DoorbellWrite { register: REPORT, value });
        }
    }
    assert!(guest.vm.take_vcpus().is_empty(), "vcpus are handed out once");
}

#[test]
fn a_running_vcpu_keeps_its_vm_alive() {
    let Some(platform) = kvm() else { return };
    let mut guest = Guest::new(&platform, config(2), |a| {
        a.mov(eax, edi)?;
        a.report()?;
        a.load(DATA)?;
        a.end(0)
    });
    let mut last = guest.vcpus.pop().unwrap();
    let _watchdog = Watchdog::new(Duration::from_secs(10), vec![last.kicker()]).unwrap();
    drop(guest);
    assert_eq!(last.run().unwrap(), Exit::DoorbellWrite { register: REPORT, value: 1 });
    assert_eq!(last.run().unwrap(), Exit::Ended { code: 0 });
}

#[test]
fn questions_are_answered_once_in_kind_and_before_the_guest_goes_on() {
    let Some(platform) = kvm() else { return };
    let mut guest = Guest::new(&platform, config(1), |a| {
        a.listen(REPORT)?;
        a.report()?;
        a.convert(DATA, 1, Side::Shared)?;
        a.report()?;
        a.mov(ecx, 0x4355_0000u32)?;
        a.rdmsr()?;
        a.report()?;
        a.end(0)
    });
    fn out_of_order<T: std::fmt::Debug>(result: Result<T, Error>) {
        assert!(matches!(result, Err(Error::Protocol { vcpu: 0, .. })), "{result:?}");
    }
    let (vm, vcpu) = (&guest.vm, &mut guest.vcpus[0]);
    // What a conversion that nobody asked for comes to: the wrong answer to everything.
    let forged = || vm.convert(&ConversionRequest::from_guest(0, DATA + PAGE_SIZE, 1, Side::Shared));
    out_of_order(vcpu.answer_read(1));
    out_of_order(vcpu.answer_conversion(forged()));
    out_of_order(vcpu.refuse_conversion());

    assert_eq!(vcpu.run().unwrap(), Exit::DoorbellRead { register: REPORT });
    out_of_order(vcpu.run());
    out_of_order(vcpu.answer_conversion(forged()));
    out_of_order(vcpu.refuse_conversion());
    out_of_order(vcpu.run());
    vcpu.answer_read(5).unwrap();
    out_of_order(vcpu.answer_read(6));
    assert_eq!(vcpu.run().unwrap(), Exit::DoorbellWrite { register: REPORT, value: 5 });
    out_of_order(vcpu.answer_read(7));

    let exit = vcpu.run().unwrap();
    let Exit::Conversion(request) = exit else { panic!("{exit:?}") };
    out_of_order(vcpu.run());
    out_of_order(vcpu.answer_read(8));
    out_of_order(vcpu.run());
    out_of_order(vcpu.answer_conversion(forged()));
    let conversion = vm.convert(&request);
    out_of_order(vcpu.run());
    vcpu.answer_conversion(conversion).unwrap();
    out_of_order(vcpu.answer_conversion(vm.convert(&request)));
    out_of_order(vcpu.refuse_conversion());
    let done = Answer::Done as u32;
    assert_eq!(vcpu.run().unwrap(), Exit::DoorbellWrite { register: REPORT, value: done });

    assert_eq!(vcpu.run().unwrap(), Exit::MsrRead { index: 0x4355_0000 });
    out_of_order(vcpu.run());
    out_of_order(vcpu.answer_conversion(forged()));
    vcpu.answer_read(9).unwrap();
    out_of_order(vcpu.answer_read(10));
    assert_eq!(vcpu.run().unwrap(), Exit::DoorbellWrite { register: REPORT, value: 9 });
    guest.end();
}

#[test]
fn a_policy_without_performance_counters_leaves_none_to_the_guest() {
    let Some(platform) = kvm() else { return };
    let config = VmConfig { policy: Policy::NO_PERFORMANCE_COUNTERS, ..config(1) };
    let launch = platform.launch(config.clone());
    if let Err(Error::Config(reason)) = &launch {
        return skip(reason);
    }
    drop(launch);
    let mut guest = Guest::new(&platform, config, |a| {
        a.mov(eax, 0xau32)?;
        a.xor(ecx, ecx)?;
        a.cpuid()?;
        a.report()?;
        // The first counter: reading one that is not there is a fault, which this guest has nobody for.
        a.xor(ecx, ecx)?;
        a.rdpmc()?;
        a.end(0)
    });
    assert_eq!(guest.report(), 0, "there are performance counters");
    assert!(matches!(guest.vcpus[0].run(), Err(Error::Crashed { .. })), "a counter can be read");
}

#[test]
fn a_policy_that_the_vmm_could_undo_is_refused() {
    let Some(platform) = kvm() else { return };
    for policy in [Policy::NO_DEBUG, Policy::NO_DEBUG | Policy::NO_MMIO, Policy::from_bits_retain(1 << 63)] {
        let launched = platform.launch(VmConfig { policy, ..config(1) });
        if isolation() == Protection::Vault && policy.difference(Policy::NO_DEBUG | Policy::NO_MMIO).is_empty() {
            assert!(launched.is_ok(), "{policy:?}: a vault lets nobody debug its guest");
        } else {
            assert!(matches!(launched, Err(Error::Config(_))), "{policy:?}");
        }
    }
    platform.launch(VmConfig { policy: Policy::NO_MMIO, ..config(1) }).unwrap();
}

#[test]
fn a_register_is_visible_exposed_by_the_exit_or_hidden_as_the_isolation_says() {
    const SECRET: u64 = 0x5ec2_e75e_c2e7_5ec2;
    let Some(platform) = kvm() else { return };
    let mut guest = Guest::new(&platform, config(1), |a| {
        a.mov(r15, SECRET)?;
        a.mov(rbx, SECRET)?;
        a.mov(rax, SECRET)?;
        a.ring(REPORT)?;
        a.hlt()
    });
    assert_eq!(guest.report(), SECRET as u32);
    let port = u64::from(PORT_BASE + REPORT);
    for register in Register::ALL {
        let read = guest.vcpus[0].register(register).unwrap();
        let expected = match register {
            Register::Rax if isolation() == Protection::Vault => RegisterRead::Exposed(SECRET & 0xffff_ffff),
            Register::Rdx if isolation() == Protection::Vault => RegisterRead::Exposed(port),
            _ if isolation() == Protection::Vault => RegisterRead::Hidden,
            Register::Rax | Register::Rbx | Register::R15 => RegisterRead::Visible(SECRET),
            Register::Rdx => RegisterRead::Visible(port),
            Register::Cr3 => RegisterRead::Visible(TABLES),
            _ => {
                assert!(matches!(read, RegisterRead::Visible(_)), "{register:?}: {read:?}");
                continue;
            }
        };
        assert_eq!(read, expected, "{register:?}");
    }
    assert_eq!(guest.run(), Exit::Halted);
    let read = guest.vcpus[0].register(Register::Rax).unwrap();
    if isolation() == Protection::Vault {
        assert_eq!(read, RegisterRead::Hidden, "the exit before it has exposed it");
    }
}

// Kicks

#[test]
fn a_watchdog_stops_a_guest_that_spins_and_the_guest_can_go_on() {
    let Some(platform) = kvm() else { return };
    let mut guest = Guest::new(&platform, config(1), |a| {
        a.convert(DATA, 1, Side::Shared)?;
        a.mov(rbx, DATA)?;
        let mut spin = a.create_label();
        a.set_label(&mut spin)?;
        a.mov(eax, dword_ptr(rbx))?;
        a.test(eax, eax)?;
        a.je(spin)?;
        a.report()?;
        a.end(0)
    });
    assert_eq!(guest.convert().pages, 1);
    for _ in 0..2 {
        let begin = Instant::now();
        let watchdog = Watchdog::new(Duration::from_millis(50), vec![guest.vcpus[0].kicker()]).unwrap();
        assert_eq!(guest.run(), Exit::Kicked);
        assert!(watchdog.fired() && begin.elapsed() >= Duration::from_millis(50));
    }
    assert!(!guest.overdue());
    write(&guest.vm, DATA, 0x1111);
    assert_eq!(guest.report(), 0x1111);
    guest.end();
}

#[test]
fn a_kick_before_the_run_stops_the_next_run_once() {
    let Some(platform) = kvm() else { return };
    let mut guest = Guest::new(&platform, config(2), |a| {
        a.listen(REPORT)?;
        a.report()?;
        a.end(0)
    });
    let kicker = guest.vcpus[0].kicker();
    kicker.kick();
    kicker.kick();
    assert_eq!(guest.vcpus[1].run().unwrap(), Exit::DoorbellRead { register: REPORT }, "it hit another vcpu");
    assert_eq!(guest.run(), Exit::Kicked);
    assert_eq!(guest.run(), Exit::DoorbellRead { register: REPORT });
    // Neither does a kick answer a question, nor does it lose the answer.
    kicker.kick();
    assert!(matches!(guest.vcpus[0].run(), Err(Error::Protocol { .. })));
    guest.vcpus[0].answer_read(5).unwrap();
    assert_eq!(guest.run(), Exit::Kicked);
    assert_eq!(guest.report(), 5);
    guest.end();
    drop(guest);
    // The vCPU is gone, and a kick does nothing.
    kicker.kick();
}

/// Kicks a vCPU that runs `body` over and over, each time a bit later than before relative to the start of the run.
fn kicks_are_never_lost(platform: &KvmPlatform, body: impl FnOnce(&mut common::Assembler) -> Result<(), IcedError>) {
    const KICKS: u32 = 200;
    let mut guest = Guest::new(platform, config(1), |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        body(a)?;
        a.jmp(again)
    });
    let kicker = guest.vcpus[0].kicker();
    thread::scope(|scope| {
        // The other thread spins until a run begins: to be woken would take it longer than that.
        let (begin, begun) = mpsc::channel();
        scope.spawn(move || {
            for kick in 0..KICKS {
                loop {
                    match begun.try_recv() {
                        Ok(()) => break,
                        Err(TryRecvError::Empty) => std::hint::spin_loop(),
                        Err(TryRecvError::Disconnected) => return,
                    }
                }
                let begin = Instant::now();
                while begin.elapsed() < Duration::from_nanos(u64::from(kick) * 50) {
                    std::hint::spin_loop();
                }
                kicker.kick();
            }
        });
        for kick in 0..KICKS {
            begin.send(()).unwrap();
            while guest.run() != Exit::Kicked {}
            // A lost kick would have left the vCPU running until the guest's own watchdog.
            assert!(!guest.overdue(), "kick {kick} was lost");
        }
    });
}

#[test]
fn kicks_that_race_with_a_spinning_guest_are_never_lost() {
    let Some(platform) = kvm() else { return };
    kicks_are_never_lost(&platform, |_| Ok(()));
}

#[test]
fn kicks_that_race_with_exits_are_never_lost() {
    let Some(platform) = kvm() else { return };
    kicks_are_never_lost(&platform, |a| a.report());
}

// Launches

#[test]
fn a_launch_refuses_what_lies_outside_memory() {
    let Some(platform) = kvm() else { return };
    let mut launch = platform.launch(config(1)).unwrap();
    let page = [1u8; 4096];
    let outside = |result: Result<(), Error>, gpa: u64| {
        assert!(matches!(result, Err(Error::OutsideMemory { gpa: at }) if at.0 == gpa), "{result:?}");
    };
    outside(launch.load(Gpa(MEMORY), &page, PageKind::Measured), MEMORY);
    outside(launch.load(Gpa(MEMORY - PAGE_SIZE), &[1; 4097], PageKind::Unmeasured), MEMORY);
    outside(launch.zero(range(MEMORY - PAGE_SIZE, 2)), MEMORY);
    outside(launch.load_boot_page(Gpa(MEMORY), [0; 4]), MEMORY);
    outside(launch.start_in_long_mode(Gpa(CODE), Gpa(MEMORY - PAGE_SIZE), Gpa(BOOT_PAGE)), MEMORY);
    for (gpa, contents) in [(CODE + 1, &page[..]), (CODE, &[])] {
        assert!(matches!(launch.load(Gpa(gpa), contents, PageKind::Measured), Err(Error::Layout(_))));
    }
    // None of the refused pages was taken.
    launch.load(Gpa(MEMORY - PAGE_SIZE), &page, PageKind::Measured).unwrap();
}

#[test]
fn a_launch_refuses_to_load_a_page_twice() {
    let Some(platform) = kvm() else { return };
    let mut launch = platform.launch(config(1)).unwrap();
    launch.load(Gpa(CODE), &[1; 3 * 4096], PageKind::Measured).unwrap();
    launch.zero(range(DATA, 2)).unwrap();
    let again = |result: Result<(), Error>, twice: GpaRange| {
        assert!(matches!(result, Err(Error::LoadedTwice { range }) if range == twice), "{result:?}");
    };
    again(launch.load(Gpa(CODE + PAGE_SIZE), &[2], PageKind::Measured), range(CODE + PAGE_SIZE, 1));
    again(launch.load(Gpa(DATA), &[2], PageKind::Unmeasured), range(DATA, 1));
    again(launch.zero(range(DATA - PAGE_SIZE, 4)), range(DATA, 2));
    again(launch.load_boot_page(Gpa(CODE), [0; 4]), range(CODE, 1));
    launch.zero(range(DATA - PAGE_SIZE, 1)).unwrap();
}

#[test]
fn a_launch_takes_one_state_for_each_vcpu() {
    let Some(platform) = kvm() else { return };
    let state = |index| VcpuState::long_mode(Gpa(CODE), Gpa(TABLES), index, Gpa(BOOT_PAGE));
    let mut launch = platform.launch(config(2)).unwrap();
    launch.set_vcpu(0, &state(0)).unwrap();
    for index in [0, 2, u32::MAX] {
        let result = launch.set_vcpu(index, &state(index));
        assert!(matches!(result, Err(Error::VcpuState { vcpu, .. }) if vcpu == index), "{result:?}");
    }
    assert!(matches!(launch.seal(), Err(Error::VcpuState { vcpu: 1, .. })), "vcpu 1 has no state");
}

#[test]
fn a_launch_refuses_configurations_without_sense() {
    let Some(platform) = kvm() else { return };
    for vcpus in [0, MAX_VCPUS + 1, u32::MAX] {
        assert!(matches!(VmConfig::new(MEMORY, vcpus), Err(Error::Config(_))));
        assert!(matches!(platform.launch(VmConfig { vcpus, ..config(1) }), Err(Error::Config(_))));
    }
    for memory in [vec![], vec![range(0, 4), range(3 * PAGE_SIZE, 4)]] {
        assert!(matches!(platform.launch(VmConfig { memory, ..config(1) }), Err(Error::Layout(_))));
    }
}

#[test]
fn the_same_launch_gives_the_same_measurement_and_another_one_does_not() {
    let Some(platform) = kvm() else { return };
    let measure = |config: VmConfig, code: u32| {
        let launch = load(&platform, config, |a| a.end(code));
        launch.seal().unwrap().transcript().measurement()
    };
    let first = measure(config(1), 0);
    assert_eq!(first, measure(config(1), 0));
    assert_ne!(first, measure(config(1), 1));
    assert_ne!(first, measure(config(2), 0));
    let interrupts = InterruptPolicy::default().accept(0x41).unwrap();
    assert_ne!(first, measure(VmConfig { interrupts, ..config(1) }, 0));
}

#[test]
fn a_device_that_is_not_kvm_is_refused_with_a_remedy() {
    let missing = KvmPlatform::open(Path::new("/nonexistent/kvm"), None).unwrap_err();
    assert!(
        matches!(&missing, KvmError::Open { path, remedy, .. }
            if path == Path::new("/nonexistent/kvm") && remedy.contains("load kvm_intel or kvm_amd")),
        "{missing}"
    );
    let null = KvmPlatform::open(Path::new("/dev/null"), None).unwrap_err();
    assert!(matches!(&null, KvmError::Open { path, .. } if path == Path::new("/dev/null")), "{null}");

    let file = tempfile::NamedTempFile::new().unwrap();
    fs::set_permissions(file.path(), Permissions::from_mode(0o000)).unwrap();
    if fs::File::open(file.path()).is_ok() {
        return skip("no file is forbidden to this user");
    }
    let forbidden = KvmPlatform::open(file.path(), None).unwrap_err();
    assert!(matches!(&forbidden, KvmError::Open { remedy, .. } if remedy.contains("group")), "{forbidden}");
}

// Images by the Linux boot protocol

/// An ELF file of one segment, at the address where it starts.
fn elf(entry: u64, code: &[u8]) -> Vec<u8> {
    let header: [&[u8]; 5] = [
        b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0",
        &entry.to_le_bytes(),
        &64u64.to_le_bytes(),
        &[0; 12],
        &[64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0],
    ];
    let len = code.len() as u64;
    let segment = [1 | 7 << 32, 64 + 56, entry, entry, len, len, PAGE_SIZE].map(u64::to_le_bytes);
    [header.concat(), segment.concat(), code.to_vec()].concat()
}

#[test]
fn an_image_that_starts_as_linux_does_finds_its_memory_command_line_and_ram_disk() {
    let Some(platform) = kvm() else { return };
    let config = config(1);
    let code = assemble(&config, CODE, |a| {
        // By the zero page in RSI: how many ranges of memory there are, how long the first is, and the first bytes of the
        // command line and of the RAM disk (Linux, Documentation/arch/x86/zero-page.rst and boot.rst).
        a.movzx(eax, byte_ptr(rsi + 0x1e8))?;
        a.report()?;
        a.mov(eax, dword_ptr(rsi + 0x2d0 + 8))?;
        a.report()?;
        for pointer in [0x228, 0x218] {
            a.mov(ebx, dword_ptr(rsi + pointer))?;
            a.mov(eax, dword_ptr(rbx))?;
            a.report()?;
        }
        a.end(0)
    });
    let image = LinuxImage::new(Kernel::Elf(&elf(CODE, &code)), Some(b"disk"), "quiet", &config.memory).unwrap();
    let mut launch = platform.launch(config).unwrap();
    launch.load_linux(&image).unwrap();
    let mut guest = Guest::from_launch(launch);
    assert_eq!(guest.report(), 1);
    assert_eq!(guest.report(), MEMORY as u32);
    assert_eq!(guest.report(), u32::from_le_bytes(*b"quie"));
    assert_eq!(guest.report(), u32::from_le_bytes(*b"disk"));
    guest.end();
}
