//! Conversions with contents: the ranges and patterns of Linux' own test of private memory
//! (tools/testing/selftests/kvm/x86/private_mem_conversions_test.c), with several vCPUs and slots.

use crate::Bench;
use crate::clause::{Clause, Verdict};
use crate::guest::{Assembler, MEMORY, REPORT};
use crate::vmm::{drive, range};
use cvm_core::memory::ViewError;
use cvm_core::{Answer, Exit, Gpa, GpaRange, PAGE_SIZE, PageState, Platform, Side, Vcpu, Vm, VmConfig};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("4.6", "contents go where their pages go", one_vcpu),
        Clause::new("4.7", "contents go where their pages go with several vCPUs in one slot", several_vcpus),
        Clause::new("4.8", "contents go where their pages go across the borders of slots", several_slots),
        Clause::new("4.9", "a conversion crosses the border of adjoining slots but no gap", borders),
    ]
}

/// Where the pages are that guests convert, and how far apart those of two vCPUs: each has [`LEN`] bytes.
const BASE: u64 = 64 << 20;
const STRIDE: u64 = 4 << 20;
const LEN: u64 = (2 << 20) + PAGE_SIZE;

/// Offset and length of each range that is converted.
const RANGES: [(u64, u64); 5] =
    [(0, PAGE_SIZE), (0, 2 << 20), (PAGE_SIZE, PAGE_SIZE), (PAGE_SIZE, 2 << 20), (2 << 20, PAGE_SIZE)];

/// How many pages of a range at most are taken back one by one, every second one.
const ODD: u64 = 8;

const PRIVATE: u64 = 0x1111_1111_1111_1111;
const SHARED: u64 = 0x2222_2222_2222_2222;
const HOST: u64 = 0x3333_3333_3333_3333;

/// A loop over the first and the last word of each page of `len` bytes from R12 + `offset` on, with `value` in RAX.
fn each_page(
    a: &mut Assembler,
    (offset, len): (u64, u64),
    side: Side,
    value: u64,
    mut word: impl FnMut(&mut Assembler, i32) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    if len == 0 {
        return Ok(());
    }
    let mut again = a.create_label();
    let address = a.address(offset, side);
    a.mov(rbx, address)?;
    a.add(rbx, r12)?;
    a.mov(rcx, len / PAGE_SIZE)?;
    a.mov(rax, value)?;
    a.set_label(&mut again)?;
    word(a, 0)?;
    word(a, 0xff8)?;
    a.add(rbx, PAGE_SIZE as i32)?;
    a.dec(rcx)?;
    a.jne(again)
}

fn fill(a: &mut Assembler, range: (u64, u64), side: Side, value: u64) -> Result<(), IcedError> {
    each_page(a, range, side, value, |a, at| a.mov(qword_ptr(rbx + at), rax))
}

fn expect(a: &mut Assembler, range: (u64, u64), side: Side, value: u64, fails: CodeLabel) -> Result<(), IcedError> {
    each_page(a, range, side, value, |a, at| {
        a.cmp(qword_ptr(rbx + at), rax)?;
        a.jne(fails)
    })
}

/// Asks until it is done: a busy host may need more than one go.
fn convert(a: &mut Assembler, (offset, len): (u64, u64), to: Side) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.mov(rbx, offset)?;
    a.add(rbx, r12)?;
    a.shr(rbx, 12)?;
    a.convert_frame(len / PAGE_SIZE, to)?;
    a.test(eax, eax)?;
    a.jne(again)
}

fn guest(a: &mut Assembler) -> Result<(), IcedError> {
    let mut fails = a.create_label();
    a.mov(r12, rdi)?;
    a.imul_3(r12, r12, STRIDE as i32)?;
    a.add(r12, BASE as i32)?;
    a.mov(rbx, r12)?;
    a.shr(rbx, 12)?;
    a.accept_frame(LEN / PAGE_SIZE)?;
    for (offset, len) in RANGES {
        let (before, after) = ((0, offset), (offset + len, LEN - offset - len));
        fill(a, (0, LEN), Side::Private, PRIVATE)?;
        convert(a, (offset, len), Side::Shared)?;
        expect(a, (offset, len), Side::Shared, 0, fails)?;
        expect(a, before, Side::Private, PRIVATE, fails)?;
        expect(a, after, Side::Private, PRIVATE, fails)?;
        fill(a, (offset, len), Side::Shared, SHARED)?;
        a.report()?;
        expect(a, (offset, len), Side::Shared, HOST, fails)?;
        // Every second page goes back by itself, and its neighbours keep what they have.
        let pages = (len / PAGE_SIZE).min(ODD);
        for page in (1..pages).step_by(2) {
            let at = offset + page * PAGE_SIZE;
            convert(a, (at, PAGE_SIZE), Side::Private)?;
            fill(a, (at, PAGE_SIZE), Side::Private, PRIVATE)?;
            expect(a, (at - PAGE_SIZE, PAGE_SIZE), Side::Shared, HOST, fails)?;
            expect(a, (at, PAGE_SIZE), Side::Private, PRIVATE, fails)?;
        }
        convert(a, (offset, len), Side::Private)?;
        for page in (1..pages).step_by(2) {
            expect(a, (offset + page * PAGE_SIZE, PAGE_SIZE), Side::Private, PRIVATE, fails)?;
        }
        expect(a, before, Side::Private, PRIVATE, fails)?;
        expect(a, after, Side::Private, PRIVATE, fails)?;
    }
    a.end(0)?;
    a.set_label(&mut fails)?;
    a.end(1)
}

