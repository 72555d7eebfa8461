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

const BOOT_PAGE: u64 = 0x1000;
const TABLES: u64 = 0x10_0000;
const CODE: u64 = 0x20_0000;

/// All that a VMM needs for a launch.
pub struct Guest {
    /// How much memory it has, from address 0.
    pub memory: u64,
    /// What is there at first.
    pub pages: [(Gpa, Vec<u8>); 3],
    /// What its vCPU starts from.
    pub state: VcpuState,
}

impl Guest {
    fn new(memory: u64, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Self {
        let mut code = CodeAssembler::new(64).unwrap();
        write(&mut code).unwrap();
        let pages = [
            (Gpa(BOOT_PAGE), vec![0; PAGE_SIZE as usize]),
            (Gpa(TABLES), identity_map(Gpa(TABLES), memory).unwrap()),
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
