//! What a pool keeps of each queue.

use super::block::{CLASSES, slot_len};
use atomic_waker::AtomicWaker;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, Ordering::SeqCst};
use core::task::Waker;

/// How many free slots of one size a queue has at hand at most.
pub(super) const WINDOW_SLOTS: usize = 256;

/// The bookkeeping of a queue, 12 KiB in private memory: a guest keeps as many in a static as its pool may have queues.
#[derive(Debug)]
pub struct QueueRecord {
    account: Account,
    windows: UnsafeCell<Windows>,
}

// SAFETY: `windows` is reached only through the one `&mut` of whoever has claimed the record, see `claim`.
unsafe impl Sync for QueueRecord {}

/// What others than the queue's owner see of it.
#[derive(Debug)]
#[repr(align(128))]
struct Account {
    claimed: AtomicBool,
    /// The bytes of what was released from other CPUs since the owner looked last.
    returned: AtomicU64,
    /// The bytes that the last owner had not got back when he left.
    left: AtomicU64,
    waiting: AtomicU8,
    waker: AtomicWaker,
}

/// What a queue waits for.
pub(super) mod waiting {
    pub(in super::super) const NOTHING: u8 = 0;
    /// Its own buffers.
    pub(in super::super) const LIMIT: u8 = 1;
    /// Anybody's.
    pub(in super::super) const POOL: u8 = 2;
}

/// The free slots that a queue has at hand, for each class.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Windows {
    cursors: [Cursor; CLASSES],
    slots: [[u32; WINDOW_SLOTS]; CLASSES],
}

/// Where a window is in its slots. Sixteen bytes, so that finding one takes a shift.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor {
    /// How many slots have left the window and come into it, modulo 2^32.
    head: u32,
    tail: u32,
    /// How many there may be before some go back to the pool.
    most: u32,
    /// The block that slots came from last.
    pub(super) prefer: u32,
}

/// Free slots in the order in which they came back, in units of 256 bytes from the pool's beginning.
pub(super) struct Window<'w> {
    pub(super) cursor: &'w mut Cursor,
    slots: &'w mut [u32; WINDOW_SLOTS],
}

impl Windows {
    const fn new() -> Self {
        Self { cursors: [Cursor { head: 0, tail: 0, most: 0, prefer: 0 }; _], slots: [[0; _]; _] }
    }

    /// Has each window keep up to `bytes`.
    pub(super) fn set_most(&mut self, bytes: usize) {
        for (class, cursor) in self.cursors.iter_mut().enumerate() {
            cursor.most = (bytes / slot_len(class)).clamp(2, WINDOW_SLOTS) as u32;
        }
    }

    /// The window of a class, if there is one.
    #[inline]
    pub(super) fn get(&mut self, class: usize) -> Option<Window<'_>> {
        Some(Window { cursor: self.cursors.get_mut(class)?, slots: self.slots.get_mut(class)? })
    }

    /// Brings one of the older half of a window to the front.
    #[cold]
    #[inline(never)]
    pub(super) fn shuffle(&mut self, class: usize, random: fn() -> u64) {
        let Some(Window { cursor, slots }) = self.get(class) else { return };
        let half = cursor.len().div_ceil(2);
        let step = ((random() >> 32) * u64::from(half)) >> 32;
        let other = cursor.head.wrapping_add(step as u32);
        slots.swap(cursor.head as usize % WINDOW_SLOTS, other as usize % WINDOW_SLOTS);
    }

    /// How many bytes there are.
    pub(super) fn bytes(&self) -> u64 {
        self.cursors.iter().enumerate().map(|(class, cursor)| u64::from(cursor.len()) * slot_len(class) as u64).sum()
    }
}

impl Cursor {
    #[inline]
    fn len(&self) -> u32 {
        self.tail.wrapping_sub(self.head)
    }
}

