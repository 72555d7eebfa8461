//! The instructions of an x86-64 guest.

#![allow(unsafe_code, reason = "port, msr and hypercall instructions are assembly")]

use crate::sev::{
    Acceptance, BlockRecord, CpuidTable, Fault, GhcbPage, GhcbVcpu, Protection, Pvalidate, StatePage, Vmgexit,
    sev_status,
};
use crate::{Error, Machine, end, hypercall};
use core::arch::asm;
use core::arch::x86_64::__cpuid_count;
use cvm_core::boot::BootPage;
use cvm_core::doorbell::{Doorbell, MSR_BASE, PORT_BASE, SPACE};
use cvm_core::x86::VcpuState;
use cvm_core::{GpaRange, PAGE_SIZE, Side};

/// The processor that the guest runs on: what reaches its host, by whichever way the boot page says.
#[derive(Debug)]
pub struct Processor {
    way: Way,
    protection: Protection,
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "there is no allocator, and a vcpu has one of these")]
enum Way {
    Direct(Direct),
    Ghcb(GhcbVcpu<Vmgexit, Pvalidate>),
}

impl Processor {
    /// The processor of a vCPU as `boot` describes it, with room for its GHCB, and the record of accepted memory that it has in
    /// common with the others. Both are only used by guests of SEV-ES and SEV-SNP.
    ///
    /// # Safety
    /// - The code runs in a guest that was started with this boot page, on the vCPU that uses the value: elsewhere the
    ///   instructions reach real devices.
    /// - It runs in ring 0. Where exits are direct it may later leave ring 0, as long as it rings by ports that its ring may
    ///   use, and asks for no conversion by hypercall.
    /// - All memory is mapped to its own addresses, and once more from [`BootPage::shared_at`] on if that is not 0.
    /// - There is one processor for each `ghcb`, and all processors of the guest have the same `blocks`, of which none was
    ///   used before the guest began.
    /// - No memory from [`BootPage::accepted`] on is used before it is accepted.
    ///
    /// # Errors
    /// [`Error::BootPage`] for a boot page of a kind that this version does not know. [`Error::Sev`] when the processor is not
    /// what the boot page says, and for faults of the host. A guest should end then.
    pub unsafe fn new(boot: &BootPage, ghcb: &'static GhcbPage, blocks: &'static [BlockRecord]) -> Result<Self, Error> {
        end::learn(boot);
        // SAFETY: the register exists where the boot page says that SEV is on; elsewhere it is not read.
        let protection = Protection::of(boot, || unsafe { sev_status() })?;
        let doorbell = boot.doorbell().ok_or(Error::BootPage("doorbell"))?;
        if matches!(protection, Protection::None | Protection::Sev) {
            // SAFETY: passed on to the caller.
            return Ok(Self { way: Way::Direct(unsafe { Direct::new(doorbell) }), protection });
        }
        let cpuid = match protection {
            Protection::SevSnp => {
                let page = core::ptr::with_exposed_provenance::<[u8; PAGE_SIZE as usize]>(boot.cpuid as usize);
                // SAFETY: the boot page says that the table is there, in a private page that nobody changes.
                Some(CpuidTable::new(unsafe { &*page }).ok_or(Error::BootPage("cpuid table"))?)
            }
            _ => None,
        };
        let acceptance = Acceptance::new(boot, protection, blocks)?;
        // SAFETY: the caller promises ring 0, and a GHCB for this vCPU alone; the page is one of `ghcb`'s kind, which is used by
        // its address alone.
        let vcpu = unsafe {
            let (exit, validate) = (Vmgexit::new(), Pvalidate::new());
            GhcbVcpu::new(exit, validate, boot, protection, ghcb.gpa(), acceptance, cpuid)?
        };
        Ok(Self { way: Way::Ghcb(vcpu), protection })
    }

    /// What of SEV protects the guest.
    pub fn protection(&self) -> Protection {
        self.protection
    }

    /// The vCPU that exits by its GHCB, if it does.
    pub fn ghcb(&self) -> Option<&GhcbVcpu<Vmgexit, Pvalidate>> {
        match &self.way {
            Way::Direct(_) => None,
            Way::Ghcb(vcpu) => Some(vcpu),
        }
    }

    /// Has the vCPU with this APIC ID start at once from `state`, with what this one has of SEV. See
    /// [`GhcbVcpu::start_vcpu`].
    ///
    /// # Safety
    /// As there.
    ///
    /// # Errors
    /// [`Error::Sev`], as there.
    pub unsafe fn start_vcpu(
        &self,
        apic_id: u32,
        page: &'static mut StatePage,
        state: &VcpuState,
    ) -> Result<(), Error> {
        let Way::Ghcb(vcpu) = &self.way else { return Err(Fault::SnpOnly.into()) };
        // SAFETY: a guest that exits by its GHCB is one of SEV, and runs in ring 0, as `new` was promised.
        let status = unsafe { sev_status() };
        // What is on is all of SEV_FEATURES, above the two bits of SEV and SEV-ES (AMD publication 24593, section 15.34.10).
        // SAFETY: passed on to the caller.
        unsafe { vcpu.start_vcpu(apic_id, page, state, status >> 2) }.map_err(Error::from)
    }

