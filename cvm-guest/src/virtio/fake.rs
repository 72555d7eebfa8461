//! A device whose every answer is up to a test: it sees registers and the pool, as a host does.

#![allow(unsafe_code, reason = "the trait has unsafe methods")]

use super::{DeviceQueue, DoorbellTransport};
use crate::pool::tests::bare;
use crate::{Machine, Platform, Pool, PoolOptions, Queue, QueueOptions, SharedRegion};
use cvm_core::boot::{self, BootPage};
use cvm_core::doorbell::{Transport, device_base};
use cvm_core::{Gpa, GpaRange, Side};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use zerocopy::FromZeros;

/// How many entries the queues have at most.
const QUEUE_SIZE: u32 = 16;

/// A queue as the driver has set it up, and how far it is.
#[derive(Debug, Clone, Copy, Default)]
struct Rings {
    size: u32,
    addresses: [u64; 3],
    ready: u32,
    seen: u16,
    used: u16,
}

/// A descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub next: Option<u16>,
}

/// The host.
#[derive(Debug)]
pub struct Host {
    device_type: u32,
    pool: &'static Pool,
    selected: Cell<u32>,
    rings: RefCell<[Rings; 2]>,
    status: Cell<u32>,
    features_selected: Cell<u32>,
    /// What is put into the used ring of the queue that the driver notifies next: an entry each time.
    pub answers: RefCell<VecDeque<(u32, u32)>>,
}

impl Host {
    /// A host whose device is of this type, and a transport to it.
    pub fn new(device_type: u32, pool: &'static Pool) -> (&'static Self, DoorbellTransport<&'static &'static Self>) {
        let host: &'static Self = Box::leak(Box::new(Self {
            device_type,
            pool,
            selected: Cell::default(),
            rings: RefCell::default(),
            status: Cell::default(),
            features_selected: Cell::default(),
            answers: RefCell::default(),
        }));
        let boot = BootPage { magic: boot::MAGIC, transport: Transport::Doorbell as u32, ..BootPage::new_zeroed() };
        let platform: &'static Platform<&'static Self> =
            Box::leak(Box::new(Platform::new(&boot, host, |_| false).unwrap()));
        (host, DoorbellTransport::new(platform.device(0).unwrap()).unwrap())
    }

    fn read_pool<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.pool.read(self.pool.offset(Gpa(address)).unwrap(), &mut bytes).unwrap();
        bytes
    }

    /// Writes into shared memory.
    pub fn write_pool(&self, address: u64, bytes: &[u8]) {
        self.pool.write(self.pool.offset(Gpa(address)).unwrap(), bytes);
    }

    /// Where the rings of a queue begin.
    pub fn rings(&self, queue: usize) -> u64 {
        self.rings.borrow()[queue].addresses[0]
    }

    /// The next chain that the driver has made available, if any: its head.
    pub fn next(&self, queue: usize) -> Option<u16> {
        let rings = &mut self.rings.borrow_mut()[queue];
        let [_, available, _] = rings.addresses;
        if u16::from_le_bytes(self.read_pool(available + 2)) == rings.seen {
            return None;
        }
        let slot = u64::from(rings.seen) % u64::from(rings.size);
        rings.seen = rings.seen.wrapping_add(1);
        Some(u16::from_le_bytes(self.read_pool(available + 4 + 2 * slot)))
    }

    /// A descriptor of the table.
    pub fn descriptor(&self, queue: usize, index: u16) -> Descriptor {
        let [table, ..] = self.rings.borrow()[queue].addresses;
        let bytes: [u8; 16] = self.read_pool(table + 16 * u64::from(index));
        let field = |from: usize, len: usize| {
            bytes[from..from + len].iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
        };
        let next = (field(12, 2) & 1 == 1).then_some(field(14, 2) as u16);
        Descriptor { address: field(0, 8), len: field(8, 4) as u32, next }
    }

    /// Puts an entry into a used ring, whatever it says.
    pub fn answer(&self, queue: usize, id: u32, len: u32) {
        let rings = &mut self.rings.borrow_mut()[queue];
        let [_, _, used] = rings.addresses;
        let slot = u64::from(rings.used) % u64::from(rings.size);
        self.write_pool(used + 4 + 8 * slot, &id.to_le_bytes());
        self.write_pool(used + 8 + 8 * slot, &len.to_le_bytes());
        rings.used = rings.used.wrapping_add(1);
        self.write_pool(used + 2, &rings.used.to_le_bytes());
    }

    /// Sets the index of a used ring without an entry.
    pub fn jump(&self, queue: usize, by: u16) {
        let rings = &mut self.rings.borrow_mut()[queue];
        rings.used = rings.used.wrapping_add(by);
        self.write_pool(rings.addresses[2] + 2, &rings.used.to_le_bytes());
    }
}

