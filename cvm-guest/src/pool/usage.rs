//! What can be seen of a pool.

use super::block::{CLASSES, Purpose, slot_len, slots};
use super::{BLOCK_LEN, Pool};
use core::sync::atomic::Ordering::Relaxed;

/// What a queue has done and has. Counts are since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct QueueUse {
    /// Buffers made.
    pub maps: u64,
    /// Bytes copied into buffers.
    pub to_device: u64,
    /// Bytes copied out of buffers.
    pub from_device: u64,
    /// Bytes lent.
    pub lent: u64,
    /// How often slots came from the pool.
    pub refills: u64,
    /// How often slots went back to it.
    pub spills: u64,
    /// How often somebody had to wait for room.
    pub waits: u64,
    /// How often a buffer was refused because nothing was free.
    pub exhausted: u64,
    /// How often a buffer was refused because of the limit.
    pub limited: u64,
    /// Bytes of slots and runs that it has: in buffers and at hand. What was released from other CPUs counts until the
    /// next refill.
    pub taken: u64,
    /// The most that this was.
    pub high_water: u64,
    /// Bytes of slots at hand.
    pub ready: u64,
}

/// What a pool has, as it was found block by block: others may have changed it meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PoolUse {
    /// Chunks of [`CHUNK_LEN`](super::CHUNK_LEN).
    pub chunks: usize,
    /// Bytes of shared memory.
    pub bytes: u64,
    /// Of these, in blocks of which nobody has anything.
    pub empty: u64,
    /// Of these, in runs.
    pub runs: u64,
    /// Blocks that are cut into slots, by the size of these: 256 B first, 256 KiB last.
    pub classes: [ClassUse; CLASSES],
    /// Bytes that queues have, and the most that they had: see [`QueueUse::taken`].
    pub taken: u64,
    /// The most that this was.
    pub high_water: u64,
    /// How often something was refused because nothing was free.
    pub exhausted: u64,
    /// How many queues wait for others to give something back.
    pub waiting: u32,
    /// How many buffers were given back that were not taken, or belong to another pool: 0, unless drivers mix them up.
    pub strays: u64,
}

/// The slots of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClassUse {
    /// The size of a slot, in bytes.
    pub slot_len: usize,
    /// How many there are in blocks of which somebody has something.
    pub slots: u64,
    /// How many of them queues have, in buffers or at hand.
    pub taken: u64,
}

impl ClassUse {
    /// Bytes that are free, but for slots of this size only: the pool's fragmentation.
    pub fn fragmented(&self) -> u64 {
        self.slots.saturating_sub(self.taken) * self.slot_len as u64
    }
}

impl Pool {
    /// What there is, and who has how much.
    pub fn usage(&self) -> PoolUse {
        let shelf = &self.shelf.0;
        let mut usage = PoolUse {
            chunks: self.chunks(),
            taken: shelf.taken.load(Relaxed),
            high_water: shelf.high_water.load(Relaxed),
            exhausted: shelf.exhausted.load(Relaxed),
            waiting: self.waiters.0.load(Relaxed),
            strays: shelf.strays.load(Relaxed),
            ..PoolUse::default()
        };
        for (class, of_class) in usage.classes.iter_mut().enumerate() {
            of_class.slot_len = slot_len(class);
        }
        for block in (0..self.extent()).filter_map(|index| self.block(index)) {
            let len = BLOCK_LEN as u64;
            match block.purpose() {
                Purpose::Absent => continue,
                Purpose::Empty => usage.empty += len,
                Purpose::Run => usage.runs += len,
                Purpose::Slots { class, taken } => {
                    usage.classes[class].slots += u64::from(slots(class));
                    usage.classes[class].taken += u64::from(taken);
                }
            }
            usage.bytes += len;
        }
        usage
    }
}
