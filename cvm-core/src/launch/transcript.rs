//! What a launch consists of, and what it is measured as.

use super::ConfigDigest;
use crate::x86::VcpuState;
use crate::{Gpa, GpaRange, PAGE_SIZE};
use sha2::{Digest, Sha384};
use std::fmt;

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
    /// What the guest was promised before any page: the digest of the whole configuration.
    Config(ConfigDigest),
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

    /// The digest of the launch configuration; nothing if the transcript has none.
    pub fn config(&self) -> Option<ConfigDigest> {
        self.entries.iter().find_map(|entry| match entry {
            Entry::Config(digest) => Some(*digest),
            Entry::Page { .. } | Entry::Zero { .. } | Entry::Vcpu { .. } => None,
        })
    }

    /// The measurement of software-only isolation: a chain of SHA-384.
    ///
    /// It starts as SHA-384 of the ASCII text `cvm software launch 2`. Each page, vCPU and configuration makes it
    /// SHA-384 of: the measurement so far (48 bytes), a kind (8 bytes, little endian: the [`PageKind`], 16 for a
    /// configuration, 17 for a vCPU), a place (8 bytes, little endian: the GPA, 0 for a configuration, the vCPU's index),
    /// and a digest (48 bytes: of a page, the entry's; of a vCPU, SHA-384 of [`VcpuState::to_bytes`]; of a configuration, its
    /// [`ConfigDigest`]; of a zero page, zeros).
    pub fn measurement(&self) -> Measurement {
        let mut chain = digest(b"cvm software launch 2");
        let mut extend = |kind: u64, place: u64, contents: &[u8; 48]| {
            let next = Sha384::new().chain_update(chain).chain_update(kind.to_le_bytes());
            chain = next.chain_update(place.to_le_bytes()).chain_update(contents).finalize().into();
        };
        for entry in &self.entries {
            match entry {
                Entry::Config(config) => extend(16, 0, &config.0),
                Entry::Page { kind, gpa, contents } => extend(*kind as u64, gpa.0, contents),
                Entry::Zero { range } => {
                    for page in 0..range.pages() {
                        extend(PageKind::Zero as u64, range.start().0 + page * PAGE_SIZE, &[0; 48]);
                    }
                }
                Entry::Vcpu { index, state } => extend(17, u64::from(*index), &digest(&state.to_bytes())),
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
