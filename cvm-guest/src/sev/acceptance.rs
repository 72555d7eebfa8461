//! Memory that is made valid when it is first needed.

use super::validate::{LARGE_PAGE, Validate, set_valid};
use super::{Fault, Protection};
use crate::sync::{AtomicU8, Ordering, pause};
use cvm_core::boot::{BootPage, MAX_RANGES, MemoryRange};
use cvm_core::{GpaRange, PAGE_SIZE};

/// Nobody has used the block.
const UNTOUCHED: u8 = 0;
/// A vCPU makes its pages valid.
const BUSY: u8 = 1;
/// Each page is valid, or was shared and its owner knows.
const TAKEN: u8 = 2;

/// What is known of a block of 2 MiB. An array of them, in a static of the guest's and common to all vCPUs, is for the blocks
/// from [`BootPage::accepted`] on.
#[derive(Debug)]
pub struct BlockRecord(AtomicU8);

impl BlockRecord {
    /// Of a block that nobody has used.
    #[cfg(not(loom))]
    #[allow(clippy::new_without_default, reason = "it is for statics")]
    pub const fn new() -> Self {
        Self(AtomicU8::new(UNTOUCHED))
    }

    /// Of a block that nobody has used.
    #[cfg(loom)]
    pub fn new() -> Self {
        Self(AtomicU8::new(UNTOUCHED))
    }

    /// Whether it is the caller who has to take the block, and say so by [`BlockRecord::taken`]. If not, somebody else has.
    fn is_mine(&self) -> bool {
        // Acquire: whoever sees a taken block sees its pages as they were made.
        match self.0.compare_exchange(UNTOUCHED, BUSY, Ordering::Acquire, Ordering::Acquire) {
            Ok(_) => true,
            Err(mut state) => {
                while state != TAKEN {
                    pause();
                    state = self.0.load(Ordering::Acquire);
                }
                false
            }
        }
    }

    fn taken(&self) {
        self.0.store(TAKEN, Ordering::Release);
    }
}

/// What memory is valid, for a guest of SEV-SNP.
///
/// All that was loaded is. The rest is made valid by blocks of 2 MiB, by whichever vCPU needs a page of one first; the
/// others wait. A page that is shared in a block which nobody has used is left out, and the rest of its block made valid
/// at once: so a record for each block is enough. That page is made valid when it comes back.
#[derive(Debug, Clone, Copy)]
pub struct Acceptance<'a> {
    blocks: &'a [BlockRecord],
    /// Where the first block is; all below is valid.
    accepted: u64,
    memory: [MemoryRange; MAX_RANGES],
}

impl<'a> Acceptance<'a> {
    /// What `boot` says of memory, with `blocks` to keep record. Other protections than SEV-SNP need none.
    ///
    /// # Errors
    /// [`Fault::NoPage`] when the first address is within a block, [`Fault::Blocks`] when there are too few records.
    pub fn new(boot: &BootPage, protection: Protection, blocks: &'a [BlockRecord]) -> Result<Self, Fault> {
        let BootPage { accepted, memory, .. } = *boot;
        let end = memory.iter().map(|range| range.start.saturating_add(range.len)).max().unwrap_or(0);
        if protection == Protection::SevSnp && accepted < end {
            if !accepted.is_multiple_of(LARGE_PAGE) {
                return Err(Fault::NoPage(accepted));
            }
            let (needed, room) = ((end - accepted).div_ceil(LARGE_PAGE), blocks.len() as u64);
            if needed > room {
                return Err(Fault::Blocks { needed, room });
            }
        }
        Ok(Self { blocks, accepted, memory })
    }

    /// Whether all of `range` is memory.
    fn has(&self, range: GpaRange) -> bool {
        let (mut at, end) = (range.start().0, range.end().0);
        // Each round finds the range that goes on where the last one ended.
        for _ in 0..MAX_RANGES {
            let around = |memory: &&MemoryRange| memory.start <= at && at < memory.start.saturating_add(memory.len);
            match self.memory.iter().find(around) {
                Some(memory) => at = memory.start.saturating_add(memory.len),
                None => return false,
            }
            if at >= end {
                return true;
            }
        }
        false
    }

    /// Makes the private pages of `range` valid that are not yet.
    ///
    /// # Errors
    /// [`Fault::NoPage`] when it is not all memory; [`Fault::Validation`], after which the guest has to end.
    pub(super) fn accept(&self, range: GpaRange, validate: &impl Validate) -> Result<(), Fault> {
        self.visit(range, None, validate)
    }

