//! What a guest exits for by its GHCB (AMD publication 56421, section 4.1).

use super::ghcb::{Event, offset};
use super::{Exit, Fault, Ghcb};
use cvm_core::Gpa;

/// Exit codes: intercepts of the processor (AMD publication 24593, appendix C), and calls.
pub(super) mod code {
    pub const CPUID: u64 = 0x72;
    pub const IOIO: u64 = 0x7b;
    pub const MSR: u64 = 0x7c;
    pub const VMMCALL: u64 = 0x81;
    pub const PAGE_STATE: u64 = 0x8000_0010;
    #[cfg(feature = "report")]
    pub const GUEST_REQUEST: u64 = 0x8000_0011;
    #[cfg(feature = "report")]
    pub const EXTENDED_GUEST_REQUEST: u64 = 0x8000_0012;
    pub const CREATE_VCPU: u64 = 0x8000_0013;
    pub const FEATURES: u64 = 0x8000_fffd;
}

/// Informations of an I/O intercept: it reads, and it has 32 bits (AMD publication 24593, section 15.10.2).
const IO_READ: u64 = 1;
const IO_32_BITS: u64 = 1 << 6;

/// The leaf whose answer depends on XCR0.
const XSAVE_LEAF: u32 = 0xd;
/// XCR0 as it is after a reset: the x87 state. A guest of this library does not change it.
const XCR0: u64 = 1;

impl Ghcb {
    /// Writes 32 bits to a port.
    pub(super) fn port_write(&self, exit: &impl Exit, port: u16, value: u32) -> Result<(), Fault> {
        let info1 = u64::from(port) << 16 | IO_32_BITS;
        self.exit(exit, Event { code: code::IOIO, info1, rax: Some(value.into()), ..Event::default() })?;
        Ok(())
    }

    /// Reads 32 bits from a port.
    pub(super) fn port_read(&self, exit: &impl Exit, port: u16) -> Result<u32, Fault> {
        let info1 = u64::from(port) << 16 | IO_32_BITS | IO_READ;
        // RAX is passed on so that a host which changes a part of it has the rest.
        let reply = self.exit(exit, Event { code: code::IOIO, info1, rax: Some(0), ..Event::default() })?;
        Ok(reply.register(offset::RAX)? as u32)
    }

    /// Writes an MSR.
    pub(super) fn msr_write(&self, exit: &impl Exit, msr: u32, value: u64) -> Result<(), Fault> {
        let (rax, rdx) = (Some(value & u64::from(u32::MAX)), Some(value >> 32));
        self.exit(exit, Event { code: code::MSR, info1: 1, rcx: Some(msr.into()), rax, rdx, ..Event::default() })?;
        Ok(())
    }

    /// Reads an MSR.
    pub(super) fn msr_read(&self, exit: &impl Exit, msr: u32) -> Result<u64, Fault> {
        let reply = self.exit(exit, Event { code: code::MSR, rcx: Some(msr.into()), ..Event::default() })?;
        let (rax, rdx) = (reply.register(offset::RAX)?, reply.register(offset::RDX)?);
        Ok(rdx << 32 | rax & u64::from(u32::MAX))
    }

    /// What the host says that CPUID gives: EAX, EBX, ECX, EDX.
    pub(super) fn cpuid(&self, exit: &impl Exit, leaf: u32, subleaf: u32) -> Result<[u32; 4], Fault> {
        let xcr0 = (leaf == XSAVE_LEAF).then_some(XCR0);
        let (rax, rcx) = (Some(leaf.into()), Some(subleaf.into()));
        let reply = self.exit(exit, Event { code: code::CPUID, rax, rcx, xcr0, ..Event::default() })?;
        let register = |offset| reply.register(offset).map(|value| value as u32);
        Ok([register(offset::RAX)?, register(offset::RBX)?, register(offset::RCX)?, register(offset::RDX)?])
    }

    /// Calls the hypervisor with RAX, RBX, RCX and RDX, and returns RAX.
    pub(super) fn hypercall(&self, exit: &impl Exit, registers: [u64; 4]) -> Result<u64, Fault> {
        let [rax, rbx, rcx, rdx] = registers.map(Some);
        let reply =
            self.exit(exit, Event { code: code::VMMCALL, rax, rbx, rcx, rdx, cpl: true, ..Event::default() })?;
        reply.register(offset::RAX)
    }

    /// What the host can do: bit 0 is SEV-SNP, bit 1 the creation of vCPUs.
    pub(super) fn features(&self, exit: &impl Exit) -> Result<u64, Fault> {
        self.exit(exit, Event { code: code::FEATURES, ..Event::default() })?.info2()
    }

    /// Has the vCPU with this APIC ID start at once from the state in the page at `state`, which the guest has made one
    /// (RMPADJUST) whose features are `sev_features`.
    pub(super) fn create_vcpu(
        &self,
        exit: &impl Exit,
        apic_id: u32,
        state: Gpa,
        sev_features: u64,
    ) -> Result<(), Fault> {
        const CREATE: u64 = 1;
        let info1 = u64::from(apic_id) << 32 | CREATE;
        let (info2, rax) = (state.0, Some(sev_features));
        self.exit(exit, Event { code: code::CREATE_VCPU, info1, info2, rax, ..Event::default() })?;
        Ok(())
    }
}
