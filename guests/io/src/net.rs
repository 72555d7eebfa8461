//! The network card, with frames as they are.

use crate::disk::compare_words;
use crate::guest::{Arena, Clock, Control, Transport, wait};
use crate::hal::{GuestHal, NetDevice};
use cvm_guest::virtio::{HEADER_LEN, Net};
use io_guest::*;

/// The driver.
pub type Driver<'a> = Net<GuestHal<NetDevice>, Transport<'a>, NET_DEPTH>;

/// The network card.
pub struct Card<'a> {
    pub driver: Driver<'a>,
    nonce: u64,
}

fn fill(frame: &mut [u8], nonce: u64) {
    let (header, payload) = frame.split_at_mut(FRAME_WORDS);
    header.fill(0);
    header[..FRAME_HEADER.len()].copy_from_slice(&FRAME_HEADER);
    for (index, place) in payload.chunks_mut(8).enumerate() {
        place.copy_from_slice(&word(nonce, index).to_le_bytes()[..place.len()]);
    }
}

impl<'a> Card<'a> {
    /// The network card behind `transport`.
    pub fn new(transport: Transport<'a>, arena: &mut Arena, nonce: u64) -> Option<Self> {
        let mut buffers = || {
            let mut buffers: [&'static mut [u8]; NET_DEPTH] = Default::default();
            for buffer in &mut buffers {
                *buffer = arena.take(HEADER_LEN + MAX_FRAME)?;
            }
            Some(buffers)
        };
        let (receive, send) = (buffers()?, buffers()?);
        let mut card = Self { driver: Net::new(transport, receive, send).ok()?, nonce };
        card.prepare();
        Some(card)
    }

    /// Puts the words of a frame into all buffers to send with, so that only stamps change from then on.
    pub fn prepare(&mut self) {
        self.driver.idle().for_each(|frame| fill(frame, self.nonce));
    }

    /// Does what `case` says.
    pub fn run(&mut self, case: &Case, control: &Control<'_>, report: &mut Report) -> Result<(), u64> {
        let size = case.size as usize;
        if case.count == 0 || !(MIN_FRAME..=MAX_FRAME).contains(&size) {
            return Err(failure::CASE);
        }
        let clock = Clock::start(control);
        let done = self.carry_out(case, report);
        clock.stop(report);
        done?;
        if case.operation != Operation::Send {
            report.compared += self.compare(case)?;
        }
        Ok(())
    }

    fn carry_out(&mut self, case: &Case, report: &mut Report) -> Result<(), u64> {
        let (mut sent, mut received) = (0, 0);
        let to_send = if case.operation == Operation::Receive { 0 } else { case.count };
        let to_receive = if case.operation == Operation::Send { 0 } else { case.count };
        while sent < to_send || received < to_receive {
            let came = wait(|| {
                if self.may_send(sent, received, case) && self.send(sent, case)? {
                    return Ok(Some(false));
                }
                if received < to_receive && self.receive(received, case)? {
                    return Ok(Some(true));
                }
                Ok(None)
            })?;
            if came {
                received += 1;
                report.compared += 16;
            } else {
                sent += 1;
            }
        }
        wait(|| Ok(self.driver.all_sent().map_err(|_| failure::DEVICE)?.then_some(())))?;
        report.ios = u64::from(to_send.max(to_receive));
        report.bytes = report.ios * u64::from(case.size);
        Ok(())
    }

    /// Whether the next frame is to be sent: echoes need room to come back to.
    fn may_send(&self, sent: u32, received: u32, case: &Case) -> bool {
        match case.operation {
            Operation::Send => sent < case.count,
            Operation::Echo => sent < case.count && sent.saturating_sub(received) < NET_DEPTH as u32,
            _ => false,
        }
    }

    fn send(&mut self, index: u32, case: &Case) -> Result<bool, u64> {
        let sent = self.driver.send(case.size as usize, |frame| {
            frame[FRAME_WORDS..FRAME_WORDS + 8].copy_from_slice(&case.stamp(index as usize).to_le_bytes());
        });
        match sent {
            Ok(()) => Ok(true),
            Err(virtio_drivers::Error::NotReady) => Ok(false),
            Err(_) => Err(failure::DEVICE),
        }
    }

    fn receive(&mut self, index: u32, case: &Case) -> Result<bool, u64> {
        let Some(frame) = self.driver.receive().map_err(|_| failure::DEVICE)? else { return Ok(false) };
        let words = frame.get(FRAME_WORDS..).unwrap_or_default().as_chunks::<8>().0;
        let last = (case.size as usize - FRAME_WORDS) / 8 - 1;
        let as_should_be = frame.len() == case.size as usize
            && words[0] == case.stamp(index as usize).to_le_bytes()
            && words[last] == word(self.nonce, last).to_le_bytes();
        if as_should_be { Ok(true) } else { Err(failure::CONTENTS) }
    }

    /// Compares the last frame that has come.
    fn compare(&mut self, case: &Case) -> Result<u64, u64> {
        let frame = self.driver.received().filter(|frame| frame.len() == case.size as usize);
        let frame = frame.ok_or(failure::CONTENTS)?;
        if frame[..FRAME_HEADER.len()] != FRAME_HEADER {
            return Err(failure::CONTENTS);
        }
        let stamp = case.stamp(case.count as usize - 1);
        compare_words(&frame[FRAME_WORDS..], |index| if index == 0 { stamp } else { word(self.nonce, index) })
    }
}