impl Window<'_> {
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.cursor.head == self.cursor.tail
    }

    #[inline]
    pub(super) fn is_full(&self) -> bool {
        self.cursor.len() >= self.cursor.most
    }

    /// How many slots come from the pool at once, and are left when some go back.
    pub(super) fn half(&self) -> u32 {
        self.cursor.most / 2
    }

    pub(super) fn len(&self) -> u32 {
        self.cursor.len()
    }

    /// How many slots have left it.
    pub(super) fn turn(&self) -> u32 {
        self.cursor.head
    }

    /// Puts a slot at the end; there must be room.
    #[inline]
    pub(super) fn push(&mut self, slot: u32) {
        self.slots[self.cursor.tail as usize % WINDOW_SLOTS] = slot;
        self.cursor.tail = self.cursor.tail.wrapping_add(1);
    }

    /// Takes the slot at the front; there must be one.
    #[inline]
    pub(super) fn pop(&mut self) -> u32 {
        let slot = self.slots[self.cursor.head as usize % WINDOW_SLOTS];
        self.cursor.head = self.cursor.head.wrapping_add(1);
        slot
    }
}

impl QueueRecord {
    /// The record of no queue.
    #[allow(clippy::new_without_default, reason = "it is for statics")]
    pub const fn new() -> Self {
        let account = Account {
            claimed: AtomicBool::new(false),
            returned: AtomicU64::new(0),
            left: AtomicU64::new(0),
            waiting: AtomicU8::new(waiting::NOTHING),
            waker: AtomicWaker::new(),
        };
        Self { account, windows: UnsafeCell::new(Windows::new()) }
    }

    /// Gives the record to a queue, with what it has of the pool already, unless another queue has it.
    #[allow(clippy::mut_from_ref, reason = "whoever claims it has it alone")]
    pub(super) fn claim(&self) -> Option<(&mut Windows, u64)> {
        let free = self.account.claimed.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok();
        // SAFETY: nobody else has claimed it, and who had it before has let go of it in `unclaim`.
        free.then(|| (unsafe { &mut *self.windows.get() }, self.account.left.load(Ordering::Relaxed)))
    }

    /// Takes the record back, with the bytes that are still to come back to it.
    ///
    /// # Safety
    /// The caller must have claimed it, and not use what [`QueueRecord::claim`] gave it any more.
    pub(super) unsafe fn unclaim(&self, left: u64) {
        self.account.left.store(left, Ordering::Relaxed);
        self.account.claimed.store(false, Ordering::Release);
    }

    /// Notes that so many bytes were released from another CPU.
    pub(super) fn credit(&self, bytes: u64, waiters: &AtomicU32) {
        self.account.returned.fetch_add(bytes, SeqCst);
        // In one order with `wait`: either this sees who waits, or he sees what has come back.
        if self.account.waiting.load(SeqCst) != waiting::NOTHING {
            self.wake(waiters);
        }
    }

    /// How many bytes were released from other CPUs since the last look.
    pub(super) fn collect(&self) -> u64 {
        self.account.returned.swap(0, SeqCst)
    }

    /// Has the queue wait for `what`; it must look once more afterwards.
    pub(super) fn wait(&self, what: u8, waker: &Waker, waiters: &AtomicU32) {
        self.account.waker.register(waker);
        self.set_waiting(what, waiters);
    }

    /// Notes what the queue waits for; returns what it was.
    pub(super) fn set_waiting(&self, what: u8, waiters: &AtomicU32) -> u8 {
        if what == waiting::POOL {
            waiters.fetch_add(1, SeqCst);
        }
        let before = self.account.waiting.swap(what, SeqCst);
        if before == waiting::POOL {
            waiters.fetch_sub(1, SeqCst);
        }
        before
    }

    /// Wakes the queue if it waits.
    pub(super) fn wake(&self, waiters: &AtomicU32) {
        if self.set_waiting(waiting::NOTHING, waiters) != waiting::NOTHING {
            self.account.waker.wake();
        }
    }

    /// Wakes the queue if it waits for what anybody gives back.
    pub(super) fn wake_for_pool(&self, waiters: &AtomicU32) {
        if self.account.waiting.load(SeqCst) == waiting::POOL {
            self.wake(waiters);
        }
    }
}
