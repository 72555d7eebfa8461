//! The GHCB MSR protocol: requests of one number, for which no page need be shared (AMD publication 56421, section 2.3).

use super::Fault;
use cvm_core::{Gpa, GpaRange, PAGE_SIZE, Side};

/// VMGEXIT.
pub trait Exit {
    /// Writes `value` to the GHCB MSR, exits, and returns what the MSR has then. With bits 0 to 11 clear it is the GPA of a
    /// GHCB, and the MSR keeps it; else it is a request, and the host's answer can be anything.
    fn exit(&self, value: u64) -> u64;
}

impl<E: Exit + ?Sized> Exit for &E {
    fn exit(&self, value: u64) -> u64 {
        (**self).exit(value)
    }
}

/// Bits 0 to 11: what it is.
const KIND: u64 = PAGE_SIZE - 1;

const INFORMATION: u64 = 0x002;
const INFORMATION_ANSWER: u64 = 0x001;
const CPUID: u64 = 0x004;
const REGISTER: u64 = 0x012;
const PAGE_STATE: u64 = 0x014;
const TERMINATE: u64 = 0x100;

/// The versions of the protocol that a guest of this library speaks.
const VERSIONS: core::ops::RangeInclusive<u16> = 1..=2;
/// The first version that knows SEV-SNP.
const SNP_VERSION: u16 = 2;

/// How often a page state change is asked for again.
const TRIES: u32 = 1000;

/// Asks for what has an answer whose kind is the next number.
fn ask(exit: &impl Exit, request: u64) -> Result<u64, Fault> {
    let answer = exit.exit(request);
    if answer & KIND == (request & KIND) + 1 { Ok(answer & !KIND) } else { Err(Fault::Answer { request, answer }) }
}

/// The highest version of the protocol that both sides speak; for `snp` one that knows of it.
pub(super) fn version(exit: &impl Exit, snp: bool) -> Result<u16, Fault> {
    let answer = exit.exit(INFORMATION);
    if answer & KIND != INFORMATION_ANSWER {
        return Err(Fault::Answer { request: INFORMATION, answer });
    }
    let (max, min) = ((answer >> 48) as u16, (answer >> 32) as u16);
    let version = max.min(*VERSIONS.end());
    let least = if snp { SNP_VERSION } else { *VERSIONS.start() };
    if version < least || version < min { Err(Fault::Version { min, max }) } else { Ok(version) }
}

/// Registers the page that this vCPU's GHCB will be; the host cannot use another one then.
pub(super) fn register(exit: &impl Exit, page: Gpa) -> Result<(), Fault> {
    let request = page.0 | REGISTER;
    let answer = ask(exit, request)?;
    if answer == page.0 { Ok(()) } else { Err(Fault::Answer { request, answer }) }
}

/// What the host says that CPUID gives for a leaf with subleaf 0, EAX, EBX, ECX and EDX, to a vCPU of SEV-ES that has no
/// GHCB yet.
///
/// # Errors
/// [`Fault::Answer`].
pub fn cpuid_by_msr(exit: &impl Exit, leaf: u32) -> Result<[u32; 4], Fault> {
    let mut registers = [0; 4];
    for (number, register) in (0..).zip(&mut registers) {
        *register = (ask(exit, u64::from(leaf) << 32 | number << 30 | CPUID)? >> 32) as u32;
    }
    Ok(registers)
}

/// The number of a side in a page state change.
pub(super) fn operation(to: Side) -> u64 {
    match to {
        Side::Private => 1,
        Side::Shared => 2,
    }
}

/// Changes the state of one page.
pub(super) fn change_page(exit: &impl Exit, page: GpaRange, to: Side) -> Result<(), Fault> {
    let mut answer = 0;
    for _ in 0..TRIES {
        answer = ask(exit, operation(to) << 52 | page.start().0 | PAGE_STATE)?;
        if answer >> 32 == 0 {
            return Ok(());
        }
        core::hint::spin_loop();
    }
    Err(Fault::PageState { range: page, to, answer })
}

