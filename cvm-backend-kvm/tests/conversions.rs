//! Conversions with contents: the ranges and patterns of Linux' own test of private memory
//! (tools/testing/selftests/kvm/x86/private_mem_conversions_test.c), with several vCPUs and slots.

mod common;

use common::*;
use cvm_backend_kvm::{KvmPlatform, KvmVcpu, KvmVm};
use cvm_core::{Answer, Exit, Gpa, GpaRange, PAGE_SIZE, PageState, Side, Vcpu, Vm};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::thread;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

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

/// A loop over the first and the last word of each page of `len` bytes from R14 + `offset` on, with `value` in RAX.
fn each_page(
    a: &mut Assembler,
    (offset, len): (u64, u64),
    value: u64,
    mut word: impl FnMut(&mut Assembler, i32) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    if len == 0 {
        return Ok(());
    }
    let mut again = a.create_label();
    a.lea(rbx, ptr(r14 + offset as i32))?;
    a.mov(rcx, len / PAGE_SIZE)?;
    a.mov(rax, value)?;
    a.set_label(&mut again)?;
    word(a, 0)?;
    word(a, 0xff8)?;
    a.add(rbx, PAGE_SIZE as i32)?;
    a.dec(rcx)?;
    a.jne(again)
}

fn fill(a: &mut Assembler, range: (u64, u64), value: u64) -> Result<(), IcedError> {
    each_page(a, range, value, |a, at| a.mov(qword_ptr(rbx + at), rax))
}

fn expect(a: &mut Assembler, range: (u64, u64), value: u64, fails: CodeLabel) -> Result<(), IcedError> {
    each_page(a, range, value, |a, at| {
        a.cmp(qword_ptr(rbx + at), rax)?;
        a.jne(fails)
    })
}

fn convert(a: &mut Assembler, (offset, len): (u64, u64), to: Side, fails: CodeLabel) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.lea(rbx, ptr(r14 + offset as i32))?;
    a.shr(rbx, 12)?;
    a.convert_frame((len / PAGE_SIZE) as u32, to)?;
    a.cmp(eax, Answer::Retry as i32)?;
    a.je(again)?;
    a.test(eax, eax)?;
    a.jne(fails)
}

fn guest(a: &mut Assembler) -> Result<(), IcedError> {
    let mut fails = a.create_label();
    a.mov(r14, rdi)?;
    a.imul_3(r14, r14, STRIDE as i32)?;
    a.add(r14, BASE as i32)?;
    for (offset, len) in RANGES {
        let (before, after) = ((0, offset), (offset + len, LEN - offset - len));
        fill(a, (0, LEN), PRIVATE)?;
        convert(a, (offset, len), Side::Shared, fails)?;
        expect(a, (offset, len), 0, fails)?;
        expect(a, before, PRIVATE, fails)?;
        expect(a, after, PRIVATE, fails)?;
        fill(a, (offset, len), SHARED)?;
        a.report()?;
        expect(a, (offset, len), HOST, fails)?;
        // Every second page goes back by itself, and its neighbours keep what they have.
        let pages = (len / PAGE_SIZE).min(ODD);
        for page in (1..pages).step_by(2) {
            let at = offset + page * PAGE_SIZE;
            convert(a, (at, PAGE_SIZE), Side::Private, fails)?;
            expect(a, (at, PAGE_SIZE), 0, fails)?;
            expect(a, (at - PAGE_SIZE, PAGE_SIZE), HOST, fails)?;
        }
        convert(a, (offset, len), Side::Private, fails)?;
        expect(a, (offset, len), 0, fails)?;
        expect(a, before, PRIVATE, fails)?;
        expect(a, after, PRIVATE, fails)?;
    }
    a.end(0)?;
    a.set_label(&mut fails)?;
    a.end(1)
}

/// Plays the VMM of one vCPU: at each report the host finds what the guest has shared, and nothing else.
fn serve(vm: &KvmVm, vcpu: &mut KvmVcpu) {
    let base = BASE + u64::from(vcpu.index()) * STRIDE;
    let mut ranges = RANGES.iter();
    loop {
        match vcpu.run().unwrap() {
            Exit::Conversion(request) => {
                let conversion = vm.convert(&request);
                // A busy host may need more than one go.
                assert_ne!(conversion.answer(), Answer::Invalid, "{:?}", conversion.cause());
                vcpu.answer_conversion(conversion).unwrap();
            }
            Exit::DoorbellWrite { register: REPORT, .. } => {
                let (offset, len) = *ranges.next().expect("one report for each range");
                let view = vm.memory().memory();
                for page in (0..LEN).step_by(PAGE_SIZE as usize) {
                    for at in [0, 0xff8].map(|word| GuestAddress(base + page + word)) {
                        if (offset..offset + len).contains(&page) {
                            assert_eq!(view.read_obj::<u64>(at).unwrap(), SHARED, "{at:x?}");
                            view.write_obj(HOST, at).unwrap();
                        } else {
                            assert!(view.read_obj::<u64>(at).is_err(), "{at:x?} is private");
                        }
                    }
                }
            }
            Exit::Kicked => panic!("vcpu {} takes too long", vcpu.index()),
            exit => {
                assert_eq!((exit, ranges.next()), (Exit::Ended { code: 0 }, None), "vcpu {}", vcpu.index());
                return;
            }
        }
    }
}

fn run(platform: &KvmPlatform, vcpus: u32, slots: &[(u64, u64)]) {
    let mut config = config(vcpus);
    let data = slots.iter().map(|(start, len)| GpaRange::new(BASE + start, *len).unwrap());
    config.memory.extend(data);
    let Guest { vm, vcpus, .. } = &mut Guest::new(platform, config, guest);
    let vm = &*vm;
    thread::scope(|scope| {
        for vcpu in vcpus {
            scope.spawn(move || serve(vm, vcpu));
        }
    });
    // What was converted back and forth is on one side only, page for page.
    assert_eq!(vm.memory().map().count(PageState::Shared), 0);
    let allocated = vm.allocated().unwrap();
    assert_eq!(allocated.shared, 0, "memory is left behind on the shared side");
    let all: u64 = vm.memory().map().slots().ranges().iter().map(GpaRange::len).sum();
    assert!(allocated.private.is_none_or(|private| private <= all));
    assert_eq!(vm.memory().map().get(Gpa(BASE)), Some(PageState::Private));
}

#[test]
fn contents_go_where_their_pages_go_with_one_vcpu_and_one_slot() {
    let Some(platform) = kvm() else { return };
    run(&platform, 1, &[(0, STRIDE)]);
}

#[test]
fn contents_go_where_their_pages_go_with_several_vcpus_in_one_slot() {
    let Some(platform) = kvm() else { return };
    run(&platform, 3, &[(0, 3 * STRIDE)]);
}

#[test]
fn contents_go_where_their_pages_go_across_the_borders_of_slots() {
    let Some(platform) = kvm() else { return };
    // Borders within the second vCPU's first large page, and at its last page.
    let (first, second) = (STRIDE + 5 * PAGE_SIZE, 2 << 20);
    run(&platform, 2, &[(0, first), (first, second), (first + second, 2 * STRIDE - first - second)]);
}
