//! Chapter 2: launches.

mod contents;
mod measurement;
mod processor;
mod reported;
mod start;

use crate::clause::{Clause, Verdict};
use crate::guest::{BOOT_PAGE, CODE, DATA, EXTRA, MEMORY, TABLES};
use crate::vmm::range;
use crate::{Bench, Guest, VmOf, quality};
use cvm_core::interrupt::InterruptPolicy;
use cvm_core::launch::{APIC_PAGE, MAX_MEMORY, MAX_VCPUS};
use cvm_core::x86::VcpuState;
use cvm_core::{
    Error, Gpa, GpaRange, InterruptController, Launch, PAGE_SIZE, PageKind, Platform, Side, VmConfig, boot,
};

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    let mut clauses = vec![
        Clause::new("2.1", "a configuration without sense is refused", senseless),
        Clause::new("2.2", "what lies outside memory is refused and the launch goes on", outside),
        Clause::new("2.3", "no page is loaded twice", twice),
        Clause::new("2.4", "nothing is loaded that the guest was told was not", late),
        Clause::new("2.5", "each vCPU has one state to start from", one_state),
    ];
    clauses.extend(contents::clauses());
    clauses.extend(start::clauses());
    clauses.extend(measurement::clauses());
    clauses.extend(reported::clauses());
    clauses.push(Clause::new(
        "2.19",
        "memory that was not loaded is zero when the guest first uses it",
        contents::fresh_memory,
    ));
    clauses.push(Clause::new(
        "2.20",
        "the processor promises the guest no technology that the guest does not have",
        processor::technologies,
    ));
    clauses
}

/// Where launches have memory that are to have more than one slot: two adjoin, and the last is behind a gap.
const GAP: u64 = MEMORY;
const UPPER: u64 = 8 << 20;
const BORDER: u64 = DATA;

/// A configuration with this memory.
fn with_slots<P: Platform>(bench: &Bench<'_, P>, vcpus: u32) -> VmConfig {
    let slot = |start, end| GpaRange::new(start, end - start).expect("a sound range");
    VmConfig { memory: vec![slot(0, BORDER), slot(BORDER, GAP), slot(UPPER, UPPER + (1 << 20))], ..bench.config(vcpus) }
}

/// The guest of a launch that worked.
fn guest_of<P: Platform>(launch: Result<Launch<P::Loader>, Error>) -> Guest<VmOf<P>> {
    Guest::from_launch(launch.unwrap_or_else(|error| panic!("{}", quality::told(&error))))
}

fn senseless<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let sound = || bench.config(1);
    for vcpus in [0, MAX_VCPUS + 1, u32::MAX] {
        let refused = bench.platform.launch(VmConfig { vcpus, ..sound() }).err();
        assert!(matches!(&refused, Some(Error::Config(_))), "{vcpus} vcpus: {refused:?}");
    }
    let slots = (0..=boot::MAX_RANGES as u64).map(|slot| range(slot << 20, 1)).collect();
    let layouts = [
        ("none", vec![]),
        ("overlaps", vec![range(0, 1024), range(0x20_0000, 1024)]),
        ("the same twice", vec![range(0, 1024), range(0, 1024)]),
        ("too many slots", slots),
        ("more than a doorbell can name", vec![range(0, 1024), range(MAX_MEMORY - PAGE_SIZE, 2)]),
    ];
    for (what, memory) in layouts {
        let refused = bench.platform.launch(VmConfig { memory, ..sound() }).err();
        assert!(matches!(&refused, Some(Error::Layout(_))), "{what}: {refused:?}");
        quality::assert_good(&refused.expect("it was refused"));
    }
    let levels = InterruptPolicy::default().accept_level(0x41).expect("no exception's vector");
    let with_apic = VmConfig { interrupt_controller: InterruptController::Apic, ..sound() };
    let refused = bench.platform.launch(VmConfig { interrupts: levels, ..with_apic.clone() }).err();
    assert!(matches!(&refused, Some(Error::Config(_))), "levels for an apic: {refused:?}");
    let memory = vec![range(0, 1024), range(APIC_PAGE.0, 1)];
    let refused = bench.platform.launch(VmConfig { memory, ..with_apic }).err();
    // A platform without the controller may say so first.
    assert!(matches!(&refused, Some(Error::Layout(_) | Error::Config(_))), "memory at the apic: {refused:?}");
    bench.guest(sound(), |a| a.end(0)).end();
    Verdict::Met
}

