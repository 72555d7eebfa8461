//! Doorbells: how a guest without a better call reaches its VMM.
//!
//! A protected guest has no emulated MMIO, and some hosts never complete a hypercall. What works everywhere is an
//! access to a port or to a model-specific register (MSR) that KVM hands to user space. Both lead to the same space
//! of 32-bit registers, each at a multiple of four:
//!
//! | registers | meaning |
//! |---|---|
//! | `0x000..0x200` | [`control`]: console, conversions, interrupts, end of the guest |
//! | `0x200 + 0x200 * n ..` | device `n`, with the register offsets of virtio-mmio (virtio 1.2, section 4.2.2) |
//!
//! Register `r` is port [`PORT_BASE`]` + r` (32-bit `in` and `out`) or MSR [`MSR_BASE`]` + r` (upper half zero).

#[cfg(feature = "std")]
use crate::{Answer, ConversionRequest, Error, Exit, Gpa, PAGE_SIZE, Side};
use zerocopy::TryFromBytes;

/// The first port of the register space. Above the ports that PCs use, below the end of the 64 Ki ports.
pub const PORT_BASE: u16 = 0xa000;

/// The first MSR of the register space: in no range that a vendor or a hypervisor interface uses.
pub const MSR_BASE: u32 = 0x4356_0000;

/// How many bytes of register offsets there are.
pub const SPACE: u16 = 0x2000;

/// How many bytes of register offsets a device has.
pub const DEVICE_SPACE: u16 = 0x200;

/// How many devices there can be.
pub const MAX_DEVICES: u16 = SPACE / DEVICE_SPACE - 1;

/// The first register of a device, which must be below [`MAX_DEVICES`].
pub const fn device_base(device: u16) -> u16 {
    DEVICE_SPACE * (device + 1)
}

/// The device that a register belongs to, with its offset there; nothing for control registers.
pub const fn device_of(register: u16) -> Option<(u16, u16)> {
    match (register / DEVICE_SPACE).checked_sub(1) {
        Some(device) if device < MAX_DEVICES => Some((device, register % DEVICE_SPACE)),
        _ => None,
    }
}

/// The control registers.
pub mod control {
    /// Write: one byte for the console.
    pub const CONSOLE: u16 = 0x00;
    /// Write: the guest ends, with this code; 0 is success.
    pub const END: u16 = 0x04;
    /// Write: this vCPU accepts the interrupt with the vector in bits 0 to 7 (32 to 255) from now on: as an edge, or
    /// with [`ACCEPT_LEVEL`] as a level. A vector keeps the trigger that it was first accepted with.
    pub const ACCEPT: u16 = 0x08;
    /// The bit of [`ACCEPT`] that makes the vector level-triggered.
    pub const ACCEPT_LEVEL: u32 = 1 << 8;
    /// Write: bits 12 to 43 of the GPA that the next conversion starts at.
    pub const CONVERT_FRAME: u16 = 0x10;
    /// Write: how many pages the next conversion has.
    pub const CONVERT_PAGES: u16 = 0x14;
    /// Write: convert to this [`Side`](crate::Side). Read: the [`Answer`](crate::Answer) to this vCPU's last request.
    /// After [`Answer::Retry`](crate::Answer::Retry) the other two registers hold what is left of it, so that writing this
    /// one again is enough to go on.
    pub const CONVERT: u16 = 0x18;
}

/// Which instructions reach the register space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, TryFromBytes)]
#[repr(u32)]
pub enum Doorbell {
    /// `in` and `out`.
    Port = 0,
    /// `rdmsr` and `wrmsr`.
    Msr = 1,
}

/// What makes an interrupt pending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Trigger {
    /// An event, once.
    Edge,
    /// A line, for as long as it is asserted.
    Level,
}

/// How a guest asks for conversions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, TryFromBytes)]
#[repr(u32)]
pub enum Transport {
    /// By the control registers behind the doorbell.
    Doorbell = 0,
    /// By the KVM hypercall `KVM_HC_MAP_GPA_RANGE` (Linux `Documentation/virt/kvm/x86/hypercalls.rst`).
    Hypercall = 1,
    /// By the page state changes of AMD SEV-SNP (AMD publication 56421).
    PageState = 2,
}

