//! What fresh memory contains: zeros, or what the guest cannot know.

use crate::Guest;
use crate::clause::Verdict;
use crate::guest::Assembler;
use cvm_core::boot::FreshMemory;
use cvm_core::{Side, Vm};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// What the guest writes where it may not read first.
const WRITTEN: u32 = 0x600d_0000;

/// Tells whether fresh memory is zero by the guest's interface, and of each of these private words what it finds: before it has
/// written there, if it may read, and after it has.
pub(super) fn tell(a: &mut Assembler, words: &[u64]) -> Result<(), IcedError> {
    let is_zero = a.fresh_memory() == FreshMemory::Zero;
    a.mov(eax, u32::from(is_zero))?;
    a.report()?;
    if is_zero {
        for gpa in words {
            a.load(*gpa, Side::Private)?;
            a.report()?;
        }
    }
    for (number, gpa) in (0..).zip(words) {
        a.store(*gpa, Side::Private, WRITTEN + number)?;
    }
    for gpa in words {
        a.load(*gpa, Side::Private)?;
        a.report()?;
    }
    Ok(())
}

/// Hears what [`tell`] tells.
pub(super) fn listen<V: Vm>(guest: &mut Guest<V>, words: &[u64]) -> Verdict {
    let is_zero = guest.report() == 1;
    if is_zero {
        for gpa in words {
            assert_eq!(guest.report(), 0, "{gpa:#x} is not zero");
        }
    }
    for (number, gpa) in (0..).zip(words) {
        assert_eq!(guest.report(), WRITTEN + number, "{gpa:#x} is not what the guest has written");
    }
    if is_zero {
        return Verdict::Met;
    }
    Verdict::NotOffered("the interface says that fresh memory is undefined".into())
}
