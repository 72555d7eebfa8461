//! The initial state of a vCPU as SEV-ES and SEV-SNP measure it: a page, the VM save area.

use crate::CpuSignature;
use cvm_core::PAGE_SIZE;
use cvm_core::x86::VcpuState;
use cvm_core::x86::save_area::{self, SaveArea, at};
use std::fmt;

/// Who makes the initial state, and so what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Vmm {
    /// QEMU.
    Qemu,
    /// Amazon's EC2.
    Ec2,
    /// Google's Compute Engine.
    Gce,
}

bitflags::bitflags! {
    /// What is active in a guest: `SEV_FEATURES` (AMD64 APM volume 2, table B-4, offset 0x3b0). Any 64 bits are valid here, as a
    /// measurement can be computed with features that have no name yet.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
    pub struct SevFeatures: u64 {
        /// SEV-SNP.
        const SNP_ACTIVE = 1;
        /// Virtual top of memory.
        const VIRTUAL_TOM = 1 << 1;
        /// `#VC` is reflected to another VMPL.
        const REFLECT_VC = 1 << 2;
        /// The host can inject `#HV` only.
        const RESTRICTED_INJECTION = 1 << 3;
        /// The host's injections go through the guest's own save area.
        const ALTERNATE_INJECTION = 1 << 4;
        /// More debug registers are swapped.
        const DEBUG_SWAP = 1 << 5;
        /// The host's instruction-based sampling is off in the guest.
        const PREVENT_HOST_IBS = 1 << 6;
        /// Branch prediction is isolated from the host's.
        const BTB_ISOLATION = 1 << 7;
        /// Supervisor shadow stacks by VMPL.
        const VMPL_SSS = 1 << 8;
        /// The guest's time-stamp counter is its own.
        const SECURE_TSC = 1 << 9;
        /// The guest has a parameter for its exits.
        const VMGEXIT_PARAMETER = 1 << 10;
        /// Virtual instruction-based sampling.
        const IBS_VIRTUALIZATION = 1 << 12;
        /// Some registers of the save area are obscured.
        const VMSA_REG_PROTECTION = 1 << 14;
        /// The sibling thread is idle while the guest runs.
        const SMT_PROTECTION = 1 << 15;
        /// The processor virtualises the guest's interrupt controller, and the host cannot write to it.
        const SECURE_AVIC = 1 << 16;
        /// Indirect branch prediction is flushed when the guest is entered.
        const IBPB_ON_ENTRY = 1 << 21;
        // Bits without a name are features of later processors: they are measured all the same.
        const _ = !0;
    }
}

/// Where a processor starts after reset.
pub const RESET_VECTOR: u32 = 0xffff_fff0;

/// The save area's fields with their offsets, in order, for messages (the same).
pub(crate) const FIELDS: [(usize, &str); 63] = [
    (at::ES, "es"),
    (at::CS, "cs"),
    (at::SS, "ss"),
    (at::DS, "ds"),
    (at::FS, "fs"),
    (at::GS, "gs"),
    (at::GDTR, "gdtr"),
    (at::LDTR, "ldtr"),
    (at::IDTR, "idtr"),
    (at::TR, "tr"),
    (0x0a0, "shadow stack pointer of a ring"),
    (0x0c0, "u_cet"),
    (0x0c8, RESERVED),
    (0x0ca, "vmpl"),
    (0x0cb, "cpl"),
    (0x0cc, RESERVED),
    (at::EFER, "efer"),
    (0x0d8, RESERVED),
    (0x140, "xss"),
    (at::CR4, "cr4"),
    (at::CR3, "cr3"),
    (at::CR0, "cr0"),
    (at::DR7, "dr7"),
    (at::DR6, "dr6"),
    (at::RFLAGS, "rflags"),
    (at::RIP, "rip"),
    (0x180, "dr0 to dr3"),
    (0x1a0, "masks of dr0 to dr3"),
    (0x1c0, RESERVED),
    (at::RSP, "rsp"),
    (0x1e0, "s_cet"),
    (0x1e8, "ssp"),
    (0x1f0, "isst_addr"),
    (0x1f8, "rax"),
    (0x200, "star, lstar, cstar or sfmask"),
    (0x220, "kernel_gs_base"),
    (0x228, "sysenter register"),
    (0x240, "cr2"),
    (0x248, RESERVED),
    (at::G_PAT, "g_pat"),
    (0x270, "dbgctl"),
    (0x278, "record of a branch"),
    (0x298, RESERVED),
    (0x2e0, "spec_ctrl"),
    (0x2e8, RESERVED),
    (0x308, "rcx"),
    (at::RDX, "rdx"),
    (0x318, "rbx"),
    (0x320, RESERVED),
    (0x328, "rbp"),
    (at::RSI, "rsi"),
    (at::RDI, "rdi"),
    (0x340, "r8 to r15"),
    (0x380, RESERVED),
    (0x390, "guest exit field"),
    (at::SEV_FEATURES, "sev_features"),
    (0x3b8, "vintr_ctrl"),
    (0x3c0, "guest_error_code"),
    (0x3c8, "virtual_tom"),
    (0x3d0, "field of the processor's own"),
    (at::XCR0, "xcr0"),
    (0x3f0, "x87 or sse state"),
    (0x670, RESERVED),
];
const RESERVED: &str = "reserved field";

