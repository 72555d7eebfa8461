//! What an x86-64 guest starts from, and the names of its registers.

pub mod save_area;
#[cfg(feature = "std")]
mod tables;

#[cfg(feature = "std")]
pub use tables::identity_map;

use crate::Gpa;

/// A segment register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Its base.
    pub base: u64,
    /// Its limit, in bytes.
    pub limit: u32,
    /// Its selector.
    pub selector: u16,
    /// The attributes of its descriptor from the type to the granularity; bits 8 to 11, which are the limit's there, are zero
    /// (AMD64 APM volume 2, section 4.7).
    pub attributes: u16,
}

/// The initial state of a vCPU. Registers that it does not have are as a reset leaves them.
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
    /// RAX, RCX, RDX and RBX.
    pub rax_to_rbx: [u64; 4],
    /// RBP.
    pub rbp: u64,
    /// R8 to R15.
    pub r8_to_r15: [u64; 8],
    /// RFLAGS.
    pub rflags: u64,
    /// CR0.
    pub cr0: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// The base of GS, whose other parts are those of `data`.
    pub gs_base: u64,
    /// Where its descriptors are.
    pub gdt_base: u64,
    /// The last byte of its descriptors.
    pub gdt_limit: u16,
    /// Where its interrupt gates are.
    pub idt_base: u64,
    /// The last byte of its interrupt gates.
    pub idt_limit: u16,
    /// CS.
    pub code: Segment,
    /// SS, DS, ES, FS and GS.
    pub data: Segment,
}

// Bits of registers (AMD64 APM volume 2, sections 3.1.1, 3.1.3, 3.1.6 and 3.1.7).
const CR0_PE: u64 = 1;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
const CR0_MP_ET_NE_WP: u64 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16;
const CR0_ALL: u64 = CR0_PE | CR0_MP_ET_NE_WP | 1 << 2 | 1 << 3 | 1 << 18 | CR0_NW | CR0_CD | CR0_PG;
const CR4_PAE: u64 = 1 << 5;
const CR4_MCE: u64 = 1 << 6;
const EFER_SCE_NXE: u64 = 1 | 1 << 11;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_ONE: u64 = 1 << 1;
const RFLAGS_ALL: u64 = 0x3f_7fd7;

// Bits of a segment's attributes: writable, code, not of the system, present; 64-bit code, 32-bit code or data.
const WRITABLE: u16 = 1 << 1;
const CODE: u16 = 1 << 3;
const NOT_SYSTEM: u16 = 1 << 4;
const PRESENT: u16 = 1 << 7;
const LONG: u16 = 1 << 13;
const DEFAULT_32: u16 = 1 << 14;

impl VcpuState {
    /// How many numbers a state is.
    pub const WORDS: usize = 30;

    /// 64-bit mode with flat segments and interrupts off, and zero for what differs from vCPU to vCPU. Machine checks are on, as
    /// KVM for AMD has them on where its host has: the state is to be the same on all hosts.
    pub const LONG_MODE: Self = Self {
        rip: 0,
        rsp: 0,
        rdi: 0,
        rsi: 0,
        cr3: 0,
        rax_to_rbx: [0; 4],
        rbp: 0,
        r8_to_r15: [0; 8],
        rflags: RFLAGS_ONE,
        cr0: CR0_PE | CR0_MP_ET_NE_WP | CR0_PG,
        cr4: CR4_PAE | CR4_MCE,
        efer: EFER_LME | EFER_LMA,
        gs_base: 0,
        gdt_base: 0,
        gdt_limit: 0xffff,
        idt_base: 0,
        idt_limit: 0xffff,
        code: Segment { base: 0, limit: u32::MAX, selector: 8, attributes: 0xa09b },
        data: Segment { base: 0, limit: u32::MAX, selector: 16, attributes: 0xc093 },
    };

    /// vCPU `index` at `entry` on the page tables at `tables`, without a stack. Where a bit makes private what an entry of
    /// a page table leads to, `tables` has it too.
    pub const fn long_mode(entry: Gpa, tables: Gpa, index: u32, boot_page: Gpa) -> Self {
        Self { rip: entry.0, rdi: index as u64, rsi: boot_page.0, cr3: tables.0, ..Self::LONG_MODE }
    }

