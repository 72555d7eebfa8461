//! The instructions of an x86-64 guest.

#![allow(unsafe_code, reason = "port, msr and hypercall instructions are assembly")]

use crate::Machine;
use core::arch::asm;
use core::arch::x86_64::__cpuid;
use cvm_core::doorbell::{Doorbell, MSR_BASE, PORT_BASE};
use cvm_core::{GpaRange, Side};

/// KVM_HC_MAP_GPA_RANGE and its "encrypted" attribute (Linux include/uapi/linux/kvm_para.h).
const HC_MAP_GPA_RANGE: u64 = 12;
const ENCRYPTED: u64 = 1 << 4;

/// The processor that the guest runs on.
#[derive(Debug, Clone, Copy)]
pub struct Processor {
    doorbell: Doorbell,
    amd: bool,
}

impl Processor {
    /// The processor, whose doorbell is rung as `doorbell` says.
    ///
    /// # Safety
    /// The code must run in a guest whose host knows the doorbell: elsewhere the instructions reach real devices. It must
    /// run in ring 0, or, as long as it rings by ports and asks for no conversion by hypercall, in a ring that may use
    /// these ports: elsewhere the instructions fault.
    pub unsafe fn new(doorbell: Doorbell) -> Self {
        // The first four letters of "AuthenticAMD" and "HygonGenuine": these processors have VMMCALL, others VMCALL.
        let vendor = __cpuid(0).ebx.to_le_bytes();
        Self { doorbell, amd: vendor == *b"Auth" || vendor == *b"Hygo" }
    }
}

impl Machine for Processor {
    fn write(&self, register: u16, value: u32) {
        let (port, msr) = (PORT_BASE.wrapping_add(register), MSR_BASE.wrapping_add(register.into()));
        match self.doorbell {
            // SAFETY: `new` was promised that a host listens here; the instruction changes no memory of ours.
            Doorbell::Port => unsafe {
                asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags));
            },
            // SAFETY: as above.
            Doorbell::Msr => unsafe {
                asm!("wrmsr", in("ecx") msr, in("eax") value, in("edx") 0, options(nostack, preserves_flags));
            },
        }
    }

    fn read(&self, register: u16) -> u32 {
        let (port, msr) = (PORT_BASE.wrapping_add(register), MSR_BASE.wrapping_add(register.into()));
        let value;
        match self.doorbell {
            // SAFETY: as in `write`.
            Doorbell::Port => unsafe {
                asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags));
            },
            // SAFETY: as in `write`.
            Doorbell::Msr => unsafe {
                asm!("rdmsr", in("ecx") msr, out("eax") value, out("edx") _, options(nostack, preserves_flags));
            },
        }
        value
    }

    fn convert(&self, range: GpaRange, to: Side) -> u64 {
        let attributes = match to {
            Side::Private => ENCRYPTED,
            Side::Shared => 0,
        };
        let (gpa, pages) = (range.start().0, range.pages());
        let mut rax = HC_MAP_GPA_RANGE;
        // RBX holds an operand, and the compiler keeps it for itself: so it is swapped in and out.
        if self.amd {
            // SAFETY: a hypercall changes RAX only; what it does to memory is the caller's business.
            unsafe {
                asm!("xchg rbx, {gpa}", "vmmcall", "xchg rbx, {gpa}", gpa = inout(reg) gpa => _, inout("rax") rax,
                     in("rcx") pages, in("rdx") attributes, options(nostack));
            }
        } else {
            // SAFETY: as above.
            unsafe {
                asm!("xchg rbx, {gpa}", "vmcall", "xchg rbx, {gpa}", gpa = inout(reg) gpa => _, inout("rax") rax,
                     in("rcx") pages, in("rdx") attributes, options(nostack));
            }
        }
        rax
    }
}