fn outside<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let page = [1; PAGE_SIZE as usize];
    let is_outside = |result: Result<(), Error>, gpa: u64| {
        assert!(matches!(result, Err(Error::OutsideMemory { gpa: at }) if at.0 == gpa), "{gpa:#x}: {result:?}");
    };
    let launch = bench.load_after(
        with_slots(bench, 1),
        |_, launch| {
            is_outside(launch.load(Gpa(GAP), &page, PageKind::Measured), GAP);
            is_outside(launch.load(Gpa(GAP - PAGE_SIZE), &[1; 4097], PageKind::Unmeasured), GAP);
            is_outside(launch.zero(range(GAP - PAGE_SIZE, 2)), GAP);
            is_outside(launch.zero(range(UPPER - PAGE_SIZE, 2)), UPPER - PAGE_SIZE);
            is_outside(launch.zero(range(0, 4096)), GAP);
            is_outside(launch.zero(range(1 << 50, 1)), 1 << 50);
            is_outside(launch.load_boot_page(Gpa(GAP), [0; 4]), GAP);
            is_outside(launch.start_in_long_mode(Gpa(CODE), Gpa(GAP - PAGE_SIZE), Gpa(BOOT_PAGE)), GAP);
            let inside = [(CODE + 1, &page[..]), (CODE, &[]), (u64::MAX - 1, &page[..]), (u64::MAX << 12, &page[..])];
            for (gpa, contents) in inside {
                let refused = launch.load(Gpa(gpa), contents, PageKind::Measured);
                assert!(matches!(refused, Err(Error::Layout(_))), "{gpa:#x}: {refused:?}");
            }
            for kind in [PageKind::Zero, PageKind::Secrets, PageKind::Cpuid] {
                let refused = launch.load(Gpa(EXTRA), &page, kind);
                assert!(matches!(refused, Err(Error::Layout(_))), "{kind:?} with contents: {refused:?}");
            }
            // None of the refused pages was taken.
            launch.load(Gpa(GAP - PAGE_SIZE), &0x600d_u32.to_le_bytes(), PageKind::Measured)
        },
        |a| {
            a.load(GAP - PAGE_SIZE, Side::Private)?;
            a.report()?;
            a.end(0)
        },
    );
    let mut guest = guest_of::<P>(launch);
    assert_eq!(guest.report(), 0x600d);
    guest.end();
    Verdict::Met
}

fn twice<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const SECOND: u64 = EXTRA + 4 * PAGE_SIZE;
    let is_twice = |result: Result<(), Error>, twice: GpaRange| {
        assert!(matches!(result, Err(Error::LoadedTwice { range }) if range == twice), "{twice}: {result:?}");
    };
    let launch = bench.load_after(
        bench.config(1),
        |_, launch| {
            launch.load(Gpa(DATA), &[1; 3 * PAGE_SIZE as usize], PageKind::Measured)?;
            launch.zero(range(SECOND, 2))?;
            is_twice(launch.load(Gpa(DATA + PAGE_SIZE), &[2], PageKind::Measured), range(DATA + PAGE_SIZE, 1));
            is_twice(launch.load(Gpa(SECOND), &[2], PageKind::Unmeasured), range(SECOND, 1));
            is_twice(launch.zero(range(SECOND - PAGE_SIZE, 4)), range(SECOND, 2));
            is_twice(launch.load_boot_page(Gpa(DATA), [0; 4]), range(DATA, 1));
            // What was refused is as it was: all of it can be loaded, once.
            launch.zero(range(SECOND - PAGE_SIZE, 1))?;
            launch.load(Gpa(SECOND + 2 * PAGE_SIZE), &[0x66; 4], PageKind::Measured)
        },
        |a| {
            for gpa in [DATA, DATA + PAGE_SIZE, SECOND, SECOND + 2 * PAGE_SIZE] {
                a.load(gpa, Side::Private)?;
                a.report()?;
            }
            a.end(0)
        },
    );
    let mut guest = guest_of::<P>(launch);
    assert_eq!([(); 4].map(|()| guest.report()), [0x0101_0101, 0x0101_0101, 0, 0x6666_6666]);
    guest.end();
    Verdict::Met
}

fn late<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut launch = bench.load(with_slots(bench, 1), |a| {
        a.load(DATA, Side::Private)?;
        a.report()?;
        if a.is_all_accepted() {
            a.load(UPPER, Side::Private)?;
            a.report()?;
        }
        a.end(0)
    });
    let loaded = launch.as_mut().map(|launch| {
        launch.load(Gpa(DATA), &[0x11; 4], PageKind::Measured).expect("below what the boot page says");
        let above = launch.load(Gpa(UPPER), &[0x22; 4], PageKind::Measured);
        match launch.interface().is_all_accepted() {
            true => above.expect("all memory is accepted"),
            // The guest would accept or initialise the page, and lose what is in it.
            false => assert!(matches!(above, Err(Error::Layout(_))), "{above:?}"),
        }
        launch.interface().is_all_accepted()
    });
    let accepts = matches!(loaded, Ok(false));
    let mut guest = guest_of::<P>(launch);
    assert_eq!(guest.report(), 0x1111_1111);
    if !accepts {
        assert_eq!(guest.report(), 0x2222_2222);
    }
    guest.end();
    Verdict::Met
}

fn one_state<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let state = |index| VcpuState::long_mode(Gpa(CODE), Gpa(TABLES), index, Gpa(BOOT_PAGE));
    let mut launch = bench.platform.launch(bench.config(2)).expect("a sound configuration");
    launch.set_vcpu(1, &state(1)).expect("vcpus may be set in any order");
    for index in [1, 2, u32::MAX] {
        let refused = launch.set_vcpu(index, &state(index));
        assert!(matches!(refused, Err(Error::VcpuState { vcpu, .. }) if vcpu == index), "{index}: {refused:?}");
    }
    let sealed = launch.seal().err();
    assert!(matches!(sealed, Some(Error::VcpuState { vcpu: 0, .. })), "vcpu 0 has no state: {sealed:?}");

    let mut guest = Guest::from_launch(bench.load(bench.config(3), |a| a.end(0)).expect("a sound launch"));
    assert!(guest.vcpus.iter().map(cvm_core::Vcpu::index).eq(0..3), "vcpus are handed out in order");
    assert!(cvm_core::Vm::take_vcpus(&mut guest.vm).is_empty(), "vcpus are handed out once");
    guest.end();
    Verdict::Met
}
