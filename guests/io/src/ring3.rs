//! Ring 3, where the guest measures: some KVM hosts emulate what runs in ring 0, instruction by instruction, so that there
//! it would measure an emulator. What runs in ring 3 the processor runs itself on them, as everything on others.
//!
//! Nothing is protected by that: it is the same code with the same memory, all of which ring 3 may use.

#![allow(unsafe_code, reason = "segments, page tables and the way to another ring are the processor's")]

use core::arch::asm;
use cvm_core::doorbell::{PORT_BASE, SPACE};

/// The bit of a page-table entry by which ring 3 may use what it leads to, and those that say where that is (AMD64 APM
/// volume 2, section 5.3.3).
const USER: u64 = 1 << 2;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// How far one entry of a second-level and of a third-level table reaches.
const LARGE_PAGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;

/// Selectors: the index in the table of segments, eight times, and the ring.
const DATA: u64 = 1 << 3 | 3;
const CODE: u64 = 2 << 3 | 3;
const TASK: u16 = 3 << 3;

/// Present flat segments of ring 3 (AMD64 APM volume 2, section 4.8): data that can be written, and 64-bit code.
const DATA_SEGMENT: u64 = 0x00cf_f200_0000_ffff;
const CODE_SEGMENT: u64 = 0x00af_fa00_0000_ffff;

/// The first port behind those of the doorbell, in bytes of one bit each.
const PORTS_END: usize = (PORT_BASE as usize + SPACE as usize) / 8;

/// The task-state segment (AMD64 APM volume 2, section 12.2.5), of which only the ports matter: there is no way back.
#[repr(C, align(16))]
struct Task {
    unused: [u8; 102],
    /// Where `forbidden` begins.
    ports: u16,
    /// A bit for each port, and a last byte of ones.
    forbidden: [u8; PORTS_END + 1],
}

static TASK_STATE: Task = {
    let mut forbidden = [0xff; PORTS_END + 1];
    let mut byte = PORT_BASE as usize / 8;
    while byte < PORTS_END {
        forbidden[byte] = 0;
        byte += 1;
    }
    Task { unused: [0; 102], ports: core::mem::offset_of!(Task, forbidden) as u16, forbidden }
};

/// Segments: none, data, code, and the task in two parts.
static mut SEGMENTS: [u64; 5] = [0; 5];

/// The operand of `lgdt`.
#[repr(C, packed)]
struct TableRegister {
    limit: u16,
    base: u64,
}

/// Goes on in ring 3, on the same stack. The ports of the doorbell can be used there, and all memory below `end`.
///
/// # Safety
/// This must be ring 0, with interrupts off, on page tables that map their own memory and all below `end` to itself by
/// pages of 2 MiB, and nobody else may use them. What only ring 0 may do ends the guest from then on.
pub unsafe fn enter(end: u64) {
    // SAFETY: passed on to the caller.
    unsafe { open_memory(end) };
    let task = (&raw const TASK_STATE).expose_provenance() as u64;
    // A task that is present and not busy, in ring 0; its base is in four pieces (AMD64 APM volume 2, section 4.8.3).
    // Up to the last byte of ones: ports behind the limit are forbidden.
    let limit = (core::mem::offset_of!(Task, forbidden) + PORTS_END) as u64;
    let low = limit | (task & 0xff_ffff) << 16 | 0x89 << 40 | (task >> 24 & 0xff) << 56;
    let segments = &raw mut SEGMENTS;
    // SAFETY: there is one vCPU, and nothing refers to the segments but what follows.
    unsafe { segments.write([0, DATA_SEGMENT, CODE_SEGMENT, low, task >> 32]) };
    let table = TableRegister { limit: size_of::<[u64; 5]>() as u16 - 1, base: segments.expose_provenance() as u64 };
    // SAFETY: the segments and the task are there for good. `iretq` goes on behind itself, with the same stack and, by
    // the flags that were, with interrupts off.
    unsafe {
        asm!(
            "lgdt [{table}]",
            "ltr {task:x}",
            "mov {scratch}, rsp",
            "push {data}",
            "push {scratch}",
            "pushfq",
            "push {code}",
            "lea {scratch}, [rip + 2f]",
            "push {scratch}",
            "iretq",
            "2:",
            table = in(reg) &raw const table,
            task = in(reg) TASK,
            data = const DATA,
            code = const CODE,
            scratch = out(reg) _,
        );
    }
}

/// Lets ring 3 use all memory below `end`.
///
/// # Safety
/// As for [`enter`].
unsafe fn open_memory(end: u64) {
    let root: u64;
    // SAFETY: ring 0 can read the register.
    unsafe { asm!("mov {}, cr3", out(reg) root, options(nomem, nostack, preserves_flags)) };
    // SAFETY: the caller promises such tables.
    let open = |table: u64, index: u64| unsafe {
        let entry = core::ptr::with_exposed_provenance_mut::<u64>((table & ADDRESS) as usize).add(index as usize);
        entry.write_volatile(entry.read_volatile() | USER);
        entry.read_volatile()
    };
    for first in (0..end).step_by(GIB as usize) {
        let pages = open(open(root, 0), first / GIB);
        for index in 0..(end - first).min(GIB).div_ceil(LARGE_PAGE) {
            open(pages, index);
        }
    }
    // SAFETY: the same tables, read anew.
    unsafe { asm!("mov cr3, {}", in(reg) root, options(nostack, preserves_flags)) };
}
