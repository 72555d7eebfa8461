//! What a launch consists of, and what it is measured as.

use crate::interrupt::InterruptController;
use crate::x86::VcpuState;
use crate::{Gpa, GpaRange, PAGE_SIZE, Policy};
use sha2::{Digest, Sha384};
use std::fmt;
use zerocopy::IntoBytes;

/// What a submitted page is to the measurement. The numbers are those of the transcript.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u64)]
pub enum PageKind {
    /// Its contents are measured.
    Measured = 1,
    /// It is zero, which is measured.
    Zero = 3,
    /// Only its address is measured, not its contents: the guest must not trust them.
    Unmeasured = 4,
    /// The trusted entity fills it with what only it and the guest know.
    Secrets = 5,
    /// The trusted entity has checked that the CPUID leaves in it are such as this processor has.
    Cpuid = 6,
}

/// A line of the transcript.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// What the guest was promised before any page.
    Config {
        /// How many vCPUs.
        vcpus: u32,
        /// The accepted vectors as 256 bits.
        interrupts: [u64; 4],
        /// Those of them that are levels, as 256 bits.
        levels: [u64; 4],
        /// The most interrupts in a second; 0 for no limit.
        most_interrupts: u32,
        /// The policy.
        policy: Policy,
        /// The interrupt controller.
        interrupt_controller: InterruptController,
    },
    /// One page with contents.
    Page {
        /// What it is to the measurement.
        kind: PageKind,
        /// Where it is.
        gpa: Gpa,
        /// SHA-384 of its contents if it is [`PageKind::Measured`], else zeros.
        contents: [u8; 48],
    },
    /// Pages of zeros.
    Zero {
        /// Where they are.
        range: GpaRange,
    },
    /// The first state of a vCPU.
    Vcpu {
        /// Its index.
        index: u32,
        /// The state.
        state: VcpuState,
    },
}

/// All that was submitted to a launch, in the order of submission.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transcript {
    pub(super) entries: Vec<Entry>,
}

impl Transcript {
    /// Its lines.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The measurement of software-only isolation: a chain of SHA-384.
    ///
    /// It starts as SHA-384 of the ASCII text `cvm software launch 1`. Each page, vCPU and configuration makes it
    /// SHA-384 of: the measurement so far (48 bytes), a kind (8 bytes, little endian: the [`PageKind`], 16 for a
    /// configuration, 17 for a vCPU), a place (8 bytes, little endian: the GPA, the number of vCPUs, the vCPU's index),
    /// and a digest (48 bytes: of a page, the entry's; of a vCPU, SHA-384 of its state's bytes; of a configuration,
    /// SHA-384 of five things, little endian: 32 bytes of accepted vectors, 32 of those that are levels, 8 of the most
    /// interrupts in a second, 8 of the policy, 8 of the [`InterruptController`]; of a zero page, zeros).
    pub fn measurement(&self) -> Measurement {
        let mut chain = digest(b"cvm software launch 1");
        let mut extend = |kind: u64, place: u64, contents: &[u8; 48]| {
            let next = Sha384::new().chain_update(chain).chain_update(kind.to_le_bytes());
            chain = next.chain_update(place.to_le_bytes()).chain_update(contents).finalize().into();
        };
        for entry in &self.entries {
            match entry {
                Entry::Config { vcpus, interrupts, levels, most_interrupts, policy, interrupt_controller } => {
                    let others = [u64::from(*most_interrupts), policy.bits(), *interrupt_controller as u64];
                    let promises = interrupts.iter().chain(levels).chain(&others);
                    let promises = promises.flat_map(|number| number.to_le_bytes()).collect::<Vec<_>>();
                    extend(16, u64::from(*vcpus), &digest(&promises));
                }
                Entry::Page { kind, gpa, contents } => extend(*kind as u64, gpa.0, contents),
                Entry::Zero { range } => {
                    for page in 0..range.pages() {
                        extend(PageKind::Zero as u64, range.start().0 + page * PAGE_SIZE, &[0; 48]);
                    }
                }
                Entry::Vcpu { index, state } => extend(17, u64::from(*index), &digest(state.as_bytes())),
            }
        }
        Measurement(chain)
    }
}

/// For whoever computes the measurement of a launch that somebody else made.
impl FromIterator<Entry> for Transcript {
    fn from_iter<I: IntoIterator<Item = Entry>>(entries: I) -> Self {
        Self { entries: entries.into_iter().collect() }
    }
}

/// What enters the measurement for the contents of a page, or for the bytes of a vCPU's state: SHA-384.
pub fn digest(contents: &[u8]) -> [u8; 48] {
    Sha384::digest(contents).into()
}

/// The digest that stands for a whole launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Measurement(pub [u8; 48]);

impl fmt::Display for Measurement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
