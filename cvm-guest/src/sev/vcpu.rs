#![allow(unsafe_code, reason = "conversions discard memory, so the methods that ask for them are unsafe")]

use super::msr::{self, Exit, Termination};
use super::validate::set_valid;
use super::{Acceptance, CpuidTable, Fault, Ghcb, Protection, Validate, page_state};
use crate::hypercall::{self, EAGAIN, EINVAL};
use crate::{Error, Machine, SharedRegion};
use core::cell::Cell;
use cvm_core::boot::BootPage;
use cvm_core::doorbell::{Doorbell, MSR_BASE, PORT_BASE, SPACE};
use cvm_core::{Gpa, GpaRange, PAGE_SIZE, Side};

/// A vCPU of SEV-ES or SEV-SNP: it reaches its host by its GHCB.
///
/// As a [`Machine`] it has no way to fail: where the host, or the processor, breaks the protocol the guest terminates.
#[derive(Debug)]
pub struct GhcbVcpu<E, V> {
    exit: E,
    validate: V,
    ghcb: Ghcb,
    doorbell: Doorbell,
    acceptance: Acceptance<'static>,
    protection: Protection,
    /// The secure processor's, under SEV-SNP alone.
    cpuid: Option<CpuidTable>,
    /// The last page state change, if the host has put the guest off, and what is left of it.
    unfinished: Cell<Option<Unfinished>>,
}

#[derive(Debug, Clone, Copy)]
struct Unfinished {
    range: GpaRange,
    to: Side,
    left: GpaRange,
}

/// What a host says that takes the page state change itself for wrong, in the upper half of SW_EXITINFO2: its header, or an
/// entry (AMD publication 56421, section 4.1.6). KVM has one other code, for what its VMM refuses and for what it puts off.
const WRONG: core::ops::RangeInclusive<u64> = 1..=2;

/// Agrees with the host on a version, and shares the page at `gpa`, which the host can use as the GHCB from then on.
/// Returns the version.
fn set_up(exit: &impl Exit, validate: &impl Validate, protection: Protection, gpa: Gpa) -> Result<u16, Fault> {
    let page = GpaRange::new(gpa.0, PAGE_SIZE).map_err(|_| Fault::NoPage(gpa.0))?;
    let snp = protection == Protection::SevSnp;
    let version = msr::version(exit, snp)?;
    if snp {
        set_valid(validate, page, false)?;
        msr::change_page(exit, page, Side::Shared)?;
        msr::register(exit, gpa)?;
    }
    Ok(version)
}

impl<E: Exit, V: Validate> GhcbVcpu<E, V> {
    /// The vCPU that runs this, protected as `protection` says, which [`Protection::of`] has found in `boot`. Its GHCB will
    /// be the page at `gpa`, which must have been loaded. `acceptance` is the guest's record of accepted memory, and `cpuid` the
    /// table at [`BootPage::cpuid`], which SEV-SNP guests must have and others cannot.
    ///
    /// # Safety
    /// The page at `gpa` must be the guest's, used for nothing else, and mapped writable at `gpa + boot.shared_at` too.
    /// `protection` and `cpuid` must be what they are said to be, and `blocks` in `acceptance` the same records for all vCPUs of
    /// the guest, of which none was used before the guest began. Memory that has to be accepted must not be used before.
    ///
    /// # Errors
    /// [`Error::BootPage`] for a doorbell that this version does not know, a protection without a GHCB, and a table of CPUID
    /// leaves that is missing or that nobody vouches for; faults of the host, after which the contents of the page are unknown.
    pub unsafe fn new(
        exit: E,
        validate: V,
        boot: &BootPage,
        protection: Protection,
        gpa: Gpa,
        acceptance: Acceptance<'static>,
        cpuid: Option<CpuidTable>,
    ) -> Result<Self, Error> {
        let doorbell = boot.doorbell().ok_or(Error::BootPage("doorbell"))?;
        match (protection, cpuid) {
            (Protection::SevSnp, Some(_)) | (Protection::SevEs, None) => {}
            // Without the table the guest would have to believe the host.
            (Protection::SevSnp, None) | (Protection::SevEs, Some(_)) => return Err(Error::BootPage("cpuid table")),
            (Protection::None | Protection::Sev, _) => return Err(Error::BootPage("protection")),
        }
        let page = GpaRange::new(gpa.0, PAGE_SIZE).map_err(|_| Fault::NoPage(gpa.0))?;
        let version = set_up(&exit, &validate, protection, gpa)?;
        // SAFETY: passed on to the caller; the page is shared now.
        let region = unsafe { SharedRegion::new(page, boot.shared_at)? };
        region.zero(0, region.len())?;
        let ghcb = Ghcb::new(region, version)?;
        Ok(Self { exit, validate, ghcb, doorbell, acceptance, protection, cpuid, unfinished: Cell::new(None) })
    }

