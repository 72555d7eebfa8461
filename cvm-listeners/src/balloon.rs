//! Pages that the guest does not use for now, so that the host may have their memory.
//!
//! A host may discard shared pages only. Private ones it cannot touch: a guest gives those back by making them shared
//! first, which discards their private memory, and then putting them into the balloon.
//!
//! | what happens | a page in the balloon |
//! |---|---|
//! | the guest inflates again | is discarded again |
//! | the guest deflates | leaves it; its contents are what `discard` left, so zeros after a hole was punched |
//! | the guest makes it private | leaves it: the guest uses it again |
//! | that is not done | stays |
//! | the page is lost | leaves it |
//!
//! A page whose conversion is under way cannot be put in.

use crate::ranges::RangeSet;
use cvm_core::memory::{ConversionListener, Objection, SharedMemory};
use cvm_core::{Gpa, GpaRange, PageState, Side};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{fmt, io};

/// Why pages do not enter or leave the balloon.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// The host cannot discard what is not shared.
    #[error("{gpa} is not on the shared side, so only the guest can give it back")]
    NotShared {
        /// The first such page.
        gpa: Gpa,
    },
    /// The guest may ask again.
    #[error("a page of {range} is being converted")]
    Converting {
        /// What was asked for.
        range: GpaRange,
    },
    /// It cannot leave.
    #[error("a page of {range} is not in the balloon")]
    NotInside {
        /// What was asked for.
        range: GpaRange,
    },
    /// The memory may have been freed in part; nothing has entered the balloon.
    #[error("failed to discard {range}")]
    Discard {
        /// What was asked for.
        range: GpaRange,
        /// What went wrong.
        source: io::Error,
    },
}

#[derive(Debug, Default)]
struct State {
    inside: RangeSet,
    /// Between `prepare` and what follows it.
    converting: RangeSet,
}

/// Keeps which pages the guest has given back. See the [module](self).
///
/// The device model calls [`inflate`](Balloon::inflate) and the like with what a guest wrote into its queues, checked to
/// be pages; the VM's listeners contain the balloon too.
pub struct Balloon<F> {
    memory: SharedMemory,
    discard: F,
    state: Mutex<State>,
}

impl<F> fmt::Debug for Balloon<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Balloon").field("state", &self.state).finish_non_exhaustive()
    }
}

impl<F: Fn(GpaRange) -> io::Result<()> + Send + Sync> Balloon<F> {
    /// An empty balloon. `discard` frees the shared memory behind pages, for example by `fallocate` with
    /// `FALLOC_FL_PUNCH_HOLE` on [`Backing::file`](cvm_core::memory::Backing::file), or fails; it must not convert.
    pub fn new(memory: &SharedMemory, discard: F) -> Self {
        Self { memory: memory.named("balloon"), discard, state: Mutex::default() }
    }

    /// Takes pages that the guest does not use, and frees their memory. Contents are lost.
    ///
    /// # Errors
    /// Not all of them are shared, one is being converted, or the discard fails.
    pub fn inflate(&self, range: GpaRange) -> Result<(), BalloonError> {
        let mut state = self.lock();
        self.free(&state, range)?;
        state.inside.insert(range);
        Ok(())
    }

    /// Frees the memory of pages that the guest does not use at the moment, without keeping them: free page reporting
    /// (virtio 1.2, Traditional Memory Balloon Device). Contents are lost.
    ///
    /// # Errors
    /// As [`inflate`](Balloon::inflate).
    pub fn report(&self, range: GpaRange) -> Result<(), BalloonError> {
        self.free(&self.lock(), range)
    }

    /// Gives pages back to the guest; their memory comes with the first access.
    ///
    /// # Errors
    /// Not all of them are in the balloon.
    pub fn deflate(&self, range: GpaRange) -> Result<(), BalloonError> {
        let mut state = self.lock();
        if !state.inside.contains(range) {
            return Err(BalloonError::NotInside { range });
        }
        state.inside.remove(range);
        Ok(())
    }

    /// How many pages are in the balloon: what a guest reads as `actual`.
    pub fn pages(&self) -> u64 {
        self.lock().inside.pages()
    }

    /// What is in the balloon, by address.
    pub fn ranges(&self) -> Vec<GpaRange> {
        self.lock().inside.runs().collect()
    }

    /// Discards `range`. A conversion that begins meanwhile waits for the lock, and one that began before is known, so
    /// the pages stay shared.
    fn free(&self, state: &State, range: GpaRange) -> Result<(), BalloonError> {
        if state.converting.intersects(range) {
            return Err(BalloonError::Converting { range });
        }
        if let Some(gpa) = self.memory.map().first_not_in(range, PageState::Shared) {
            return Err(BalloonError::NotShared { gpa });
        }
        (self.discard)(range).map_err(|source| BalloonError::Discard { range, source })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn left(&self, range: GpaRange) {
        let mut state = self.lock();
        state.converting.remove(range);
        state.inside.remove(range);
    }
}

impl<F: Fn(GpaRange) -> io::Result<()> + Send + Sync> ConversionListener for Balloon<F> {
    fn name(&self) -> &str {
        "balloon"
    }

    fn prepare(&self, range: GpaRange, _to: Side) -> Result<(), Objection> {
        self.lock().converting.insert(range);
        Ok(())
    }

    fn committed(&self, range: GpaRange, _to: Side) {
        self.left(range);
    }

    fn aborted(&self, range: GpaRange, _to: Side) {
        self.lock().converting.remove(range);
    }

    fn poisoned(&self, range: GpaRange) {
        self.left(range);
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests;
