//! What a VMM and its vault say to each other.
//!
//! Everything is a [`Message`]: a sequence number, a kind, six operands, and for some kinds a short text. Either end may
//! be compromised, so that each checks all that it takes: a kind that it does not know, an operand that is out of range,
//! one that should be zero, or a text where there is none or of another length makes a message [`Malformed`].
//!
//! | | on | from the VMM | from the vault |
//! |---|---|---|---|
//! | until the launch is sealed, and for what is not about a vCPU | a socket | [`Order`] | [`Report`] |
//! | for each vCPU, after the seal | a shared page | [`Request`] | [`Reply`] |
//!
//! No two kinds have the same number, so that none of the four is ever taken for another.
//!
//! Each message from the VMM has one from the vault as its answer, with the same sequence number, before the next may
//! come.

use cvm_core::doorbell::{Access, Doorbell, SPACE, Transport, device_of};
use cvm_core::interrupt::{InterruptController, Refusal};
use cvm_core::memory::LeftAs;
use cvm_core::x86::{Register, VcpuState};
use cvm_core::{
    Answer, ConversionRequest, Event, Exit, Gpa, GpaRange, Measurement, PAGE_SIZE, PageKind, Policy, Side, Trigger,
};
use std::num::NonZeroU32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The most bytes of text that a message has.
pub const MOST_TEXT: usize = 256;

/// The fixed part of every message, little endian as the processor that both ends run on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Message {
    /// Counts the VMM's messages; an answer has that of its question.
    pub sequence: u32,
    /// What it is.
    pub kind: u16,
    /// How many bytes of text follow.
    pub text: u16,
    /// What the kind says; those that it does not use are zero.
    pub operands: [u64; 6],
}

/// A message that means nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a message of kind {kind:#x} is malformed")]
pub struct Malformed {
    /// Its kind.
    pub kind: u16,
}

/// A message and its text.
pub type Encoded = (Message, String);

fn encoded(kind: u16, operands: &[u64]) -> Encoded {
    let mut message = Message { kind, ..Message::default() };
    for (slot, operand) in message.operands.iter_mut().zip(operands) {
        *slot = *operand;
    }
    (message, String::new())
}

fn with_text((mut message, _): Encoded, text: &str) -> Encoded {
    let text: String = text.chars().filter(|letter| !letter.is_control()).collect();
    let end = text.char_indices().map(|(at, letter)| at + letter.len_utf8()).take_while(|end| *end <= MOST_TEXT).last();
    let text = text[..end.unwrap_or(0)].to_owned();
    message.text = text.len() as u16;
    (message, text)
}

/// What a refusal is in a message.
fn refusal_operands(refusal: Refusal) -> [u64; 2] {
    match refusal {
        Refusal::Reserved => [0, 0],
        Refusal::NotAccepted => [1, 0],
        Refusal::TooMany { most } => [2, most.get().into()],
        Refusal::NotAnInterrupt => [3, 0],
        Refusal::WrongTrigger => [4, 0],
        Refusal::EdgesOnly => [5, 0],
    }
}

/// Takes a message apart.
struct Parts<'a> {
    kind: u16,
    operands: std::slice::Iter<'a, u64>,
    text: Option<&'a [u8]>,
}

impl<'a> Parts<'a> {
    fn of(message: &'a Message, text: &'a [u8]) -> Result<Self, Malformed> {
        let parts = Self { kind: message.kind, operands: message.operands.iter(), text: Some(text) };
        if text.len() == usize::from(message.text) { Ok(parts) } else { Err(parts.malformed()) }
    }

    fn malformed(&self) -> Malformed {
        Malformed { kind: self.kind }
    }

    /// The next operand.
    fn next<T: TryFrom<u64>>(&mut self) -> Result<T, Malformed> {
        let operand = self.operands.next().copied().unwrap_or(0);
        T::try_from(operand).map_err(|_| self.malformed())
    }

    /// The next operand as one of `choices`, by the number that `number` gives each.
    fn choice<T: Copy>(&mut self, choices: &[T], number: impl Fn(T) -> u64) -> Result<T, Malformed> {
        let operand = self.next::<u64>()?;
        choices.iter().copied().find(|choice| number(*choice) == operand).ok_or(self.malformed())
    }

    fn flag(&mut self) -> Result<bool, Malformed> {
        self.choice(&[false, true], u64::from)
    }

    fn side(&mut self) -> Result<Side, Malformed> {
        self.choice(&[Side::Private, Side::Shared], |side| side as u64)
    }

    fn range(&mut self) -> Result<GpaRange, Malformed> {
        let (start, len) = (self.next()?, self.next()?);
        GpaRange::new(start, len).map_err(|_| self.malformed())
    }

