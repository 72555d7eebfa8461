//! A virtio block device: split virtqueue, registers as virtio-mmio has them, reached by doorbell.

use cvm::SharedMemory;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use tiny_guest::SECTOR;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_mmio::*;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryError};

const QUEUE_SIZE: u16 = 16;
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_BLK_F_FLUSH;
/// "virt" in ASCII, little endian.
const MAGIC: u32 = 0x7472_6976;

/// The length of a request's header (virtio 1.2, section 5.2.6).
const HEADER_LEN: usize = 16;

/// What the device has done.
#[derive(Debug, Default, Clone)]
pub struct Served {
    /// Requests that were answered, whatever the answer.
    pub requests: u64,
    /// Bytes read from the disk.
    pub read: u64,
    /// Bytes written to the disk.
    pub written: u64,
    /// How many requests were refused because a descriptor is not shared.
    pub refused: u64,
    /// The address of the last such descriptor.
    pub refused_address: u64,
}

/// The device.
pub struct BlockDevice {
    file: File,
    sectors: u64,
    queue: Queue,
    status: u32,
    features_sel: u32,
    queue_sel: u32,
    interrupt: u32,
    served: Served,
}

/// Why a request is not answered with success.
enum Failure {
    /// A descriptor that is not in shared memory.
    Memory(GuestMemoryError),
    /// The file failed, or there is no such part of it.
    Disk,
    /// A request that the device does not know.
    Unsupported,
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        Self::Disk
    }
}

impl From<GuestMemoryError> for Failure {
    fn from(error: GuestMemoryError) -> Self {
        Self::Memory(error)
    }
}

impl BlockDevice {
    /// A device of `sectors` sectors in `file`.
    pub fn new(file: File, sectors: u64) -> Self {
        #[allow(clippy::expect_used, reason = "the size is a constant power of two")]
        let queue = Queue::new(QUEUE_SIZE).expect("16 is a queue size");
        let served = Served::default();
        Self { file, sectors, queue, status: 0, features_sel: 0, queue_sel: 0, interrupt: 0, served }
    }

    /// What it has done.
    pub fn served(&self) -> &Served {
        &self.served
    }

    /// What the guest reads from the register at `offset`.
    pub fn read(&self, offset: u16) -> u32 {
        match u32::from(offset) {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => 2,
            VIRTIO_MMIO_DEVICE_ID => VIRTIO_ID_BLOCK,
            VIRTIO_MMIO_DEVICE_FEATURES => FEATURES.checked_shr(32 * self.features_sel.min(2)).unwrap_or(0) as u32,
            VIRTIO_MMIO_QUEUE_NUM_MAX if self.queue_sel == 0 => QUEUE_SIZE.into(),
            VIRTIO_MMIO_QUEUE_READY if self.queue_sel == 0 => self.queue.ready().into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt,
            VIRTIO_MMIO_STATUS => self.status,
            // The configuration space: how many sectors there are.
            offset if offset == VIRTIO_MMIO_CONFIG => self.sectors as u32,
            offset if offset == VIRTIO_MMIO_CONFIG + 4 => (self.sectors >> 32) as u32,
            _ => 0,
        }
    }

