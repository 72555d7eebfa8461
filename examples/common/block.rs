//! A virtio block device.

use crate::virtio::Registers;
use cvm::SharedMemory;
use cvm::memory::{SharedView, ViewError};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// Sectors of a virtio block device (virtio 1.2, section 5.2.4).
const SECTOR: u64 = 512;

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
    registers: Registers<1>,
    disk: Disk,
}

/// What is behind it.
struct Disk {
    file: File,
    sectors: u64,
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
        let registers = Registers::new(VIRTIO_ID_BLOCK, 1 << VIRTIO_BLK_F_FLUSH);
        Self { registers, disk: Disk { file, sectors, served: Served::default() } }
    }

    /// What it has done.
    #[allow(dead_code, reason = "not every example asks")]
    pub fn served(&self) -> &Served {
        &self.disk.served
    }

    /// What the guest reads from the register at `offset`.
    pub fn read(&self, offset: u16) -> u32 {
        // The configuration space begins with how many sectors there are.
        self.registers.read(offset, &self.disk.sectors.to_le_bytes())
    }

    /// What the guest writes to the register at `offset`.
    pub fn write(&mut self, offset: u16, value: u32, memory: &SharedMemory) {
        if self.registers.write(offset, value) {
            self.serve(memory);
        }
    }

    /// Serves what is in the queue. Returns how many requests there were.
    pub fn serve(&mut self, memory: &SharedMemory) -> usize {
        let disk = &mut self.disk;
        self.registers.serve(0, memory, |chain, memory| {
            let descriptors: Vec<Descriptor> = chain.collect();
            let Some((status, rest)) = descriptors.split_last().filter(|(last, _)| last.is_write_only()) else {
                return Err(virtio_queue::Error::InvalidChain);
            };
            let (answer, written) = disk.answer(rest, memory);
            memory.write_obj(answer, status.addr()).map_err(virtio_queue::Error::GuestMemory)?;
            disk.served.requests += 1;
            Ok(Some(written + 1))
        })
    }

    /// As [`Registers::listen`].
    #[allow(dead_code, reason = "only a device with a thread of its own need say")]
    pub fn listen(&mut self, on: bool, memory: &SharedMemory) {
        self.registers.listen(0, on, memory);
    }
}

impl Disk {
    /// Carries out one request, all of it but its last descriptor; returns the answer, and how many bytes of the rest
    /// were written to.
    fn answer(&mut self, descriptors: &[Descriptor], memory: &SharedView) -> (u8, u32) {
        let (answer, written) = match self.carry_out(descriptors, memory) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Failure::Disk) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Failure::Memory(error)) => {
                if let Some(refused) = ViewError::of(&error) {
                    self.served.refused += 1;
                    self.served.refused_address = refused.gpa().0;
                }
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        (answer as u8, written)
    }

    fn carry_out(&mut self, descriptors: &[Descriptor], memory: &SharedView) -> Result<u32, Failure> {
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
        memory: &SharedView,
    ) -> Result<u32, Failure> {
        let len: u64 = data.iter().map(|descriptor| u64::from(descriptor.len())).sum();
        let start = sector.checked_mul(SECTOR);
        let end = start.and_then(|start| start.checked_add(len));
        let fits = end.is_some_and(|end| end <= self.sectors * SECTOR) && len.is_multiple_of(SECTOR);
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