/// Why a guest ends by itself, told to the host by the GHCB MSR as a set of reasons and a reason in it.
///
/// | set | reason |
/// |---|---|
/// | 0 | the protocol's: 0 [`General`](Self::General), 1 [`Version`](Self::Version) |
/// | 0xc | 1 [`Fault`](Self::Fault), 2 [`Validation`](Self::Validation), from 0x80 on [`Panic`](Self::Panic) |
/// | 0xd | [`Exception`](Self::Exception): the vector |
/// | 0xe | [`Vc`](Self::Vc) below 0x100: the error code |
/// | 0xf | [`Vc`](Self::Vc) from 0x400 to 0x4ff: what the error code has above 0x400 |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Termination {
    /// It has its reasons.
    General,
    /// The host speaks no version that it knows.
    Version,
    /// The host, or the processor, is not what it has to be.
    Fault,
    /// A page was replaced, or the guest has lost track.
    Validation,
    /// The guest's code panicked, with this code.
    Panic(u8),
    /// An exception other than #VC that the guest does not handle, by its vector: the host replaced a page, perhaps, or raised
    /// it.
    Exception(u8),
    /// A #VC that the guest does not handle, by its error code (AMD publication 24593, appendix C): the code of the exit that
    /// an instruction would have caused, 0x400 where there is no page, and 0x404 for a page that is not valid, which the host
    /// replaced or the guest never accepted.
    Vc(u64),
}

impl Termination {
    /// This library's sets of reasons: the protocol leaves all but 0 to others, and Linux has 1.
    const OWN_SET: u64 = 0xc;
    /// The reason is the vector of an exception. It is that of #VC for an error code that the next two sets have no room for.
    const EXCEPTION_SET: u64 = 0xd;
    /// The reason is the error code of #VC.
    const VC_SET: u64 = 0xe;
    /// The reason is the error code of #VC above 0x400.
    const VC_PAGE_SET: u64 = 0xf;
    const VC_PAGE: u64 = 0x400;
    const VC_VECTOR: u8 = 29;

    /// What terminates the guest when it is written to the GHCB MSR.
    pub fn request(self) -> u64 {
        let (set, code) = match self {
            Self::General => (0, 0),
            Self::Version => (0, 1),
            Self::Fault => (Self::OWN_SET, 1),
            Self::Validation => (Self::OWN_SET, 2),
            Self::Panic(code) => (Self::OWN_SET, 0x80 | code),
            Self::Exception(vector) => (Self::EXCEPTION_SET, vector),
            Self::Vc(error) => match (u8::try_from(error), u8::try_from(error.wrapping_sub(Self::VC_PAGE))) {
                (Ok(error), _) => (Self::VC_SET, error),
                (_, Ok(above)) => (Self::VC_PAGE_SET, above),
                _ => (Self::EXCEPTION_SET, Self::VC_VECTOR),
            },
        };
        TERMINATE | set << 12 | u64::from(code) << 16
    }
}

impl From<Fault> for Termination {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Version { .. } => Self::Version,
            Fault::Validation { .. } => Self::Validation,
            _ => Self::Fault,
        }
    }
}

