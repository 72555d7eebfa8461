//! What an x86-64 guest starts from, and the names of its registers.

pub mod save_area;
#[cfg(feature = "std")]
mod tables;

#[cfg(feature = "std")]
pub use tables::identity_map;

use crate::Gpa;

/// The first state of a vCPU that starts in 64-bit mode with flat segments and interrupts off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VcpuState {
    /// Where it starts.
    pub rip: u64,
    /// Its stack.
    pub rsp: u64,
    /// First argument: by convention the vCPU's index.
    pub rdi: u64,
    /// Second argument: by convention the boot page.
    pub rsi: u64,
    /// Its page tables.
    pub cr3: u64,
}

impl VcpuState {
    /// vCPU `index` at `entry` on the page tables at `tables`, without a stack. Where a bit makes private what an entry of
    /// a page table leads to, `tables` has it too.
    pub fn long_mode(entry: Gpa, tables: Gpa, index: u32, boot_page: Gpa) -> Self {
        Self { rip: entry.0, rsp: 0, rdi: index.into(), rsi: boot_page.0, cr3: tables.0 }
    }
}

/// Bits of page-table entries (AMD64 APM volume 2, section 5.3.3).
pub mod entry {
    /// It leads somewhere.
    pub const PRESENT: u64 = 1;
    /// What it leads to can be written.
    pub const WRITABLE: u64 = 1 << 1;
    /// It leads to a large page, not to another table.
    pub const LARGE: u64 = 1 << 7;
}

/// Where guests whose page tables tell the sides apart find the shared side of address 0: what an entry of the root table
/// reaches further up.
pub const SHARED_AT: u64 = TABLE_ENTRIES * GIB;

const TABLE_ENTRIES: u64 = 512;
const GIB: u64 = 1 << 30;

/// A register that a host may want to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "they have the names that the architecture gives them")]
pub enum Register {
    Rax,
    Rbx,
    Rcx,
    Rdx,
    Rsi,
    Rdi,
    Rsp,
    Rbp,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
    Rip,
    Rflags,
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    Efer,
}

impl Register {
    /// All of them.
    pub const ALL: [Self; 23] = [
        Self::Rax,
        Self::Rbx,
        Self::Rcx,
        Self::Rdx,
        Self::Rsi,
        Self::Rdi,
        Self::Rsp,
        Self::Rbp,
        Self::R8,
        Self::R9,
        Self::R10,
        Self::R11,
        Self::R12,
        Self::R13,
        Self::R14,
        Self::R15,
        Self::Rip,
        Self::Rflags,
        Self::Cr0,
        Self::Cr2,
        Self::Cr3,
        Self::Cr4,
        Self::Efer,
    ];
}
