//! Chapter 2: the transcript.

use super::{BORDER, UPPER, guest_of};
use crate::clause::{Clause, Verdict};
use crate::guest::{BOOT_PAGE, CODE, EXTRA, GHCB, TABLES};
use crate::vmm::range;
use crate::{Bench, VmOf};
use cvm_core::boot::Interface;
use cvm_core::doorbell::Doorbell;
use cvm_core::interrupt::InterruptPolicy;
use cvm_core::launch::{Entry, Loader, digest};
use cvm_core::x86::VcpuState;
use cvm_core::{Error, Gpa, Launch, PAGE_SIZE, PageKind, Platform, Transcript, Vm, VmConfig};

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("2.12", "the transcript has what was submitted in the order of submission", order),
        Clause::new("2.13", "a rehearsal predicts the transcript", rehearsal),
    ]
}

/// What a launch may have been given otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Twist {
    None,
    Contents,
    LastByte,
    Address,
    Order,
    Unmeasured,
    LessZeros,
    NoZeros,
    Argument,
    State,
    StateOrder,
}

const CONTENTS: [u8; 0x1800] = [7; 0x1800];

/// Submits the same whatever loads it, but for the twist, to a launch with two vCPUs.
pub(super) fn submit<L: Loader>(launch: &mut Launch<L>, code: &[u8], twist: Twist) -> Result<(), Error> {
    let mut contents = CONTENTS;
    match twist {
        Twist::Contents => contents[0] = 8,
        Twist::LastByte => contents[CONTENTS.len() - 1] = 8,
        _ => {}
    }
    let kind = if twist == Twist::Unmeasured { PageKind::Unmeasured } else { PageKind::Measured };
    let at = if twist == Twist::Address { EXTRA + 8 * PAGE_SIZE } else { EXTRA };
    if twist != Twist::Order {
        launch.load(Gpa(at), &contents, kind)?;
    }
    launch.load(Gpa(CODE), code, PageKind::Measured)?;
    if twist == Twist::Order {
        launch.load(Gpa(at), &contents, kind)?;
    }
    launch.load(Gpa(BORDER - PAGE_SIZE), &[9; 0x1001], PageKind::Measured)?;
    match twist {
        Twist::LessZeros => launch.zero(range(UPPER, 2))?,
        Twist::NoZeros => {}
        _ => launch.zero(range(UPPER, 3))?,
    }
    if matches!(twist, Twist::State | Twist::StateOrder) {
        let interface = *launch.interface();
        let top = launch.config().memory.iter().map(|slot| slot.end().0).max().unwrap_or(0);
        let tables = cvm_core::x86::identity_map(Gpa(TABLES), top, interface.private_bit)?;
        launch.load(Gpa(TABLES), &tables, PageKind::Measured)?;
        let root = Gpa(TABLES | interface.private_bit.map_or(0, |bit| 1 << bit));
        for index in if twist == Twist::State { [0, 1] } else { [1, 0] } {
            let state = VcpuState::long_mode(Gpa(CODE), root, index, Gpa(BOOT_PAGE));
            let rsp = if twist == Twist::State { 8 } else { state.rsp };
            launch.set_vcpu(index, &VcpuState { rsp, ..state })?;
        }
    } else {
        launch.start_in_long_mode(Gpa(CODE), Gpa(TABLES), Gpa(BOOT_PAGE))?;
    }
    launch.load_boot_page(Gpa(BOOT_PAGE), [0, 0, 0, u64::from(twist == Twist::Argument)])
}

/// A configuration as [`submit`] needs it, in which much is not as it is by default. There is little memory, as all that a guest
/// need not accept is hashed.
pub(super) fn config<P: Platform>(bench: &Bench<'_, P>) -> VmConfig {
    let interrupts = InterruptPolicy::default().accept(0x41).expect("no exception's vector");
    let memory = vec![
        range(0, 32),
        range(TABLES, 16),
        range(CODE, 8),
        range(BORDER - 4 * PAGE_SIZE, 4),
        range(BORDER, 4),
        range(GHCB, 2),
        range(UPPER, 8),
    ];
    VmConfig { memory, interrupts, doorbell: Doorbell::Msr, ..bench.config(2) }
}

