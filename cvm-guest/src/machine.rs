use crate::Error;
use cvm_core::{GpaRange, Side};

/// The instructions that reach the host.
///
/// Doorbell registers are those of [`cvm_core::doorbell`]. Values that come back are the host's: they can be anything.
pub trait Machine {
    /// Writes a doorbell register.
    fn write(&self, register: u16, value: u32);

    /// Reads a doorbell register.
    fn read(&self, register: u16) -> u32;

    /// Asks for a conversion by hypercall, and returns what is in RAX then: 0, or an error number.
    fn convert(&self, range: GpaRange, to: Side) -> u64;

    /// Makes the private pages of `range` such as can be used; where all memory is, nothing is to do.
    ///
    /// # Errors
    /// [`Error::Sev`] when it is not all memory.
    fn accept(&self, range: GpaRange) -> Result<(), Error> {
        let _ = range;
        Ok(())
    }
}

impl<M: Machine + ?Sized> Machine for &M {
    fn write(&self, register: u16, value: u32) {
        (**self).write(register, value);
    }

    fn read(&self, register: u16) -> u32 {
        (**self).read(register)
    }

    fn convert(&self, range: GpaRange, to: Side) -> u64 {
        (**self).convert(range, to)
    }

    fn accept(&self, range: GpaRange) -> Result<(), Error> {
        (**self).accept(range)
    }
}
