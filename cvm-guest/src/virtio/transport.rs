//! A virtio transport without MMIO.

use crate::{DeviceRegisters, Machine};
use cvm_core::doorbell::DEVICE_SPACE;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{Error, PhysAddr, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Register offsets (virtio 1.2, section 4.2.2).
mod register {
    pub const MAGIC: u16 = 0x000;
    pub const VERSION: u16 = 0x004;
    pub const DEVICE_ID: u16 = 0x008;
    pub const DEVICE_FEATURES: u16 = 0x010;
    pub const DEVICE_FEATURES_SEL: u16 = 0x014;
    pub const DRIVER_FEATURES: u16 = 0x020;
    pub const DRIVER_FEATURES_SEL: u16 = 0x024;
    pub const QUEUE_SEL: u16 = 0x030;
    pub const QUEUE_NUM_MAX: u16 = 0x034;
    pub const QUEUE_NUM: u16 = 0x038;
    pub const QUEUE_READY: u16 = 0x044;
    pub const QUEUE_NOTIFY: u16 = 0x050;
    pub const INTERRUPT_STATUS: u16 = 0x060;
    pub const INTERRUPT_ACK: u16 = 0x064;
    pub const STATUS: u16 = 0x070;
    pub const QUEUE_DESC: u16 = 0x080;
    pub const QUEUE_DRIVER: u16 = 0x090;
    pub const QUEUE_DEVICE: u16 = 0x0a0;
    pub const CONFIG_GENERATION: u16 = 0x0fc;
    pub const CONFIG: u16 = 0x100;
}

/// "virt" in ASCII, little endian (virtio 1.2, section 4.2.2).
const MAGIC: u32 = 0x7472_6976;
/// The version of the register layout (virtio 1.2, section 4.2.2).
const VERSION: u32 = 2;

/// Why there is no device behind a doorbell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// The registers are not those of a virtio device.
    #[error("there is no virtio device: its magic is {0:#x}")]
    NoDevice(u32),
    /// They are, but of another version.
    #[error("the device speaks version {0}, not {VERSION}")]
    Version(u32),
    /// No driver can be meant by the device type.
    #[error("the device is of the unknown type {0}")]
    DeviceType(u32),
}

/// The transport of one device, whose registers are those of virtio-mmio behind a doorbell.
#[derive(Debug)]
pub struct DoorbellTransport<M: Machine> {
    registers: DeviceRegisters<M>,
    device_type: DeviceType,
}

impl<M: Machine> DoorbellTransport<M> {
    /// The device behind `registers`.
    ///
    /// # Errors
    /// [`TransportError`] if there is none that this transport knows.
    pub fn new(registers: DeviceRegisters<M>) -> core::result::Result<Self, TransportError> {
        match registers.read(register::MAGIC) {
            MAGIC => {}
            other => return Err(TransportError::NoDevice(other)),
        }
        match registers.read(register::VERSION) {
            VERSION => {}
            other => return Err(TransportError::Version(other)),
        }
        let id = registers.read(register::DEVICE_ID);
        let device_type = u8::try_from(id).ok().and_then(|id| DeviceType::try_from(id).ok());
        Ok(Self { registers, device_type: device_type.ok_or(TransportError::DeviceType(id))? })
    }

    fn write_long(&self, register: u16, value: u64) {
        self.registers.write(register, value as u32);
        self.registers.write(register + 4, (value >> 32) as u32);
    }
}

/// Where configuration ends, from its start.
const CONFIG_LEN: usize = (DEVICE_SPACE - register::CONFIG) as usize;

impl<M: Machine> Transport for DoorbellTransport<M> {
    fn device_type(&self) -> DeviceType {
        self.device_type
    }

    fn read_device_features(&mut self) -> u64 {
        let half = |select| {
            self.registers.write(register::DEVICE_FEATURES_SEL, select);
            u64::from(self.registers.read(register::DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    fn write_driver_features(&mut self, features: u64) {
        for select in [0, 1] {
            self.registers.write(register::DRIVER_FEATURES_SEL, select);
            self.registers.write(register::DRIVER_FEATURES, (features >> (32 * select)) as u32);
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.registers.write(register::QUEUE_SEL, queue.into());
        self.registers.read(register::QUEUE_NUM_MAX)
    }

    fn notify(&mut self, queue: u16) {
        self.registers.write(register::QUEUE_NOTIFY, queue.into());
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(self.registers.read(register::STATUS))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.registers.write(register::STATUS, status.bits());
    }

    fn set_guest_page_size(&mut self, _guest_page_size: u32) {
        // The legacy layout alone has such a register.
    }

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(&mut self, queue: u16, size: u32, descriptors: PhysAddr, driver: PhysAddr, device: PhysAddr) {
        self.registers.write(register::QUEUE_SEL, queue.into());
        self.registers.write(register::QUEUE_NUM, size);
        self.write_long(register::QUEUE_DESC, descriptors);
        self.write_long(register::QUEUE_DRIVER, driver);
        self.write_long(register::QUEUE_DEVICE, device);
        self.registers.write(register::QUEUE_READY, 1);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.registers.write(register::QUEUE_SEL, queue.into());
        self.registers.write(register::QUEUE_READY, 0);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.registers.write(register::QUEUE_SEL, queue.into());
        self.registers.read(register::QUEUE_READY) != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let status = self.registers.read(register::INTERRUPT_STATUS);
        if status != 0 {
            self.registers.write(register::INTERRUPT_ACK, status);
        }
        InterruptStatus::from_bits_truncate(status)
    }

    fn read_config_generation(&self) -> u32 {
        self.registers.read(register::CONFIG_GENERATION)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        let mut value = T::new_zeroed();
        let bytes = value.as_mut_bytes();
        if offset.checked_add(bytes.len()).is_none_or(|end| end > CONFIG_LEN) {
            return Err(Error::ConfigSpaceTooSmall);
        }
        for (at, byte) in (offset..).zip(bytes) {
            // Registers are read in whole words only, each for the first of its bytes.
            let word = self.registers.read(register::CONFIG + (at & !3) as u16);
            *byte = word.to_le_bytes()[at & 3];
        }
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(&mut self, offset: usize, value: T) -> Result<()> {
        let (words, rest) = value.as_bytes().as_chunks::<4>();
        if !offset.is_multiple_of(4) || !rest.is_empty() {
            return Err(Error::Unsupported);
        }
        if offset.checked_add(size_of::<T>()).is_none_or(|end| end > CONFIG_LEN) {
            return Err(Error::ConfigSpaceTooSmall);
        }
        for (index, word) in words.iter().enumerate() {
            self.registers.write(register::CONFIG + (offset + 4 * index) as u16, u32::from_le_bytes(*word));
        }
        Ok(())
    }
}
