//! The first state of a vCPU as files for [`IgvmPlatform::Native`](super::IgvmPlatform::Native) have it: a page with an
//! `IgvmNativeVpContextX64` and zeros.

use super::{Context, IgvmError, difference, possible};
use crate::PAGE_SIZE;
use crate::x86::{Segment, VcpuState};

/// Its fields with their offsets; a segment's are selector, attributes, base and limit.
const FIELDS: [(usize, &str); 37] = [
    (0, "rax"),
    (8, "rcx"),
    (16, "rdx"),
    (24, "rbx"),
    (RSP, "rsp"),
    (RBP, "rbp"),
    (RSI, "rsi"),
    (RDI, "rdi"),
    (R8, "r8"),
    (72, "r9"),
    (80, "r10"),
    (88, "r11"),
    (96, "r12"),
    (104, "r13"),
    (112, "r14"),
    (120, "r15"),
    (RIP, "rip"),
    (RFLAGS, "rflags"),
    (IDT_BASE, "idt base"),
    (IDT_LIMIT, "idt limit"),
    (154, "reserved field"),
    (GDT_LIMIT, "gdt limit"),
    (GDT_BASE, "gdt base"),
    (CODE, "code selector"),
    (CODE + 2, "code attributes"),
    (CODE + 4, "code base"),
    (CODE + 8, "code limit"),
    (DATA, "data selector"),
    (DATA + 2, "data attributes"),
    (DATA + 4, "data base"),
    (DATA + 8, "data limit"),
    (GS_BASE, "gs base"),
    (CR0, "cr0"),
    (CR3, "cr3"),
    (CR4, "cr4"),
    (EFER, "efer"),
    (232, "field behind the last"),
];

const RSP: usize = 32;
const RBP: usize = 40;
const RSI: usize = 48;
const RDI: usize = 56;
const R8: usize = 64;
const RIP: usize = 128;
const RFLAGS: usize = 136;
const IDT_BASE: usize = 144;
const IDT_LIMIT: usize = 152;
const GDT_LIMIT: usize = 158;
const GDT_BASE: usize = 160;
const CODE: usize = 168;
const DATA: usize = 180;
const GS_BASE: usize = 192;
const CR0: usize = 200;
const CR3: usize = 208;
const CR4: usize = 216;
const EFER: usize = 224;

/// The page that stands for a state in a file for [`IgvmPlatform::Native`](super::IgvmPlatform::Native), for whoever writes one:
/// an `IgvmNativeVpContextX64`, and zeros.
pub fn native_page(state: &VcpuState) -> [u8; PAGE_SIZE as usize] {
    let mut page = [0; PAGE_SIZE as usize];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    let numbers = [
        (RSP, state.rsp),
        (RBP, state.rbp),
        (RSI, state.rsi),
        (RDI, state.rdi),
        (RIP, state.rip),
        (RFLAGS, state.rflags),
        (IDT_BASE, state.idt_base),
        (GDT_BASE, state.gdt_base),
        (GS_BASE, state.gs_base),
        (CR0, state.cr0),
        (CR3, state.cr3),
        (CR4, state.cr4),
        (EFER, state.efer),
    ];
    numbers.iter().for_each(|(at, number)| put(*at, &number.to_le_bytes()));
    (0..).step_by(8).zip(state.rax_to_rbx).for_each(|(at, number)| put(at, &number.to_le_bytes()));
    (R8..).step_by(8).zip(state.r8_to_r15).for_each(|(at, number)| put(at, &number.to_le_bytes()));
    put(IDT_LIMIT, &state.idt_limit.to_le_bytes());
    put(GDT_LIMIT, &state.gdt_limit.to_le_bytes());
    for (at, segment) in [(CODE, state.code), (DATA, state.data)] {
        put(at, &segment.selector.to_le_bytes());
        put(at + 2, &segment.attributes.to_le_bytes());
        // The format has 32 bits of the base, as segments outside of 64-bit mode do.
        put(at + 4, &(segment.base as u32).to_le_bytes());
        put(at + 8, &segment.limit.to_le_bytes());
    }
    page
}

/// The state that a page stands for.
///
/// # Errors
/// [`IgvmError::State`] if it is none that a vCPU can start from.
pub(super) fn state(context: &Context<'_>) -> Result<VcpuState, IgvmError> {
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&context.contents[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let segment = |at: usize| Segment {
        base: number(at + 4) & u64::from(u32::MAX),
        limit: (number(at + 4) >> 32) as u32,
        selector: number(at) as u16,
        attributes: (number(at) >> 16) as u16,
    };
    let state = VcpuState {
        rip: number(RIP),
        rsp: number(RSP),
        rdi: number(RDI),
        rsi: number(RSI),
        cr3: number(CR3),
        rax_to_rbx: [0, 8, 16, 24].map(number),
        rbp: number(RBP),
        r8_to_r15: std::array::from_fn(|index| number(R8 + 8 * index)),
        rflags: number(RFLAGS),
        cr0: number(CR0),
        cr4: number(CR4),
        efer: number(EFER),
        gs_base: number(GS_BASE),
        gdt_base: number(GDT_BASE),
        gdt_limit: number(GDT_LIMIT) as u16,
        idt_base: number(IDT_BASE),
        idt_limit: number(IDT_LIMIT) as u16,
        code: segment(CODE),
        data: segment(DATA),
    };
    // What is reserved, and what is behind the state.
    difference(context, &native_page(&state), &FIELDS)?;
    possible(context, &state, FIELDS)?;
    Ok(state)
}
