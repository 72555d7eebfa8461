//! What is said on a vCPU's page.

use super::{Encoded, Malformed, Message, Parts, encoded, refusal_operands, with_text};
use cvm_core::doorbell::{Access, SPACE, device_of};
use cvm_core::interrupt::Refusal;
use cvm_core::memory::LeftAs;
use cvm_core::x86::Register;
use cvm_core::{Answer, ConversionRequest, Event, Exit, Gpa, GpaRange, Side};

/// What the guest's last exit is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Given {
    /// Nothing: it asked for nothing.
    Nothing,
    /// The value that it reads.
    Value(u64),
    /// What became of its conversion.
    Answer(Answer),
}

/// What a VMM asks for on a vCPU's page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Answer the last exit, and run the guest up to the next.
    Run(Given),
    /// Carry out this part of what the guest has asked for.
    Convert {
        /// The pages.
        range: GpaRange,
        /// Where they go.
        to: Side,
    },
    /// Take pages from the guest that a conversion has lost.
    Poison(GpaRange),
    /// Show a register.
    Register(Register),
    /// Inject an event.
    Inject(Event),
}

const ANSWERS: [Answer; 3] = [Answer::Done, Answer::Invalid, Answer::Retry];

impl Request {
    /// What it has the vault do, for errors.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Run(_) => "run a vcpu",
            Self::Convert { .. } => "convert pages",
            Self::Poison(_) => "poison pages",
            Self::Register(_) => "show a register",
            Self::Inject(_) => "inject an event",
        }
    }

    /// As a message.
    pub fn encode(&self) -> Encoded {
        match *self {
            Self::Run(Given::Nothing) => encoded(1, &[]),
            Self::Run(Given::Value(value)) => encoded(2, &[value]),
            Self::Run(Given::Answer(answer)) => encoded(3, &[answer as u64]),
            Self::Convert { range, to } => encoded(4, &[range.start().0, range.len(), to as u64]),
            Self::Poison(range) => encoded(5, &[range.start().0, range.len()]),
            Self::Register(register) => encoded(6, &[register as u64]),
            Self::Inject(event) => {
                let (event, vector) = match event {
                    Event::Interrupt(vector) => (0, vector),
                    Event::Line { vector, asserted: true } => (1, vector),
                    Event::Line { vector, asserted: false } => (2, vector),
                };
                encoded(7, &[event, vector.into()])
            }
        }
    }

    /// From a message.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn decode(message: &Message, text: &[u8]) -> Result<Self, Malformed> {
        let mut parts = Parts::of(message, text)?;
        let request = match message.kind {
            1 => Self::Run(Given::Nothing),
            2 => Self::Run(Given::Value(parts.next()?)),
            3 => Self::Run(Given::Answer(parts.choice(&ANSWERS, |answer| answer as u64)?)),
            4 => Self::Convert { range: parts.range()?, to: parts.side()? },
            5 => Self::Poison(parts.range()?),
            6 => Self::Register(parts.choice(&Register::ALL, |register| register as u64)?),
            7 => Self::Inject(match (parts.next()?, parts.next()?) {
                (0u64, vector) => Event::Interrupt(vector),
                (1, vector) => Event::Line { vector, asserted: true },
                (2, vector) => Event::Line { vector, asserted: false },
                _ => return Err(parts.malformed()),
            }),
            _ => return Err(parts.malformed()),
        };
        parts.end(request)
    }
}

/// Why a vCPU cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// It accessed what is no memory.
    Mmio {
        /// Where.
        gpa: Gpa,
        /// Whether it wrote.
        write: bool,
    },
    /// It touched a page without the conversion that this takes.
    MissingConversion {
        /// The address.
        gpa: Gpa,
    },
    /// It rang a doorbell that is not there.
    UnknownDoorbell {
        /// The register.
        register: u16,
        /// What it tried.
        access: Access,
    },
    /// It crashed, for this reason.
    Crashed(String),
    /// Pages are lost that a guest may still see.
    Lost,
    /// The vault's host failed it.
    Host(String),
}

/// What a vault answers on a vCPU's page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// The guest has exited.
    Exit(Exit),
    /// The guest has failed.
    Failed(Failure),
    /// It is done.
    Done,
    /// The pages were not converted.
    NotConverted {
        /// How they are left.
        left_as: LeftAs,
        /// Why.
        reason: String,
    },
    /// What the exit under way exposes of the register, or nothing.
    Register(Option<u64>),
    /// The guard does not allow the injection.
    InjectionRefused(Refusal),
    /// What the request takes for granted does not hold, for this reason: an honest VMM asks that too, when other vCPUs have
    /// been faster.
    Outdated(String),
    /// The vault does not do that, for this reason; no honest VMM asks for it.
    Refused(String),
}

