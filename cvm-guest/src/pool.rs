//! Bounce buffers.

use crate::{Error, SharedRegion};
use core::ptr::NonNull;
use cvm_core::Gpa;
use spin::Mutex;

/// The unit of allocation, in bytes: a buffer takes a run of these.
pub const GRANULE: usize = 256;

const BITS: usize = u64::BITS as usize;

/// A shared region cut into buffers. Its bookkeeping is private: nothing that the host writes can confuse it.
#[derive(Debug)]
pub struct Pool {
    region: SharedRegion,
    taken: Mutex<Taken>,
}

/// One bit for each granule, set while it is in use or beyond the end of the region.
#[derive(Debug)]
struct Taken {
    words: &'static mut [u64],
    /// Where the next search begins.
    next: usize,
}

impl Taken {
    fn bits(&self) -> usize {
        self.words.len() * BITS
    }

    /// The first granule from `from` on whose bit is `set`, or the number of bits.
    fn find(&self, from: usize, set: bool) -> usize {
        let mut word = from / BITS;
        let mut skip = from % BITS;
        while let Some(bits) = self.words.get(word) {
            let wanted = (if set { *bits } else { !*bits }) >> skip << skip;
            if wanted != 0 {
                return word * BITS + wanted.trailing_zeros() as usize;
            }
            (word, skip) = (word + 1, 0);
        }
        self.bits()
    }

    /// The first free run of `count` granules from `from` on that begins at a multiple of `align` granules.
    fn find_run(&self, from: usize, count: usize, align: usize) -> Option<usize> {
        let mut at = from;
        loop {
            at = self.find(at, false).next_multiple_of(align);
            if at.checked_add(count)? > self.bits() {
                return None;
            }
            // Rounding up may have led behind the free run that was found, onto a granule in use.
            let end = self.find(at, true);
            if end - at >= count {
                return Some(at);
            }
            at = end;
        }
    }

    fn set(&mut self, first: usize, count: usize, on: bool) {
        for bit in first..first + count {
            let mask = 1 << (bit % BITS);
            if on {
                self.words[bit / BITS] |= mask;
            } else {
                self.words[bit / BITS] &= !mask;
            }
        }
    }
}

/// How many granules `len` bytes take; an empty buffer takes one, so that it has an address of its own.
fn granules(len: usize) -> usize {
    len.div_ceil(GRANULE).max(1)
}

impl Pool {
    /// A pool of the whole of `region`, with its bookkeeping in `words`: a bit for each [`GRANULE`]. A guest keeps them in a static.
    ///
    /// # Errors
    /// [`Error::PoolSize`] if `words` has too few bits. The region is dropped then, and stays shared.
    pub fn new(region: SharedRegion, words: &'static mut [u64]) -> Result<Self, Error> {
        let (bytes, capacity) = (region.len(), words.len() * BITS * GRANULE);
        if bytes > capacity {
            return Err(Error::PoolSize { bytes, capacity });
        }
        words.fill(0);
        let mut taken = Taken { words, next: 0 };
        let granules = bytes / GRANULE;
        taken.set(granules, taken.bits() - granules, true);
        Ok(Self { region, taken: Mutex::new(taken) })
    }

    /// The memory that the buffers are in.
    pub fn region(&self) -> &SharedRegion {
        &self.region
    }

    /// Takes a run for `len` bytes that begins at a multiple of `align` bytes, a power of two; returns its offset.
    pub(crate) fn allocate(&self, len: usize, align: usize) -> Result<usize, Error> {
        let (count, align) = (granules(len), align.div_ceil(GRANULE).max(1));
        let mut taken = self.taken.lock();
        let from = taken.next;
        let run = taken.find_run(from, count, align).or_else(|| taken.find_run(0, count, align));
        let first = run.ok_or(Error::Exhausted { len })?;
        taken.set(first, count, true);
        taken.next = first + count;
        Ok(first * GRANULE)
    }

    /// Gives the run back that [`Pool::allocate`] returned for `len` bytes.
    pub(crate) fn release(&self, offset: usize, len: usize) {
        let (first, count) = (offset / GRANULE, granules(len));
        let mut taken = self.taken.lock();
        if first + count <= taken.bits() {
            taken.set(first, count, false);
        }
    }

    /// The offset of an address in the pool.
    #[cfg(feature = "virtio")]
    pub(crate) fn offset(&self, gpa: Gpa) -> Option<usize> {
        self.region.range().contains(gpa).then(|| (gpa.0 - self.region.range().start().0) as usize)
    }

    /// A pointer to a run, for code that keeps the rules of shared memory itself.
    #[cfg_attr(not(feature = "virtio"), allow(dead_code, reason = "only drivers need it"))]
    pub(crate) fn pointer(&self, offset: usize) -> NonNull<u8> {
        self.region.pointer(offset)
    }

    /// How many bytes are free, in whatever pieces.
    pub fn free(&self) -> usize {
        let taken = self.taken.lock();
        taken.words.iter().map(|bits| bits.count_zeros() as usize).sum::<usize>() * GRANULE
    }

    /// A buffer with a copy of `data`, for a device to read.
    ///
    /// # Errors
    /// [`Error::Exhausted`].
    pub fn to_device(&self, data: &[u8]) -> Result<ToDevice<'_>, Error> {
        let buffer = Buffer::new(self, data.len())?;
        self.region.write(buffer.offset, data)?;
        Ok(ToDevice(buffer))
    }

    /// A buffer of `len` bytes for a device to write.
    ///
    /// # Errors
    /// [`Error::Exhausted`].
    pub fn from_device(&self, len: usize) -> Result<FromDevice<'_>, Error> {
        Ok(FromDevice(Buffer::new(self, len)?))
    }
}

