//! What a vCPU does at an exception: it ends the guest and tells the host why. Nothing is emulated.

#![allow(unsafe_code, reason = "descriptor tables are the processor's, and are loaded by instructions")]

use crate::end;
use core::arch::{asm, naked_asm};
use core::ptr::addr_of_mut;
use cvm_core::boot::{self, BootPage};

/// How many vectors exceptions have. Interrupts have higher ones; for them a guest needs a table of its own.
const VECTORS: usize = 32;

/// How many bytes the stack of the handlers has.
const STACK_LEN: usize = 1024;

/// Present flat segments of ring 0, accessed already (AMD64 APM volume 2, section 4.8): 64-bit code, and data that can be
/// written. Their selectors are those that the launch gives every vCPU.
const CODE_SEGMENT: u64 = 0x00af_9b00_0000_ffff;
const DATA_SEGMENT: u64 = 0x00cf_9300_0000_ffff;
const CODE: u64 = 1 << 3;
const TASK: u16 = 3 << 3;

/// The first entry of the interrupt stack table.
const STACK: u64 = 1;

/// Gates and segments: present, in ring 0, an interrupt gate and a task that is not busy (AMD64 APM volume 2, sections
/// 4.8.3 and 4.8.4).
const INTERRUPT_GATE: u64 = 0x8e;
const AVAILABLE_TASK: u64 = 0x89;

/// How many bytes there are from the entry of one vector to that of the next.
const ENTRY_LEN: u64 = 8;

/// The task-state segment (AMD64 APM volume 2, section 12.2.5).
#[derive(Debug)]
#[repr(C, packed(4))]
struct Task {
    unused: [u32; 9],
    stacks: [u64; 7],
    reserved: [u32; 2],
    reserved_low: u16,
    /// Where the permissions for ports begin: behind the segment, so that there are none.
    ports: u16,
}

/// The descriptor tables of a vCPU, and the stack of its exception handlers. [`entry`](crate::entry) has one for each.
#[derive(Debug)]
#[repr(C, align(16))]
pub struct VcpuTables {
    stack: [u8; STACK_LEN],
    gates: [[u64; 2]; VECTORS],
    segments: [u64; 5],
    task: Task,
}

/// The operand of `lgdt` and `lidt`.
#[repr(C, packed)]
struct TableRegister {
    limit: u16,
    base: u64,
}

impl VcpuTables {
    /// Tables that nobody has loaded.
    #[allow(clippy::new_without_default, reason = "it is for statics")]
    pub const fn new() -> Self {
        let task = Task { unused: [0; 9], stacks: [0; 7], reserved: [0; 2], reserved_low: 0, ports: 0 };
        Self { stack: [0; STACK_LEN], gates: [[0; 2]; VECTORS], segments: [0; 5], task }
    }

    /// Fills the tables and loads them, so that an exception ends the guest from then on: by the GHCB MSR with the reason, or
    /// by the doorbell with a code from [`EXCEPTION`](crate::EXCEPTION) on. The code that [`entry`](crate::entry) makes
    /// calls this on every vCPU. Where the boot page is none, nothing is loaded.
    ///
    /// # Safety
    /// `tables` must be valid for writes for as long as the guest runs, be mapped at the same address for as long, and be
    /// used for nothing else. The vCPU must be in ring 0 and 64-bit mode, with interrupts off. `boot` must point to a page
    /// of private memory.
    pub unsafe extern "C" fn load(tables: *mut Self, boot: *const BootPage) {
        // SAFETY: the caller promises a page of memory, and every bit pattern is a boot page.
        let boot = unsafe { boot.read() };
        if boot.magic != boot::MAGIC {
            return;
        }
        end::learn(&boot);
        // SAFETY: the caller promises that the tables can be written and that nobody else uses them. The addresses of their
        // parts are exposed, since the processor will use them.
        unsafe {
            let stack = addr_of_mut!((*tables).stack).expose_provenance() as u64 + STACK_LEN as u64;
            let task = addr_of_mut!((*tables).task);
            task.write(Task {
                unused: [0; 9],
                stacks: [stack; 7],
                reserved: [0; 2],
                reserved_low: 0,
                ports: size_of::<Task>() as u16,
            });
            let [low, high] = task_segment(task.expose_provenance() as u64);
            let segments = addr_of_mut!((*tables).segments);
            segments.write([0, CODE_SEGMENT, DATA_SEGMENT, low, high]);
            let gates = addr_of_mut!((*tables).gates);
            let first = (entries as *const ()).expose_provenance() as u64;
            gates.write(core::array::from_fn(|vector| gate(first + ENTRY_LEN * vector as u64)));
            let register = |limit: usize, base: usize| TableRegister { limit: limit as u16 - 1, base: base as u64 };
            let segments = register(size_of::<[u64; 5]>(), segments.expose_provenance());
            let gates = register(size_of::<[[u64; 2]; VECTORS]>(), gates.expose_provenance());
            asm!("lgdt [{segments}]", "ltr {task:x}", "lidt [{gates}]", segments = in(reg) &raw const segments,
                 task = in(reg) TASK, gates = in(reg) &raw const gates, options(nostack, preserves_flags));
        }
    }
}

/// The segment of the task at `base`, which is in four pieces of the descriptor.
const fn task_segment(base: u64) -> [u64; 2] {
    let limit = size_of::<Task>() as u64 - 1;
    let low = limit | (base & 0xff_ffff) << 16 | AVAILABLE_TASK << 40 | (base >> 24 & 0xff) << 56;
    [low, base >> 32]
}

/// The gate to the handler at `address`, which is in three pieces of the descriptor.
const fn gate(address: u64) -> [u64; 2] {
    let low = address & 0xffff | CODE << 16 | STACK << 32 | INTERRUPT_GATE << 40 | (address >> 16 & 0xffff) << 48;
    [low, address >> 32]
}

/// Where the processor goes at an exception: an entry for each vector, of [`ENTRY_LEN`] bytes, one behind the other.
#[unsafe(naked)]
unsafe extern "C" fn entries() -> ! {
    naked_asm!(
        ".rept {vectors}",
        // Five bytes, and three to make the entry complete. The return address tells which entry it is.
        "call 2f",
        "nop",
        "nop",
        "nop",
        ".endr",
        "2:",
        "pop rdi",
        "lea rax, [rip + {entries}]",
        "sub rdi, rax",
        "shr rdi, 3",
        // The error code, where the vector has one.
        "mov rsi, [rsp]",
        "and rsp, -16",
        "cld",
        "call {unhandled}",
        "ud2",
        vectors = const VECTORS,
        entries = sym entries,
        unhandled = sym unhandled,
    )
}

extern "C" fn unhandled(vector: u64, error: u64) -> ! {
    // SAFETY: exceptions come here since a guest has loaded the tables, and the gates lead to ring 0.
    unsafe { end::end_after_exception(vector as u8, error) }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_architecture() {
        assert_eq!(gate(0x1234_5678_9abc_def0), [0x9abc_8e01_0008_def0, 0x1234_5678]);
        assert_eq!(task_segment(0x1234_5678_9abc_def0), [0x9a00_89bc_def0_0067, 0x1234_5678]);
        assert_eq!(size_of::<Task>(), 0x68);
        assert_eq!(core::mem::offset_of!(Task, stacks) + 8 * STACK as usize - 8, 0x24);
    }
}