/// Plays the VMM of one vCPU: at each report the host finds what the guest has shared, and nothing else.
fn serve<V: Vm>(vm: &V, vcpu: &mut V::Vcpu) {
    let base = BASE + u64::from(vcpu.index()) * STRIDE;
    let words = |page: u64| [0, 0xff8].map(|word| GuestAddress(base + page + word));
    for (offset, len) in RANGES {
        match drive(vm, vcpu) {
            Ok(Exit::DoorbellWrite { register: REPORT, .. }) => {}
            other => panic!("vcpu {}: {other:x?} with {len:#x} bytes at {offset:#x}", vcpu.index()),
        }
        let view = vm.memory().memory();
        for page in (0..LEN).step_by(PAGE_SIZE as usize) {
            for at in words(page) {
                if (offset..offset + len).contains(&page) {
                    assert_eq!(view.read_obj::<u64>(at).unwrap(), SHARED, "{at:x?}");
                    view.write_obj(HOST, at).unwrap();
                } else {
                    assert!(view.read_obj::<u64>(at).is_err(), "{at:x?} is private");
                }
            }
        }
    }
    assert_eq!(drive(vm, vcpu).unwrap(), Exit::Ended { code: 0 }, "vcpu {} has found other contents", vcpu.index());
}

fn run<P: Platform>(bench: &Bench<'_, P>, vcpus: u32, slots: &[(u64, u64)]) -> Verdict {
    let mut config = bench.config(vcpus);
    let data = slots.iter().map(|(start, len)| GpaRange::new(BASE + start, *len).expect("a sound range"));
    config.memory.extend(data);
    let mut guest = bench.guest(config, guest);
    guest.run_all(serve);
    // What was converted back and forth is on one side only, page for page.
    assert_eq!(guest.shared_pages(), 0);
    let allocated = guest.allocated();
    assert_eq!(allocated.shared, 0, "memory is left behind on the shared side");
    let all: u64 = guest.vm.memory().map().slots().ranges().iter().map(GpaRange::len).sum();
    assert!(allocated.private.is_none_or(|private| private <= all), "{allocated:x?} of {all:#x} bytes");
    assert_eq!(super::guest_state(&guest, BASE), Some(PageState::Private));
    Verdict::Met
}

fn one_vcpu<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    run(bench, 1, &[(0, STRIDE)])
}

fn several_vcpus<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    run(bench, 2, &[(0, 2 * STRIDE)])
}

fn several_slots<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    // Borders within the second vCPU's first large page, and at its last page.
    let (first, second) = (STRIDE + 5 * PAGE_SIZE, 2 << 20);
    run(bench, 2, &[(0, first), (first, second), (first + second, 2 * STRIDE - first - second)])
}

fn borders<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const BORDER: u64 = MEMORY;
    const GAP: u64 = MEMORY + 0x10_0000;
    const BEHIND: u64 = MEMORY + 0x20_0000;
    let memory = vec![range(BEHIND, 256), range(0, BORDER / PAGE_SIZE), range(BORDER, 256)];
    let mut guest = bench.guest(VmConfig { memory, ..bench.config(1) }, |a| {
        a.accept(BORDER, 2)?;
        a.convert(BORDER - 2 * PAGE_SIZE, 4, Side::Shared)?;
        a.report()?;
        a.load(BORDER - 4, Side::Shared)?;
        a.report()?;
        a.load(BORDER, Side::Shared)?;
        a.report()?;
        // Into the gap, from it, and across it.
        a.ask(GAP - PAGE_SIZE, 2, Side::Shared)?;
        a.report()?;
        a.ask(BEHIND - PAGE_SIZE, 2, Side::Shared)?;
        a.report()?;
        a.ask(GAP - PAGE_SIZE, (BEHIND - GAP) / PAGE_SIZE + 2, Side::Shared)?;
        a.report()?;
        a.accept(BEHIND, 1)?;
        a.convert(BEHIND, 1, Side::Shared)?;
        a.report()?;
        a.store(BEHIND, Side::Shared, 0x1111)?;
        a.report()?;
        a.end(0)
    });
    assert_eq!(guest.convert().pages, 4);
    assert_eq!(guest.report(), 0);
    let both = 0x4444_3333_2222_1111u64;
    guest.vm.memory().memory().write_obj(both, GuestAddress(BORDER - 4)).unwrap();
    assert_eq!((guest.report(), guest.report()), (0x2222_1111, 0x4444_3333));
    for outside in [GAP, BEHIND - PAGE_SIZE, GAP] {
        let refused = guest.convert();
        assert_eq!((refused.answer, refused.pages), (Answer::Invalid, 0), "{}", refused.cause);
        assert!(refused.cause.starts_with(&format!("{outside:#x} lies outside")), "{}", refused.cause);
        assert_ne!(guest.report(), 0, "the guest was told that the gap is shared");
        assert_eq!(guest.shared_pages(), 4, "something before or behind the gap was converted");
    }
    assert_eq!(guest.convert().pages, 1);
    assert_eq!(guest.report(), 0);
    guest.report();
    assert_eq!(guest.read(BEHIND).unwrap(), 0x1111);
    let view = guest.vm.memory().memory();
    let error = view.read_obj::<u8>(GuestAddress(GAP)).expect_err("the gap can be read");
    assert_eq!(ViewError::of(&error), Some(ViewError::OutsideMemory(Gpa(GAP))), "{error}");
    drop(view);
    guest.end();
    Verdict::Met
}
