//! Conversions by several vCPUs at the same time.

use super::guest_state;
use super::listeners::{Ear, Word};
use crate::Bench;
use crate::clause::{Clause, Verdict};
use crate::guest::{DATA, EXTRA, MEMORY};
use crate::vmm::{Guest, drive, range};
use cvm_core::memory::ConversionTotals;
use cvm_core::{Exit, GpaRange, Launch, PAGE_SIZE, PageState, Platform, Side, Vm};
use iced_x86::code_asm::*;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("4.10", "several vCPUs convert at the same time", interleaved),
        Clause::new("4.11", "pages that several vCPUs convert at once are each left on one side", contended),
        Clause::new("4.12", "a conversion does not disturb the pages next to it", neighbours),
    ]
}

/// Runs all vCPUs, each on its thread, to their ends.
fn run_to_ends<V: Vm>(guest: &mut Guest<V>) {
    guest.run_all(|vm, vcpu| assert_eq!(drive(vm, vcpu).unwrap(), Exit::Ended { code: 0 }));
}

fn interleaved<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const VCPUS: u32 = 4;
    const PAGES: u32 = 10;
    // The pages of all vCPUs alternate, so that each word of a map has pages of everybody. Every third page goes back.
    let mut guest = bench.guest(bench.config(VCPUS), |a| {
        for page in 0..PAGES {
            let is_private = page.is_multiple_of(3);
            let sides: &[Side] = if is_private { &[Side::Shared, Side::Private] } else { &[Side::Shared] };
            for side in sides {
                a.lea(ebx, edi + (DATA / PAGE_SIZE) as u32 + page * VCPUS)?;
                a.convert_frame(1, *side)?;
            }
            // What each vCPU leaves in each of its pages.
            let side = if is_private { Side::Private } else { Side::Shared };
            let address = a.address(DATA + u64::from(page * VCPUS) * PAGE_SIZE, side);
            a.mov(rbx, rdi)?;
            a.shl(rbx, 12)?;
            a.mov(rcx, address)?;
            a.mov(dword_ptr(rbx + rcx), edi)?;
        }
        a.end(0)
    });
    run_to_ends(&mut guest);
    for page in 0..PAGES {
        for vcpu in 0..VCPUS {
            let gpa = DATA + u64::from(page * VCPUS + vcpu) * PAGE_SIZE;
            let is_private = page.is_multiple_of(3);
            let state = if is_private { PageState::Private } else { PageState::Shared };
            assert_eq!(guest_state(&guest, gpa), Some(state), "page {page} of vcpu {vcpu}");
            match guest.read(gpa) {
                Ok(value) => assert!(!is_private && value == vcpu, "page {page} of vcpu {vcpu} gave {value}"),
                Err(error) => assert!(is_private, "page {page} of vcpu {vcpu}: {error}"),
            }
        }
    }
    let (back, there) = (u64::from(PAGES.div_ceil(3) * VCPUS), u64::from(PAGES * VCPUS));
    let totals = ConversionTotals { requests: back + there, refused: 0, to_private: back, to_shared: there };
    assert_eq!(guest.conversions(), totals);
    Verdict::Met
}

