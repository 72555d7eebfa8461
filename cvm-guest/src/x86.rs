//! The instructions of an x86-64 guest.

#![allow(unsafe_code, reason = "port, msr and hypercall instructions are assembly")]

use crate::sev::{
    Acceptance, BlockRecord, CpuidTable, Fault, GhcbPage, GhcbVcpu, Protection, Pvalidate, StatePage, Termination,
    Validate, Vmgexit, sev_status,
};
use crate::{Error, Machine, hypercall};
use core::arch::asm;
use core::arch::x86_64::__cpuid_count;
use core::sync::atomic::{AtomicBool, Ordering};
use cvm_core::boot::{BootPage, Exits};
use cvm_core::doorbell::{Doorbell, MSR_BASE, PORT_BASE, control};
use cvm_core::x86::VcpuState;
use cvm_core::{GpaRange, PAGE_SIZE, Side};

/// Whether exits of this guest go by the GHCB: what who panics has to know.
static BY_GHCB: AtomicBool = AtomicBool::new(false);

/// The processor that the guest runs on: what reaches its host, by whichever way the boot page says.
///
/// Under SEV-SNP pages are validated by `V`. Nothing but [`Pvalidate`] protects a guest.
#[derive(Debug)]
pub struct Processor<V = Pvalidate> {
    way: Way<V>,
    protection: Protection,
}

#[derive(Debug)]
enum Way<V> {
    Direct(Direct),
    Ghcb(GhcbVcpu<Vmgexit, V>),
}

impl<V: Validate> Processor<V> {
    /// The processor of a vCPU as `boot` describes it, with room for its GHCB, and the record of accepted memory that it has in
    /// common with the others. Both are only used by guests of SEV-ES and SEV-SNP.
    ///
    /// # Safety
    /// The code must run in a guest whose host started it with this boot page: elsewhere the instructions reach real devices.
    /// All memory must be mapped to its own addresses, and once more from [`BootPage::shared_at`] on if that is not 0. There
    /// must be one processor for each `ghcb`. It must run in ring 0, or, where exits are direct and as long as it rings by ports and asks for no conversion
    /// by hypercall, in a ring that may use these ports: elsewhere the instructions fault.
    ///
    /// # Errors
    /// [`Error::BootPage`] for a boot page of a kind that this version does not know. [`Error::Sev`] when the processor is not
    /// what the boot page says, and for faults of the host. A guest should end then.
    pub unsafe fn new(
        boot: &BootPage,
        validate: V,
        ghcb: &'static GhcbPage,
        blocks: &'static [BlockRecord],
    ) -> Result<Self, Error> {
        BY_GHCB.store(boot.exits() == Some(Exits::Ghcb), Ordering::Relaxed);
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
            let exit = Vmgexit::new();
            GhcbVcpu::new(exit, validate, boot, protection, ghcb.gpa(), acceptance, cpuid)?
        };
        Ok(Self { way: Way::Ghcb(vcpu), protection })
    }

    /// What of SEV protects the guest.
    pub fn protection(&self) -> Protection {
        self.protection
    }

    /// The vCPU that exits by its GHCB, if it does.
    pub fn ghcb(&self) -> Option<&GhcbVcpu<Vmgexit, V>> {
        match &self.way {
            Way::Direct(_) => None,
            Way::Ghcb(vcpu) => Some(vcpu),
        }
    }

    /// Has the vCPU with this APIC ID start at once from `state`, with what this one has of SEV. See
    /// [`GhcbVcpu::start_vcpu`].
    ///
    /// # Errors
    /// [`Error::Sev`], as there.
    pub fn start_vcpu(&self, apic_id: u32, page: &'static mut StatePage, state: &VcpuState) -> Result<(), Error> {
        let Way::Ghcb(vcpu) = &self.way else { return Err(Fault::SnpOnly.into()) };
        // SAFETY: a guest that exits by its GHCB is one of SEV, and runs in ring 0, as `new` was promised.
        let status = unsafe { sev_status() };
        // What is on is all of SEV_FEATURES, above the two bits of SEV and SEV-ES (AMD publication 24593, section 15.34.10).
        Ok(vcpu.start_vcpu(apic_id, page, state, status >> 2)?)
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

impl<V: Validate> Machine for Processor<V> {
    fn write(&self, register: u16, value: u32) {
        match &self.way {
            Way::Direct(direct) => direct.write(register, value),
            Way::Ghcb(vcpu) => vcpu.write(register, value),
        }
    }

    fn read(&self, register: u16) -> u32 {
        match &self.way {
            Way::Direct(direct) => direct.read(register),
            Way::Ghcb(vcpu) => vcpu.read(register),
        }
    }

    fn convert(&self, range: GpaRange, to: Side) -> u64 {
        match &self.way {
            Way::Direct(direct) => direct.convert(range, to),
            Way::Ghcb(vcpu) => vcpu.convert(range, to),
        }
    }

    fn accept(&self, range: GpaRange) -> Result<(), Error> {
        match &self.way {
            Way::Direct(_) => Ok(()),
            Way::Ghcb(vcpu) => vcpu.accept(range),
        }
    }
}

/// Ends a guest that has panicked, with `code`. What panicked is not said: the console is the host's to read.
///
/// # Safety
/// The code must run in a guest, in a ring as for [`Processor::new`].
pub unsafe fn end_after_panic(code: u32) -> ! {
    if BY_GHCB.load(Ordering::Relaxed) {
        // The vCPU's GHCB is not at hand, and need not be in order.
        // SAFETY: passed on to the caller; this vCPU does nothing else any more.
        let exit = unsafe { Vmgexit::new() };
        let code = u8::try_from(code).unwrap_or(u8::MAX);
        crate::sev::terminate(&exit, Termination::Panic(code));
    }
    for doorbell in [Doorbell::Port, Doorbell::Msr] {
        // SAFETY: passed on to the caller; a host that does not know the doorbell ends the guest all the same.
        let direct = unsafe { Direct::new(doorbell) };
        direct.write(control::END, code);
    }
    loop {
        core::hint::spin_loop();
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
