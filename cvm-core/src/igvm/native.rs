//! The first state of a vCPU as files for [`IgvmPlatform::Native`](super::IgvmPlatform::Native) have it: a page with an
//! `IgvmNativeVpContextX64` and zeros.

use super::{Context, IgvmError, difference};
use crate::PAGE_SIZE;
use crate::x86::VcpuState;

/// Its fields with their offsets; a segment's are selector, attributes, base and limit.
const FIELDS: [(usize, &str); 37] = [
    (0, "rax"),
    (8, "rcx"),
    (16, "rdx"),
    (24, "rbx"),
    (RSP, "rsp"),
    (40, "rbp"),
    (RSI, "rsi"),
    (RDI, "rdi"),
    (64, "r8"),
    (72, "r9"),
    (80, "r10"),
    (88, "r11"),
    (96, "r12"),
    (104, "r13"),
    (112, "r14"),
    (120, "r15"),
    (RIP, "rip"),
    (RFLAGS, "rflags"),
    (144, "idt base"),
    (IDT_LIMIT, "idt limit"),
    (154, "reserved field"),
    (GDT_LIMIT, "gdt limit"),
    (160, "gdt base"),
    (CODE, "code selector"),
    (CODE + 2, "code attributes"),
    (CODE + 4, "code base"),
    (CODE + 8, "code limit"),
    (DATA, "data selector"),
    (DATA + 2, "data attributes"),
    (DATA + 4, "data base"),
    (DATA + 8, "data limit"),
    (192, "gs base"),
    (CR0, "cr0"),
    (CR3, "cr3"),
    (CR4, "cr4"),
    (EFER, "efer"),
    (232, "field behind the last"),
];

const RSP: usize = 32;
const RSI: usize = 48;
const RDI: usize = 56;
const RIP: usize = 128;
const RFLAGS: usize = 136;
const IDT_LIMIT: usize = 152;
const GDT_LIMIT: usize = 158;
const CODE: usize = 168;
const DATA: usize = 180;
const CR0: usize = 200;
const CR3: usize = 208;
const CR4: usize = 216;
const EFER: usize = 224;

/// What is the same in every state, but zeros: limits of tables as after a reset; flat segments, of which code is 64-bit code
/// (the attributes are those of a descriptor, without the bits of the limit); PE, MP, ET, NE, WP and PG; PAE; LME and LMA.
const SAME: [(usize, u64); 11] = [
    (RFLAGS, 1 << 1),
    (IDT_LIMIT, 0xffff),
    (GDT_LIMIT, 0xffff),
    (CODE, 8),
    (CODE + 2, 0xa09b),
    (CODE + 8, 0xffff_ffff),
    (DATA, 16),
    (DATA + 2, 0xc093),
    (DATA + 8, 0xffff_ffff),
    (CR0, 0x8001_0033),
    (CR4, 1 << 5),
];
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

/// The page that stands for a state in a file for [`IgvmPlatform::Native`](super::IgvmPlatform::Native), for whoever writes one:
/// an `IgvmNativeVpContextX64`, and zeros.
pub fn native_page(state: &VcpuState) -> [u8; PAGE_SIZE as usize] {
    let VcpuState { rip, rsp, rdi, rsi, cr3 } = *state;
    let own = [(RIP, rip), (RSP, rsp), (RDI, rdi), (RSI, rsi), (CR3, cr3), (EFER, EFER_LME_LMA)];
    let mut page = [0; PAGE_SIZE as usize];
    // Some are narrower, and what is above those is zero here.
    for (at, value) in SAME.into_iter().chain(own) {
        page[at..at + 8].iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to |= from);
    }
    page
}

/// The state that a page stands for.
///
/// # Errors
/// [`IgvmError::State`] if it is none that a vCPU can start from here.
pub(super) fn state(context: &Context<'_>) -> Result<VcpuState, IgvmError> {
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&context.contents[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let state = VcpuState { rip: number(RIP), rsp: number(RSP), rdi: number(RDI), rsi: number(RSI), cr3: number(CR3) };
    difference(context, &native_page(&state), &FIELDS)?;
    Ok(state)
}
