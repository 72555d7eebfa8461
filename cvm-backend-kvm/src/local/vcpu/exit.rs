//! KVM's exits, before the contract makes something of them.

use super::super::vcpu_fd::PortAnswer;
use crate::Error;
use cvm_core::doorbell::Transport;
use cvm_core::x86::Register;
use cvm_core::{Gpa, Side};
use kvm_ioctls::VcpuExit;

/// A KVM exit, taken out of the page that is shared with KVM.
#[derive(Debug)]
pub(super) enum Raw {
    PortOut {
        port: u16,
        width: u8,
        value: u32,
    },
    PortIn {
        port: u16,
        width: u8,
        answer: PortAnswer,
    },
    MsrWrite {
        index: u32,
        value: u64,
    },
    MsrRead {
        index: u32,
    },
    Hypercall {
        number: u64,
        arguments: [u64; 6],
    },
    Mmio {
        gpa: Gpa,
        write: bool,
    },
    Fault {
        gpa: Gpa,
    },
    Halt,
    InterruptWindow,
    Interrupted,
    /// What plain KVM does not have.
    Foreign,
    Crash(String),
}

impl Raw {
    pub(super) fn from_kvm(exit: Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Result<Self, Error> {
        let width = |data: &[u8]| match data.len() {
            width @ (1 | 2 | 4) => Some(width as u8),
            _ => None,
        };
        let string = |port| Self::Crash(string_io(port));
        Ok(match exit {
            Ok(VcpuExit::IoOut(port, data)) => match width(data) {
                Some(width) => {
                    let value = data.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
                    Self::PortOut { port, width, value }
                }
                None => string(port),
            },
            Ok(VcpuExit::IoIn(port, data)) => match width(data) {
                Some(width) => Self::PortIn { port, width, answer: PortAnswer::new(data) },
                None => string(port),
            },
            Ok(VcpuExit::X86Wrmsr(msr)) => Self::MsrWrite { index: msr.index, value: msr.data },
            Ok(VcpuExit::X86Rdmsr(msr)) => Self::MsrRead { index: msr.index },
            Ok(VcpuExit::Hypercall(call)) => Self::Hypercall { number: call.nr, arguments: call.args },
            Ok(VcpuExit::MmioRead(gpa, _)) => Self::Mmio { gpa: Gpa(gpa), write: false },
            Ok(VcpuExit::MmioWrite(gpa, _)) => Self::Mmio { gpa: Gpa(gpa), write: true },
            Ok(VcpuExit::MemoryFault { gpa, .. }) => Self::Fault { gpa: Gpa(gpa) },
            Ok(VcpuExit::Hlt) => Self::Halt,
            Ok(VcpuExit::IrqWindowOpen) => Self::InterruptWindow,
            // The guest lowered its task priority, which matters to a local APIC only.
            Ok(VcpuExit::Intr | VcpuExit::SetTpr) => Self::Interrupted,
            Ok(VcpuExit::Shutdown) => Self::Crash("it shut down, as after a triple fault".into()),
            Ok(VcpuExit::InternalError) => Self::Crash("kvm could not execute an instruction".into()),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                Self::Crash(format!("the processor refused to enter it: {reason:#x}"))
            }
            Ok(_) => Self::Foreign,
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => Self::Interrupted,
            Err(error) if error.errno() == libc::EFAULT => {
                Self::Crash("it touched memory that is not there, and kvm does not say where".into())
            }
            Err(error) => return Err(Error::kvm("run a vcpu")(error)),
        })
    }

    /// What it shows of registers: its operands, and of a register that is wider no more than these.
    ///
    /// By a GHCB a guest says what it wants to exit for: a port is no register then, nor is what page state changes.
    pub(super) fn expose(&self, exposed: &mut Vec<(Register, u64)>, by_ghcb: bool, transport: Transport) {
        exposed.clear();
        // Ports above 255 can be named by DX alone (Intel SDM, volume 2, IN and OUT).
        let by_register = |port: u16| (port > 0xff && !by_ghcb).then_some((Register::Rdx, port.into()));
        match self {
            Self::PortOut { port, value, .. } => {
                exposed.push((Register::Rax, (*value).into()));
                exposed.extend(by_register(*port));
            }
            Self::PortIn { port, .. } => exposed.extend(by_register(*port)),
            Self::MsrWrite { index, value } => exposed.extend([
                (Register::Rcx, (*index).into()),
                (Register::Rax, value & u64::from(u32::MAX)),
                (Register::Rdx, value >> 32),
            ]),
            Self::MsrRead { index } => exposed.push((Register::Rcx, (*index).into())),
            Self::Hypercall { .. } if transport == Transport::PageState => {}
            Self::Hypercall { number, arguments: [gpa, pages, attributes, ..] } => exposed.extend([
                (Register::Rax, *number),
                (Register::Rbx, *gpa),
                (Register::Rcx, *pages),
                (Register::Rdx, *attributes),
            ]),
            _ => {}
        }
    }
}

/// What is said of a guest that accessed a port by a string instruction.
pub(super) fn string_io(port: u16) -> String {
    format!("it used string i/o on port {port:#x}")
}

/// The side that the attributes of `KVM_HC_MAP_GPA_RANGE` ask for: bits 0 to 3 are a page size, which is only a hint,
/// bit 4 is "encrypted", the others are reserved (Linux Documentation/virt/kvm/x86/hypercalls.rst).
pub(super) fn side(attributes: u64) -> Option<Side> {
    match attributes >> 4 {
        0 => Some(Side::Shared),
        1 => Some(Side::Private),
        _ => None,
    }
}
