//! The launch digest of SEV-SNP: a chain of SHA-384 over every page, in the order in which they are given to the firmware.

use crate::{Error, Vmsa};
use cvm_core::{Gpa, GpaRange, Measurement, PAGE_SIZE};
use sha2::{Digest, Sha384};
use std::num::NonZeroUsize;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

const PAGE: usize = PAGE_SIZE as usize;

/// What a page is to the firmware. The numbers are those of `PAGE_TYPE` (AMD publication 56860, `SNP_LAUNCH_UPDATE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PageType {
    /// Its contents are measured.
    Normal = 1,
    /// It is the initial state of a vCPU, which is measured.
    Vmsa = 2,
    /// It is zero.
    Zero = 3,
    /// Its contents are not measured.
    Unmeasured = 4,
    /// The firmware writes keys there.
    Secrets = 5,
    /// The firmware checks what the host says of the processor.
    Cpuid = 6,
}

/// Where every vCPU's state is to the measurement: all ones, cut to whole pages and 48 bits of address (KVM,
/// `SEV_SNP_LAUNCH_FINISH`; the same in all evidence).
pub const VMSA_GPA: Gpa = Gpa(0xffff_ffff_f000);

/// `LENGTH` of the structure that each page is measured as.
const PAGE_INFO_BYTES: u16 = 0x70;

/// Pages that a thread takes at a time: some 0.1 ms of work, so that threads end together.
const CHUNK: usize = 16;

/// A launch digest as it grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaunchDigest {
    chain: [u8; 48],
    threads: NonZeroUsize,
}

impl Default for LaunchDigest {
    fn default() -> Self {
        Self::new()
    }
}

impl LaunchDigest {
    /// That of a launch into which nothing was loaded. Pages are hashed on all processors.
    pub fn new() -> Self {
        Self { chain: [0; 48], threads: thread::available_parallelism().unwrap_or(NonZeroUsize::MIN) }
    }

    /// The same, and pages are hashed on at most so many threads, the caller's among them.
    pub fn with_threads(self, threads: NonZeroUsize) -> Self {
        Self { threads, ..self }
    }

    /// Adds one page, of whose contents this is what enters the measurement: SHA-384 of a normal page and of a
    /// [`PageType::Vmsa`], else zeros.
    ///
    /// What is hashed is `PAGE_INFO` (AMD publication 56860, section 8.17.2): the digest so far, that of the
    /// contents, the structure's length, the page's type, whether it is of an initial migration image (none is), the
    /// permissions of VMPL 3, 2 and 1 (none: KVM gives none), a reserved byte, and the address.
    pub fn extend(&mut self, page: PageType, gpa: Gpa, contents: &[u8; 48]) {
        let mut info = [0; PAGE_INFO_BYTES as usize];
        info[..0x30].copy_from_slice(&self.chain);
        info[0x30..0x60].copy_from_slice(contents);
        info[0x60..0x62].copy_from_slice(&PAGE_INFO_BYTES.to_le_bytes());
        info[0x62] = page as u8;
        info[0x68..].copy_from_slice(&gpa.0.to_le_bytes());
        self.chain = Sha384::digest(info).into();
    }

    /// Adds normal pages, from `start` upwards.
    ///
    /// # Errors
    /// [`Error::Pages`] if they are not whole pages, or end above 52 bits of address.
    pub fn normal(&mut self, start: Gpa, contents: &[u8]) -> Result<(), Error> {
        let len = contents.len() as u64;
        if len > 0 {
            pages(start, len)?;
        }
        let (pages, _) = contents.as_chunks::<PAGE>();
        let chunks: Vec<_> = pages.chunks(CHUNK).map(|pages| (pages, OnceLock::new())).collect();
        let next = AtomicUsize::new(0);
        // Hashes the chunk that nobody has taken yet, if there is one.
        let work = || {
            let chunk = chunks.get(next.fetch_add(1, Ordering::Relaxed));
            if let Some((pages, digests)) = chunk {
                digests.get_or_init(|| hash(pages));
            }
            chunk.is_some()
        };
        let helpers = self.threads.get().min(chunks.len()).saturating_sub(1);
        thread::scope(|scope| {
            for _ in 0..helpers {
                // Without it there is less help, and the caller's thread does all that is left.
                let _ = thread::Builder::new().spawn_scoped(scope, || while work() {});
            }
            let mut gpa = start.0;
            for (_, digests) in &chunks {
                // The chain goes on as soon as it can; until then this thread hashes too.
                while digests.get().is_none() && work() {}
                for digest in digests.wait() {
                    self.extend(PageType::Normal, Gpa(gpa), digest);
                    gpa += PAGE_SIZE;
                }
            }
        });
        Ok(())
    }