/// One access to a register, as a port or MSR exit exposes it.
#[cfg(feature = "std")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The guest reads and waits for a value.
    Read,
    /// The guest writes this value.
    Write(u32),
}

#[cfg(feature = "std")]
impl std::fmt::Display for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Read => f.write_str("read"),
            Self::Write(value) => write!(f, "write {value:#x} to"),
        }
    }
}

/// What an access to the register space asks of a backend.
#[cfg(feature = "std")]
#[derive(Debug, PartialEq, Eq)]
pub enum Ring {
    /// Nothing that the VMM need know: go on.
    Latched,
    /// The guest reads this value: hand it over and go on.
    Value(u32),
    /// The vCPU accepts the interrupt with this vector, which is no exception's, and this trigger.
    Accept(u8, Trigger),
    /// The VMM must see this.
    Exit(crate::Exit),
}

/// The control registers of one vCPU.
///
/// A pure state machine: a backend feeds it the accesses that its port and MSR exits expose.
#[cfg(feature = "std")]
#[derive(Debug, Clone)]
pub struct Registers {
    vcpu: u32,
    frame: u32,
    pages: u32,
    answer: Answer,
}

#[cfg(feature = "std")]
impl Registers {
    /// The registers as vCPU `vcpu` finds them at its start.
    pub fn new(vcpu: u32) -> Self {
        Self { vcpu, frame: 0, pages: 0, answer: Answer::Invalid }
    }

    /// What an access means.
    ///
    /// # Errors
    /// [`Error::UnknownDoorbell`] for a register that does not exist, cannot be accessed that way, or takes no such
    /// value.
    pub fn access(&mut self, register: u16, access: Access) -> Result<Ring, Error> {
        let unknown = Error::UnknownDoorbell { vcpu: self.vcpu, register, access };
        if register >= SPACE || !register.is_multiple_of(4) {
            return Err(unknown);
        }
        if device_of(register).is_some() {
            return Ok(Ring::Exit(match access {
                Access::Read => Exit::DoorbellRead { register },
                Access::Write(value) => Exit::DoorbellWrite { register, value },
            }));
        }
        Ok(match (register, access) {
            (control::CONSOLE, Access::Write(byte)) => {
                Ring::Exit(Exit::Console(u8::try_from(byte).map_err(|_| unknown)?))
            }
            (control::ACCEPT, Access::Write(accepted)) => {
                let level = accepted & control::ACCEPT_LEVEL != 0;
                let vector = u8::try_from(accepted & !control::ACCEPT_LEVEL).ok().filter(|vector| *vector >= 32);
                Ring::Accept(vector.ok_or(unknown)?, if level { Trigger::Level } else { Trigger::Edge })
            }
            (control::END, Access::Write(code)) => Ring::Exit(Exit::Ended { code }),
            (control::CONVERT_FRAME, Access::Write(frame)) => {
                self.frame = frame;
                Ring::Latched
            }
            (control::CONVERT_PAGES, Access::Write(pages)) => {
                self.pages = pages;
                Ring::Latched
            }
            (control::CONVERT, Access::Write(side)) => {
                let to = Side::from_u32(side).ok_or(unknown)?;
                let gpa = u64::from(self.frame) * PAGE_SIZE;
                Ring::Exit(Exit::Conversion(ConversionRequest::from_guest(self.vcpu, gpa, self.pages.into(), to)))
            }
            (control::CONVERT, Access::Read) => Ring::Value(self.answer as u32),
            _ => return Err(unknown),
        })
    }

    /// Keeps the answer for the guest to read; `reached` is how far the request got, as
    /// [`Conversion::reached`](crate::Conversion::reached) has it.
    pub fn answer(&mut self, answer: Answer, reached: Gpa) {
        self.answer = answer;
        let done = (reached.0 / PAGE_SIZE).checked_sub(self.frame.into()).and_then(|done| u32::try_from(done).ok());
        if let Some(done) = done.filter(|done| answer == Answer::Retry && *done < self.pages)
            && let Some(frame) = self.frame.checked_add(done)
        {
            (self.frame, self.pages) = (frame, self.pages - done);
        }
    }
}

