//! Guests of a few instructions, whatever they run on.
//!
//! A guest is written once, with an [`Assembler`] that knows from the launch's interface how exits reach the host, how
//! conversions are asked for, and where the shared side of a page is.

mod assembler;
mod ghcb;

pub use assembler::Assembler;
use cvm_core::doorbell::device_base;
pub use ghcb::Field;

/// How much memory a guest has unless a clause says otherwise.
pub const MEMORY: u64 = 4 << 20;
/// The boot page; the two pages behind it are those that a trusted entity fills.
pub const BOOT_PAGE: u64 = 0x1000;
/// Pages for what a clause loads besides.
pub const EXTRA: u64 = 0x4000;
/// Page tables.
pub const TABLES: u64 = 0x10_0000;
/// Where each vCPU starts.
pub const CODE: u64 = 0x20_0000;
/// Pages that no launch loads: for a clause's own purposes.
pub const DATA: u64 = 0x30_0000;
/// Where each vCPU has the page by which it talks to its host, where that takes one: the first one's.
pub const GHCB: u64 = 0x3e_0000;
/// How many of them there are.
pub const MAX_GHCBS: u64 = 16;
/// The doorbell register by which guests tell a number.
pub const REPORT: u16 = device_base(0);
