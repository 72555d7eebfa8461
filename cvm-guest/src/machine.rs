#![allow(unsafe_code, reason = "conversions discard memory, so the methods that ask for them are unsafe")]

use crate::Error;
use cvm_core::{GpaRange, Side};

/// The instructions that reach the host.
///
/// Doorbell registers are those of [`cvm_core::doorbell`]. Values that come back are the host's: they can be anything.
///
/// Safe code reaches a host by [`Platform`](crate::Platform). By the instructions themselves it could give away memory that
/// is in use:
/// ```compile_fail,E0133
/// fn ring(machine: &impl cvm_guest::Machine) {
///     machine.write(cvm_core::doorbell::control::CONVERT, cvm_core::Side::Shared as u32);
/// }
/// ```
/// ```compile_fail,E0133
/// fn call(machine: &impl cvm_guest::Machine, stack: cvm_core::GpaRange) {
///     machine.convert(stack, cvm_core::Side::Shared);
/// }
/// ```
pub trait Machine {
    /// Writes a doorbell register.
    ///
    /// # Safety
    /// The register must be below [`SPACE`](cvm_core::doorbell::SPACE). A write to
    /// [`CONVERT`](cvm_core::doorbell::control::CONVERT) converts the range that the registers before it name, and needs
    /// what [`Machine::convert`] needs. No other register changes memory of the guest.
    unsafe fn write(&self, register: u16, value: u32);

    /// Reads a doorbell register. Beyond the last register there is nothing, which reads as 0.
    fn read(&self, register: u16) -> u32;

    /// Asks for a conversion by hypercall, and returns what is in RAX then: 0, or an error number.
    ///
    /// # Safety
    /// Nothing of the guest may be in `range`: no code, stack, static or other object, no reference, and no
    /// [`SharedRegion`](crate::SharedRegion) unless it is the one that is taken back by this conversion. The contents of
    /// the range are lost, and the host can read and write what is shared.
    unsafe fn convert(&self, range: GpaRange, to: Side) -> u64;

    /// Lets the guest use private memory that nobody has used yet, whatever is in it: see
    /// [`Platform::accept`](crate::Platform::accept). Where no memory has to be accepted, this does nothing.
    ///
    /// # Errors
    /// [`Error::Sev`] when `range` is not all memory.
    fn accept(&self, range: GpaRange) -> Result<(), Error> {
        let _ = range;
        Ok(())
    }
}

impl<M: Machine + ?Sized> Machine for &M {
    unsafe fn write(&self, register: u16, value: u32) {
        // SAFETY: passed on to the caller.
        unsafe { (**self).write(register, value) };
    }

    fn read(&self, register: u16) -> u32 {
        (**self).read(register)
    }

    unsafe fn convert(&self, range: GpaRange, to: Side) -> u64 {
        // SAFETY: passed on to the caller.
        unsafe { (**self).convert(range, to) }
    }

    fn accept(&self, range: GpaRange) -> Result<(), Error> {
        (**self).accept(range)
    }
}