/// A run of a pool, given back on drop.
#[derive(Debug)]
struct Buffer<'p> {
    pool: &'p Pool,
    offset: usize,
    len: usize,
}

impl<'p> Buffer<'p> {
    fn new(pool: &'p Pool, len: usize) -> Result<Self, Error> {
        let offset = pool.allocate(len, GRANULE)?;
        Ok(Self { pool, offset, len })
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        self.pool.release(self.offset, self.len);
    }
}

/// Data on its way to a device. Dropping it gives the buffer back, so keep it until the device is done.
#[derive(Debug)]
pub struct ToDevice<'p>(Buffer<'p>);

impl ToDevice<'_> {
    /// Where the device finds it.
    pub fn gpa(&self) -> Gpa {
        self.0.pool.region.gpa(self.0.offset)
    }

    /// How many bytes there are.
    #[allow(clippy::len_without_is_empty, reason = "it is the length for a descriptor")]
    pub fn len(&self) -> usize {
        self.0.len
    }
}

/// Room for data from a device. Dropping it gives the buffer back, so keep it until the device is done.
#[derive(Debug)]
pub struct FromDevice<'p>(Buffer<'p>);

impl FromDevice<'_> {
    /// Where the device is to write.
    pub fn gpa(&self) -> Gpa {
        self.0.pool.region.gpa(self.0.offset)
    }

    /// How many bytes it may write.
    #[allow(clippy::len_without_is_empty, reason = "it is the length for a descriptor")]
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Copies the first `data.len()` bytes out. How many the device says it has written is its word only.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`] if that is more than the buffer has.
    pub fn read(&self, data: &mut [u8]) -> Result<(), Error> {
        if data.len() > self.0.len {
            return Err(Error::OutOfBounds { offset: 0, len: data.len(), limit: self.0.len });
        }
        self.0.pool.region.read(self.0.offset, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::tests::region;
    use proptest::prelude::*;

    fn words(count: usize) -> &'static mut [u64] {
        vec![0; count].leak()
    }

    #[test]
    fn a_buffer_carries_its_bytes_and_is_given_back() {
        let pool = Pool::new(region(4), words(1)).unwrap();
        let all = pool.free();
        let out = pool.to_device(b"to the device").unwrap();
        assert_eq!(out.len(), 13);
        let mut seen = [0; 13];
        pool.region().read((out.gpa().0 - pool.region().range().start().0) as usize, &mut seen).unwrap();
        assert_eq!(&seen, b"to the device");

        let back = pool.from_device(300).unwrap();
        pool.region().write((back.gpa().0 - pool.region().range().start().0) as usize, &[7; 300]).unwrap();
        let mut data = [0; 200];
        back.read(&mut data).unwrap();
        assert_eq!(data, [7; 200]);
        assert_eq!(pool.free(), all - 3 * GRANULE);
        drop((out, back));
        assert_eq!(pool.free(), all);
    }

    #[test]
    fn a_device_that_claims_more_than_the_buffer_has_gets_an_error() {
        let pool = Pool::new(region(1), words(1)).unwrap();
        let buffer = pool.from_device(100).unwrap();
        let error = Error::OutOfBounds { offset: 0, len: 101, limit: 100 };
        assert_eq!(buffer.read(&mut [0; 101]).unwrap_err(), error);
    }

    #[test]
    fn an_exhausted_pool_says_so_and_recovers() {
        let pool = Pool::new(region(2), words(1)).unwrap();
        let buffers: Vec<_> = (0..32).map(|_| pool.from_device(GRANULE).unwrap()).collect();
        assert_eq!(pool.from_device(1).unwrap_err(), Error::Exhausted { len: 1 });
        assert_eq!(pool.from_device(usize::MAX).unwrap_err(), Error::Exhausted { len: usize::MAX });
        drop(buffers);
        assert!(pool.from_device(32 * GRANULE).is_ok());
    }

    #[test]
    fn a_pool_without_enough_bookkeeping_is_refused() {
        let error = Pool::new(region(5), words(1)).unwrap_err();
        assert_eq!(error, Error::PoolSize { bytes: 5 * 4096, capacity: 64 * GRANULE });
    }

    proptest! {
        #[test]
        fn live_runs_never_overlap_and_nothing_is_lost(
            steps in prop::collection::vec((any::<bool>(), 0usize..6000, 0u32..5, any::<prop::sample::Index>()), 0..200),
        ) {
            // 11 pages: the bookkeeping has room for 12.
            let pool = Pool::new(region(11), words(3)).unwrap();
            let mut live: Vec<(usize, usize)> = Vec::new();
            for (take, len, align, which) in steps {
                let align = GRANULE << align;
                if take {
                    if let Ok(offset) = pool.allocate(len, align) {
                        prop_assert_eq!(offset % align, 0);
                        prop_assert!(offset + granules(len) * GRANULE <= pool.region().len());
                        for (other, other_len) in &live {
                            let apart = offset + granules(len) * GRANULE <= *other
                                || other + granules(*other_len) * GRANULE <= offset;
                            prop_assert!(apart, "{offset:#x}+{len:#x} and {other:#x}+{other_len:#x}");
                        }
                        live.push((offset, len));
                    }
                } else if !live.is_empty() {
                    let (offset, len) = live.swap_remove(which.index(live.len()));
                    pool.release(offset, len);
                }
                let taken: usize = live.iter().map(|(_, len)| granules(*len) * GRANULE).sum();
                prop_assert_eq!(pool.free(), pool.region().len() - taken);
            }
        }
    }
}