    /// Makes all pages of `range` invalid, so that they can be given away.
    ///
    /// # Errors
    /// As [`Acceptance::accept`].
    pub(super) fn give(&self, range: GpaRange, validate: &impl Validate) -> Result<(), Fault> {
        self.visit(range, Some(range), validate)
    }

    /// Takes the blocks of `range`, but for the pages that are `given` away.
    fn visit(&self, range: GpaRange, given: Option<GpaRange>, validate: &impl Validate) -> Result<(), Fault> {
        if !self.has(range) {
            return Err(Fault::NoPage(range.start().0));
        }
        let end = range.end().0;
        let mut at = range.start().0;
        if at < self.accepted {
            let valid = part(at, end.min(self.accepted));
            if let (Some(valid), true) = (valid, given.is_some()) {
                set_valid(validate, valid, false)?;
            }
            at = end.min(self.accepted);
        }
        while at < end {
            let index = (at - self.accepted) / LARGE_PAGE;
            let start = self.accepted + index * LARGE_PAGE;
            let next = end.min(start.saturating_add(LARGE_PAGE));
            let block = usize::try_from(index).ok().and_then(|index| self.blocks.get(index));
            let block = block.ok_or(Fault::Blocks { needed: index + 1, room: self.blocks.len() as u64 })?;
            if block.is_mine() {
                self.take(start, given, validate)?;
                block.taken();
            } else if let (Some(valid), true) = (part(at, next), given.is_some()) {
                set_valid(validate, valid, false)?;
            }
            at = next;
        }
        Ok(())
    }

    /// Makes the memory of a block valid that is not `given` away.
    fn take(&self, start: u64, given: Option<GpaRange>, validate: &impl Validate) -> Result<(), Fault> {
        let (from, until) = given.map_or((0, 0), |given| (given.start().0, given.end().0));
        for memory in &self.memory {
            let (low, high) =
                (start.max(memory.start), (start + LARGE_PAGE).min(memory.start.saturating_add(memory.len)));
            let sides =
                if from < until { [(low, high.min(from)), (low.max(until), high)] } else { [(low, high), (0, 0)] };
            for (low, high) in sides {
                if let Some(range) = part(low, high) {
                    set_valid(validate, range, true)?;
                }
            }
        }
        Ok(())
    }
}

