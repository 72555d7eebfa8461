//! Exits by the guest-hypervisor communication block (AMD publication 56421), each vCPU by its own page: that at
//! [`GHCB`] for the first one, and the pages behind it for the others.

use super::Assembler;
use super::GHCB;
use cvm_core::x86::Register;
use cvm_core::{PAGE_SIZE, Side, x86};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::fs;
use std::sync::LazyLock;

/// The MSR, and what is asked by it (section 2.3.1).
const MSR: u32 = 0xc001_0130;
const PAGE_STATE: u32 = 0x14;
const REGISTER: u32 = 0x12;
const TERMINATE: u32 = 0x100;
const CPUID: u64 = 4;

/// Fields (section 2.6).
const CPL: i32 = 0xcb;
const RAX: i32 = 0x1f8;
const RCX: i32 = 0x308;
const RDX: i32 = 0x310;
const RBX: i32 = 0x318;
const EXIT_CODE: i32 = 0x390;
const EXIT_INFO_1: i32 = 0x398;
const EXIT_INFO_2: i32 = 0x3a0;
const SCRATCH: i32 = 0x3a8;
const VALID: i32 = 0x3f0;
const BUFFER: i32 = 0x800;
const VERSION: i32 = 0xffa;

/// What an exit is for (section 4.1).
const RDPMC: u64 = 0x6f;
const IOIO: u64 = 0x7b;
const MSR_ACCESS: u64 = 0x7c;
const VMMCALL: u64 = 0x81;
const PAGE_STATE_CHANGE: u64 = 0x8000_0010;
const TERMINATION_REQUEST: u64 = 0x8000_fffe;

/// Version 2 of the protocol, which has page state changes.
const VERSION_2: u32 = 2;

/// The most entries of a page state change (section 4.1.6).
const MOST_ENTRIES: u64 = 253;

/// Fields of the page that a test of a backend's own sets and reads, each of 64 bits (section 2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Field {
    /// RAX.
    Rax = RAX,
    /// RBX.
    Rbx = RBX,
    /// The first number that says what an exit is for, and then the host's answer.
    ExitInfo1 = EXIT_INFO_1,
    /// The second one.
    ExitInfo2 = EXIT_INFO_2,
}

const fn bit(field: i32) -> u128 {
    1 << (field / 8)
}

/// What an entry of a page state change asks for.
const fn operation(to: Side) -> u64 {
    match to {
        Side::Private => 1,
        Side::Shared => 2,
    }
}

/// Whether this processor's hypercall instruction is AMD's. It is looked up once: the suite has calls fail later on.
pub(super) fn has_vmmcall() -> bool {
    static IS_AMDS: LazyLock<bool> = LazyLock::new(|| {
        let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        ["AuthenticAMD", "HygonGenuine"].iter().any(|vendor| processor.contains(vendor))
    });
    *IS_AMDS
}

impl Assembler {
    /// Exits to the host: `rep vmmcall`.
    fn vmgexit(&mut self) -> Result<(), IcedError> {
        self.db(&[0xf3, 0x0f, 0x01, 0xd9])
    }

    /// The address of the shared side of the vCPU's page, in R15.
    fn page(&mut self) -> Result<(), IcedError> {
        self.mov(r15, rdi)?;
        self.shl(r15, 12)?;
        self.mov(r14, x86::SHARED_AT + GHCB)?;
        self.add(r15, r14)
    }

    /// Asks by the MSR for what is in RAX.
    fn ask_by_msr(&mut self) -> Result<(), IcedError> {
        self.mov(rdx, rax)?;
        self.shr(rdx, 32)?;
        self.mov(ecx, MSR)?;
        self.wrmsr()?;
        self.vmgexit()
    }

    /// Shares and registers the vCPU's page.
    pub(super) fn make_ghcb(&mut self) -> Result<(), IcedError> {
        self.mov(rbx, GHCB / PAGE_SIZE)?;
        self.add(rbx, rdi)?;
        self.validate(1, false)?;
        self.mov(rax, operation(Side::Shared) << 52 | u64::from(PAGE_STATE))?;
        self.shl(rbx, 12)?;
        self.or(rax, rbx)?;
        self.ask_by_msr()?;
        self.mov(rax, rbx)?;
        self.or(rax, REGISTER as i32)?;
        self.ask_by_msr()
    }

    /// Asks by the MSR to end this guest for a reason of a set of reasons.
    pub fn terminate(&mut self, set: u8, reason: u8) -> Result<(), IcedError> {
        self.mov(eax, u32::from(reason) << 16 | u32::from(set) << 12 | TERMINATE)?;
        self.ask_by_msr()
    }

    /// Exits for `code`; of the fields `valid` the guest has taken care before. R15 is the page's address afterwards.
    fn exit(&mut self, code: u64, info: u64, valid: u128) -> Result<(), IcedError> {
        self.exit_with(code, [info, 0], valid)
    }

