//! Chapter 2: what the guest finds in its memory.

use super::{BORDER, UPPER, guest_of, with_slots};
use crate::clause::{Clause, Verdict};
use crate::clauses::fresh;
use crate::guest::{Assembler, BOOT_PAGE, CODE, EXTRA, GHCB, MEMORY, TABLES};
use crate::vmm::range;
use crate::{Bench, quality};
use cvm_core::launch::Entry;
use cvm_core::x86::VcpuState;
use cvm_core::{Error, Gpa, GpaRange, Launch, PAGE_SIZE, PageKind, Platform, Side, Transcript, Vm, VmConfig, boot};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::collections::{BTreeMap, BTreeSet};

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new(
            "2.6",
            "the guest finds what was loaded and zeros in all memory that it need not initialise",
            found,
        ),
        Clause::new("2.7", "contents that are not measured are loaded or refused and then nothing goes on", unmeasured),
    ]
}

/// By what a page's words are made into one number, that of zeros is zero.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// What a clause leaves out: the boot page and the two behind it, page tables, in which the processor writes, and the page of
/// the way to the host.
const LEFT_OUT: [(u64, u64); 3] = [(BOOT_PAGE, 3), (TABLES, 16), (GHCB, 1)];

/// A slot of one page.
const TOP: u64 = 16 << 20;

/// More than 2 MiB: more than backends load at once.
const LARGE: u64 = 514;

/// What `page` comes to, whose end is zeros.
fn number(page: &[u8]) -> u64 {
    let mut words = page.chunks(8).map(|word| {
        let mut bytes = [0; 8];
        bytes[..word.len()].copy_from_slice(word);
        u64::from_le_bytes(bytes)
    });
    (0..PAGE_SIZE / 8).fold(0u64, |sum, _| sum.wrapping_mul(FACTOR).wrapping_add(words.next().unwrap_or_default()))
}

/// Bytes that no two pages have in common: some at the start of each page, and the last ones.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for (page, bytes) in (1..).zip(bytes.chunks_mut(PAGE_SIZE as usize)) {
        let word = (page ^ seed << 32).wrapping_mul(FACTOR).to_le_bytes();
        let last = bytes.len().saturating_sub(word.len());
        for at in [0, last] {
            bytes[at..].iter_mut().zip(word).for_each(|(byte, from)| *byte = from);
        }
    }
    bytes
}

/// As many slots as there can be, in no order: two adjoin. There is not much in them, since each page is hashed.
fn slots() -> Vec<GpaRange> {
    vec![
        range(TOP, 1),
        range(BORDER, 24),
        range(CODE, 16),
        range(UPPER, LARGE + 8),
        range(0, 16),
        range(GHCB, 1),
        range(BORDER - 8 * PAGE_SIZE, 8),
        range(TABLES, 16),
    ]
}

/// The parts of memory that the guest looks at.
fn looked_at() -> Vec<GpaRange> {
    let mut slots = slots();
    slots.sort();
    let mut parts = Vec::new();
    for slot in slots {
        let mut next = slot.start().0;
        for (start, pages) in LEFT_OUT {
            let out = range(start, pages);
            if slot.contains_range(&out) {
                // Nothing if one ends where the other begins.
                parts.extend(GpaRange::new(next, out.start().0 - next));
                next = out.end().0;
            }
        }
        parts.extend(GpaRange::new(next, slot.end().0 - next));
    }
    parts
}

/// What is loaded besides the guest: the last page of each is not full.
fn loads() -> Vec<(u64, Vec<u8>)> {
    vec![
        (EXTRA, pattern(1, 0x1801)),
        // Across the border of two slots, once so and once so.
        (BORDER - PAGE_SIZE, pattern(2, 0x2000)),
        (BORDER + 2 * PAGE_SIZE, pattern(3, 0x1007)),
        // Only the last page is not zero, and only its last byte, which alone makes the number that is told.
        (BORDER + 8 * PAGE_SIZE, [vec![0; 0x1fff], vec![0x80]].concat()),
        (UPPER + PAGE_SIZE, pattern(4, (LARGE * PAGE_SIZE) as usize - 5)),
        (TOP, pattern(5, 0x1000)),
    ]
}

/// Tells of each page that is not zero where it is and what it comes to.
fn look(a: &mut Assembler) -> Result<(), IcedError> {
    a.mov(rbp, FACTOR)?;
    for part in looked_at() {
        let (mut page, mut word, mut next) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(r8, part.start().0)?;
        a.set_label(&mut page)?;
        a.xor(r10d, r10d)?;
        a.mov(r11, r8)?;
        a.mov(ecx, 512u32)?;
        a.set_label(&mut word)?;
        a.imul_2(r10, rbp)?;
        a.add(r10, qword_ptr(r11))?;
        a.add(r11, 8)?;
        a.dec(ecx)?;
        a.jne(word)?;
        a.test(r10, r10)?;
        a.je(next)?;
        a.mov(rax, r8)?;
        a.shr(rax, 12)?;
        a.report()?;
        a.mov(rax, r10)?;
        a.shr(rax, 32)?;
        a.report()?;
        a.set_label(&mut next)?;
        a.add(r8, PAGE_SIZE as i32)?;
        a.mov(rax, part.end().0)?;
        a.cmp(r8, rax)?;
        a.jne(page)?;
    }
    // No page is there.
    a.mov(eax, u32::MAX)?;
    a.report()?;
    a.end(0)
}

