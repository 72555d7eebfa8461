use super::*;
use crate::Platform;
use crate::sev::event::code;
use crate::sev::fake::{Host, Pages, TERMINATED, boot, vcpu, vcpu_with};
use crate::sev::ghcb::offset;
use cvm_core::Trigger;
use cvm_core::boot::MemoryRange;
use cvm_core::doorbell::control;
use proptest::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a test of a guest needs: a host, a processor, and memory around the GHCB.
struct Setting {
    host: Host,
    pages: Pages,
    boot: BootPage,
}

impl Setting {
    fn new(protection: Protection, doorbell: Doorbell) -> Self {
        let host = Host::new(protection, 8);
        let memory = MemoryRange { start: host.memory.gpa(0).0, len: 8 * PAGE_SIZE };
        let mut boot = boot(protection, doorbell, memory);
        boot.accepted = u64::MAX;
        Self { host, pages: Pages::default(), boot }
    }

    fn vcpu(&self) -> GhcbVcpu<&Host, &Pages> {
        vcpu(&self.host, &self.pages, &self.boot).unwrap()
    }

    /// A page of memory behind the GHCB.
    fn page(&self, number: u64, count: u64) -> GpaRange {
        GpaRange::from_pages(self.host.memory.gpa(0).0 + number * PAGE_SIZE, count).unwrap()
    }
}

fn convert(vcpu: &GhcbVcpu<&Host, &Pages>, range: GpaRange, to: Side) -> u64 {
    // SAFETY: this host converts nothing.
    unsafe { vcpu.convert(range, to) }
}

fn write(vcpu: &GhcbVcpu<&Host, &Pages>, register: u16, value: u32) {
    // SAFETY: as above.
    unsafe { vcpu.write(register, value) };
}

/// Whether the guest terminates.
fn terminates<R>(work: impl FnOnce() -> R) -> bool {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(_) => false,
        Err(why) => {
            let why = why.downcast_ref::<String>().expect("another panic than by termination");
            assert!(why.starts_with(TERMINATED), "{why}");
            true
        }
    }
}

#[test]
fn the_ghcb_is_given_up_shared_and_registered_before_the_first_exit_by_it() {
    let setting = Setting::new(Protection::SevSnp, Doorbell::Port);
    setting.vcpu();
    let gpa = setting.host.memory.gpa(0).0;
    assert_eq!(*setting.host.msrs.borrow(), [2, 2 << 52 | gpa | 0x14, gpa | 0x12]);
    assert!(setting.pages.valid().is_empty());
    let setting = Setting::new(Protection::SevEs, Doorbell::Port);
    setting.vcpu();
    assert_eq!(*setting.host.msrs.borrow(), [2]);
}

#[test]
fn the_protection_decides_whether_there_is_a_table_of_cpuid_leaves() {
    let cases = [
        (Protection::SevSnp, true, None),
        (Protection::SevSnp, false, Some("cpuid table")),
        (Protection::SevEs, true, Some("cpuid table")),
        (Protection::SevEs, false, None),
        (Protection::Sev, false, Some("protection")),
        (Protection::None, false, Some("protection")),
    ];
    for (protection, has_table, refused) in cases {
        let Setting { host, pages, boot } = &Setting::new(protection, Doorbell::Port);
        let made = vcpu_with(host, pages, boot, has_table);
        match refused {
            Some(what) => assert_eq!(made.err(), Some(Error::BootPage(what)), "{protection:?}, {has_table}"),
            None => assert_eq!(made.unwrap().is_snp(), protection == Protection::SevSnp),
        }
    }
}

#[test]
fn doorbells_ring_by_ports_and_msrs_with_all_that_the_host_needs() {
    for (doorbell, code) in [(Doorbell::Port, code::IOIO), (Doorbell::Msr, code::MSR)] {
        let setting = Setting::new(Protection::SevSnp, doorbell);
        let vcpu = setting.vcpu();
        setting.host.value.set(0x1234_5678);
        write(&vcpu, control::END, 7);
        assert_eq!(vcpu.read(control::CONVERT), 0x1234_5678);
        let exits = setting.host.exits.borrow();
        assert!(exits.iter().all(|seen| seen.code == code));
        let info1: Vec<u64> = exits.iter().map(|seen| seen.info1).collect();
        match doorbell {
            Doorbell::Port => assert_eq!(info1, [0xa004_0040, 0xa018_0041]),
            Doorbell::Msr => assert_eq!(info1, [1, 0]),
        }
    }
}