/// The transcript of a launch that became a VM, how its guest found the platform, and the guest's code.
fn sealed<P: Platform>(bench: &Bench<'_, P>, twist: Twist) -> (Transcript, Interface, Vec<u8>) {
    let launched = bench.platform.launch(config(bench)).and_then(|mut launch| {
        let code = bench.assemble(&launch, CODE, |a| a.begin().and_then(|()| a.end(0)));
        submit(&mut launch, &code, twist).map(|()| (launch, code))
    });
    let (launch, code) = match launched {
        Ok((launch, code)) => (Ok(launch), code),
        Err(error) => (Err(error), Vec::new()),
    };
    let interface = launch.as_ref().ok().map(|launch| *launch.interface());
    let mut guest: crate::Guest<VmOf<P>> = guest_of::<P>(launch);
    let transcript = guest.vm.transcript().clone();
    guest.end();
    assert_eq!(guest.vm.transcript(), &transcript, "the transcript is another one after the guest has run");
    (transcript, interface.expect("a launch"), code)
}

fn order<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let (transcript, interface, code) = sealed(bench, Twist::StateOrder);
    let mut entries = transcript.entries().iter();
    let mut next = || entries.next().expect("the transcript is too short");
    let config = config(bench);
    let expected = Entry::Config(config.digest(&interface));
    assert_eq!(next(), &expected);
    let mut padded = CONTENTS.to_vec();
    padded.resize(2 * PAGE_SIZE as usize, 0);
    let mut across = vec![9; PAGE_SIZE as usize + 1];
    across.resize(2 * PAGE_SIZE as usize, 0);
    let mut code = code;
    code.resize(code.len().next_multiple_of(PAGE_SIZE as usize), 0);
    for (start, contents) in [(EXTRA, &padded), (CODE, &code), (BORDER - PAGE_SIZE, &across)] {
        for (page, contents) in (0..).zip(contents.chunks(PAGE_SIZE as usize)) {
            let gpa = Gpa(start + page * PAGE_SIZE);
            let expected = Entry::Page { kind: PageKind::Measured, gpa, contents: digest(contents) };
            assert_eq!(next(), &expected);
        }
    }
    assert_eq!(next(), &Entry::Zero { range: range(UPPER, 3) });
    let mut vcpus = Vec::new();
    let mut boot_page = None;
    let mut vouched = Vec::new();
    let mut zeros = Vec::new();
    for entry in entries {
        match entry {
            Entry::Vcpu { index, state } => {
                assert_eq!(state.rip, CODE);
                vcpus.push(*index);
            }
            Entry::Page { kind: PageKind::Measured, gpa, .. } if gpa.0 == BOOT_PAGE => boot_page = Some(vcpus.len()),
            Entry::Page { kind: PageKind::Measured, gpa, .. } => {
                assert!((TABLES..CODE).contains(&gpa.0) && vcpus.is_empty(), "nobody has loaded {gpa}");
            }
            Entry::Page { kind, gpa, .. } => vouched.push((*kind, gpa.0)),
            Entry::Zero { range } => zeros.push(*range),
            other => panic!("nobody has submitted {other:?}"),
        }
    }
    assert_eq!(vcpus, [1, 0], "vcpus in the order in which they were set");
    assert_eq!(boot_page, Some(2), "the boot page came last");
    let expected = [(PageKind::Secrets, BOOT_PAGE + PAGE_SIZE), (PageKind::Cpuid, BOOT_PAGE + 2 * PAGE_SIZE)];
    assert_eq!(vouched, if interface.vouched_pages { expected.to_vec() } else { vec![] });
    // What lies between, where the guest was told that it is accepted: up to the large page's end.
    assert_eq!(zeros.is_empty(), interface.is_all_accepted(), "{zeros:?}");
    Verdict::Met
}

fn rehearsal<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let (transcript, interface, code) = sealed(bench, Twist::State);
    let predicted = Launch::rehearse(config(bench), interface).and_then(|mut launch| {
        submit(&mut launch, &code, Twist::State)?;
        launch.transcript()
    });
    let predicted = predicted.expect("a launch that works works in rehearsal");
    for (happened, predicted) in transcript.entries().iter().zip(predicted.entries()) {
        assert_eq!(happened, predicted, "what happened, and what was predicted");
    }
    assert_eq!(transcript, predicted);
    assert_eq!(transcript.measurement(), predicted.measurement());
    Verdict::Met
}
