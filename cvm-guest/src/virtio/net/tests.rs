//! The network card against hosts that keep to the protocol, and hosts that do not.

use super::*;
use crate::SharedRegion;
use crate::pool::tests::region;
use crate::virtio::DoorbellTransport;
use crate::virtio::fake::{self, Host, device_queue, in_use, is_shared, pool};
use proptest::prelude::*;
use spin::Once;

const RECEIVE: usize = 0;
const SEND: usize = 1;
const DEPTH: usize = 4;
const BUFFER: usize = 2048;
/// The device type of a network card (virtio 1.2, section 5).
const NET: u32 = 1;

type Card<Q> = Net<QueueFrames<Q>, DoorbellTransport<&'static &'static Host>, DEPTH>;

fn card<Q: DeviceQueue>() -> (&'static Host, Card<Q>) {
    let (host, transport) = Host::new(NET, pool::<Q>());
    let buffers = || [(); DEPTH].map(|()| &mut *vec![0xaa; BUFFER].leak());
    (host, Net::new(transport, buffers(), buffers()).unwrap())
}

/// How many bytes of the pool are neither free nor lent to the device: the rings, and what was lost.
fn unaccounted<Q: DeviceQueue>(card: &Card<Q>) -> u64 {
    let receiving = card.line.receiving.iter().flatten().count() * BUFFER;
    // Slots have powers of two, from 256 bytes on.
    let slot = |(_, len): &Buffer| len.next_power_of_two().max(256);
    let sending = card.line.sending.iter().flatten().map(slot).sum::<usize>();
    in_use::<Q>() - (receiving + sending) as u64
}

/// Has the device receive `frame` into the next buffer, and claim `len` bytes.
fn deliver(host: &Host, frame: &[u8], len: u32) {
    let head = host.next(RECEIVE).unwrap();
    let buffer = host.descriptor(RECEIVE, head);
    host.write_pool(buffer.address, &[0; HEADER_LEN]);
    host.write_pool(buffer.address + HEADER_LEN as u64, frame);
    host.answer(RECEIVE, head.into(), len);
}

#[test]
fn frames_go_both_ways_and_no_more_is_copied_than_there_is() {
    device_queue!(Q);
    let (host, mut card) = card::<Q>();
    let rings = unaccounted(&card);
    for round in 0..20u8 {
        assert_eq!(card.receive().unwrap(), None);
        let frame = [round; 100];
        deliver(host, &frame, (HEADER_LEN + frame.len()) as u32);
        assert_eq!(card.receive().unwrap(), Some(&frame[..]));
        let (buffer, _) = card.held.as_ref().unwrap();
        assert!(round >= DEPTH as u8 || buffer[HEADER_LEN + frame.len()..].iter().all(|byte| *byte == 0xaa));

        card.send(60, |frame| frame.fill(round)).unwrap();
        let head = host.next(SEND).unwrap();
        let sent = host.descriptor(SEND, head);
        assert!(is_shared(pool::<Q>(), sent.address) && sent.len as usize == HEADER_LEN + 60 && sent.next.is_none());
        host.answer(SEND, head.into(), 0);
        assert!(card.all_sent().unwrap());
        assert_eq!(unaccounted(&card), rings);
    }
}

#[test]
fn a_length_that_cannot_be_is_an_error_and_nothing_is_lost() {
    device_queue!(Q);
    for len in [0, HEADER_LEN as u32 - 1, BUFFER as u32 + 1, u32::MAX - 11, u32::MAX] {
        let (host, mut card) = card::<Q>();
        let before = unaccounted(&card);
        deliver(host, b"frame", len);
        assert_eq!(card.receive().unwrap_err(), Error::IoError, "{len:#x}");
        assert_eq!(unaccounted(&card), before, "{len:#x}");
        assert_eq!(card.send(60, |_| ()).unwrap_err(), Error::IoError, "a broken device is not used any more");
        assert_eq!(card.broken(), Some(Error::IoError));
    }
}

#[test]
fn a_frame_that_the_host_changes_after_it_was_received_is_what_it_was() {
    device_queue!(Q);
    let (host, mut card) = card::<Q>();
    let head = host.next(RECEIVE).unwrap();
    let buffer = host.descriptor(RECEIVE, head);
    host.write_pool(buffer.address, &[1; HEADER_LEN + 64]);
    host.answer(RECEIVE, head.into(), HEADER_LEN as u32 + 64);
    let frame = card.receive().unwrap().unwrap();
    host.write_pool(buffer.address, &[2; HEADER_LEN + 64]);
    assert_eq!(frame, [1; 64]);
}

#[test]
fn frames_sent_may_be_done_in_any_order_but_not_twice() {
    device_queue!(Q);
    let (host, mut card) = card::<Q>();
    for _ in 0..DEPTH {
        card.send(60, |frame| frame.fill(0)).unwrap();
    }
    assert_eq!(card.send(60, |_| ()).unwrap_err(), Error::NotReady);
    let heads: Vec<u16> = std::iter::from_fn(|| host.next(SEND)).collect();
    assert_eq!(heads.len(), DEPTH);
    for head in heads.iter().rev().take(3) {
        host.answer(SEND, (*head).into(), 0);
    }
    assert!(!card.all_sent().unwrap());
    host.answer(SEND, heads[3].into(), 0);
    assert_eq!(card.all_sent().unwrap_err(), Error::WrongToken);
}