#[test]
fn a_platform_works_by_the_ghcb_as_it_does_without() {
    let setting = Setting::new(Protection::SevEs, Doorbell::Port);
    let platform = Platform::new(&setting.boot, setting.vcpu(), |_| true).unwrap();
    std::fmt::Write::write_str(&mut platform.console(), "hi").unwrap();
    platform.accept_interrupt(0x41, Trigger::Edge).unwrap();
    // SAFETY: this host converts nothing.
    unsafe { platform.convert(setting.page(2, 1), Side::Shared).unwrap() };
    let codes: Vec<u64> = setting.host.exits.borrow().iter().map(|seen| seen.code).collect();
    assert_eq!(codes, [code::IOIO, code::IOIO, code::IOIO, code::VMMCALL]);
    setting.host.value.set(EINVAL);
    // SAFETY: as above.
    assert!(unsafe { platform.convert(setting.page(2, 1), Side::Shared) }.is_err());
    assert_eq!(platform.machine().cpuid(0xd, 1).unwrap(), [EINVAL as u32; 4]);
}

#[test]
fn pages_are_invalid_before_they_are_given_and_valid_after_they_are_taken() {
    let setting = Setting::new(Protection::SevSnp, Doorbell::Port);
    (2..6).for_each(|page| setting.pages.set(setting.page(page, 1).start().0 / PAGE_SIZE));
    let vcpu = setting.vcpu();
    let valid = setting.pages.valid();
    let first = setting.page(3, 2).start().0 / PAGE_SIZE;
    setting.host.answer_by({
        // At the exit that shares, neither page may be valid, and so at the exit that takes them back.
        let pages: *const Pages = &raw const setting.pages;
        move |_, seen| {
            assert_eq!(seen.code, code::PAGE_STATE);
            // SAFETY: the setting outlives the host that has this closure.
            let valid = unsafe { &*pages }.valid();
            assert!(!valid.contains(&first) && !valid.contains(&(first + 1)));
            false
        }
    });
    assert_eq!(convert(&vcpu, setting.page(3, 2), Side::Shared), 0);
    assert_eq!(setting.pages.valid().len(), 2);
    assert_eq!(convert(&vcpu, setting.page(3, 2), Side::Private), 0);
    assert_eq!(setting.pages.valid(), valid);
}

#[test]
fn a_host_that_puts_the_guest_off_is_asked_for_what_is_left() {
    const TIMES: u64 = 3000;
    let setting = Setting::new(Protection::SevSnp, Doorbell::Port);
    (2..6).for_each(|page| setting.pages.set(setting.page(page, 1).start().0 / PAGE_SIZE));
    let platform = Platform::new(&setting.boot, setting.vcpu(), |tries| tries < 2 * TIMES).unwrap();
    let valid = setting.pages.valid();
    for to in [Side::Shared, Side::Private] {
        let times = Cell::new(0);
        setting.host.pace.set(1);
        setting.host.answer_by(move |host, _| {
            times.set(times.get() + 1);
            // One page is done at first, then none for long.
            let puts_off = (2..TIMES).contains(&times.get());
            if puts_off {
                host.write(offset::EXIT_INFO_2, 0x100 << 32);
            }
            puts_off
        });
        // SAFETY: this host converts nothing.
        unsafe { platform.convert(setting.page(3, 2), to).unwrap() };
        let shared = setting.host.shared.borrow().contains(&(setting.page(4, 1).start().0 / PAGE_SIZE));
        assert_eq!(shared, to == Side::Shared);
    }
    assert_eq!(setting.pages.valid(), valid);
    // A host that takes the request for wrong is not asked again.
    setting.host.exits.borrow_mut().clear();
    setting.host.answer_by(|host, _| {
        host.write(offset::EXIT_INFO_2, 2 << 32);
        true
    });
    // SAFETY: as above.
    assert!(unsafe { platform.convert(setting.page(3, 2), Side::Shared) }.is_err());
    assert_eq!(setting.host.exits.borrow().len(), 1);
}