impl Machine for Host {
    unsafe fn write(&self, register: u16, value: u32) {
        let offset = register - device_base(0);
        if offset == 0x050 {
            let answer = self.answers.borrow_mut().pop_front();
            return answer.into_iter().for_each(|(id, len)| self.answer(value as usize, id, len));
        }
        let mut all = self.rings.borrow_mut();
        let Some(rings) = all.get_mut(self.selected.get() as usize) else { return };
        match offset {
            0x014 => self.features_selected.set(value),
            0x030 => self.selected.set(value),
            0x038 => rings.size = value,
            0x044 => rings.ready = value,
            0x070 => self.status.set(value),
            0x080..=0x0a4 => {
                let address = &mut rings.addresses[usize::from(offset - 0x080) / 0x10];
                let shift = u32::from(offset % 0x10) * 8;
                *address = *address & !(0xffff_ffff << shift) | u64::from(value) << shift;
            }
            _ => {}
        }
    }

    fn read(&self, register: u16) -> u32 {
        match register - device_base(0) {
            0x000 => 0x7472_6976,
            0x004 => 2,
            0x008 => self.device_type,
            // Virtio 1 only.
            0x010 => u32::from(self.features_selected.get() == 1),
            0x034 => QUEUE_SIZE,
            0x044 => self.rings.borrow()[self.selected.get() as usize].ready,
            0x070 => self.status.get(),
            // The disk's size in sectors; the network card's address begins with it.
            0x100 => 64,
            _ => 0,
        }
    }

    unsafe fn convert(&self, range: GpaRange, to: Side) -> u64 {
        panic!("no driver makes {range} {to}")
    }
}

/// A device queue of its own for each test, of a pool of one chunk: the functions of a `Hal` have no `self`.
macro_rules! device_queue {
    ($name:ident) => {
        struct $name;

        impl $crate::virtio::DeviceQueue for $name {
            fn with<R>(work: impl FnOnce(&mut $crate::Queue<'static>) -> R) -> R {
                static QUEUE: spin::Mutex<Option<$crate::Queue<'static>>> = spin::Mutex::new(None);
                let fresh = || $crate::virtio::fake::queue($crate::pool::tests::region(0));
                work(QUEUE.lock().get_or_insert_with(fresh))
            }
        }
    };
}
pub(crate) use device_queue;

/// A queue of a pool that has this chunk.
pub fn queue(region: SharedRegion) -> Queue<'static> {
    let pool: &Pool = Box::leak(Box::new(bare(1, 1, PoolOptions::default())));
    pool.add(region).unwrap();
    pool.queue(QueueOptions::default()).unwrap()
}

/// The pool of a test.
pub fn pool<Q: DeviceQueue>() -> &'static Pool {
    Q::with(|queue| queue.pool())
}

/// How many bytes of a test's pool are in slots that were not given back: rings, and what the device has.
pub fn in_use<Q: DeviceQueue>() -> u64 {
    let usage = Q::with(|queue| queue.usage());
    usage.taken - usage.ready
}

/// Whether an address is one of the pool's.
pub fn is_shared(pool: &Pool, address: u64) -> bool {
    pool.offset(Gpa(address)).is_some()
}