/// The pages from `start` to `end`, if there are any.
fn part(start: u64, end: u64) -> Option<GpaRange> {
    if start < end { GpaRange::from_pages(start, (end - start) / PAGE_SIZE).ok() } else { None }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::fake::Pages;
    use super::super::{PageSize, Validated};
    use super::*;
    use proptest::prelude::*;
    use zerocopy::FromZeros;

    const BLOCK_PAGES: u64 = LARGE_PAGE / PAGE_SIZE;

    fn boot(accepted: u64, memory: &[(u64, u64)]) -> BootPage {
        let mut boot = BootPage { accepted, ..BootPage::new_zeroed() };
        for (entry, (start, len)) in boot.memory.iter_mut().zip(memory) {
            *entry = MemoryRange { start: start * PAGE_SIZE, len: len * PAGE_SIZE };
        }
        boot
    }

    fn records(count: usize) -> Vec<BlockRecord> {
        (0..count).map(|_| BlockRecord::new()).collect()
    }

    fn pages(start: u64, count: u64) -> GpaRange {
        GpaRange::from_pages(start * PAGE_SIZE, count).unwrap()
    }

    #[test]
    fn too_few_records_are_refused_before_any_page_is_touched() {
        let boot = boot(LARGE_PAGE, &[(0, 4 * BLOCK_PAGES + 1)]);
        let error = Fault::Blocks { needed: 4, room: 3 };
        assert_eq!(Acceptance::new(&boot, Protection::SevSnp, &records(3)).unwrap_err(), error);
        assert!(Acceptance::new(&boot, Protection::SevSnp, &records(4)).is_ok());
        assert!(Acceptance::new(&boot, Protection::SevEs, &[]).is_ok());
        let within = BootPage { accepted: PAGE_SIZE, ..boot };
        let blocks = records(9);
        assert_eq!(Acceptance::new(&within, Protection::SevSnp, &blocks).unwrap_err(), Fault::NoPage(PAGE_SIZE));
    }

    #[test]
    fn what_is_no_memory_is_not_accepted() {
        let (boot, blocks, fake) =
            (boot(LARGE_PAGE, &[(0, 1024), (1024, 512), (2048, 10)]), records(8), Pages::default());
        let acceptance = Acceptance::new(&boot, Protection::SevSnp, &blocks).unwrap();
        for bad in [pages(1536, 1), pages(1535, 2), pages(2057, 2), pages(1 << 30, 1)] {
            assert_eq!(acceptance.accept(bad, &fake), Err(Fault::NoPage(bad.start().0)));
            assert_eq!(acceptance.give(bad, &fake), Err(Fault::NoPage(bad.start().0)));
        }
        assert!(fake.valid().is_empty());
        acceptance.accept(pages(1000, 100), &fake).unwrap();
        acceptance.accept(pages(2050, 1), &fake).unwrap();
        let expected: Vec<u64> = (512..1536).chain(2048..2058).collect();
        assert_eq!(fake.valid(), expected);
    }

    #[test]
    fn vcpus_that_need_the_same_block_at_once_accept_it_once() {
        struct Slow<'a>(&'a std::sync::Mutex<Vec<u64>>);
        impl Validate for Slow<'_> {
            fn validate(&self, gpa: u64, _size: PageSize, valid: bool) -> Validated {
                assert!(valid);
                std::thread::yield_now();
                self.0.lock().unwrap().push(gpa);
                Validated::Changed
            }

            fn make_state(&self, _gpa: u64) -> Validated {
                unreachable!()
            }
        }
        let (boot, blocks) = (boot(0, &[(0, 8 * BLOCK_PAGES)]), records(8));
        let acceptance = Acceptance::new(&boot, Protection::SevSnp, &blocks).unwrap();
        let accepted = std::sync::Mutex::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for block in 0..8 {
                        acceptance.accept(pages(block * BLOCK_PAGES + 7, 1), &Slow(&accepted)).unwrap();
                        // Whoever waited finds it done.
                        assert!(accepted.lock().unwrap().contains(&(block * LARGE_PAGE)));
                    }
                });
            }
        });
        let mut accepted = accepted.into_inner().unwrap();
        accepted.sort_unstable();
        assert_eq!(accepted, (0..8).map(|block| block * LARGE_PAGE).collect::<Vec<_>>());
    }

    proptest! {
        /// A plain model: a page is valid if it was loaded, or its block was used and it is not away.
        #[test]
        fn pages_are_valid_when_they_are_used_and_not_while_they_are_away(
            loaded in 0u64..3, gap in 0u64..700, steps in prop::collection::vec((0u64..3000, 1u64..1100, any::<bool>()), 1..12),
        ) {
            // The second range of memory begins and ends within blocks.
            let memory = [(0, 1500), (1500 + gap, 900)];
            let (boot, blocks, fake) = (boot(loaded * LARGE_PAGE, &memory), records(8), Pages::default());
            let acceptance = Acceptance::new(&boot, Protection::SevSnp, &blocks).unwrap();
            let is_memory = |page: u64| memory.iter().any(|(start, len)| (*start..start + len).contains(&page));
            (0..loaded * BLOCK_PAGES).filter(|page| is_memory(*page)).for_each(|page| fake.set(page));
            let mut away = std::collections::BTreeSet::new();
            for (start, count, give) in steps {
                let all = (start..start + count).all(is_memory);
                let none_away = (start..start + count).all(|page| !away.contains(&page));
                if give && none_away {
                    let given = acceptance.give(pages(start, count), &fake);
                    prop_assert_eq!(given.is_ok(), all);
                    if all {
                        away.extend(start..start + count);
                    }
                } else if !give {
                    prop_assert_eq!(acceptance.accept(pages(start, count), &fake).is_ok(), all);
                    if all {
                        let valid = fake.valid();
                        prop_assert!((start..start + count).all(|page| away.contains(&page) != valid.contains(&page)));
                    }
                }
                prop_assert!(fake.valid().iter().all(|page| is_memory(*page) && !away.contains(page)));
            }
            for page in away {
                set_valid(&fake, pages(page, 1), true).unwrap();
            }
        }
    }
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;

    #[test]
    fn a_block_is_taken_once_and_who_did_not_take_it_sees_what_was_done() {
        loom::model(|| {
            let shared = Arc::new((BlockRecord::new(), AtomicUsize::new(0)));
            let work = |shared: &(BlockRecord, AtomicUsize)| {
                let (block, done) = shared;
                if block.is_mine() {
                    done.fetch_add(1, Ordering::Relaxed);
                    block.taken();
                }
                assert_eq!(done.load(Ordering::Relaxed), 1);
            };
            let other = loom::thread::spawn({
                let shared = Arc::clone(&shared);
                move || work(&shared)
            });
            work(&shared);
            other.join().unwrap();
        });
    }
}
