//! The device models of the examples against guests that write what they like.

#[path = "../examples/common/block.rs"]
mod block;
#[path = "../examples/common/net.rs"]
mod net;
#[path = "../examples/common/virtio.rs"]
mod virtio;

use block::BlockDevice;
use cvm::memory::{ConversionEngine, Converter, ConverterError, PageStateMap, Slots};
use cvm::{Answer, ConversionRequest, GpaRange, PAGE_SIZE, SharedMemory, Side};
use net::{NetDevice, Responder};
use proptest::prelude::*;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

/// A backend without memory of its own.
struct Nothing;

impl Converter for Nothing {
    fn convert(&self, _: u32, _: GpaRange, _: Side) -> Result<(), ConverterError> {
        Ok(())
    }

    fn poison(&self, _: u32, _: GpaRange) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(())
    }

    fn most_runs(&self) -> u64 {
        u64::MAX
    }
}

/// Memory of 16 pages, of which all but the last four are shared; and what is behind it.
fn memory() -> (SharedMemory, GuestMemoryMmap) {
    let range = GpaRange::from_pages(0, 16).unwrap();
    let map = Arc::new(PageStateMap::new(Slots::new(&[range]).unwrap()).unwrap());
    let backing = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), range.len() as usize)]).unwrap();
    let engine = ConversionEngine::new(Nothing, SharedMemory::new(backing.clone(), map).unwrap());
    let request = ConversionRequest::from_guest(0, 0, 12, Side::Shared);
    engine.ask(request);
    assert_eq!(engine.convert(&request).answer(), Answer::Done);
    (engine.memory().clone(), backing)
}

/// Whether the private pages are as they were.
fn is_untouched(backing: &GuestMemoryMmap) -> bool {
    let mut private = vec![1; 4 * PAGE_SIZE as usize];
    backing.read_slice(&mut private, GuestAddress(12 * PAGE_SIZE)).unwrap();
    private.iter().all(|byte| *byte == 0)
}

/// Echoes, but keeps 16 frames at most.
#[derive(Default)]
struct Echo {
    frames: Vec<Vec<u8>>,
    longest: usize,
}

impl Responder for Echo {
    fn take(&mut self, frame: &[u8]) {
        self.longest = self.longest.max(frame.len());
        if self.frames.len() < 16 {
            self.frames.push(frame.to_vec());
        }
    }

    fn give(&mut self, frame: &mut Vec<u8>) -> bool {
        self.frames.pop().map(|next| *frame = next).is_some()
    }
}

/// Where the guest has the parts of queue `queue`.
fn ring(queue: u64, part: u64) -> u64 {
    (3 * queue + part) * PAGE_SIZE
}

/// What a driver writes to set up a queue.
fn set_up(mut write: impl FnMut(u32, u32), queue: u32) {
    write(VIRTIO_MMIO_QUEUE_SEL, queue);
    write(VIRTIO_MMIO_QUEUE_NUM, 16);
    for (part, register) in
        [VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_USED_LOW].into_iter().enumerate()
    {
        write(register, ring(queue.into(), part as u64) as u32);
    }
    write(VIRTIO_MMIO_QUEUE_READY, 1);
}