fn submit<P: Platform>(launch: &mut Launch<P::Loader>) -> Result<(), Error> {
    for (gpa, contents) in loads() {
        launch.load(Gpa(gpa), &contents, PageKind::Measured)?;
    }
    launch.zero(range(BORDER + 16 * PAGE_SIZE, 3))?;
    // Across a border too.
    launch.zero(range(BORDER - 4 * PAGE_SIZE, 2))
}

fn found<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let config = VmConfig { memory: slots(), ..bench.config(1) };
    let launch = bench.load_after(config, |_, launch| submit::<P>(launch), look).map(|launch| {
        let code = bench.assemble(&launch, CODE, |a| a.begin().and_then(|()| look(a)));
        (launch, code)
    });
    let (launch, code) = match launch {
        Ok((launch, code)) => (Ok(launch), code),
        Err(error) => (Err(error), Vec::new()),
    };
    let interface = launch.as_ref().ok().map(|launch| *launch.interface());
    let mut expected = BTreeMap::new();
    for (gpa, contents) in loads().into_iter().chain([(CODE, code)]) {
        for (page, contents) in (gpa / PAGE_SIZE..).zip(contents.chunks(PAGE_SIZE as usize)) {
            expected.insert(page as u32, (number(contents) >> 32) as u32);
        }
    }
    expected.retain(|_, number| *number != 0);

    let mut guest = guest_of::<P>(launch);
    let mut found = BTreeMap::new();
    loop {
        let page = guest.report();
        if page == u32::MAX {
            break;
        }
        found.insert(page, guest.report());
    }
    guest.end();
    // Where memory is not zero by itself, the guest finds zeros only if the launch has loaded them.
    if interface.is_some_and(|interface| !interface.is_all_accepted()) {
        let loaded = loaded_pages(guest.vm.transcript());
        for part in looked_at() {
            for page in 0..part.pages() {
                let gpa = part.start().0 + page * PAGE_SIZE;
                assert!(loaded.contains(&gpa), "{gpa:#x}: nothing was loaded there, so it is not zero on hardware");
            }
        }
    }
    for page in expected.keys().chain(found.keys()) {
        assert_eq!(found.get(page), expected.get(page), "page {page:#x}: what is found, and what was loaded");
    }
    assert_eq!(guest.vm.memory().map().slots().ranges().len(), boot::MAX_RANGES);
    Verdict::Met
}

/// The addresses of the pages that a launch has loaded.
fn loaded_pages(transcript: &Transcript) -> BTreeSet<u64> {
    let ranges = transcript.entries().iter().filter_map(|entry| match entry {
        Entry::Page { gpa, .. } => Some(range(gpa.0, 1)),
        Entry::Zero { range } => Some(*range),
        Entry::Config(_) | Entry::Vcpu { .. } => None,
    });
    ranges.flat_map(|range| (range.start().0..range.end().0).step_by(PAGE_SIZE as usize)).collect()
}

pub(super) fn fresh_memory<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    // Nothing is loaded in the last slot, which is far above all that is.
    let words = [UPPER, UPPER + PAGE_SIZE - 4, UPPER + PAGE_SIZE, UPPER + 2 * PAGE_SIZE - 4];
    let config = VmConfig { memory: vec![range(0, MEMORY / PAGE_SIZE), range(UPPER, 2)], ..bench.config(1) };
    let mut guest = bench.guest(config, |a| {
        a.accept(UPPER, 2)?;
        fresh::tell(a, &words)?;
        a.end(0)
    });
    let verdict = fresh::listen(&mut guest, &words);
    guest.end();
    verdict
}

fn unmeasured<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const SEEN: [u64; 4] = [EXTRA, EXTRA + PAGE_SIZE, BORDER - PAGE_SIZE, BORDER];
    let mut refusal = None;
    let launch = bench.load_after(
        with_slots(bench, 1),
        |_, launch| {
            let loaded = launch.load(Gpa(EXTRA), &[0x11; 0x1001], PageKind::Unmeasured);
            if let Err(error) = loaded {
                let after = [
                    launch.load(Gpa(CODE), &[1], PageKind::Measured),
                    launch.zero(range(BORDER, 1)),
                    launch.load_boot_page(Gpa(BOOT_PAGE), [0; 4]),
                    launch.set_vcpu(0, &VcpuState::long_mode(Gpa(CODE), Gpa(TABLES), 0, Gpa(BOOT_PAGE))),
                ];
                refusal = Some((quality::told(&error), after));
                return Err(error);
            }
            launch.load(Gpa(BORDER - PAGE_SIZE), &[0x22; 0x2000], PageKind::Unmeasured)
        },
        |a| {
            for gpa in SEEN {
                a.load(gpa, Side::Private)?;
                a.report()?;
            }
            a.end(0)
        },
    );
    if let Some((told, after)) = refusal {
        // It is the backend that cannot, and after that no step works.
        assert!(matches!(launch, Err(Error::Backend { step: "load pages", .. })), "{told}");
        for step in after {
            assert!(matches!(step, Err(Error::LaunchFailed)), "after a step that failed: {step:?}");
        }
        return Verdict::NotOffered(told);
    }
    let mut guest = guest_of::<P>(launch);
    assert_eq!(SEEN.map(|_| guest.report()), [0x1111_1111, 0x11, 0x2222_2222, 0x2222_2222]);
    guest.end();
    Verdict::Met
}
