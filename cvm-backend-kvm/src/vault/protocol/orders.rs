//! What is said on the socket.

use super::{Encoded, Malformed, Message, Parts, encoded, refusal_operands, with_text};
use cvm_core::doorbell::{Doorbell, Transport};
use cvm_core::interrupt::{InterruptController, Refusal};
use cvm_core::x86::VcpuState;
use cvm_core::{GpaRange, Measurement, PageKind, Policy, Trigger};
use std::num::NonZeroU32;
use zerocopy::IntoBytes;

/// How many numbers of a vCPU's state one order has room for, and how many orders a state takes.
const PART: usize = 5;
pub const PARTS: usize = VcpuState::WORDS / PART;
const _: () = assert!(VcpuState::WORDS == PART * PARTS);

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
    /// Begin the launch. With it come the file of the shared side, that of the vCPUs' pages, and a socket for kicks.
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
    /// A part of the numbers that the next vCPU's initial state is ([`VcpuState::to_words`]).
    Registers {
        /// Which part, from 0, of `VcpuState::WORDS` numbers in messages of this size.
        part: usize,
        /// Its numbers.
        words: [u64; PART],
    },
    /// Give a vCPU the initial state whose parts were told last.
    SetVcpu {
        /// Which.
        index: u32,
    },
    /// End the launch.
    Seal,
    /// Say how much memory is in use.
    Count,
    /// Have the eventfd that comes with this signalled when the guest writes this doorbell register.
    DoorbellFd(u16),
    /// Have the eventfd that comes with this raise an interrupt.
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
    /// What it has the vault do, for errors.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Slot(_) => "take a memory slot",
            Self::Accept { .. } => "take the interrupt policy",
            Self::Create { .. } => "create the vm",
            Self::Load { .. } => "load pages",
            Self::Registers { .. } | Self::SetVcpu { .. } => "set the initial state of a vcpu",
            Self::Seal => "seal the launch",
            Self::Count => "count the memory in use",
            Self::DoorbellFd(_) => "connect a doorbell register",
            Self::InterruptFd { .. } => "connect an interrupt",
            Self::CountDropped => "count dropped interrupts",
        }
    }

    /// What gives a vCPU this state, in order.
    pub fn set_vcpu(index: u32, state: &VcpuState) -> impl Iterator<Item = Self> {
        let words = state.to_words();
        let part =
            move |part: usize| Self::Registers { part, words: std::array::from_fn(|at| words[PART * part + at]) };
        (0..PARTS).map(part).chain([Self::SetVcpu { index }])
    }

    /// Takes a part of a state, of which there are from 0; a state has as many parts as its message takes.
    pub(in crate::vault) fn put(words: &mut [u64; VcpuState::WORDS], part: usize, of: [u64; PART]) {
        words.iter_mut().skip(PART * part).zip(of).for_each(|(word, number)| *word = number);
    }
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
            Self::SetVcpu { index } => encoded(0x105, &[index.into()]),
            Self::Registers { part, words: [a, b, c, d, e] } => encoded(0x10b, &[part as u64, a, b, c, d, e]),
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
            0x105 => Self::SetVcpu { index: parts.next()? },
            0x10b => {
                let part = parts.next().ok().filter(|part| *part < PARTS).ok_or(parts.malformed())?;
                let words = [parts.next()?, parts.next()?, parts.next()?, parts.next()?, parts.next()?];
                Self::Registers { part, words }
            }
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
    /// It is done.
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
    /// There can be no such descriptor, for this reason.
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
            Self::NoDescriptor(reason) => with_text(encoded(0x205, &[]), reason),
            Self::InjectionRefused(refusal) => encoded(0x206, &refusal_operands(*refusal)),
            Self::Dropped(count) => encoded(0x207, &[*count]),
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
            0x205 => Self::NoDescriptor(parts.text()?),
            0x206 => Self::InjectionRefused(parts.refusal()?),
            0x207 => Self::Dropped(parts.next()?),
            _ => return Err(parts.malformed()),
        };
        parts.end(report)
    }
}