    /// What the guest writes to the register at `offset`.
    pub fn write(&mut self, offset: u16, value: u32, memory: &SharedMemory) {
        match u32::from(offset) {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.features_sel = value,
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt &= !value,
            VIRTIO_MMIO_STATUS if value == 0 => {
                self.queue.reset();
                (self.status, self.interrupt) = (0, 0);
            }
            VIRTIO_MMIO_STATUS => self.status |= value,
            VIRTIO_MMIO_QUEUE_NOTIFY if value == 0 => self.serve(memory),
            _ if self.queue_sel != 0 => {}
            VIRTIO_MMIO_QUEUE_NUM => self.queue.set_size(u16::try_from(value).unwrap_or(u16::MAX)),
            VIRTIO_MMIO_QUEUE_READY => self.queue.set_ready(value == 1),
            VIRTIO_MMIO_QUEUE_DESC_LOW => self.queue.set_desc_table_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => self.queue.set_desc_table_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => self.queue.set_avail_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => self.queue.set_avail_ring_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => self.queue.set_used_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_USED_HIGH => self.queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    /// Serves what is in the queue. A ring or a status byte that is not shared leaves nothing to answer with, so the
    /// device asks to be reset.
    fn serve(&mut self, memory: &SharedMemory) {
        if self.try_serve(memory).is_err() {
            self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        }
    }

    fn try_serve(&mut self, memory: &SharedMemory) -> Result<(), virtio_queue::Error> {
        let memory = memory.memory();
        if self.status & VIRTIO_CONFIG_S_NEEDS_RESET != 0 || !self.queue.is_valid(&*memory) {
            return Err(virtio_queue::Error::QueueNotReady);
        }
        // At most as many as fit into the queue, or a guest that adds while we serve would keep us here.
        for _ in 0..QUEUE_SIZE {
            let Some(chain) = self.queue.pop_descriptor_chain(memory.clone()) else { break };
            let head = chain.head_index();
            let descriptors: Vec<Descriptor> = chain.collect();
            let Some((status, rest)) = descriptors.split_last().filter(|(last, _)| last.is_write_only()) else {
                return Err(virtio_queue::Error::InvalidChain);
            };
            let (answer, written) = match self.carry_out(rest, &memory) {
                Ok(written) => (VIRTIO_BLK_S_OK, written),
                Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
                Err(Failure::Disk) => (VIRTIO_BLK_S_IOERR, 0),
                Err(Failure::Memory(error)) => {
                    if let GuestMemoryError::InvalidGuestAddress(address) = error {
                        self.served.refused += 1;
                        self.served.refused_address = address.raw_value();
                    }
                    (VIRTIO_BLK_S_IOERR, 0)
                }
            };
            memory.write_obj(answer as u8, status.addr()).map_err(virtio_queue::Error::GuestMemory)?;
            self.queue.add_used(&*memory, head, written + 1)?;
            self.served.requests += 1;
            self.interrupt |= 1;
        }
        Ok(())
    }

    /// Carries out one request, all of it but its last descriptor; returns how many bytes of it were written to.
    fn carry_out(&mut self, descriptors: &[Descriptor], memory: &cvm::memory::SharedView) -> Result<u32, Failure> {
        let (header, data) = descriptors.split_first().ok_or(Failure::Unsupported)?;
        if header.is_write_only() || (header.len() as usize) < HEADER_LEN {
            return Err(Failure::Unsupported);
        }
        // Read once: what the guest changes afterwards is not looked at.
        let mut bytes = [0; HEADER_LEN];
        memory.read_slice(&mut bytes, header.addr())?;
        let [kind, _, low, high] = *bytes.as_chunks::<4>().0 else { return Err(Failure::Unsupported) };
        let sector = u64::from(u32::from_le_bytes(low)) | u64::from(u32::from_le_bytes(high)) << 32;
        match u32::from_le_bytes(kind) {
            VIRTIO_BLK_T_IN => self.transfer(sector, data, true, memory),
            VIRTIO_BLK_T_OUT => self.transfer(sector, data, false, memory),
            VIRTIO_BLK_T_FLUSH => Ok(self.file.sync_data().map(|()| 0)?),
            _ => Err(Failure::Unsupported),
        }
    }

    /// Moves data between the disk and the guest's buffers.
    fn transfer(
        &mut self,
        sector: u64,
        data: &[Descriptor],
        to_guest: bool,
        memory: &cvm::memory::SharedView,
    ) -> Result<u32, Failure> {
        let len: u64 = data.iter().map(|descriptor| u64::from(descriptor.len())).sum();
        let start = sector.checked_mul(SECTOR as u64);
        let end = start.and_then(|start| start.checked_add(len));
        let fits = end.is_some_and(|end| end <= self.sectors * SECTOR as u64) && len.is_multiple_of(SECTOR as u64);
        let direction = data.iter().all(|descriptor| descriptor.is_write_only() == to_guest);
        let (Some(start), true, true) = (start, fits, direction) else {
            return Err(Failure::Disk);
        };
        self.file.seek(SeekFrom::Start(start))?;
        for descriptor in data {
            let (address, len): (GuestAddress, _) = (descriptor.addr(), descriptor.len() as usize);
            if to_guest {
                memory.read_exact_volatile_from(address, &mut self.file, len)?;
            } else {
                memory.write_all_volatile_to(address, &mut self.file, len)?;
            }
        }
        match to_guest {
            true => {
                self.served.read += len;
                Ok(u32::try_from(len).unwrap_or(u32::MAX - 1))
            }
            false => {
                self.served.written += len;
                Ok(0)
            }
        }
    }
}
