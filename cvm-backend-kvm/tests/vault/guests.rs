//! Guests of the tests.

use crate::common::{Assembler, DATA, REPORT, range};
use cvm_core::doorbell::device_base;
use cvm_core::{Exit, GpaRange, PAGE_SIZE, Side};
use iced_x86::IcedError;

/// What the guest keeps to itself.
pub const SECRET: u32 = 0x5ec2_e751;
/// Pages that it shares from time to time.
pub const POOL: u64 = DATA + 0x1_0000;
pub const POOL_PAGES: u64 = 2;
/// By which register it tells what it has heard.
pub const HEARD: u16 = device_base(1);

/// A guest that keeps a secret on a page, says forever whether it is still there, and converts others.
pub fn witness(a: &mut Assembler) -> Result<(), IcedError> {
    a.store(DATA, Side::Private, SECRET)?;
    a.store(DATA + PAGE_SIZE - 4, Side::Private, SECRET)?;
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.load(DATA, Side::Private)?;
    a.report()?;
    a.load(DATA + PAGE_SIZE - 4, Side::Private)?;
    a.report()?;
    a.listen(HEARD)?;
    a.ring(HEARD)?;
    for to in [Side::Shared, Side::Private] {
        a.convert(POOL, POOL_PAGES, to)?;
        a.ring(HEARD)?;
    }
    a.jmp(again)
}

/// A guest that does nothing forever.
pub fn spin(a: &mut Assembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.jmp(again)
}

pub const SAYS_SECRET: Exit = Exit::DoorbellWrite { register: REPORT, value: SECRET };

pub fn says(value: u32) -> Exit {
    Exit::DoorbellWrite { register: HEARD, value }
}

pub fn pool() -> GpaRange {
    range(POOL, POOL_PAGES)
}