    fn refusal(&mut self) -> Result<Refusal, Malformed> {
        Ok(match (self.next()?, self.next()?) {
            (0u64, 0u32) => Refusal::Reserved,
            (1, 0) => Refusal::NotAccepted,
            (2, most) => Refusal::TooMany { most: NonZeroU32::new(most).ok_or(self.malformed())? },
            (3, 0) => Refusal::NotAnInterrupt,
            (4, 0) => Refusal::WrongTrigger,
            (5, 0) => Refusal::EdgesOnly,
            _ => return Err(self.malformed()),
        })
    }

    fn text(&mut self) -> Result<String, Malformed> {
        let text = self.text.take().and_then(|text| str::from_utf8(text).ok());
        let text = text.filter(|text| text.len() <= MOST_TEXT && !text.contains(char::is_control));
        text.map(str::to_owned).ok_or(self.malformed())
    }

    /// What was made of the message, if nothing of it is left over.
    fn end<T>(self, made: T) -> Result<T, Malformed> {
        let empty = self.text.is_none_or(<[u8]>::is_empty);
        if empty && self.operands.clone().all(|operand| *operand == 0) { Ok(made) } else { Err(self.malformed()) }
    }
}

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
                    Event::Line { vector, asserted: true } => (6, vector),
                    Event::Line { vector, asserted: false } => (7, vector),
                    Event::Interrupt(vector) => (0, vector),
                    Event::Exception(vector) => (1, vector),
                    Event::Nmi => (2, 0),
                    Event::Smi => (3, 0),
                    Event::Init => (4, 0),
                    Event::Startup => (5, 0),
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
                (1, vector) => Event::Exception(vector),
                (2, 0) => Event::Nmi,
                (3, 0) => Event::Smi,
                (4, 0) => Event::Init,
                (5, 0) => Event::Startup,
                (6, vector) => Event::Line { vector, asserted: true },
                (7, vector) => Event::Line { vector, asserted: false },
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
    /// The vault does not do that, for this reason.
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

/// What a VMM orders on the socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// The VM to be has memory here.
    Slot(GpaRange),
    /// It also accepts these vectors, at most so many in a second.
    Accept {
        /// 256 bits, vector 0 first.
        vectors: [u64; 4],
        /// What makes them pending.
        trigger: Trigger,
        /// Nothing if there is no limit.
        most_per_second: Option<NonZeroU32>,
    },
    /// Begin the launch. With it come the file of the shared side and that of the vCPUs' pages.
    Create {
        /// How many vCPUs.
        vcpus: u32,
        /// What the guest demands.
        policy: Policy,
        /// How it rings.
        doorbell: Doorbell,
        /// How it asks for conversions.
        transport: Transport,
        /// Who hands it interrupts.
        interrupt_controller: InterruptController,
    },
    /// Load what the shared side has at these pages.
    Load {
        /// The pages.
        range: GpaRange,
        /// What they are to the measurement.
        kind: PageKind,
    },
    /// The first state of a vCPU.
    SetVcpu {
        /// Which.
        index: u32,
        /// The state.
        state: VcpuState,
    },
    /// End the launch.
    Seal,
    /// Say how much memory is in use.
    Count,
    /// Give a descriptor that is signalled when the guest writes this doorbell register.
    DoorbellFd(u16),
    /// Give a descriptor that raises an interrupt.
    InterruptFd {
        /// On which vCPU.
        vcpu: u32,
        /// Its vector.
        vector: u8,
    },
    /// Say how many interrupts were dropped.
    CountDropped,
}

impl Order {
    /// As a message.
    pub fn encode(&self) -> Encoded {
        match *self {
            Self::Slot(range) => encoded(0x101, &[range.start().0, range.len()]),
            Self::Accept { vectors: [a, b, c, d], trigger, most_per_second } => {
                let most = most_per_second.map_or(0, NonZeroU32::get).into();
                encoded(0x102, &[a, b, c, d, most, (trigger == Trigger::Level).into()])
            }
            Self::Create { vcpus, policy, doorbell, transport, interrupt_controller } => {
                let (doorbell, controller) = (doorbell as u64, interrupt_controller as u64);
                encoded(0x103, &[vcpus.into(), policy.bits(), doorbell, transport as u64, controller])
            }
            Self::Load { range, kind } => encoded(0x104, &[range.start().0, range.len(), kind as u64]),
            Self::SetVcpu { index, state: VcpuState { rip, rsp, rdi, rsi, cr3 } } => {
                encoded(0x105, &[index.into(), rip, rsp, rdi, rsi, cr3])
            }
            Self::Seal => encoded(0x106, &[]),
            Self::Count => encoded(0x107, &[]),
            Self::DoorbellFd(register) => encoded(0x108, &[register.into()]),
            Self::InterruptFd { vcpu, vector } => encoded(0x109, &[vcpu.into(), vector.into()]),
            Self::CountDropped => encoded(0x10a, &[]),
        }
    }

