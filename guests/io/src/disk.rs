//! The disk, with several requests in flight.

#![allow(unsafe_code, reason = "the driver is lent buffers, which it must be given again when the device is done")]

use crate::guest::{Arena, Clock, Control, Transport, wait};
use crate::hal::{DiskDevice, GuestHal};
use io_guest::*;
use virtio_drivers::device::blk::{BlkReq, BlkResp, VirtIOBlk};

/// A request and its buffers. In a page of their own, so that all can be shared.
struct Slot {
    request: &'static mut BlkReq,
    response: &'static mut BlkResp,
    read: &'static mut [u8],
    write: &'static mut [u8],
    /// How much of `write` is filled already.
    filled: usize,
    /// What it is used for: the driver's token, and the I/O's index.
    flight: Option<(u16, u32)>,
}

impl Slot {
    fn new(arena: &mut Arena) -> Option<Self> {
        let (request, rest) = arena.take(size_of::<BlkReq>() + size_of::<BlkResp>())?.split_at_mut(size_of::<BlkReq>());
        let (request, response) = (request.as_mut_ptr().cast::<BlkReq>(), rest.as_mut_ptr().cast::<BlkResp>());
        // SAFETY: the memory is this slot's alone and a page begins with it, so a request is aligned; an answer is one
        // byte. Both are written before they are referred to.
        let (request, response) = unsafe {
            request.write(BlkReq::default());
            response.write(BlkResp::default());
            (&mut *request, &mut *response)
        };
        let (read, write) = (arena.take(MAX_REQUEST)?, arena.take(MAX_REQUEST)?);
        Some(Self { request, response, read, write, filled: 0, flight: None })
    }

    /// Makes the first `len` bytes to write what they should be, but for the stamp.
    fn fill(&mut self, len: usize, nonce: u64) {
        let words = self.write[..len].as_chunks_mut::<8>().0;
        for (index, place) in words.iter_mut().enumerate().skip(self.filled / 8) {
            *place = word(nonce, index).to_le_bytes();
        }
        self.filled = self.filled.max(len);
    }
}

/// The disk.
pub struct Disk<'a> {
    driver: VirtIOBlk<GuestHal<DiskDevice>, Transport<'a>>,
    slots: [Slot; DISK_DEPTH],
    nonce: u64,
    /// A device that has failed is not used any more.
    failed: bool,
}

impl<'a> Disk<'a> {
    /// The disk behind `transport`.
    pub fn new(transport: Transport<'a>, arena: &mut Arena, nonce: u64) -> Option<Self> {
        let driver = VirtIOBlk::new(transport).ok()?;
        if driver.capacity() != (DISK_LEN / SECTOR) as u64 {
            return None;
        }
        let mut slots = [const { None }; DISK_DEPTH];
        for slot in &mut slots {
            *slot = Some(Slot::new(arena)?);
        }
        let [Some(a), Some(b), Some(c), Some(d), Some(e)] = slots else { return None };
        Some(Self { driver, slots: [a, b, c, d, e], nonce, failed: false })
    }

    /// Does what `case` says.
    pub fn run(&mut self, case: &Case, control: &Control<'_>, report: &mut Report) -> Result<(), u64> {
        let size = case.size as usize;
        if self.failed || case.count == 0 || size == 0 || size > MAX_REQUEST || !WRITTEN.is_multiple_of(size) {
            return Err(failure::CASE);
        }
        if case.operation.is_write() {
            self.slots.iter_mut().take(case.count as usize).for_each(|slot| slot.fill(size, self.nonce));
        }
        let clock = Clock::start(control);
        let done = self.carry_out(case, report);
        clock.stop(report);
        self.failed = done.is_err();
        let last = done?;
        if !case.operation.is_write() {
            report.compared += self.compare(last, case)?;
        }
        Ok(())
    }

    /// All I/Os of a case. Returns the slot of the last one.
    fn carry_out(&mut self, case: &Case, report: &mut Report) -> Result<usize, u64> {
        let (mut next, mut last) = (0, 0);
        while report.ios < case.count.into() {
            if next < case.count
                && let Some(slot) = self.slots.iter().position(|slot| slot.flight.is_none())
            {
                self.begin(slot, case, next)?;
                (next, last) = (next + 1, slot);
                continue;
            }
            let token = wait(|| Ok(self.driver.peek_used()))?;
            report.compared += self.complete(token, case)?;
            report.ios += 1;
            report.bytes += u64::from(case.size);
        }
        Ok(last)
    }

    fn begin(&mut self, slot: usize, case: &Case, index: u32) -> Result<(), u64> {
        let (size, offset) = (case.size as usize, case.offset(index));
        let Slot { request, response, read, write, flight, .. } = &mut self.slots[slot];
        // SAFETY: the slot is not touched until the token comes back.
        let token = unsafe {
            if case.operation.is_write() {
                write[..8].copy_from_slice(&case.stamp(offset).to_le_bytes());
                self.driver.write_blocks_nb(offset / SECTOR, request, &write[..size], response)
            } else {
                self.driver.read_blocks_nb(offset / SECTOR, request, &mut read[..size], response)
            }
        };
        *flight = Some((token.map_err(|_| failure::DEVICE)?, index));
        Ok(())
    }

    /// Completes the request that the device says it has done. Returns how many bytes were compared.
    fn complete(&mut self, token: u16, case: &Case) -> Result<u64, u64> {
        let mine = |slot: &&mut Slot| slot.flight.is_some_and(|(flight, _)| flight == token);
        let slot = self.slots.iter_mut().find(mine).ok_or(failure::DEVICE)?;
        let Slot { request, response, read, write, flight, .. } = slot;
        let (size, index) = (case.size as usize, flight.take().map_or(0, |(_, index)| index));
        // SAFETY: these are the buffers that the token was returned for.
        let done = unsafe {
            if case.operation.is_write() {
                self.driver.complete_write_blocks(token, request, &write[..size], response)
            } else {
                self.driver.complete_read_blocks(token, request, &mut read[..size], response)
            }
        };
        done.map_err(|_| failure::DEVICE)?;
        if case.operation.is_write() {
            return Ok(0);
        }
        let words = read[..size].as_chunks::<8>().0;
        let first = case.offset(index) / 8;
        let as_should_be = |at: usize| words[at] == word(self.nonce, first + at).to_le_bytes();
        if as_should_be(0) && as_should_be(words.len() - 1) { Ok(16) } else { Err(failure::CONTENTS) }
    }

    /// Compares what the last I/O has read.
    fn compare(&self, slot: usize, case: &Case) -> Result<u64, u64> {
        let first = case.offset(case.count - 1) / 8;
        compare_words(&self.slots[slot].read[..case.size as usize], |index| word(self.nonce, first + index))
    }
}

/// Compares the first words one by one, and then one in each page. Returns how many bytes that were.
pub fn compare_words(data: &[u8], expected: impl Fn(usize) -> u64) -> Result<u64, u64> {
    let words = data.as_chunks::<8>().0;
    let few = words.len().min(COMPARED / 8);
    let mut compared = 0;
    for index in (0..few).chain((few..words.len()).step_by(512)) {
        if words[index] != expected(index).to_le_bytes() {
            return Err(failure::CONTENTS);
        }
        compared += 8;
    }
    Ok(compared)
}