/// Ends the guest. A host that runs it on nevertheless finds it repeating itself.
pub(crate) fn terminate(exit: &impl Exit, why: Termination) -> ! {
    loop {
        exit.exit(why.request());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::RefCell;

    struct Host<F>(F, RefCell<Vec<u64>>);

    impl<F: Fn(u64) -> u64> Host<F> {
        fn new(answer: F) -> Self {
            Self(answer, RefCell::default())
        }
    }

    impl<F: Fn(u64) -> u64> Exit for Host<F> {
        fn exit(&self, value: u64) -> u64 {
            self.1.borrow_mut().push(value);
            self.0(value)
        }
    }

    #[test]
    fn the_highest_common_version_is_taken() {
        let host = |max: u64, min: u64| Host::new(move |_| max << 48 | min << 32 | 51 << 24 | 1);
        for (max, min, es, snp) in [(2, 1, Ok(2), Ok(2)), (9, 1, Ok(2), Ok(2)), (2, 2, Ok(2), Ok(2))] {
            assert_eq!((version(&host(max, min), false), version(&host(max, min), true)), (es, snp));
        }
        assert_eq!(version(&host(1, 1), false), Ok(1));
        assert_eq!(version(&host(1, 1), true), Err(Fault::Version { min: 1, max: 1 }));
        assert_eq!(version(&host(3, 3), false), Err(Fault::Version { min: 3, max: 3 }));
        assert_eq!(version(&host(0, 0), false), Err(Fault::Version { min: 0, max: 0 }));
        assert_eq!(version(&Host::new(|_| 7), false), Err(Fault::Answer { request: 2, answer: 7 }));
    }

    #[test]
    fn a_host_that_registers_another_page_is_refused() {
        assert_eq!(register(&Host::new(|value| value + 1), Gpa(0x5000)), Ok(()));
        let error = Fault::Answer { request: 0x5012, answer: 0x6000 };
        assert_eq!(register(&Host::new(|_| 0x6013), Gpa(0x5000)), Err(error));
        // What AMD's publication has a host answer that prefers another page.
        assert!(register(&Host::new(|_| !KIND | 0x13), Gpa(0x5000)).is_err());
    }

    #[test]
    fn requests_are_the_numbers_of_the_publication() {
        let host = Host::new(|value| match value & KIND {
            CPUID => ((value >> 30 & 3) + 7) << 32 | 5,
            kind => kind + 1,
        });
        let page = GpaRange::from_pages(0x12_3000, 1).unwrap();
        change_page(&host, page, Side::Private).unwrap();
        change_page(&host, page, Side::Shared).unwrap();
        assert_eq!(cpuid_by_msr(&host, 0x8000_001f), Ok([7, 8, 9, 10]));
        let words = [0x10_0000_0012_3014, 0x20_0000_0012_3014, 0x8000_001f_0000_0004];
        assert_eq!(host.1.borrow()[..3], words);
        assert_eq!(Termination::Panic(5).request(), 0x85_c100);
        assert_eq!(Termination::General.request(), 0x100);
        assert_eq!(Termination::Version.request(), 0x1_0100);
        assert_eq!(Termination::Exception(14).request(), 0x0e_d100);
        assert_eq!(Termination::Vc(0x72).request(), 0x72_e100);
        assert_eq!(Termination::Vc(0x404).request(), 0x04_f100);
        assert_eq!(Termination::Vc(0x8000_0010).request(), 0x1d_d100);
    }

    #[test]
    fn a_page_that_is_never_changed_is_given_up() {
        let host = Host::new(|_| 1 << 32 | 0x15);
        let page = GpaRange::from_pages(0x1000, 1).unwrap();
        let error = Fault::PageState { range: page, to: Side::Shared, answer: 1 << 32 };
        assert_eq!(change_page(&host, page, Side::Shared), Err(error));
        assert_eq!(host.1.borrow().len(), TRIES as usize);
    }

    proptest! {
        #[test]
        fn an_answer_of_another_kind_is_none(answer: u64) {
            let page = GpaRange::from_pages(0x1000, 1).unwrap();
            let host = Host::new(move |_| answer);
            prop_assert_eq!(register(&host, Gpa(0x1000)).is_ok(), answer == 0x1013);
            prop_assert_eq!(change_page(&host, page, Side::Shared).is_ok(), answer & (KIND | !0 << 32) == 0x15);
            prop_assert_eq!(cpuid_by_msr(&host, 0).is_ok(), answer & KIND == 5);
        }
    }
}