#[test]
fn what_is_no_memory_is_not_given_away() {
    let setting = Setting::new(Protection::SevSnp, Doorbell::Port);
    let vcpu = setting.vcpu();
    assert_eq!(convert(&vcpu, setting.page(7, 2), Side::Shared), EINVAL);
    assert_eq!(vcpu.accept(setting.page(8, 1)), Err(Fault::NoPage(setting.page(8, 1).start().0).into()));
    assert!(setting.host.exits.borrow().is_empty());
}

#[test]
fn a_page_that_is_not_what_it_should_be_ends_the_guest() {
    let setting = Setting::new(Protection::SevSnp, Doorbell::Port);
    let vcpu = setting.vcpu();
    // It was never valid.
    assert!(terminates(|| convert(&vcpu, setting.page(3, 1), Side::Shared)));
    // Somebody else has made it valid meanwhile.
    setting.pages.set(setting.page(4, 1).start().0 / PAGE_SIZE);
    assert_eq!(convert(&vcpu, setting.page(4, 1), Side::Shared), 0);
    setting.pages.set(setting.page(4, 1).start().0 / PAGE_SIZE);
    assert!(terminates(|| convert(&vcpu, setting.page(4, 1), Side::Private)));
}

#[test]
fn a_host_that_breaks_the_protocol_ends_the_guest() {
    let answers: [fn(&Host); 3] = [
        // An error, an exception to inject, no value.
        |host| host.write(offset::EXIT_INFO_1, 2),
        |host| host.write(offset::EXIT_INFO_1, 1),
        |_| {},
    ];
    for answer in answers {
        let setting = Setting::new(Protection::SevEs, Doorbell::Port);
        let vcpu = setting.vcpu();
        setting.host.answer_by(move |host, _| {
            answer(host);
            true
        });
        assert!(terminates(|| vcpu.read(0)));
    }
}

/// A host whose other CPUs write all over the GHCB while the guest uses it.
#[test]
fn a_host_that_scribbles_meanwhile_is_a_host_that_answers_something() {
    use core::sync::atomic::{AtomicBool, Ordering};
    for protection in [Protection::SevSnp, Protection::SevEs] {
        let setting = Setting::new(protection, Doorbell::Port);
        (2..8).for_each(|page| setting.pages.set(setting.page(page, 1).start().0 / PAGE_SIZE));
        let vcpu = setting.vcpu();
        // What is honest of this host would not expect that somebody else writes.
        setting.host.answer_by(|_, _| true);
        let (stop, memory) = (AtomicBool::new(false), &setting.host.memory);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut at, mut value) = (0usize, 1u64);
                while !stop.load(Ordering::Relaxed) {
                    value = value.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                    at = (at + 8) % (offset::VERSION & !7);
                    // The fake host checks that the guest has filled in these.
                    if !(offset::EXIT_CODE..offset::EXIT_INFO_2 + 8).contains(&at) && at & !8 != offset::VALID {
                        memory.write(at, &(value >> 20).to_le_bytes()).unwrap();
                    }
                }
            });
            for _ in 0..2000 {
                terminates(|| vcpu.read(0));
                terminates(|| vcpu.cpuid(1, 0));
                terminates(|| page_state::change(&vcpu.ghcb, &vcpu.exit, setting.page(2, 2), Side::Shared));
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}

proptest! {
    /// A host that writes whatever it likes all over the GHCB at each exit.
    #[test]
    fn whatever_the_host_leaves_in_the_ghcb_the_guest_goes_on_or_terminates(
        words in prop::collection::vec((0usize..512, any::<u64>()), 0..64), honest_info1: bool, snp: bool, msr: bool,
    ) {
        let protection = if snp { Protection::SevSnp } else { Protection::SevEs };
        let setting = Setting::new(protection, if msr { Doorbell::Msr } else { Doorbell::Port });
        (1..8).for_each(|page| setting.pages.set(setting.page(page, 1).start().0 / PAGE_SIZE));
        let vcpu = setting.vcpu();
        setting.host.answer_by(move |host, _| {
            words.iter().for_each(|(word, value)| host.write(word * 8, *value));
            if honest_info1 {
                host.write(offset::EXIT_INFO_1, 0);
            }
            true
        });
        terminates(|| vcpu.read(0));
        terminates(|| write(&vcpu, 0, 1));
        terminates(|| convert(&vcpu, setting.page(2, 2), Side::Shared));
        terminates(|| vcpu.cpuid(1, 0));
        terminates(|| vcpu.features());
    }
}
