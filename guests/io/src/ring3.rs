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
const DATA: u64 = 3 << 3 | 3;
const CODE: u64 = 4 << 3 | 3;
const TASK: u16 = 5 << 3;

/// Present flat segments (AMD64 APM volume 2, section 4.8): 64-bit code and data that can be written, of ring 0, where the
/// handlers of exceptions run, and of ring 3.
const KERNEL_CODE_SEGMENT: u64 = 0x00af_9b00_0000_ffff;
const KERNEL_DATA_SEGMENT: u64 = 0x00cf_9300_0000_ffff;
const DATA_SEGMENT: u64 = 0x00cf_f200_0000_ffff;
const CODE_SEGMENT: u64 = 0x00af_fa00_0000_ffff;

/// How many bytes the stack has that exception handlers run on.
const STACK_LEN: usize = 1024;

/// The first port behind those of the doorbell, in bytes of one bit each.
const PORTS_END: usize = (PORT_BASE as usize + SPACE as usize) / 8;

/// The task-state segment (AMD64 APM volume 2, section 12.2.5). Of the stacks only those matter that
/// [`VcpuTables`](cvm_guest::VcpuTables) has its handlers run on: there is no way back.
#[repr(C, packed(4))]
struct Task {
    unused: [u32; 9],
    stacks: [u64; 7],
    reserved: [u16; 5],
    /// Where `forbidden` begins.
    ports: u16,
    /// A bit for each port, and a last byte of ones.
    forbidden: [u8; PORTS_END + 1],
}

#[repr(C, align(16))]
struct Stack([u8; STACK_LEN]);

static mut STACK: Stack = Stack([0; STACK_LEN]);

static mut TASK_STATE: Task = {
    let mut forbidden = [0xff; PORTS_END + 1];
    let mut byte = PORT_BASE as usize / 8;
    while byte < PORTS_END {
        forbidden[byte] = 0;
        byte += 1;
    }
    let ports = core::mem::offset_of!(Task, forbidden) as u16;
    Task { unused: [0; 9], stacks: [0; 7], reserved: [0; 5], ports, forbidden }
};

/// Segments: none, code and data of ring 0, data and code of ring 3, and the task in two parts.
static mut SEGMENTS: [u64; 7] = [0; 7];

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
    let stack = (&raw mut STACK).expose_provenance() as u64 + STACK_LEN as u64;
    // SAFETY: there is one vCPU, and nothing refers to the task yet.
    unsafe { (&raw mut TASK_STATE.stacks).write_unaligned([stack; 7]) };
    let task = (&raw mut TASK_STATE).expose_provenance() as u64;
    // A task that is present and not busy, in ring 0; its base is in four pieces (AMD64 APM volume 2, section 4.8.3).
    // Up to the last byte of ones: ports behind the limit are forbidden.
    let limit = (core::mem::offset_of!(Task, forbidden) + PORTS_END) as u64;
    let low = limit | (task & 0xff_ffff) << 16 | 0x89 << 40 | (task >> 24 & 0xff) << 56;
    let segments = &raw mut SEGMENTS;
    // SAFETY: there is one vCPU, and nothing refers to the segments but what follows.
    unsafe {
        segments.write([0, KERNEL_CODE_SEGMENT, KERNEL_DATA_SEGMENT, DATA_SEGMENT, CODE_SEGMENT, low, task >> 32])
    };
    let table = TableRegister { limit: size_of::<[u64; 7]>() as u16 - 1, base: segments.expose_provenance() as u64 };
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