/// A VM save area.
#[derive(Clone, PartialEq, Eq)]
pub struct Vmsa(Box<SaveArea>);

impl Vmsa {
    /// That of a vCPU which starts in real mode at `start`, as after a reset, made by a VMM for firmware. Compare
    /// [`RESET_VECTOR`].
    pub fn reset(vmm: Vmm, start: u32, signature: CpuSignature, features: SevFeatures) -> Self {
        let mut vmsa = Self(Box::new([0; PAGE_SIZE as usize]));
        let area = &mut *vmsa.0;
        save_area::reset(area, features.bits());
        let (code, stack, task, rdx) = match vmm {
            Vmm::Qemu => (0x9b, 0x93, 0x8b, signature.0),
            Vmm::Ec2 if start == RESET_VECTOR => (0x9a, 0x92, 0x83, 0x600),
            Vmm::Ec2 => (0x9b, 0x92, 0x83, 0x600),
            Vmm::Gce => (0x9b, 0x93, 0x8b, 0x600),
        };
        for place in [at::ES, at::DS, at::FS, at::GS] {
            save_area::set_segment(area, place, (0, 0x93, 0xffff, 0));
        }
        save_area::set_segment(area, at::CS, (0xf000, code, 0xffff, u64::from(start & 0xffff_0000)));
        save_area::set_segment(area, at::SS, (0, stack, 0xffff, 0));
        save_area::set_segment(area, at::TR, (0, task, 0xffff, 0));
        save_area::set(area, at::RIP, u64::from(start & 0xffff));
        save_area::set(area, at::RDX, rdx.into());
        match vmm {
            Vmm::Qemu => save_area::set_floating_point(area),
            Vmm::Ec2 => {}
            // Not the architecture's page attributes but its own.
            Vmm::Gce => save_area::set(area, at::G_PAT, 0x0007_0106),
        }
        vmsa
    }

    /// That of a vCPU whose initial state KVM was given as [`VcpuState`] has it.
    pub fn of(state: &VcpuState, features: SevFeatures) -> Self {
        let mut vmsa = Self(Box::new([0; PAGE_SIZE as usize]));
        save_area::fill(&mut vmsa.0, state, features.bits());
        vmsa
    }

    /// Its 4096 bytes.
    pub fn as_bytes(&self) -> &SaveArea {
        &self.0
    }
}

fn number(page: &SaveArea, place: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&page[place..place + 8]);
    u64::from_le_bytes(bytes)
}

/// What is active in the guest with this save area.
pub(crate) fn features(page: &SaveArea) -> u64 {
    number(page, at::SEV_FEATURES)
}

impl fmt::Debug for Vmsa {
    /// What is not zero in it, by eight bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers = self.0.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
        let given = (0..).step_by(8).zip(numbers).filter(|(_, number)| *number != 0);
        f.debug_map().entries(given.map(|(place, number): (u32, _)| (place, number))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cvm_core::Gpa;

    fn number(vmsa: &Vmsa, place: usize) -> u64 {
        super::number(&vmsa.0, place)
    }

    #[test]
    fn a_vcpu_after_reset_starts_at_its_vector() {
        let signature = CpuSignature(0x80_0f12);
        let vmsa = Vmsa::reset(Vmm::Qemu, 0x80_b004, signature, SevFeatures::SNP_ACTIVE);
        assert_eq!((number(&vmsa, at::CS + 8), number(&vmsa, at::RIP)), (0x80_0000, 0xb004));
        assert_eq!((number(&vmsa, at::RDX), number(&vmsa, at::SEV_FEATURES)), (0x80_0f12, 1));
    }

    #[test]
    fn a_vcpu_in_64_bit_mode_has_what_it_was_given() {
        let state = VcpuState::long_mode(Gpa(0x10_0000), Gpa(0x5000), 3, Gpa(0x4000));
        let state = VcpuState { rsp: 0x2000, ..state };
        let vmsa = Vmsa::of(&state, SevFeatures::SNP_ACTIVE);
        let places = [at::RIP, at::RSP, at::RDI, at::RSI, at::CR3];
        assert_eq!(places.map(|place| number(&vmsa, place)), [0x10_0000, 0x2000, 3, 0x4000, 0x5000]);
        assert_eq!((number(&vmsa, at::CR0), number(&vmsa, at::EFER)), (0x8001_0033, 0x1500));
        assert_eq!((number(&vmsa, at::CS), number(&vmsa, at::DS)), (0xffff_ffff_0a9b_0008, 0xffff_ffff_0c93_0010));
    }
}
