//! Chunks: what a pool grows and shrinks by.

use super::Pool;
use super::block::{BLOCK_LEN, Block};
use crate::{Error, Machine, Platform, SharedRegion};
use core::ptr::NonNull;
use cvm_core::{GpaRange, PAGE_SIZE};

/// How many bytes a pool grows and shrinks by, and is aligned to: the largest page that a host is likely to map.
pub const CHUNK_LEN: usize = BLOCKS * BLOCK_LEN;

/// How many blocks a chunk has.
pub(super) const BLOCKS: usize = 8;

/// The bookkeeping of a chunk, 2 KiB in private memory: a guest keeps as many in a static as its pool may have chunks.
#[derive(Debug)]
#[repr(transparent)]
pub struct ChunkRecord {
    blocks: [Block; BLOCKS],
}

impl ChunkRecord {
    /// The record of no chunk.
    #[cfg(not(loom))]
    #[allow(clippy::new_without_default, reason = "it is for statics")]
    pub const fn new() -> Self {
        Self { blocks: [const { Block::new() }; _] }
    }

    /// The record of no chunk.
    #[cfg(loom)]
    #[allow(clippy::new_without_default, reason = "as above")]
    pub fn new() -> Self {
        Self { blocks: core::array::from_fn(|_| Block::new()) }
    }

    /// The blocks of records that follow each other.
    pub(super) const fn blocks(records: &[Self]) -> &[Block] {
        // SAFETY: a record is nothing but its blocks, and they follow each other as the records do.
        unsafe { core::slice::from_raw_parts(records.as_ptr().cast(), records.len() * BLOCKS) }
    }
}

/// The blocks of a chunk.
type Chunk = [Block; BLOCKS];

impl Pool {
    fn records(&self) -> &'static [Chunk] {
        self.blocks.as_chunks().0
    }

    /// Puts memory behind a chunk that was claimed.
    fn settle(&self, number: usize, region: &SharedRegion) {
        for (index, block) in self.records()[number].iter().enumerate() {
            let at = index * BLOCK_LEN;
            block.put(region.pointer(at).as_ptr(), region.gpa(at).0);
        }
        self.unclaim_some(number, BLOCKS);
    }

    /// Lets go of the first blocks of a chunk that were claimed; the first one last, because who finds that one idle may
    /// take the whole chunk away.
    fn unclaim_some(&self, number: usize, count: usize) {
        (0..count).rev().for_each(|index| self.unclaim(number * BLOCKS + index));
    }

    /// Claims all of a chunk, if nobody has anything of it.
    fn claim_chunk(&self, number: usize) -> bool {
        let claimed = self.records()[number].iter().take_while(|block| block.claim()).count();
        if claimed < BLOCKS {
            self.unclaim_some(number, claimed);
        }
        claimed == BLOCKS
    }

    /// Makes room for a chunk: the number and the record that it will have.
    fn claim_record(&self) -> Result<(usize, &Chunk), Error> {
        let record = self.records().iter().enumerate().find(|(_, chunk)| chunk[0].claim_absent());
        // Whoever takes a chunk away makes its first block absent last, so the others are so too.
        record.ok_or(Error::PoolFull).inspect(|(_, chunk)| {
            for block in &chunk[1..] {
                let absent = block.claim_absent();
                debug_assert!(absent);
            }
        })
    }

    fn check(range: &GpaRange) -> Result<(), Error> {
        let fits = range.len() == CHUNK_LEN as u64 && range.start().0.is_multiple_of(CHUNK_LEN as u64);
        if fits { Ok(()) } else { Err(Error::NotAChunk(*range)) }
    }

    /// Adds a chunk of memory that is shared already.
    ///
    /// # Errors
    /// [`Error::NotAChunk`] if it is not [`CHUNK_LEN`] long or its guest physical address is not a multiple of that,
    /// [`Error::PoolFull`] if there is no record for it. The region is dropped then, and stays shared.
    pub fn add(&self, region: SharedRegion) -> Result<(), Error> {
        Self::check(&region.range())?;
        self.settle(self.claim_record()?.0, &region);
        self.wake();
        Ok(())
    }

    /// Shares a chunk and adds it. Not for the path of an I/O: the host takes its time for a conversion.
    ///
    /// # Safety
    /// As for [`Platform::share`], until [`Pool::shrink`] has returned the range.
    ///
    /// # Errors
    /// As for [`Pool::add`], before anything was shared, and for [`Platform::share`].
    pub unsafe fn grow<M: Machine>(&self, platform: &Platform<M>, range: GpaRange) -> Result<(), Error> {
        Self::check(&range)?;
        let (number, chunk) = self.claim_record()?;
        // SAFETY: passed on to the caller.
        match unsafe { platform.share(range) } {
            Ok(region) => self.settle(number, &region),
            Err(error) => {
                chunk.iter().rev().for_each(Block::vacate);
                return Err(error);
            }
        }
        self.wake();
        Ok(())
    }

    /// Takes a chunk out of which nobody has anything, if there is one, the last first, and makes it private. Queues
    /// that have free slots at hand give them back by [`Queue::trim`](super::Queue::trim).
    ///
    /// # Safety
    /// No buffer of another pool may have been given to this one or one of its queues: it might have freed what is
    /// still in use.
    ///
    /// # Errors
    /// As for [`Platform::unshare`]. The chunk is lost to the guest then.
    pub unsafe fn shrink<M: Machine>(&self, platform: &Platform<M>) -> Result<Option<GpaRange>, Error> {
        let records = self.records();
        let Some(number) = (0..records.len()).rev().find(|number| self.claim_chunk(*number)) else { return Ok(None) };
        let chunk = &records[number];
        let (base, gpa) = (chunk[0].base(), chunk[0].gpa());
        // In reverse, since `claim_record` begins with the first one.
        chunk.iter().rev().for_each(Block::vacate);
        let range = GpaRange::from_pages(gpa, CHUNK_LEN as u64 / PAGE_SIZE).ok();
        let (Some(base), Some(range)) = (NonNull::new(base), range) else { return Ok(None) };
        // SAFETY: the chunk was added as a region of this length, and nobody has anything of it any more.
        let region = unsafe { SharedRegion::mapped_at(base, range) };
        platform.unshare(region).map(Some)
    }

    /// How many chunks there are.
    pub fn chunks(&self) -> usize {
        self.records().iter().filter(|chunk| chunk[0].is_present()).count()
    }
}
