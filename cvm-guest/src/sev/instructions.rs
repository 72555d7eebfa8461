//! The instructions of guests of SEV.

#![allow(unsafe_code, reason = "they are assembly")]

use super::{Exit, PageSize, Validate, Validated};
use core::arch::asm;
use core::marker::PhantomData;

/// The MSR that holds the GPA of the GHCB, or a request (AMD publication 56421, section 2.3).
const GHCB_MSR: u32 = 0xc001_0130;
/// The MSR that says what of SEV is on (AMD publication 24593, section 15.34.10).
const SEV_STATUS_MSR: u32 = 0xc001_0131;

unsafe fn read_msr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller promises that the MSR exists; to read it changes nothing.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

/// What of SEV is on.
///
/// # Safety
/// The processor must have the MSR, and the code run in ring 0.
pub(crate) unsafe fn sev_status() -> u64 {
    // SAFETY: passed on to the caller.
    unsafe { read_msr(SEV_STATUS_MSR) }
}

/// VMGEXIT with the GHCB MSR around it, of one vCPU, which it cannot leave.
///
/// ```compile_fail,E0277
/// fn to_another_vcpu<T: Send>() {}
/// to_another_vcpu::<cvm_guest::sev::Vmgexit>();
/// ```
#[derive(Debug)]
pub struct Vmgexit(PhantomData<*mut ()>);

impl Vmgexit {
    /// The exit of this vCPU.
    ///
    /// # Safety
    /// The code must run in ring 0 of a guest of SEV-ES or SEV-SNP, and nothing else may use its GHCB MSR at the same time.
    /// The value gives whoever has it all that a guest can ask of its host, conversions and new vCPUs among it: it must go
    /// to a [`GhcbVcpu`](super::GhcbVcpu), or to other code that asks for nothing which memory in use does not survive.
    pub unsafe fn new() -> Self {
        Self(PhantomData)
    }
}

impl Exit for Vmgexit {
    fn exit(&self, value: u64) -> u64 {
        // SAFETY: `new` was promised a guest that has the MSR. What the host writes during the exit is shared memory: the
        // block may change memory as far as the compiler knows. `rep vmmcall` is VMGEXIT (AMD publication 24594).
        unsafe {
            asm!("wrmsr", "rep vmmcall", in("ecx") GHCB_MSR, in("eax") value as u32, in("edx") (value >> 32) as u32,
                 options(nostack));
            read_msr(GHCB_MSR)
        }
    }
}

/// PVALIDATE and RMPADJUST.
///
/// ```compile_fail,E0133
/// let power_over_every_page = cvm_guest::sev::Pvalidate::new();
/// ```
#[derive(Debug)]
pub struct Pvalidate(());

impl Pvalidate {
    /// The instructions.
    ///
    /// # Safety
    /// The code must run in ring 0 of a guest of SEV-SNP, whose memory is mapped to its own addresses. The value gives
    /// whoever has it the power over every page of the guest: it must go to a [`GhcbVcpu`](super::GhcbVcpu), or to other
    /// code that makes no page in use invalid, and none valid twice.
    pub unsafe fn new() -> Self {
        Self(())
    }
}

/// FAIL_SIZEMISMATCH (AMD publication 24594, PVALIDATE and RMPADJUST).
const SIZE_MISMATCH: u32 = 6;

impl Validate for Pvalidate {
    fn validate(&self, gpa: u64, size: PageSize, valid: bool) -> Validated {
        let (rax, carry): (u64, u8);
        // SAFETY: the instruction changes no memory, just whether the page can be used; that nobody uses a page which is not
        // valid is the business of whoever gives pages away. It is written as bytes for assemblers that do not know it.
        unsafe {
            asm!(".byte 0xf2, 0x0f, 0x01, 0xff", "setc {carry}", carry = out(reg_byte) carry,
                 inout("rax") gpa => rax, in("ecx") size as u32, in("edx") u32::from(valid), options(nostack));
        }
        match (rax as u32, carry) {
            (0, 0) => Validated::Changed,
            (0, _) => Validated::Unchanged,
            (SIZE_MISMATCH, _) => Validated::SizeMismatch,
            (code, _) => Validated::Failed(code),
        }
    }

    fn make_state(&self, gpa: u64) -> Validated {
        // The page is to be a VMSA (bit 16), which only a VMPL below the own one can be given: VMPL 1, without any access.
        const ATTRIBUTES: u64 = 1 << 16 | 1;
        let rax: u64;
        // SAFETY: as above: the instruction changes what the page can be used for, and who has it made a state has given it up.
        unsafe {
            asm!(".byte 0xf3, 0x0f, 0x01, 0xfe", inout("rax") gpa => rax, in("ecx") PageSize::Small as u32,
                 in("rdx") ATTRIBUTES, options(nostack));
        }
        match rax as u32 {
            0 => Validated::Changed,
            SIZE_MISMATCH => Validated::SizeMismatch,
            code => Validated::Failed(code),
        }
    }
}