    /// What a step gave, or the end of the guest.
    fn must<T>(&self, result: Result<T, Fault>) -> T {
        result.unwrap_or_else(|fault| self.terminate(fault.into()))
    }

    /// Ends the guest, and tells the host why.
    pub fn terminate(&self, why: Termination) -> ! {
        msr::terminate(&self.exit, why)
    }

    /// Whether this is SEV-SNP.
    pub(super) fn is_snp(&self) -> bool {
        self.protection == Protection::SevSnp
    }

    /// What the processor says of itself: EAX, EBX, ECX, EDX. Under SEV-SNP the secure processor vouches for it, and under
    /// SEV-ES it is the host's word.
    ///
    /// # Errors
    /// Faults of the host.
    pub fn cpuid(&self, leaf: u32, subleaf: u32) -> Result<[u32; 4], Fault> {
        match &self.cpuid {
            Some(table) => Ok(table.get(leaf, subleaf)),
            None => self.ghcb.cpuid(&self.exit, leaf, subleaf),
        }
    }

    /// What the host says that it can do: bit 0 is SEV-SNP, bit 1 [`GhcbVcpu::start_vcpu`].
    ///
    /// # Errors
    /// Faults of the host.
    pub fn features(&self) -> Result<u64, Fault> {
        self.ghcb.features(&self.exit)
    }

    pub(super) fn ghcb(&self) -> &Ghcb {
        &self.ghcb
    }

    pub(super) fn exit(&self) -> &E {
        &self.exit
    }

    pub(super) fn validate(&self) -> &V {
        &self.validate
    }

    /// Changes sides of pages by page state change. What is not memory is not given away, as for hypercalls the host would
    /// say.
    fn change_state(&self, range: GpaRange, to: Side) -> u64 {
        // What is asked for again goes on where the host stopped: pages that are given away are invalid already.
        let unfinished = self.unfinished.take().filter(|last| (last.range, last.to) == (range, to));
        let left = unfinished.map_or(range, |last| last.left);
        if to == Side::Shared && unfinished.is_none() {
            match self.acceptance.give(range, &self.validate) {
                Err(Fault::NoPage(_)) => return EINVAL,
                given => self.must(given),
            }
        }
        match page_state::change(&self.ghcb, &self.exit, left, to) {
            // Pages that the guest meant to give away are nobody's now, as the caller is told.
            Err(Fault::PageState { answer, .. }) if WRONG.contains(&(answer >> 32)) => return EINVAL,
            Err(Fault::PageState { range: left, .. }) => {
                self.unfinished.set(Some(Unfinished { range, to, left }));
                return EAGAIN;
            }
            changed => self.must(changed),
        }
        if to == Side::Private {
            self.must(set_valid(&self.validate, range, true));
        }
        0
    }
}

impl<E: Exit, V: Validate> Machine for GhcbVcpu<E, V> {
    unsafe fn write(&self, register: u16, value: u32) {
        self.must(match self.doorbell {
            Doorbell::Port => self.ghcb.port_write(&self.exit, PORT_BASE.wrapping_add(register), value),
            Doorbell::Msr => self.ghcb.msr_write(&self.exit, MSR_BASE.wrapping_add(register.into()), value.into()),
        });
    }

    fn read(&self, register: u16) -> u32 {
        if register >= SPACE {
            return 0;
        }
        self.must(match self.doorbell {
            Doorbell::Port => self.ghcb.port_read(&self.exit, PORT_BASE.wrapping_add(register)),
            Doorbell::Msr => {
                self.ghcb.msr_read(&self.exit, MSR_BASE.wrapping_add(register.into())).map(|value| value as u32)
            }
        })
    }

    unsafe fn convert(&self, range: GpaRange, to: Side) -> u64 {
        if self.is_snp() {
            return self.change_state(range, to);
        }
        let registers = [hypercall::MAP_GPA_RANGE, range.start().0, range.pages(), hypercall::attributes(to)];
        self.must(self.ghcb.hypercall(&self.exit, registers))
    }

    fn accept(&self, range: GpaRange) -> Result<(), Error> {
        if !self.is_snp() {
            return Ok(());
        }
        match self.acceptance.accept(range, &self.validate) {
            Err(fault @ Fault::NoPage(_)) => Err(fault.into()),
            accepted => {
                self.must(accepted);
                Ok(())
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