#[cfg(all(test, feature = "std"))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_conversion_is_latched_and_then_asked_for() {
        let mut registers = Registers::new(3);
        assert_eq!(registers.access(control::CONVERT_FRAME, Access::Write(0x200)).unwrap(), Ring::Latched);
        assert_eq!(registers.access(control::CONVERT_PAGES, Access::Write(2)).unwrap(), Ring::Latched);
        let Ring::Exit(Exit::Conversion(request)) = registers.access(control::CONVERT, Access::Write(1)).unwrap()
        else {
            panic!("no conversion");
        };
        assert_eq!(request, ConversionRequest::from_guest(3, 0x20_0000, 2, Side::Shared));
        assert_eq!(registers.access(control::CONVERT, Access::Read).unwrap(), Ring::Value(Answer::Invalid as u32));
        registers.answer(Answer::Retry, Gpa(0x20_0000));
        assert_eq!(registers.access(control::CONVERT, Access::Read).unwrap(), Ring::Value(Answer::Retry as u32));
    }

    #[test]
    fn a_guest_that_is_to_ask_again_rings_once_more_for_what_is_left() {
        let mut registers = Registers::new(0);
        registers.access(control::CONVERT_FRAME, Access::Write(0x200)).unwrap();
        registers.access(control::CONVERT_PAGES, Access::Write(8)).unwrap();
        let mut ring = |answer, reached| {
            registers.answer(answer, Gpa(reached));
            match registers.access(control::CONVERT, Access::Write(1)).unwrap() {
                Ring::Exit(Exit::Conversion(request)) => (request.gpa().0, request.pages()),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(ring(Answer::Retry, 0x20_3000), (0x20_3000, 5));
        assert_eq!(ring(Answer::Retry, 0x20_7000), (0x20_7000, 1));
        for (answer, reached) in [(Answer::Retry, 0x20_8000), (Answer::Retry, 0), (Answer::Retry, u64::MAX)] {
            assert_eq!(ring(answer, reached), (0x20_7000, 1), "{reached:#x} is not on the way");
        }
        assert_eq!(ring(Answer::Invalid, 0x20_8000), (0x20_7000, 1));
    }

    #[test]
    fn a_guest_can_accept_interrupts_and_no_exceptions() {
        let mut registers = Registers::new(0);
        let mut accept = |value| registers.access(control::ACCEPT, Access::Write(value));
        for vector in 32..=255u8 {
            assert_eq!(accept(vector.into()).unwrap(), Ring::Accept(vector, Trigger::Edge));
            let level = u32::from(vector) | control::ACCEPT_LEVEL;
            assert_eq!(accept(level).unwrap(), Ring::Accept(vector, Trigger::Level));
        }
        for refused in [0, 31, 0x100, 0x11f, 0x241, 0x8000_0041, u32::MAX] {
            assert!(accept(refused).is_err(), "{refused:#x}");
        }
        assert!(registers.access(control::ACCEPT, Access::Read).is_err());
    }

    #[test]
    fn every_device_has_its_own_registers() {
        for device in 0..MAX_DEVICES {
            assert_eq!(device_of(device_base(device) + 0x1fc), Some((device, 0x1fc)));
        }
        assert_eq!(device_of(control::CONVERT), None);
        assert_eq!(device_of(SPACE), None);
    }

    proptest! {
        #[test]
        fn garbage_is_refused_and_never_panics(accesses: Vec<(u16, Option<u32>)>) {
            let mut registers = Registers::new(0);
            for (register, value) in accesses {
                let access = value.map_or(Access::Read, Access::Write);
                match registers.access(register, access) {
                    Ok(_) => prop_assert!(register < SPACE && register.is_multiple_of(4)),
                    Err(Error::UnknownDoorbell { .. }) => {}
                    Err(error) => prop_assert!(false, "{error}"),
                }
            }
        }
    }
}