    /// Adds pages whose contents are not measured, or are those of zero pages.
    pub fn without_contents(&mut self, page: PageType, range: GpaRange) {
        for index in 0..range.pages() {
            self.extend(page, Gpa(range.start().0 + index * PAGE_SIZE), &[0; 48]);
        }
    }

    /// Adds vCPUs, in the order of their indices. The firmware gets them when everything else is loaded.
    pub fn vcpus<'a>(&mut self, states: impl IntoIterator<Item = &'a Vmsa>) {
        let mut last: Option<(&Vmsa, [u8; 48])> = None;
        for state in states {
            // Most are alike.
            let digest = match last {
                Some((vmsa, digest)) if vmsa == state => digest,
                _ => Sha384::digest(state.as_bytes()).into(),
            };
            last = Some((state, digest));
            self.extend(PageType::Vmsa, VMSA_GPA, &digest);
        }
    }

    /// The digest of all that was added.
    pub fn measurement(&self) -> Measurement {
        Measurement(self.chain)
    }
}

/// SHA-384 of each page. Images have runs of equal pages, mostly of nothing.
fn hash(pages: &[[u8; PAGE]]) -> Vec<[u8; 48]> {
    let mut digests = Vec::with_capacity(pages.len());
    for (index, page) in pages.iter().enumerate() {
        let same = index.checked_sub(1).filter(|before| pages[*before] == *page);
        digests.push(same.map_or_else(|| Sha384::digest(page).into(), |before| digests[before]));
    }
    digests
}

/// Whole pages, whose last is below 52 bits of address.
pub(crate) fn pages(start: Gpa, len: u64) -> Result<GpaRange, Error> {
    let refuse = |problem| Error::Pages { gpa: start, len, problem };
    if !start.0.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
        return Err(refuse("these are not whole pages"));
    }
    GpaRange::new(start.0, len).map_err(|_| refuse("it takes 1 page or more, within 52 bits of address"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one_by_one(start: u64, contents: &[u8]) -> Measurement {
        let mut digest = LaunchDigest::new();
        for (page, gpa) in contents.chunks(PAGE).zip((start..).step_by(PAGE)) {
            digest.extend(PageType::Normal, Gpa(gpa), &Sha384::digest(page).into());
        }
        digest.measurement()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn threads_change_nothing(fill in proptest::collection::vec(0..3u8, 0..120), threads in 1..9usize) {
            let contents: Vec<_> = fill.iter().flat_map(|byte| [*byte; PAGE]).collect();
            let mut digest = LaunchDigest::new().with_threads(NonZeroUsize::new(threads).unwrap());
            digest.normal(Gpa(0x8000), &contents).unwrap();
            prop_assert_eq!(digest.measurement(), one_by_one(0x8000, &contents));
        }
    }

    #[test]
    fn what_is_no_page_is_refused() {
        let mut digest = LaunchDigest::new();
        for (gpa, len) in [(0x1000, 0x1001), (0x1001, 0x1000), (1 << 52, 0x1000), (u64::MAX - 0xfff, 0x1000)] {
            let error = digest.normal(Gpa(gpa), &vec![0; len]).unwrap_err();
            assert!(matches!(error, Error::Pages { .. }), "{error}");
        }
        assert_eq!(digest.measurement(), Measurement([0; 48]));
    }

    #[test]
    fn type_place_and_order_of_pages_enter_the_digest() {
        let of = |pages: &[(PageType, u64)]| {
            let mut digest = LaunchDigest::new();
            for (page, gpa) in pages {
                digest.extend(*page, Gpa(*gpa), &[0; 48]);
            }
            digest.measurement().0
        };
        use PageType::{Cpuid, Secrets};
        let given = of(&[(Cpuid, 0x1000), (Secrets, 0x2000)]);
        assert_ne!(given, of(&[(Secrets, 0x2000), (Cpuid, 0x1000)]));
        assert_ne!(given, of(&[(Secrets, 0x1000), (Cpuid, 0x2000)]));
        assert_ne!(given, of(&[(Cpuid, 0x1000), (Secrets, 0x3000)]));
    }
}