/// A descriptor, and a place for it.
#[derive(Debug, Clone)]
struct Descriptor {
    queue: u64,
    index: u64,
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// What the guest does.
#[derive(Debug, Clone)]
enum Step {
    Register(u16, u32),
    Scribble(u64, Vec<u8>),
    Describe(Descriptor),
    Offer { queue: u64, heads: Vec<u16> },
}

fn step() -> impl Strategy<Value = Step> {
    let address = || prop_oneof![8 => 0u64..16 * PAGE_SIZE, 1 => any::<u64>()];
    let descriptor = (0u64..2, 0u64..16, address(), prop_oneof![8 => 0u32..4096, 1 => any::<u32>()], 0u16..8, 0u16..17)
        .prop_map(|(queue, index, address, len, flags, next)| Descriptor { queue, index, address, len, flags, next });
    prop_oneof![
        1 => (0u16..0x200, any::<u32>()).prop_map(|(offset, value)| Step::Register(offset, value)),
        1 => (0u64..12 * PAGE_SIZE - 64, prop::collection::vec(any::<u8>(), 0..64))
            .prop_map(|(at, bytes)| Step::Scribble(at, bytes)),
        8 => descriptor.prop_map(Step::Describe),
        4 => (0u64..2, prop::collection::vec(0u16..17, 1..17)).prop_map(|(queue, heads)| Step::Offer { queue, heads }),
    ]
}

/// Does what the guest does, in memory.
fn act(memory: &SharedMemory, step: &Step) {
    let memory = memory.memory();
    match step {
        Step::Register(..) => {}
        Step::Scribble(at, bytes) => memory.write_slice(bytes, GuestAddress(*at)).unwrap(),
        Step::Describe(Descriptor { queue, index, address, len, flags, next }) => {
            let at = ring(*queue, 0) + 16 * index;
            let low = u128::from(*address) | u128::from(*len) << 64;
            let all = low | u128::from(*flags) << 96 | u128::from(*next) << 112;
            memory.write_slice(&all.to_le_bytes(), GuestAddress(at)).unwrap();
        }
        Step::Offer { queue, heads } => {
            let index = GuestAddress(ring(*queue, 1) + 2);
            let mut next: u16 = memory.read_obj(index).unwrap();
            for head in heads {
                let slot = ring(*queue, 1) + 4 + 2 * u64::from(next % 16);
                memory.write_obj(*head, GuestAddress(slot)).unwrap();
                next = next.wrapping_add(1);
            }
            memory.write_obj(next, index).unwrap();
        }
    }
}

proptest! {
    #[test]
    fn whatever_a_guest_does_the_network_card_goes_on_and_keeps_off_private_memory(
        steps in prop::collection::vec(step(), 0..60),
    ) {
        let (memory, backing) = memory();
        let mut card = NetDevice::new([2; 6], 1514, Echo::default());
        (0..2).for_each(|queue| set_up(|offset, value| card.write(offset as u16, value, &memory), queue));
        for step in &steps {
            act(&memory, step);
            if let Step::Register(offset, value) = step {
                card.write(*offset, *value, &memory);
                card.read(*offset);
            }
            // At most what fits into both queues.
            prop_assert!(card.serve(&memory) <= 32);
            card.listen(true, &memory);
        }
        prop_assert!(card.responder.longest <= 1514 && is_untouched(&backing));
    }

    #[test]
    fn whatever_a_guest_does_the_disk_goes_on_and_keeps_its_length(steps in prop::collection::vec(step(), 0..60)) {
        let (memory, backing) = memory();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[0xaa; 64 * 512], 0).unwrap();
        let mut disk = BlockDevice::new(file.try_clone().unwrap(), 64);
        set_up(|offset, value| disk.write(offset as u16, value, &memory), 0);
        for step in &steps {
            act(&memory, step);
            if let Step::Register(offset, value) = step {
                disk.write(*offset, *value, &memory);
                disk.read(*offset);
            }
            prop_assert!(disk.serve(&memory) <= 16);
            disk.listen(true, &memory);
        }
        prop_assert_eq!(file.metadata().unwrap().len(), 64 * 512);
        prop_assert!(is_untouched(&backing));
    }
}

/// A frame with its header, in the guest's memory.
fn offer_frame(memory: &SharedMemory, address: u64, len: u32) {
    let descriptor = Descriptor { queue: 1, index: 0, address, len, flags: 0, next: 0 };
    act(memory, &Step::Describe(descriptor));
    act(memory, &Step::Offer { queue: 1, heads: vec![0] });
}

#[test]
fn a_frame_in_private_memory_or_too_long_is_refused_and_the_next_one_is_taken() {
    let (memory, _) = memory();
    let mut card = NetDevice::new([2; 6], 1514, Echo::default());
    (0..2).for_each(|queue| set_up(|offset, value| card.write(offset as u16, value, &memory), queue));
    for (address, len) in
        [(12 * PAGE_SIZE, 100), (12 * PAGE_SIZE - 50, 100), (10 * PAGE_SIZE, 12 + 1515), (u64::MAX, 4)]
    {
        let before = card.refused();
        offer_frame(&memory, address, len);
        card.serve(&memory);
        assert_eq!(card.refused(), before + 1, "{len} bytes at {address:#x}");
    }
    offer_frame(&memory, 10 * PAGE_SIZE, 12 + 1514);
    card.serve(&memory);
    assert_eq!((card.refused(), card.responder.longest), (4, 1514));
}