    /// The same with a second number that says what for.
    fn exit_with(&mut self, code: u64, infos: [u64; 2], valid: u128) -> Result<(), IcedError> {
        let valid = valid | bit(EXIT_CODE) | bit(EXIT_INFO_1) | bit(EXIT_INFO_2);
        let values = [
            (EXIT_CODE, code),
            (EXIT_INFO_1, infos[0]),
            (EXIT_INFO_2, infos[1]),
            (VALID, valid as u64),
            (VALID + 8, (valid >> 64) as u64),
        ];
        for (field, value) in values {
            self.mov(r14, value)?;
            self.mov(qword_ptr(r15 + field), r14)?;
        }
        self.mov(word_ptr(r15 + VERSION), VERSION_2)?;
        // The page's own address, not that of where its shared side is mapped: the lower half of R15 alone.
        self.mov(eax, r15d)?;
        self.xor(edx, edx)?;
        self.mov(ecx, MSR)?;
        self.wrmsr()?;
        self.vmgexit()?;
        self.page()
    }

    pub(super) fn port_by_ghcb(&mut self, port: u16, width: u8, read: bool) -> Result<(), IcedError> {
        // The operand's width in bytes, and a 64-bit address (AMD64 APM volume 2, section 15.10.2).
        let info = u64::from(port) << 16 | 1 << 9 | u64::from(width) << 4 | u64::from(read);
        self.page()?;
        // What of RAX a read leaves as it was.
        self.mov(rbx, rax)?;
        self.mov(qword_ptr(r15 + RAX), rax)?;
        self.exit(IOIO, info, bit(RAX))?;
        if !read {
            return Ok(());
        }
        self.mov(rax, rbx)?;
        match width {
            1 => self.mov(al, byte_ptr(r15 + RAX)),
            2 => self.mov(ax, word_ptr(r15 + RAX)),
            _ => self.mov(eax, dword_ptr(r15 + RAX)),
        }
    }

    pub(super) fn msr_by_ghcb(&mut self, index: u32, read: bool) -> Result<(), IcedError> {
        self.page()?;
        self.mov(r14d, index)?;
        self.mov(qword_ptr(r15 + RCX), r14)?;
        let mut valid = bit(RCX);
        if !read {
            self.mov(eax, eax)?;
            self.mov(qword_ptr(r15 + RAX), rax)?;
            self.mov(edx, edx)?;
            self.mov(qword_ptr(r15 + RDX), rdx)?;
            valid |= bit(RAX) | bit(RDX);
        }
        self.exit(MSR_ACCESS, u64::from(!read), valid)?;
        if read {
            self.mov(eax, dword_ptr(r15 + RAX))?;
            self.mov(edx, dword_ptr(r15 + RDX))?;
        }
        Ok(())
    }

    /// Asks by the MSR what the processor says of itself in this register of a leaf, for EAX.
    pub(super) fn cpuid_by_msr(&mut self, leaf: u32, register: Register) -> Result<(), IcedError> {
        let register = match register {
            Register::Rbx => 1,
            Register::Rcx => 2,
            Register::Rdx => 3,
            _ => 0,
        };
        self.mov(rax, u64::from(leaf) << 32 | register << 30 | CPUID)?;
        self.ask_by_msr()?;
        self.mov(ecx, MSR)?;
        self.rdmsr()?;
        self.mov(eax, edx)
    }

    pub(super) fn counter_by_ghcb(&mut self, index: u32) -> Result<(), IcedError> {
        self.page()?;
        self.mov(r14d, index)?;
        self.mov(qword_ptr(r15 + RCX), r14)?;
        self.exit(RDPMC, 0, bit(RCX))?;
        self.mov(eax, dword_ptr(r15 + RAX))?;
        self.mov(edx, dword_ptr(r15 + RDX))
    }

    /// A hypercall with what is in RAX, RBX, RCX and RDX; the answer is in RAX.
    pub(super) fn hypercall_by_ghcb(&mut self) -> Result<(), IcedError> {
        self.page()?;
        for (field, register) in [(RAX, rax), (RBX, rbx), (RCX, rcx), (RDX, rdx)] {
            self.mov(qword_ptr(r15 + field), register)?;
        }
        self.mov(byte_ptr(r15 + CPL), 0u32)?;
        self.exit(VMMCALL, 0, bit(RAX) | bit(RBX) | bit(RCX) | bit(RDX) | bit(CPL))?;
        self.mov(rax, qword_ptr(r15 + RAX))
    }

    /// Names the page's buffer as what the exit is about.
    fn name_buffer(&mut self) -> Result<(), IcedError> {
        self.mov(r14d, r15d)?;
        self.add(r14d, BUFFER)?;
        self.mov(qword_ptr(r15 + SCRATCH), r14)
    }