fn contended<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const VCPUS: u32 = 3;
    const ROUNDS: u32 = 5;
    const PAGES: u64 = 8;
    // Ranges that overlap: each vCPU's begins a page behind that of the one before. Nobody touches them.
    let mut guest = bench.guest(bench.config(VCPUS), |a| {
        let mut round = a.create_label();
        a.mov(r8d, ROUNDS)?;
        a.set_label(&mut round)?;
        // Where the next label is must be an instruction of its own.
        a.nop()?;
        for side in [Side::Shared, Side::Private, Side::Shared] {
            // It may have to ask again when another one has taken pages back.
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.lea(ebx, edi + (DATA / PAGE_SIZE) as u32)?;
            a.ask_frame(PAGES, side)?;
            a.test(eax, eax)?;
            a.jne(again)?;
        }
        a.dec(r8d)?;
        a.jne(round)?;
        a.end(0)
    });
    let ear = Ear::slow("ear", guest.vm.memory(), Duration::from_millis(1));
    guest.vm.add_listener(Arc::clone(&ear) as _);
    run_to_ends(&mut guest);
    // Whose turn was when nobody knows, but one after the other they lead from the first state to the last one.
    let mut shared = BTreeSet::new();
    let mut changes = ConversionTotals::default();
    let mut under_way: Vec<GpaRange> = Vec::new();
    for heard in ear.take() {
        if heard.word == Word::Prepare {
            let other = under_way.iter().find(|other| other.intersection(&heard.range).is_some());
            assert_eq!(other, None, "{} was prepared while a conversion of some of it was under way", heard.range);
            under_way.push(heard.range);
            continue;
        }
        under_way.retain(|range| *range != heard.range);
        if heard.word != Word::Committed {
            continue;
        }
        for page in 0..heard.range.pages() {
            let gpa = heard.range.start().0 + page * PAGE_SIZE;
            let is_change = match heard.to {
                Some(Side::Shared) => shared.insert(gpa),
                _ => shared.remove(&gpa),
            };
            assert!(is_change, "{gpa:#x} went where it was already");
        }
        match heard.to {
            Some(Side::Shared) => changes.to_shared += heard.range.pages(),
            _ => changes.to_private += heard.range.pages(),
        }
    }
    let last = (0..PAGES + u64::from(VCPUS)).map(|page| DATA + page * PAGE_SIZE);
    for gpa in last {
        let state = if shared.contains(&gpa) { PageState::Shared } else { PageState::Private };
        assert_eq!(guest_state(&guest, gpa), Some(state), "{gpa:#x}");
    }
    assert_eq!(guest.shared_pages(), shared.len() as u64);
    let totals = guest.conversions();
    assert_eq!((totals.to_shared, totals.to_private), (changes.to_shared, changes.to_private));
    assert!(guest.allocated().private.is_none_or(|private| private <= MEMORY - shared.len() as u64 * PAGE_SIZE));
    Verdict::Met
}

fn neighbours<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const BEFORE: u64 = EXTRA;
    const PAGE: u64 = EXTRA + PAGE_SIZE;
    const BEHIND: u64 = EXTRA + 2 * PAGE_SIZE;
    const STOP: u64 = BEHIND + 8;
    const ROUNDS: u32 = 25;
    let load = |_: &Bench<'_, P>, launch: &mut Launch<P::Loader>| launch.zero(range(EXTRA, 3));
    // The first vCPU converts a page to and fro while the second one writes and reads the last word before it and the first
    // one behind it.
    let launch = bench.load_after(bench.config(2), load, |a| {
        let mut neighbour = a.create_label();
        a.test(edi, edi)?;
        a.jne(neighbour)?;

        let mut again = a.create_label();
        a.mov(r8d, ROUNDS)?;
        a.set_label(&mut again)?;
        a.convert(PAGE, 1, Side::Shared)?;
        a.store(PAGE, Side::Shared, 1)?;
        a.convert(PAGE, 1, Side::Private)?;
        a.store(PAGE, Side::Private, 2)?;
        a.dec(r8d)?;
        a.jne(again)?;
        a.store(STOP, Side::Private, 1)?;
        a.end(0)?;

        let (mut again, mut wrong) = (a.create_label(), a.create_label());
        a.set_label(&mut neighbour)?;
        a.mov(rbx, BEHIND)?;
        a.mov(rcx, BEFORE + PAGE_SIZE - 4)?;
        a.set_label(&mut again)?;
        a.inc(r8d)?;
        for address in [rbx, rcx] {
            a.mov(dword_ptr(address), r8d)?;
            a.mov(eax, dword_ptr(address))?;
            a.cmp(eax, r8d)?;
            a.jne(wrong)?;
        }
        a.mov(eax, dword_ptr(rbx + 8))?;
        a.test(eax, eax)?;
        a.je(again)?;
        a.end(0)?;
        a.set_label(&mut wrong)?;
        a.end(1)
    });
    let mut guest = Guest::from_launch(launch.unwrap());
    run_to_ends(&mut guest);
    let rounds = u64::from(ROUNDS);
    let totals = ConversionTotals { requests: 2 * rounds, refused: 0, to_private: rounds, to_shared: rounds };
    assert_eq!(guest.conversions(), totals);
    guest.assert_private(range(EXTRA, 3));
    Verdict::Met
}