    /// Checks that a processor can have this state; if not, names the field.
    ///
    /// # Errors
    /// The name of the first register that has a reserved bit, or contradicts the others.
    pub fn check(&self) -> Result<(), &'static str> {
        let has = |value: u64, bits: u64| value & bits == bits;
        let paging = has(self.cr0, CR0_PG);
        let long = paging && has(self.efer, EFER_LME);
        let kind = |attributes: u16| attributes & (NOT_SYSTEM | PRESENT | CODE);
        let code = self.code.attributes;
        let data = self.data.attributes;
        let rules = [
            (self.rflags & !RFLAGS_ALL == 0 && has(self.rflags, RFLAGS_ONE), "rflags"),
            (self.cr0 & !CR0_ALL == 0, "cr0"),
            ((!paging || has(self.cr0, CR0_PE)) && (!has(self.cr0, CR0_NW) || has(self.cr0, CR0_CD)), "cr0"),
            (!long || has(self.cr4, CR4_PAE), "cr4"),
            (self.efer & !(EFER_SCE_NXE | EFER_LME | EFER_LMA) == 0 && has(self.efer, EFER_LMA) == long, "efer"),
            (code & 0xf00 == 0 && kind(code) == NOT_SYSTEM | PRESENT | CODE, "code attributes"),
            (code & LONG == 0 || long && code & DEFAULT_32 == 0, "code attributes"),
            (data & 0xf00 == 0 && kind(data) == NOT_SYSTEM | PRESENT && data & WRITABLE != 0, "data attributes"),
        ];
        rules.iter().find(|(is_met, _)| !is_met).map_or(Ok(()), |(_, field)| Err(field))
    }

    /// All of it as numbers.
    pub fn to_words(&self) -> [u64; Self::WORDS] {
        let [rax, rcx, rdx, rbx] = self.rax_to_rbx;
        let [r8, r9, r10, r11, r12, r13, r14, r15] = self.r8_to_r15;
        let segment = |segment: &Segment| {
            let Segment { base, limit, selector, attributes } = *segment;
            [base, u64::from(limit) | u64::from(selector) << 32 | u64::from(attributes) << 48]
        };
        let ([code, code_rest], [data, data_rest]) = (segment(&self.code), segment(&self.data));
        let limits = u64::from(self.gdt_limit) | u64::from(self.idt_limit) << 16;
        [
            self.rip,
            self.rsp,
            self.rdi,
            self.rsi,
            self.cr3,
            rax,
            rcx,
            rdx,
            rbx,
            self.rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            self.rflags,
            self.cr0,
            self.cr4,
            self.efer,
            self.gs_base,
            self.gdt_base,
            self.idt_base,
            limits,
            code,
            code_rest,
            data,
            data_rest,
        ]
    }

    /// The state that [`VcpuState::to_words`] makes these of; nothing if a bit is set that it never sets.
    pub fn from_words(words: &[u64; Self::WORDS]) -> Option<Self> {
        let segment = |base: u64, rest: u64| Segment {
            base,
            limit: rest as u32,
            selector: (rest >> 32) as u16,
            attributes: (rest >> 48) as u16,
        };
        let [
            rip,
            rsp,
            rdi,
            rsi,
            cr3,
            rax,
            rcx,
            rdx,
            rbx,
            rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rflags,
            cr0,
            cr4,
            efer,
            gs_base,
            gdt_base,
            idt_base,
            limits,
            code,
            code_rest,
            data,
            data_rest,
        ] = *words;
        (limits >> 32 == 0).then_some(Self {
            rip,
            rsp,
            rdi,
            rsi,
            cr3,
            rax_to_rbx: [rax, rcx, rdx, rbx],
            rbp,
            r8_to_r15: [r8, r9, r10, r11, r12, r13, r14, r15],
            rflags,
            cr0,
            cr4,
            efer,
            gs_base,
            gdt_base,
            gdt_limit: limits as u16,
            idt_base,
            idt_limit: (limits >> 16) as u16,
            code: segment(code, code_rest),
            data: segment(data, data_rest),
        })
    }

    /// What is measured of it: its numbers, little endian.
    pub fn to_bytes(&self) -> [u8; 8 * Self::WORDS] {
        let mut bytes = [0; 8 * Self::WORDS];
        for (place, word) in bytes.chunks_exact_mut(8).zip(self.to_words()) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_comes_back_from_its_numbers_each_of_which_is_one_fields() {
        let numbers = std::array::from_fn(|index| if index == 25 { 0x1234_5678 } else { 1 << (2 * index) | 1 });
        let state = VcpuState::from_words(&numbers).unwrap();
        assert_eq!(state.to_words(), numbers);
        assert_eq!((state.gdt_limit, state.idt_limit), (0x5678, 0x1234));
        let mut too_long = numbers;
        too_long[25] |= 1 << 32;
        assert_eq!(VcpuState::from_words(&too_long), None);
        assert_eq!(state.to_bytes()[8..16], numbers[1].to_le_bytes());
    }

    #[test]
    fn what_no_processor_can_have_is_refused_by_its_field() {
        let flat = VcpuState::LONG_MODE;
        let code = |attributes| VcpuState { code: Segment { attributes, ..flat.code }, ..flat };
        let data = |attributes| VcpuState { data: Segment { attributes, ..flat.data }, ..flat };
        let protected = VcpuState { cr0: 0x11, cr4: 0, efer: 0, ..code(0xc09b) };
        for state in [
            flat,
            VcpuState { cr0: 0x8000_0031, efer: 0xd00, ..data(0xa093) },
            VcpuState { cr0: flat.cr0 | CR0_CD, cr4: CR4_PAE, rflags: 0x202, ..flat },
            protected,
        ] {
            assert_eq!(state.check(), Ok(()), "{state:x?}");
        }
        for (state, field) in [
            (VcpuState { rflags: 0, ..flat }, "rflags"),
            (VcpuState { rflags: 1 << 22 | 2, ..flat }, "rflags"),
            (VcpuState { cr0: flat.cr0 | 1 << 32, ..flat }, "cr0"),
            (VcpuState { cr0: flat.cr0 & !CR0_PE, ..flat }, "cr0"),
            (VcpuState { cr0: flat.cr0 | CR0_NW, ..flat }, "cr0"),
            (VcpuState { cr4: 0, ..flat }, "cr4"),
            (VcpuState { efer: EFER_LME, ..flat }, "efer"),
            (VcpuState { efer: flat.efer | 1 << 12, ..flat }, "efer"),
            (VcpuState { cr0: 0x11, ..flat }, "efer"),
            (code(0xa09b | DEFAULT_32), "code attributes"),
            (code(0xa093), "code attributes"),
            (code(0xa19b), "code attributes"),
            (VcpuState { code: flat.code, ..protected }, "code attributes"),
            (data(0xc09b), "data attributes"),
            (data(0xc091), "data attributes"),
            (data(0xc013), "data attributes"),
        ] {
            assert_eq!(state.check(), Err(field), "{state:x?}");
        }
    }
}
