//! What virtio devices have in common: registers as virtio-mmio has them, reached by doorbell, and split virtqueues.

use cvm::SharedMemory;
use cvm::memory::Pinned;
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_mmio::*;
use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddressSpace;

/// How many entries a queue has at most.
pub const QUEUE_SIZE: u16 = 16;
/// "virt" in ASCII, little endian.
const MAGIC: u32 = 0x7472_6976;

/// The registers and queues of a device.
pub struct Registers<const QUEUES: usize> {
    device: u32,
    features: u64,
    queues: [Queue; QUEUES],
    status: u32,
    features_sel: u32,
    queue_sel: u32,
    interrupt: u32,
}

impl<const QUEUES: usize> Registers<QUEUES> {
    /// Those of a device with this virtio identifier, and these features besides virtio 1.
    pub fn new(device: u32, features: u64) -> Self {
        #[allow(clippy::expect_used, reason = "the size is a constant power of two")]
        let queues = [(); QUEUES].map(|()| Queue::new(QUEUE_SIZE).expect("16 is a queue size"));
        let features = features | 1 << VIRTIO_F_VERSION_1;
        Self { device, features, queues, status: 0, features_sel: 0, queue_sel: 0, interrupt: 0 }
    }

    /// What the guest reads from the register at `offset`; `config` is the device's configuration space.
    pub fn read(&self, offset: u16, config: &[u8]) -> u32 {
        let queue = self.queues.get(self.queue_sel as usize);
        match u32::from(offset) {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => 2,
            VIRTIO_MMIO_DEVICE_ID => self.device,
            VIRTIO_MMIO_DEVICE_FEATURES => self.features.checked_shr(32 * self.features_sel.min(2)).unwrap_or(0) as u32,
            VIRTIO_MMIO_QUEUE_NUM_MAX if queue.is_some() => QUEUE_SIZE.into(),
            VIRTIO_MMIO_QUEUE_READY => queue.is_some_and(Queue::ready).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt,
            VIRTIO_MMIO_STATUS => self.status,
            offset => {
                let at = offset.checked_sub(VIRTIO_MMIO_CONFIG).map(|at| at as usize);
                let mut word = [0; 4];
                for (place, byte) in word.iter_mut().zip(at.and_then(|at| config.get(at..)).unwrap_or_default()) {
                    *place = *byte;
                }
                u32::from_le_bytes(word)
            }
        }
    }

    /// What the guest writes to the register at `offset`. Returns whether there is something in the queues.
    pub fn write(&mut self, offset: u16, value: u32) -> bool {
        let queue = self.queues.get_mut(self.queue_sel as usize);
        match (u32::from(offset), queue) {
            (VIRTIO_MMIO_DEVICE_FEATURES_SEL, _) => self.features_sel = value,
            (VIRTIO_MMIO_QUEUE_SEL, _) => self.queue_sel = value,
            (VIRTIO_MMIO_INTERRUPT_ACK, _) => self.interrupt &= !value,
            (VIRTIO_MMIO_STATUS, _) if value == 0 => {
                self.queues.iter_mut().for_each(Queue::reset);
                (self.status, self.interrupt) = (0, 0);
            }
            (VIRTIO_MMIO_STATUS, _) => self.status |= value,
            (VIRTIO_MMIO_QUEUE_NOTIFY, _) => return true,
            (_, None) => {}
            (VIRTIO_MMIO_QUEUE_NUM, Some(queue)) => queue.set_size(u16::try_from(value).unwrap_or(u16::MAX)),
            (VIRTIO_MMIO_QUEUE_READY, Some(queue)) => queue.set_ready(value == 1),
            (VIRTIO_MMIO_QUEUE_DESC_LOW, Some(queue)) => queue.set_desc_table_address(Some(value), None),
            (VIRTIO_MMIO_QUEUE_DESC_HIGH, Some(queue)) => queue.set_desc_table_address(None, Some(value)),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, Some(queue)) => queue.set_avail_ring_address(Some(value), None),
            (VIRTIO_MMIO_QUEUE_AVAIL_HIGH, Some(queue)) => queue.set_avail_ring_address(None, Some(value)),
            (VIRTIO_MMIO_QUEUE_USED_LOW, Some(queue)) => queue.set_used_ring_address(Some(value), None),
            (VIRTIO_MMIO_QUEUE_USED_HIGH, Some(queue)) => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
        false
    }

    /// Hands chains of queue `index` to `carry_out`, which returns how many bytes it has written to the last one, or
    /// nothing to leave it for later. At most as many as fit into the queue, or a guest that adds while we serve would
    /// keep us here. Returns how many there were.
    ///
    /// A ring that is not shared, or a chain that cannot be answered, leaves nothing to answer with, so the device asks
    /// to be reset.
    pub fn serve(
        &mut self,
        index: usize,
        memory: &SharedMemory,
        mut carry_out: impl FnMut(DescriptorChain<Pinned>, &Pinned) -> Result<Option<u32>, Error>,
    ) -> usize {
        let memory = memory.memory();
        let mut serve = || {
            let queue = &mut self.queues[index];
            if self.status & VIRTIO_CONFIG_S_NEEDS_RESET != 0 || !queue.is_valid(&*memory) {
                return Err(Error::QueueNotReady);
            }
            for served in 0..QUEUE_SIZE {
                let Some(chain) = queue.pop_descriptor_chain(memory.clone()) else { return Ok(served) };
                let head = chain.head_index();
                let Some(written) = carry_out(chain, &memory)? else {
                    queue.go_to_previous_position();
                    return Ok(served);
                };
                queue.add_used(&*memory, head, written)?;
                self.interrupt |= 1;
            }
            Ok(QUEUE_SIZE)
        };
        match serve() {
            Ok(served) => served.into(),
            Err(_) => {
                self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
                0
            }
        }
    }

    /// Whether the guest has set up queue `index`.
    pub fn ready(&self, index: usize) -> bool {
        self.queues[index].ready()
    }

    /// Tells the guest whether to ring when it adds to queue `index`. What it has added before it knew, it did not ring
    /// for: look again after saying yes.
    pub fn listen(&mut self, index: usize, on: bool, memory: &SharedMemory) {
        let (memory, queue) = (memory.memory(), &mut self.queues[index]);
        if queue.ready() && queue.is_valid(&*memory) {
            // What fails here fails again when the queue is served.
            let _ = match on {
                true => queue.enable_notification(&*memory).map(drop),
                false => queue.disable_notification(&*memory),
            };
        }
    }
}
