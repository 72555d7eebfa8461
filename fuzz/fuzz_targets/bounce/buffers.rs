//! What becomes of buffers: made, given back, received, lent and read.

use super::memory::NEAR;
use super::{CHUNK_LEN, Handle, LONGEST, Live, MOST_MASK, Program, RECORDS};
use cvm_guest::{Error, Lent, Placement, Refusal};
use libfuzzer_sys::arbitrary::Result;
use std::hint::black_box;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

fn out_of_bounds<T>(result: core::result::Result<T, Error>) -> bool {
    matches!(result, Err(Error::OutOfBounds { .. }))
}

/// Whether so many bytes are there, and whether an error says that they are not.
fn valid(len: usize, unread: &Range<usize>) -> (bool, bool) {
    (len <= unread.len(), len > unread.len())
}

impl<'p> Program<'p, '_> {
    pub fn map(&mut self) -> Result<()> {
        let (pool, queue, kind) = (self.pool, self.queue()?, self.given.int_in_range(0u8..=5)?);
        let (mut len, at_end) = (self.len()?, self.given.arbitrary()?);
        let bits = if self.given.ratio(1, 3)? { self.given.int_in_range(0u32..=20)? } else { 0 };
        let (mask, low) = ((1usize << bits) - 1, if bits == 0 { 0 } else { self.given.arbitrary::<usize>()? });
        let placement = Placement::offset(mask, low);
        let mut parts: Vec<&[u8]> = vec![];
        let made = match kind {
            0..=1 => {
                parts.push(self.private.source(queue, len, at_end));
                self.queues[queue].to_device_at(parts[0], placement).map(Handle::Out)
            }
            2 if bits == 0 => {
                let most = len;
                len = 0;
                for number in 0..self.given.int_in_range(0..=5)? {
                    let part = self.given.int_in_range(0..=most - len)?;
                    parts.push(self.private.source(number, part, number % 2 == 0));
                    len += part;
                }
                self.queues[queue].gather(&parts).map(Handle::Out)
            }
            _ => {
                len = if self.given.ratio(1, 30)? { usize::MAX - self.given.int_in_range(0..=CHUNK_LEN)? } else { len };
                self.queues[queue].from_device_at(len, placement).map(Handle::In)
            }
        };
        let handle = match made {
            Ok(handle) => handle,
            Err(refusal) => {
                let least = len.saturating_add(low & mask).max(mask + 1) as u64;
                match refusal {
                    Refusal::Impossible => assert!(
                        mask >= MOST_MASK || least > self.options[queue].limit.min((RECORDS * CHUNK_LEN) as u64),
                        "{len:#x} bytes at {mask:#x}"
                    ),
                    Refusal::Limited => assert!(self.options[queue].limit < u64::MAX),
                    Refusal::Exhausted => {}
                }
                return Ok(());
            }
        };
        let (gpa, known) = match &handle {
            Handle::Out(buffer) => (pool.gpa(buffer), pool.len(buffer)),
            Handle::In(buffer) => (pool.gpa(buffer), pool.len(buffer)),
            Handle::Lent(_) => unreachable!("nothing was lent"),
        };
        assert_eq!((gpa.0 as usize & mask, known), (low & mask, len));
        let place = self.place(gpa.0, len);
        self.take(&place);
        match &handle {
            Handle::Out(_) => self.sent(&place, &parts),
            _ => self.look_around(&place),
        }
        self.live.push(Live { queue, handle, unread: place.clone(), place });
        Ok(())
    }

    /// Gives a buffer back in one of all ways.
    pub fn release(&mut self, buffer: Live<'p>) -> Result<()> {
        let how = self.given.int_in_range(0u8..=4)?;
        let queue = if how == 0 { 1 - buffer.queue } else { buffer.queue };
        match (buffer.handle, how) {
            (Handle::Out(buffer), 1) => self.pool.release(buffer),
            (Handle::Out(buffer), _) => self.queues[queue].release(buffer),
            (Handle::In(buffer), 1) => self.pool.release(buffer),
            (Handle::In(buffer), _) => self.queues[queue].release(buffer),
            (Handle::Lent(buffer), 1) => self.pool.release(buffer),
            (Handle::Lent(buffer), 2) => drop(buffer),
            (Handle::Lent(buffer), _) => self.queues[queue].release(buffer),
        }
        self.give(&buffer.place);
        Ok(())
    }

    pub fn receive(&mut self) -> Result<()> {
        let Some(Live { queue, handle, place, unread }) = self.pick()? else {
            return Ok(());
        };
        let Handle::In(buffer) = handle else {
            return self.release(Live { queue, handle, place, unread });
        };
        NEAR.store(place.start, Relaxed);
        let used = self.used(place.len())?;
        // The private buffer may be shorter than what the device has written.
        let room = match self.given.int_in_range(0u8..=3)? {
            0 => self.given.int_in_range(0..=place.len())?,
            _ => used.min(place.len()) + self.given.int_in_range(0..=100usize)?,
        };
        let by = if self.given.ratio(1, 4)? { 1 - queue } else { queue };
        let fits = used <= place.len() && used <= room;
        let (at_end, queue) = (self.given.arbitrary()?, &mut self.queues[by]);
        let received = self.private.receive(room.min(LONGEST), at_end, |data| {
            let received = queue.receive(buffer, used, data);
            assert_eq!((received.is_ok(), out_of_bounds(received)), (fits, !fits));
            if fits { used } else { 0 }
        });
        if let Some(expected) = &self.expected {
            assert!(received == expected[place.start..][..received.len()]);
        }
        self.give(&place);
        Ok(())
    }

    pub fn lend(&mut self) -> Result<()> {
        let Some(Live { queue, handle, place, unread }) = self.pick()? else {
            return Ok(());
        };
        let Handle::In(buffer) = handle else {
            self.live.push(Live { queue, handle, place, unread });
            return self.read_lent();
        };
        let used = self.used(place.len())?;
        let lent = self.queues[queue].lend(buffer, used);
        match lent {
            Ok(lent) => {
                assert_eq!((lent.remaining(), self.pool.len(&lent)), (used, place.len()));
                assert!(used <= place.len());
                let unread = place.start..place.start + used;
                self.live.push(Live { queue, handle: Handle::Lent(lent), place, unread });
                self.read_lent()
            }
            Err(error) => {
                assert_eq!(error, Error::OutOfBounds { offset: 0, len: used, limit: place.len() });
                assert!(used > place.len());
                self.give(&place);
                Ok(())
            }
        }
    }

    /// Reads some of what was lent last, if that was the last thing that happened.
    fn read_lent(&mut self) -> Result<()> {
        let Some(mut live) = self.live.pop() else {
            return Ok(());
        };
        if let Handle::Lent(lent) = &mut live.handle {
            NEAR.store(live.unread.start, Relaxed);
            for _ in 0..self.given.int_in_range(0..=4)? {
                match self.given.int_in_range(0u8..=4)? {
                    0 => {
                        let len = self.used(live.unread.len())?;
                        let skipped = lent.skip(len);
                        assert_eq!((skipped.is_ok(), out_of_bounds(skipped)), valid(len, &live.unread));
                        if skipped.is_ok() {
                            live.unread.start += len;
                        }
                    }
                    1 => self.read_value::<1>(lent, &mut live.unread)?,
                    2 => self.read_value::<12>(lent, &mut live.unread)?,
                    3 => self.read_value::<64>(lent, &mut live.unread)?,
                    _ => {
                        let len = self.used(live.unread.len())?;
                        self.read(lent, &mut live.unread, len)?;
                    }
                }
                assert_eq!(lent.remaining(), live.unread.len());
            }
        }
        self.live.push(live);
        Ok(())
    }

    fn read(&mut self, lent: &mut Lent<'p>, unread: &mut Range<usize>, len: usize) -> Result<()> {
        // There is no more private memory than that.
        let len = len.min(LONGEST);
        let at_end = self.given.arbitrary()?;
        let read = self.private.receive(len, at_end, |data| {
            let read = lent.read(data);
            assert_eq!((read.is_ok(), out_of_bounds(read)), valid(len, unread));
            if read.is_ok() { len } else { 0 }
        });
        if let Some(expected) = &self.expected {
            assert!(read == expected[unread.start..][..read.len()]);
        }
        unread.start += read.len();
        Ok(())
    }

    /// Reads a header, which the host changes at once; and then as much as the header says.
    fn read_value<const N: usize>(&mut self, lent: &mut Lent<'p>, unread: &mut Range<usize>) -> Result<()> {
        let value = lent.read_value::<[u8; N]>();
        assert_eq!((value.is_ok(), out_of_bounds(value)), valid(N, unread));
        let Ok(value) = value else { return Ok(()) };
        let kept = black_box(value);
        if let Some(expected) = &self.expected {
            assert_eq!(value, expected[unread.start..][..N]);
        }
        self.host_writes(unread.start, &kept.map(|byte| !byte));
        assert_eq!(black_box(&value), &kept, "the guest's own copy has changed");
        unread.start += N;
        if let Some(claimed) = value.first_chunk().copied().map(u32::from_ne_bytes) {
            self.read(lent, unread, claimed as usize % 10_000)?;
        }
        Ok(())
    }
}