    /// Asks for the changes that are in the buffer. The host's answer is in RAX: 0 if all is done.
    fn change_page_states(&mut self) -> Result<(), IcedError> {
        self.name_buffer()?;
        self.exit(PAGE_STATE_CHANGE, 0, bit(SCRATCH))?;
        self.mov(rax, qword_ptr(r15 + EXIT_INFO_2))
    }

    /// Changes the state of `pages` pages from the page frame in RBX on, as many at once as can be. EAX is 0 if all is done.
    pub(super) fn page_state_by_ghcb(&mut self, pages: u64, to: Side) -> Result<(), IcedError> {
        let mut out = self.create_label();
        let mut left = pages;
        loop {
            let entries = left.min(MOST_ENTRIES);
            self.page()?;
            // From the first entry to the last one.
            self.mov(r14, entries.wrapping_sub(1) << 16 & 0xffff_0000)?;
            self.mov(qword_ptr(r15 + BUFFER), r14)?;
            if entries > 0 {
                self.mov(r14, rbx)?;
                self.shl(r14, 12)?;
                self.mov(rax, operation(to) << 52)?;
                self.or(r14, rax)?;
                self.lea(rcx, ptr(r15 + BUFFER + 8))?;
                self.mov(eax, entries as u32)?;
                let mut again = self.create_label();
                self.set_label(&mut again)?;
                self.mov(qword_ptr(rcx), r14)?;
                self.add(rcx, 8)?;
                self.add(r14, PAGE_SIZE as i32)?;
                self.dec(eax)?;
                self.jne(again)?;
            }
            self.change_page_states()?;
            left -= entries;
            if left == 0 {
                break;
            }
            self.test(rax, rax)?;
            self.jne(out)?;
            self.add(rbx, entries as i32)?;
        }
        self.set_label(&mut out)?;
        self.test(rax, rax)?;
        self.setne(al)?;
        self.movzx(eax, al)
    }

    /// Asks by the page to end this guest for a reason of a set of reasons (section 4.1).
    pub fn terminate_by_page(&mut self, set: u8, reason: u8) -> Result<(), IcedError> {
        self.page()?;
        self.exit(TERMINATION_REQUEST, u64::from(reason) << 4 | u64::from(set), 0)
    }

    /// Moves a string of bytes between a port and the page's buffer.
    pub(super) fn string_by_ghcb(&mut self, port: u16, count: u32, read: bool) -> Result<(), IcedError> {
        // A string, repeated, of bytes, by a 64-bit address (AMD64 APM volume 2, section 15.10.2).
        let info = u64::from(port) << 16 | 1 << 9 | 1 << 4 | 1 << 3 | 1 << 2 | u64::from(read);
        self.page()?;
        self.name_buffer()?;
        self.exit_with(IOIO, [info, count.into()], bit(SCRATCH))
    }

    /// Asks by the MSR for whatever `request` is; the answer is in RAX.
    pub fn request_by_msr(&mut self, request: u64) -> Result<(), IcedError> {
        self.mov(rax, request)?;
        self.ask_by_msr()?;
        self.mov(ecx, MSR)?;
        self.rdmsr()?;
        self.shl(rdx, 32)?;
        self.or(rax, rdx)
    }

    /// Exits by the page for whatever `code` is, with two numbers that say what for, and with `fields` besides.
    pub fn exit_by_page(&mut self, code: u64, infos: [u64; 2], fields: &[(Field, u64)]) -> Result<(), IcedError> {
        self.page()?;
        let mut valid = 0;
        for (field, value) in fields {
            self.mov(r14, *value)?;
            self.mov(qword_ptr(r15 + *field as i32), r14)?;
            valid |= bit(*field as i32);
        }
        self.exit_with(code, infos, valid)
    }

    /// Loads RAX from a field of the page.
    pub fn load_field(&mut self, field: Field) -> Result<(), IcedError> {
        self.page()?;
        self.mov(rax, qword_ptr(r15 + field as i32))
    }

    /// Asks by the page, at once, for a change of each of these pages to a side, from the first one to the last. The
    /// host's answer is in RAX: 0 if all is done.
    pub fn page_states_by_page(&mut self, changes: &[(u64, Side)]) -> Result<(), IcedError> {
        self.page()?;
        let header = (changes.len() as u64).wrapping_sub(1) << 16 & 0xffff_0000;
        let entries = changes.iter().map(|(gpa, to)| operation(*to) << 52 | gpa);
        for (place, value) in (BUFFER..).step_by(8).zip([header].into_iter().chain(entries)) {
            self.mov(r14, value)?;
            self.mov(qword_ptr(r15 + place), r14)?;
        }
        self.change_page_states()
    }
}