    /// From a message.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn decode(message: &Message, text: &[u8]) -> Result<Self, Malformed> {
        let mut parts = Parts::of(message, text)?;
        let order = match message.kind {
            0x101 => Self::Slot(parts.range()?),
            0x102 => Self::Accept {
                vectors: [parts.next()?, parts.next()?, parts.next()?, parts.next()?],
                most_per_second: NonZeroU32::new(parts.next()?),
                trigger: if parts.flag()? { Trigger::Level } else { Trigger::Edge },
            },
            0x103 => Self::Create {
                vcpus: parts.next()?,
                // Demands that are not known here are refused with a reason, not as malformed.
                policy: Policy::from_bits_retain(parts.next()?),
                doorbell: parts.choice(&[Doorbell::Port, Doorbell::Msr], |doorbell| doorbell as u64)?,
                transport: parts.choice(&[Transport::Doorbell, Transport::Hypercall], |transport| transport as u64)?,
                interrupt_controller: parts
                    .choice(&[InterruptController::None, InterruptController::Apic], |controller| controller as u64)?,
            },
            0x104 => {
                const KINDS: [PageKind; 3] = [PageKind::Measured, PageKind::Zero, PageKind::Unmeasured];
                Self::Load { range: parts.range()?, kind: parts.choice(&KINDS, |kind| kind as u64)? }
            }
            0x105 => Self::SetVcpu {
                index: parts.next()?,
                state: VcpuState {
                    rip: parts.next()?,
                    rsp: parts.next()?,
                    rdi: parts.next()?,
                    rsi: parts.next()?,
                    cr3: parts.next()?,
                },
            },
            0x106 => Self::Seal,
            0x107 => Self::Count,
            0x108 => Self::DoorbellFd(parts.next()?),
            0x109 => Self::InterruptFd { vcpu: parts.next()?, vector: parts.next()? },
            0x10a => Self::CountDropped,
            _ => return Err(parts.malformed()),
        };
        parts.end(order)
    }
}

/// What a vault answers on the socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// It is done; of the launch's begin, with the descriptor that wakes the vault for kicks.
    Done,
    /// The launch has ended with this measurement.
    Sealed(Measurement),
    /// So much memory is in use, in bytes.
    Memory {
        /// On the private side, where the host can tell.
        private: Option<u64>,
        /// On the shared side.
        shared: u64,
    },
    /// It is not done, for this reason.
    Failed(String),
    /// The descriptor that was asked for comes with this.
    Descriptor,
    /// There is no such descriptor, for this reason.
    NoDescriptor(String),
    /// The guard does not allow that descriptor.
    InjectionRefused(Refusal),
    /// So many interrupts were dropped.
    Dropped(u64),
}

impl Report {
    /// As a message.
    pub fn encode(&self) -> Encoded {
        match self {
            Self::Done => encoded(0x201, &[]),
            Self::Sealed(Measurement(digest)) => {
                let (mut message, text) = encoded(0x202, &[]);
                message.operands.as_mut_bytes().copy_from_slice(digest);
                (message, text)
            }
            Self::Memory { private, shared } => {
                encoded(0x203, &[private.is_some().into(), private.unwrap_or(0), *shared])
            }
            Self::Failed(reason) => with_text(encoded(0x204, &[]), reason),
            Self::Descriptor => encoded(0x205, &[]),
            Self::NoDescriptor(reason) => with_text(encoded(0x206, &[]), reason),
            Self::InjectionRefused(refusal) => encoded(0x207, &refusal_operands(*refusal)),
            Self::Dropped(count) => encoded(0x208, &[*count]),
        }
    }

    /// From a message.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn decode(message: &Message, text: &[u8]) -> Result<Self, Malformed> {
        let mut parts = Parts::of(message, text)?;
        let report = match message.kind {
            0x201 => Self::Done,
            0x202 => {
                let mut digest = [0; 48];
                for word in digest.chunks_exact_mut(size_of::<u64>()) {
                    word.copy_from_slice(&parts.next::<u64>()?.to_le_bytes());
                }
                Self::Sealed(Measurement(digest))
            }
            0x203 => Self::Memory {
                private: match (parts.flag()?, parts.next()?) {
                    (true, bytes) => Some(bytes),
                    (false, 0) => None,
                    _ => return Err(parts.malformed()),
                },
                shared: parts.next()?,
            },
            0x204 => Self::Failed(parts.text()?),
            0x205 => Self::Descriptor,
            0x206 => Self::NoDescriptor(parts.text()?),
            0x207 => Self::InjectionRefused(parts.refusal()?),
            0x208 => Self::Dropped(parts.next()?),
            _ => return Err(parts.malformed()),
        };
        parts.end(report)
    }
}

/// The size of [`Message`] in words of the page that carries it.
pub(super) const WORDS: usize = size_of::<Message>() / size_of::<u64>();
const _: () = assert!(size_of::<Message>() == 56 && PAGE_SIZE == 4096);

#[cfg(test)]
mod tests;
