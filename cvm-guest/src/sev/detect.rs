use super::Fault;
use crate::Error;
use cvm_core::boot::{BootPage, Exits};
use cvm_core::doorbell::Transport;

/// What of SEV protects the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// Nothing of it.
    None,
    /// Memory is encrypted.
    Sev,
    /// Registers are too, and exits go by the GHCB.
    SevEs,
    /// The host cannot replace private pages either.
    SevSnp,
}

/// The bits of the MSR `SEV_STATUS` (AMD publication 24593, section 15.34.10).
const SEV: u64 = 1;
const SEV_ES: u64 = 1 << 1;
const SEV_SNP: u64 = 1 << 2;

/// The features that a guest of this library can run with, because they demand nothing of it: swapped debug registers (bit 7),
/// no sampling by the host (8), isolated branch prediction (9), a time-stamp counter of its own (11), virtual instruction-based
/// sampling (14), an idle sibling thread (17), and a prediction barrier on entry (23). The guest stops with any other, as a
/// feature that it does not know could change what its instructions do (bits as for SEV_SNP).
const SUPPORTED: u64 = 1 << 7 | 1 << 8 | 1 << 9 | 1 << 11 | 1 << 14 | 1 << 17 | 1 << 23;

impl Protection {
    /// What `boot` says, which is measured, checked against the MSR `SEV_STATUS`, which no host can intercept where the
    /// processor has it. It is only read where the boot page says that the processor does: elsewhere the read faults,
    /// and a guest without exception handlers ends.
    ///
    /// Where the boot page says that nothing protects the guest, nobody is asked. Its measurement is another one then,
    /// and under SEV-ES and SEV-SNP its first direct exit faults.
    ///
    /// # Errors
    /// [`Error::BootPage`] for a boot page that contradicts itself; [`Fault::Protection`], [`Fault::Features`].
    pub fn of(boot: &BootPage, status: impl FnOnce() -> u64) -> Result<Self, Error> {
        let said = Self::said(boot).ok_or(Error::BootPage("protection"))?;
        let expected = match said {
            Self::None => return Ok(said),
            Self::Sev => SEV,
            Self::SevEs => SEV | SEV_ES,
            Self::SevSnp => SEV | SEV_ES | SEV_SNP,
        };
        let status = status();
        if status & (SEV | SEV_ES | SEV_SNP) != expected {
            return Err(Fault::Protection { said, status }.into());
        }
        if status & !(expected | SUPPORTED) != 0 {
            return Err(Fault::Features(status).into());
        }
        Ok(said)
    }

    fn said(boot: &BootPage) -> Option<Self> {
        let two_sides = boot.shared_at != 0;
        match (boot.exits()?, boot.transport()?) {
            (Exits::Direct, Transport::Doorbell | Transport::Hypercall) => {
                Some(if two_sides { Self::Sev } else { Self::None })
            }
            (Exits::Ghcb, Transport::Doorbell | Transport::Hypercall) if two_sides => Some(Self::SevEs),
            (Exits::Ghcb, Transport::PageState) if two_sides && boot.secrets != 0 && boot.cpuid != 0 => {
                Some(Self::SevSnp)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zerocopy::FromZeros;

    fn boot(exits: Exits, transport: Transport, shared_at: u64, vouched: u64) -> BootPage {
        let (exits, transport) = (exits as u32, transport as u32);
        BootPage { exits, transport, shared_at, secrets: vouched, cpuid: vouched, ..BootPage::new_zeroed() }
    }

    fn unread() -> u64 {
        panic!("the status is not to be read")
    }

    #[test]
    fn the_boot_page_and_the_processor_have_to_agree() {
        let kinds = [
            (boot(Exits::Direct, Transport::Hypercall, 1 << 39, 0), SEV, Protection::Sev),
            (boot(Exits::Ghcb, Transport::Hypercall, 1 << 39, 0), SEV | SEV_ES, Protection::SevEs),
            (boot(Exits::Ghcb, Transport::PageState, 1 << 39, 0x2000), SEV | SEV_ES | SEV_SNP, Protection::SevSnp),
        ];
        for (boot, right, said) in kinds {
            for status in 0..8 {
                let of = Protection::of(&boot, || status);
                if status == right {
                    assert_eq!(of, Ok(said));
                } else {
                    assert_eq!(of, Err(Fault::Protection { said, status }.into()));
                }
            }
        }
    }

    #[test]
    fn a_guest_goes_on_only_with_features_that_demand_nothing_of_it() {
        let boot = boot(Exits::Ghcb, Transport::PageState, 1 << 39, 0x2000);
        for bit in 3..64 {
            let status = SEV | SEV_ES | SEV_SNP | 1 << bit;
            let expected = match bit {
                7 | 8 | 9 | 11 | 14 | 17 | 23 => Ok(Protection::SevSnp),
                _ => Err(Fault::Features(status).into()),
            };
            assert_eq!(Protection::of(&boot, || status), expected, "bit {bit}");
        }
    }

    #[test]
    fn without_protection_the_processor_is_not_asked() {
        for transport in [Transport::Doorbell, Transport::Hypercall] {
            assert_eq!(Protection::of(&boot(Exits::Direct, transport, 0, 0), unread), Ok(Protection::None));
        }
    }

    #[test]
    fn a_boot_page_that_contradicts_itself_is_refused() {
        let bad = [
            boot(Exits::Direct, Transport::PageState, 0, 0),
            boot(Exits::Direct, Transport::PageState, 1 << 39, 0x2000),
            boot(Exits::Ghcb, Transport::Hypercall, 0, 0),
            boot(Exits::Ghcb, Transport::PageState, 0, 0x2000),
            boot(Exits::Ghcb, Transport::PageState, 1 << 39, 0),
        ];
        for boot in bad {
            assert_eq!(Protection::of(&boot, unread), Err(Error::BootPage("protection")));
        }
    }

    proptest! {
        #[test]
        fn no_status_makes_a_protected_guest_believe_that_it_is_not(status: u64, kind in 0usize..3) {
            let exits = [Exits::Direct, Exits::Ghcb, Exits::Ghcb][kind];
            let transport = [Transport::Hypercall, Transport::Hypercall, Transport::PageState][kind];
            let of = Protection::of(&boot(exits, transport, 1 << 39, 0x2000), || status);
            prop_assert!(of != Ok(Protection::None));
        }
    }
}