impl Reply {
    /// As a message. An exit that there is no message for becomes a crash.
    pub fn encode(&self) -> Encoded {
        match self {
            Self::Exit(exit) => match *exit {
                Exit::Conversion(request) => encoded(0x11, &[request.gpa().0, request.pages(), request.to() as u64]),
                Exit::Console(byte) => encoded(0x12, &[byte.into()]),
                Exit::DoorbellWrite { register, value } => encoded(0x13, &[register.into(), value.into()]),
                Exit::DoorbellRead { register } => encoded(0x14, &[register.into()]),
                Exit::PortWrite { port, width, value } => encoded(0x15, &[port.into(), width.into(), value.into()]),
                Exit::PortRead { port, width } => encoded(0x16, &[port.into(), width.into()]),
                Exit::MsrWrite { index, value } => encoded(0x17, &[index.into(), value]),
                Exit::MsrRead { index } => encoded(0x18, &[index.into()]),
                Exit::Halted => encoded(0x19, &[]),
                Exit::Ended { code } => encoded(0x1a, &[code.into()]),
                Exit::Kicked => encoded(0x1b, &[]),
                _ => with_text(encoded(0x23, &[]), "it left by an exit that vaults do not pass on"),
            },
            Self::Failed(failure) => match failure {
                Failure::Mmio { gpa, write } => encoded(0x20, &[gpa.0, (*write).into()]),
                Failure::MissingConversion { gpa } => encoded(0x21, &[gpa.0]),
                Failure::UnknownDoorbell { register, access } => {
                    let (write, value) = match access {
                        Access::Read => (0, 0),
                        Access::Write(value) => (1, *value),
                    };
                    encoded(0x22, &[(*register).into(), write, value.into()])
                }
                Failure::Crashed(reason) => with_text(encoded(0x23, &[]), reason),
                Failure::Lost => encoded(0x24, &[]),
                Failure::Host(reason) => with_text(encoded(0x25, &[]), reason),
            },
            Self::Done => encoded(0x30, &[]),
            Self::NotConverted { left_as, reason } => {
                with_text(encoded(0x31, &[(*left_as == LeftAs::Unknown).into()]), reason)
            }
            Self::Register(exposed) => encoded(0x32, &[exposed.is_some().into(), exposed.unwrap_or(0)]),
            Self::InjectionRefused(refusal) => encoded(0x40, &refusal_operands(*refusal)),
            Self::Refused(reason) => with_text(encoded(0x50, &[]), reason),
            Self::Outdated(reason) => with_text(encoded(0x51, &[]), reason),
        }
    }

    /// From a message about vCPU `vcpu`.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn decode(vcpu: u32, message: &Message, text: &[u8]) -> Result<Self, Malformed> {
        let mut parts = Parts::of(message, text)?;
        let reply = match message.kind {
            0x11..=0x1b => Self::Exit(Self::decode_exit(vcpu, message.kind, &mut parts)?),
            0x20 => Self::Failed(Failure::Mmio { gpa: Gpa(parts.next()?), write: parts.flag()? }),
            0x21 => Self::Failed(Failure::MissingConversion { gpa: Gpa(parts.next()?) }),
            0x22 => {
                let register = parts.next()?;
                let access = match (parts.flag()?, parts.next()?) {
                    (false, 0) => Access::Read,
                    (true, value) => Access::Write(value),
                    _ => return Err(parts.malformed()),
                };
                Self::Failed(Failure::UnknownDoorbell { register, access })
            }
            0x23 => Self::Failed(Failure::Crashed(parts.text()?)),
            0x24 => Self::Failed(Failure::Lost),
            0x25 => Self::Failed(Failure::Host(parts.text()?)),
            0x30 => Self::Done,
            0x31 => {
                let left_as = if parts.flag()? { LeftAs::Unknown } else { LeftAs::Before };
                Self::NotConverted { left_as, reason: parts.text()? }
            }
            0x32 => Self::Register(match (parts.flag()?, parts.next()?) {
                (true, value) => Some(value),
                (false, 0) => None,
                _ => return Err(parts.malformed()),
            }),
            0x40 => Self::InjectionRefused(parts.refusal()?),
            0x50 => Self::Refused(parts.text()?),
            0x51 => Self::Outdated(parts.text()?),
            _ => return Err(parts.malformed()),
        };
        parts.end(reply)
    }

    fn decode_exit(vcpu: u32, kind: u16, parts: &mut Parts<'_>) -> Result<Exit, Malformed> {
        fn device(parts: &mut Parts<'_>) -> Result<u16, Malformed> {
            let register: u16 = parts.next()?;
            let is_one = register < SPACE && register.is_multiple_of(4) && device_of(register).is_some();
            if is_one { Ok(register) } else { Err(parts.malformed()) }
        }
        Ok(match kind {
            0x11 => Exit::Conversion(ConversionRequest::from_guest(vcpu, parts.next()?, parts.next()?, parts.side()?)),
            0x12 => Exit::Console(parts.next()?),
            0x13 => Exit::DoorbellWrite { register: device(parts)?, value: parts.next()? },
            0x14 => Exit::DoorbellRead { register: device(parts)? },
            0x15 => {
                let (port, width) = (parts.next()?, parts.choice(&[1, 2, 4], u64::from)?);
                let value: u32 = parts.next()?;
                if u64::from(value) >> (8 * width) != 0 {
                    return Err(parts.malformed());
                }
                Exit::PortWrite { port, width, value }
            }
            0x16 => Exit::PortRead { port: parts.next()?, width: parts.choice(&[1, 2, 4], u64::from)? },
            0x17 => Exit::MsrWrite { index: parts.next()?, value: parts.next()? },
            0x18 => Exit::MsrRead { index: parts.next()? },
            0x19 => Exit::Halted,
            0x1a => Exit::Ended { code: parts.next()? },
            0x1b => Exit::Kicked,
            _ => return Err(parts.malformed()),
        })
    }
}
