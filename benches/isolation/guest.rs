//! The guests: a few instructions each, the same whatever isolates them.

use cvm::doorbell::{PORT_BASE, control, device_base};
use cvm::x86::{VcpuState, identity_map};
use cvm::{Gpa, GpaRange, PAGE_SIZE, Side};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// The register by which a guest just leaves.
pub const DOORBELL: u16 = device_base(0);

/// Where the range begins that guests convert.
const RANGE: u64 = 64 << 20;

/// The vector that [`Guest::echoing`] answers to.
pub const VECTOR: u8 = 0x41;

/// The MSR by which a guest ends an interrupt (Intel SDM, volume 3, section 12.12).
const EOI: u32 = 0x80b;

const BOOT_PAGE: u64 = 0x1000;
const TABLE: u64 = 0x2000;
const IDT: u64 = 0x3000;
const HANDLER: u64 = 0x4000;
/// Where the stack ends.
const STACK: u64 = 0x30_1000;
const TABLES: u64 = 0x10_0000;
const CODE: u64 = 0x20_0000;

/// All that a VMM needs for a launch.
pub struct Guest {
    /// How much memory it has, from address 0.
    pub memory: u64,
    /// What is there at first.
    pub pages: Vec<(Gpa, Vec<u8>)>,
    /// What its vCPU starts from.
    pub state: VcpuState,
}

impl Guest {
    fn new(memory: u64, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Self {
        let mut code = CodeAssembler::new(64).unwrap();
        write(&mut code).unwrap();
        let pages = vec![
            (Gpa(BOOT_PAGE), vec![0; PAGE_SIZE as usize]),
            (Gpa(TABLES), identity_map(Gpa(TABLES), memory, None).unwrap()),
            (Gpa(CODE), code.assemble(CODE).unwrap()),
        ];
        Self { memory, pages, state: VcpuState::long_mode(Gpa(CODE), Gpa(TABLES), 0, Gpa(BOOT_PAGE)) }
    }

    /// One that rings for ever.
    pub fn ringing() -> Self {
        Self::new(16 << 20, |code| {
            let mut again = code.create_label();
            code.mov(edx, u32::from(PORT_BASE + DOORBELL))?;
            code.set_label(&mut again)?;
            code.out(dx, eax)?;
            code.jmp(again)
        })
    }

    /// One that halts for ever, and rings for each interrupt of [`VECTOR`], which its APIC takes.
    pub fn echoing() -> Self {
        let mut guest = Self::new(16 << 20, |code| {
            let mut again = code.create_label();
            code.mov(rsp, STACK)?;
            code.mov(rbx, TABLE + 24)?;
            code.lgdt(ptr(rbx))?;
            code.lidt(ptr(rbx + 10))?;
            code.sti()?;
            code.set_label(&mut again)?;
            code.hlt()?;
            code.jmp(again)
        });
        let handler = || {
            let mut code = CodeAssembler::new(64)?;
            code.mov(edx, u32::from(PORT_BASE + DOORBELL))?;
            code.out(dx, eax)?;
            code.mov(ecx, EOI)?;
            code.xor(eax, eax)?;
            code.xor(edx, edx)?;
            code.wrmsr()?;
            code.iretq()?;
            code.assemble(HANDLER)
        };
        // A null, a 64-bit code and a data descriptor, and behind them the operands of lgdt and lidt.
        let mut table = [0u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff].map(u64::to_le_bytes).concat();
        for (limit, base) in [(23u16, TABLE), (4095, IDT)] {
            table.extend(limit.to_le_bytes());
            table.extend(base.to_le_bytes());
        }
        // A 64-bit interrupt gate (AMD64 APM volume 2, section 4.8.4), present, to the code segment.
        let gate = HANDLER & 0xffff | 8 << 16 | 0x8e00 << 32 | (HANDLER >> 16 & 0xffff) << 48;
        let mut idt = vec![0; PAGE_SIZE as usize];
        idt[usize::from(VECTOR) * 16..][..8].copy_from_slice(&gate.to_le_bytes());
        guest.pages.extend([(Gpa(TABLE), table), (Gpa(IDT), idt), (Gpa(HANDLER), handler().unwrap())]);
        guest
    }

    /// One that shares a range and takes it back for ever, by four exits each, and touches its first page after each
    /// if it is to.
    pub fn converting(range: GpaRange, touches: bool) -> Self {
        Self::new(RANGE + (64 << 20), |code| {
            let mut again = code.create_label();
            code.mov(rbx, range.start().0)?;
            code.set_label(&mut again)?;
            for side in [Side::Shared, Side::Private] {
                let writes = [
                    (control::CONVERT_FRAME, (range.start().0 / PAGE_SIZE) as u32),
                    (control::CONVERT_PAGES, range.pages() as u32),
                    (control::CONVERT, side as u32),
                ];
                for (register, value) in writes {
                    code.mov(edx, u32::from(PORT_BASE + register))?;
                    code.mov(eax, value)?;
                    code.out(dx, eax)?;
                }
                code.in_(eax, dx)?;
                if touches {
                    code.mov(dword_ptr(rbx), eax)?;
                }
            }
            code.jmp(again)
        })
    }
}

/// The range of `len` bytes that a guest converts.
pub fn range(len: u64) -> GpaRange {
    GpaRange::new(RANGE, len).unwrap()
}