    /// What the processor says of itself: EAX, EBX, ECX, EDX. Only under SEV-SNP somebody vouches for it.
    ///
    /// # Errors
    /// [`Error::Sev`] for faults of the host.
    pub fn cpuid(&self, leaf: u32, subleaf: u32) -> Result<[u32; 4], Error> {
        match &self.way {
            Way::Direct(_) => {
                let found = __cpuid_count(leaf, subleaf);
                Ok([found.eax, found.ebx, found.ecx, found.edx])
            }
            Way::Ghcb(vcpu) => Ok(vcpu.cpuid(leaf, subleaf)?),
        }
    }
}

impl Machine for Processor {
    unsafe fn write(&self, register: u16, value: u32) {
        // SAFETY: passed on to the caller.
        unsafe {
            match &self.way {
                Way::Direct(direct) => direct.write(register, value),
                Way::Ghcb(vcpu) => vcpu.write(register, value),
            }
        }
    }

    fn read(&self, register: u16) -> u32 {
        match &self.way {
            Way::Direct(direct) => direct.read(register),
            Way::Ghcb(vcpu) => vcpu.read(register),
        }
    }

    unsafe fn convert(&self, range: GpaRange, to: Side) -> u64 {
        // SAFETY: passed on to the caller.
        unsafe {
            match &self.way {
                Way::Direct(direct) => direct.convert(range, to),
                Way::Ghcb(vcpu) => vcpu.convert(range, to),
            }
        }
    }

    fn accept(&self, range: GpaRange) -> Result<(), Error> {
        match &self.way {
            Way::Direct(_) => Ok(()),
            Way::Ghcb(vcpu) => vcpu.accept(range),
        }
    }
}

/// Writes a doorbell register.
///
/// # Safety
/// As for [`Machine::write`], in a ring that may use the doorbell.
pub(crate) unsafe fn ring(doorbell: Doorbell, register: u16, value: u32) {
    let (port, msr) = (PORT_BASE.wrapping_add(register), MSR_BASE.wrapping_add(register.into()));
    match doorbell {
        // SAFETY: passed on to the caller.
        Doorbell::Port => unsafe {
            asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags));
        },
        // SAFETY: as above.
        Doorbell::Msr => unsafe {
            asm!("wrmsr", in("ecx") msr, in("eax") value, in("edx") 0, options(nostack, preserves_flags));
        },
    }
}

/// A vCPU whose instructions reach the host by themselves.
#[derive(Debug, Clone, Copy)]
struct Direct {
    doorbell: Doorbell,
    amd: bool,
}

impl Direct {
    /// The vCPU, whose doorbell is rung as `doorbell` says.
    ///
    /// # Safety
    /// As [`Processor::new`].
    unsafe fn new(doorbell: Doorbell) -> Self {
        // The first four letters of "AuthenticAMD" and "HygonGenuine": these processors have VMMCALL, others VMCALL.
        let vendor = __cpuid_count(0, 0).ebx.to_le_bytes();
        Self { doorbell, amd: vendor == *b"Auth" || vendor == *b"Hygo" }
    }
}

impl Machine for Direct {
    unsafe fn write(&self, register: u16, value: u32) {
        // SAFETY: `new` was promised a guest and a ring that may do this, and the rest is passed on to the caller.
        unsafe { ring(self.doorbell, register, value) };
    }

    fn read(&self, register: u16) -> u32 {
        if register >= SPACE {
            return 0;
        }
        let (port, msr) = (PORT_BASE.wrapping_add(register), MSR_BASE.wrapping_add(register.into()));
        let value;
        match self.doorbell {
            // SAFETY: `new` was promised a guest and a ring that may do this; a read changes no memory of the guest.
            Doorbell::Port => unsafe {
                asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags));
            },
            // SAFETY: as above.
            Doorbell::Msr => unsafe {
                asm!("rdmsr", in("ecx") msr, out("eax") value, out("edx") _, options(nostack, preserves_flags));
            },
        }
        value
    }

    unsafe fn convert(&self, range: GpaRange, to: Side) -> u64 {
        let (gpa, pages, attributes) = (range.start().0, range.pages(), hypercall::attributes(to));
        let mut rax = hypercall::MAP_GPA_RANGE;
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
