//! vCPUs that the guest starts by itself, from a state that the host cannot see (AMD publication 56421, section 4.1.9).

#![allow(unsafe_code, reason = "a vcpu that is started runs whatever it is pointed at")]

use super::{Exit, Fault, GhcbVcpu, Validate, Validated};
use cvm_core::x86::VcpuState;
use cvm_core::x86::save_area::{self, SaveArea};
use cvm_core::{Gpa, PAGE_SIZE};

/// Room for the state of a vCPU: a page of the guest's, mapped to its own address, that was loaded.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct StatePage(SaveArea);

impl StatePage {
    /// Room for one.
    #[allow(clippy::new_without_default, reason = "it is for statics")]
    pub const fn new() -> Self {
        Self([0; PAGE_SIZE as usize])
    }

    /// The state of a vCPU at VMPL 0 that starts as those do which the launch has set up. `sev_features` are its SEV_FEATURES.
    pub fn fill(&mut self, state: &VcpuState, sev_features: u64) {
        save_area::fill(&mut self.0, state, sev_features);
    }

    /// Its 4096 bytes: a VM save area, once it is filled.
    pub fn as_bytes(&self) -> &SaveArea {
        &self.0
    }
}

impl<E: Exit, V: Validate> GhcbVcpu<E, V> {
    /// Has the vCPU with this APIC ID start at once from `state` with these SEV_FEATURES, which have to be those of all vCPUs.
    /// The page is the processor's from then on; and it is lost after a fault too, since the host may have it then.
    ///
    /// # Safety
    /// The vCPU runs whatever is at `state.rip`, on the page tables and with the stack of `state`: that must be code which
    /// is written for this, with a stack of its own. If the vCPU runs already, it is stopped where it is and must own
    /// nothing. The page must be mapped to its own address.
    /// ```compile_fail,E0133
    /// # use cvm_guest::sev::{Exit, GhcbVcpu, StatePage, Validate};
    /// fn start(
    ///     vcpu: &GhcbVcpu<impl Exit, impl Validate>,
    ///     page: &'static mut StatePage,
    ///     state: &cvm_core::x86::VcpuState,
    /// ) {
    ///     let _ = vcpu.start_vcpu(1, page, state, 1);
    /// }
    /// ```
    ///
    /// # Errors
    /// [`Fault::SnpOnly`]; [`Fault::NoPage`] for a page at a multiple of 2 MiB; [`Fault::Validation`] for one that the
    /// processor does not take; faults of the host.
    pub unsafe fn start_vcpu(
        &self,
        apic_id: u32,
        page: &'static mut StatePage,
        state: &VcpuState,
        sev_features: u64,
    ) -> Result<(), Fault> {
        if !self.is_snp() {
            return Err(Fault::SnpOnly);
        }
        page.fill(state, sev_features);
        // The last use of the page by its reference. The address is exposed: what is in it is for the instructions to see.
        let gpa = core::ptr::from_mut(page).expose_provenance() as u64;
        // Processors mistake a state there for a large page (AMD publication 57238, erratum 1467).
        if gpa.is_multiple_of(super::validate::LARGE_PAGE) {
            return Err(Fault::NoPage(gpa));
        }
        match self.validate().make_state(gpa) {
            Validated::Changed => self.ghcb().create_vcpu(self.exit(), apic_id, Gpa(gpa), sev_features),
            found => Err(Fault::Validation { gpa, found }),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::event::code;
    use super::super::fake::{Host, Pages, boot, vcpu};
    use super::super::ghcb::offset;
    use super::super::{Protection, validate::LARGE_PAGE};
    use super::*;
    use cvm_core::boot::MemoryRange;
    use cvm_core::doorbell::Doorbell;

    const STATE: VcpuState =
        VcpuState { rsp: 0x2000, ..VcpuState::long_mode(Gpa(0x10_0000), Gpa(0x5000), 3, Gpa(0x4000)) };

    /// A page at a multiple of 2 MiB, or one that is not.
    fn page(is_multiple: bool) -> &'static mut StatePage {
        let pages = (0..=LARGE_PAGE / PAGE_SIZE).map(|_| StatePage::new()).collect::<Vec<_>>().leak();
        let found = |page: &&mut StatePage| address(page).is_multiple_of(LARGE_PAGE) == is_multiple;
        pages.iter_mut().find(found).unwrap()
    }

    fn address(page: &StatePage) -> u64 {
        std::ptr::from_ref(page).addr() as u64
    }

    /// A vCPU of this host's guest starts another from `page`.
    fn start(host: &Host, pages: &Pages, page: &'static mut StatePage) -> Result<(), Fault> {
        let memory = MemoryRange { start: host.memory.gpa(0).0, len: 8 * PAGE_SIZE };
        let mut boot = boot(host.protection, Doorbell::Port, memory);
        boot.accepted = u64::MAX;
        let vcpu = vcpu(host, pages, &boot).unwrap();
        assert_eq!(vcpu.features(), Ok(3));
        host.exits.borrow_mut().clear();
        // SAFETY: this host starts nothing.
        unsafe { vcpu.start_vcpu(5, page, &STATE, 1) }
    }

    #[test]
    fn a_vcpu_starts_from_a_page_that_the_processor_took_for_its_state() {
        let (host, pages, page) = (Host::new(Protection::SevSnp, 8), Pages::default(), page(false));
        let gpa = address(page);
        pages.set(gpa / PAGE_SIZE);
        start(&host, &pages, page).unwrap();
        assert_eq!(pages.states(), [gpa / PAGE_SIZE]);
        let exits = host.exits.borrow();
        assert_eq!(exits.len(), 1);
        assert_eq!((exits[0].code, exits[0].info1, exits[0].info2), (code::CREATE_VCPU, 5 << 32 | 1, gpa));
        assert_eq!(host.read(offset::RAX), 1);
    }

    #[test]
    fn the_host_is_not_asked_to_start_a_vcpu_from_a_page_that_is_no_state() {
        for found in [Validated::Failed(2), Validated::Failed(3), Validated::SizeMismatch] {
            let (host, pages, page) = (Host::new(Protection::SevSnp, 8), Pages::default(), page(false));
            let gpa = address(page);
            pages.set(gpa / PAGE_SIZE);
            pages.fail(gpa, found);
            assert_eq!(start(&host, &pages, page), Err(Fault::Validation { gpa, found }));
            assert!(host.exits.borrow().is_empty());
        }
        // It is not valid.
        let (host, pages, page) = (Host::new(Protection::SevSnp, 8), Pages::default(), page(false));
        assert!(matches!(start(&host, &pages, page), Err(Fault::Validation { .. })));
        assert!(host.exits.borrow().is_empty());
    }

    #[test]
    fn vcpus_are_started_only_under_snp_and_not_from_a_page_that_a_processor_mistakes() {
        let (host, pages, page_of_512) = (Host::new(Protection::SevSnp, 8), Pages::default(), page(true));
        let gpa = address(page_of_512);
        pages.set(gpa / PAGE_SIZE);
        assert_eq!(start(&host, &pages, page_of_512), Err(Fault::NoPage(gpa)));
        assert!(pages.states().is_empty() && host.exits.borrow().is_empty());
        let (host, pages) = (Host::new(Protection::SevEs, 8), Pages::default());
        assert_eq!(start(&host, &pages, page(false)), Err(Fault::SnpOnly));
        assert!(pages.states().is_empty() && host.exits.borrow().is_empty());
    }

    #[test]
    fn a_host_that_refuses_to_start_a_vcpu_is_told_of() {
        let (host, pages, page) = (Host::new(Protection::SevSnp, 8), Pages::default(), page(false));
        pages.set(address(page) / PAGE_SIZE);
        host.answer_by(|host, seen| {
            let refuses = seen.code == code::CREATE_VCPU;
            if refuses {
                host.write(offset::EXIT_INFO_1, 2);
            }
            refuses
        });
        let refused = start(&host, &pages, page);
        assert!(matches!(refused, Err(Fault::Refused { code: code::CREATE_VCPU, info1: 2, .. })), "{refused:?}");
    }

    #[test]
    fn a_page_that_was_used_for_something_else_has_nothing_of_it() {
        let (mut used, mut fresh) = (StatePage([0xff; PAGE_SIZE as usize]), StatePage::new());
        used.fill(&STATE, 1);
        fresh.fill(&STATE, 1);
        assert_eq!(used.as_bytes(), fresh.as_bytes());
    }
}