#[test]
fn a_token_that_was_never_given_is_an_error() {
    for queue in [RECEIVE, SEND] {
        device_queue!(Q);
        for token in [DEPTH as u32, 16, 0xffff, 0x1_0000 + DEPTH as u32, u32::MAX] {
            let (host, mut card) = card::<Q>();
            host.answer(queue, token, 100);
            let error = if queue == RECEIVE { card.receive().map(drop) } else { card.all_sent().map(drop) };
            assert_eq!(error.unwrap_err(), Error::WrongToken, "{token:#x}");
        }
    }
}

#[test]
fn a_device_that_never_answers_leaves_the_guest_its_time() {
    device_queue!(Q);
    let (_, mut card) = card::<Q>();
    for _ in 0..DEPTH {
        card.send(60, |frame| frame.fill(0)).unwrap();
    }
    for _ in 0..1000 {
        assert_eq!(card.receive().unwrap(), None);
        assert_eq!(card.send(60, |_| ()).unwrap_err(), Error::NotReady);
    }
    assert_eq!(card.broken(), None);
}

#[cfg(feature = "smoltcp")]
#[test]
fn a_network_stack_finds_a_broken_device_empty_and_full() {
    use smoltcp::phy::Device;
    use smoltcp::time::Instant;
    device_queue!(Q);
    let (host, mut card) = card::<Q>();
    assert!(card.transmit(Instant::ZERO).is_some() && Device::receive(&mut card, Instant::ZERO).is_none());
    deliver(host, b"frame", u32::MAX);
    assert!(Device::receive(&mut card, Instant::ZERO).is_none());
    assert!(card.transmit(Instant::ZERO).is_none());
}

/// What a host does, or has its guest do.
#[derive(Debug, Clone)]
enum Step {
    Answer { queue: usize, id: u32, len: u32 },
    Honest { queue: usize, len: u32 },
    Jump { queue: usize, by: u16 },
    Scribble { at: u64, bytes: Vec<u8> },
    Receive,
    Send(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let queue = || 0usize..2;
    let step = prop_oneof![
        1 => (queue(), prop_oneof![0u32..8, any::<u32>()], prop_oneof![0u32..3000, any::<u32>()])
            .prop_map(|(queue, id, len)| Step::Answer { queue, id, len }),
        4 => (queue(), 12u32..2048).prop_map(|(queue, len)| Step::Honest { queue, len }),
        1 => (queue(), any::<u16>()).prop_map(|(queue, by)| Step::Jump { queue, by }),
        // Rings and buffers are in blocks of 256 KiB.
        2 => (prop_oneof![3 => 0u64..16 << 10, 1 => 256u64 << 10..288 << 10], prop::collection::vec(any::<u8>(), 0..64))
            .prop_map(|(at, bytes)| Step::Scribble { at, bytes }),
        4 => Just(Step::Receive),
        3 => (0usize..3000).prop_map(Step::Send),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    #[test]
    fn whatever_the_host_does_the_guest_gets_frames_or_an_error_and_loses_nothing(steps in steps()) {
        device_queue!(Q);
        // Each case begins with all of the memory, as if the guest had started again.
        static MEMORY: Once<SharedRegion> = Once::new();
        Q::with(|queue| *queue = fake::queue(again(MEMORY.call_once(|| region(0)))));
        let (host, mut card) = card::<Q>();
        let rings = unaccounted(&card);
        for step in steps {
            match step {
                Step::Answer { queue, id, len } => host.answer(queue, id, len),
                Step::Honest { queue, len } => {
                    // After a scribble over the rings there may be any head.
                    if let Some(head) = host.next(queue) {
                        host.answer(queue, head.into(), len);
                    }
                }
                Step::Jump { queue, by } => host.jump(queue, by),
                Step::Scribble { at, bytes } => {
                    host.write_pool(host.rings(RECEIVE) + at, &bytes);
                }
                Step::Receive => {
                    if let Ok(Some(frame)) = card.receive() {
                        prop_assert!(frame.len() <= BUFFER - HEADER_LEN);
                    }
                }
                Step::Send(len) => {
                    let sent = card.send(len, |frame| frame.fill(1));
                    prop_assert!(sent.is_err() || len <= card.max_frame());
                }
            }
            prop_assert_eq!(unaccounted(&card), rings);
        }
        let lent = in_use::<Q>() - rings;
        drop(card);
        prop_assert_eq!(in_use::<Q>(), lent, "the rings come back, and nothing else that the device may write to");
    }
}

/// The same memory, for a pool that has none in use.
fn again(region: &SharedRegion) -> SharedRegion {
    // SAFETY: the memory is a test's for good, and nobody has references into it.
    unsafe { SharedRegion::mapped_at(region.pointer(0), region.range()) }
}
