//! What becomes of rings: made, sent with, released in order and out of it, dropped.

use super::memory::NEAR;
use super::{BASE, LONGEST, LiveRing, MOST_MASK, Program};
use cvm_core::Gpa;
use cvm_guest::{Refusal, Ring};
use libfuzzer_sys::arbitrary::Result;
use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;

impl Program<'_, '_> {
    pub fn make_ring(&mut self) -> Result<()> {
        let queue = self.queue()?;
        let (slots, slot_len) = (self.given.int_in_range(0..=70usize)?, self.given.int_in_range(0..=9000usize)?);
        let all = slots.max(1).next_power_of_two() * slot_len.max(64).next_power_of_two();
        let mut ring = match Ring::new(&mut self.queues[queue], slots, slot_len) {
            Ok(ring) => ring,
            Err(Refusal::Impossible) => {
                assert!(all > MOST_MASK || all as u64 > self.options[queue].limit);
                return Ok(());
            }
            Err(_) => return Ok(()),
        };
        let first = ring.send(&[]).unwrap();
        let (gpa, len) = ring.segment(&first);
        assert_eq!(len, 0);
        ring.release(first).unwrap();
        let place = self.place(gpa.0, all);
        self.take(&place);
        let slot_len = slot_len.max(64).next_power_of_two();
        self.rings.push(LiveRing { ring, place, slot_len, sent: 1, flying: VecDeque::new() });
        Ok(())
    }

    pub fn use_ring(&mut self) -> Result<()> {
        if self.rings.is_empty() {
            return self.make_ring();
        }
        let index = self.given.choose_index(self.rings.len())?;
        let mut ring = self.rings.swap_remove(index);
        let slots = ring.place.len() / ring.slot_len;
        match self.given.int_in_range(0u8..=8)? {
            0 => {
                // The device is done with all packets.
                let LiveRing { ring, place, .. } = ring;
                drop(ring);
                self.give(&place);
                return Ok(());
            }
            1..=4 => {
                let len = self.used(ring.slot_len)?.min(LONGEST);
                let packet = self.private.source(ring.sent, len, self.given.arbitrary()?);
                let at = ring.place.start + ring.sent % slots * ring.slot_len;
                NEAR.store(at, Relaxed);
                match ring.ring.send(packet) {
                    Ok(sent) => {
                        let place = at..at + len;
                        assert_eq!(ring.ring.segment(&sent), (Gpa(BASE + at as u64), len as u32));
                        assert!(len <= ring.slot_len && ring.flying.len() < slots);
                        self.sent(&place, &[packet]);
                        ring.flying.push_back((sent, place));
                        ring.sent += 1;
                    }
                    Err(Refusal::Impossible) => assert!(len > ring.slot_len),
                    Err(refusal) => {
                        assert_eq!((refusal, ring.flying.len()), (Refusal::Exhausted, slots))
                    }
                }
            }
            _ if ring.flying.is_empty() => {}
            _ => {
                let which = self.given.choose_index(ring.flying.len())?;
                let (sent, place) = ring.flying.remove(which).expect("it is there");
                self.look_around(&place);
                match ring.ring.release(sent) {
                    Ok(()) => assert_eq!(which, 0),
                    Err(sent) => {
                        assert_ne!(which, 0);
                        ring.flying.insert(which, (sent, place));
                    }
                }
            }
        }
        assert_eq!(ring.ring.in_flight() as usize, ring.flying.len());
        self.rings.push(ring);
        Ok(())
    }
}
