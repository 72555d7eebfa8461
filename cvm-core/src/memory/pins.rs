//! Pins: how a conversion knows that nobody still looks at a page which it takes away.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Counts the holders of a shared view.
#[derive(Debug, Default)]
pub(super) struct Pins {
    held: AtomicUsize,
}

impl Pins {
    /// A pin: as long as it lives, no page that was shared when a holder looked leaves the shared side.
    ///
    /// The holder takes the pin first and reads the page-state map after; the engine changes the map first and reads
    /// the count after. All four are sequentially consistent, so one of the two sees the other.
    pub(super) fn pin(self: &Arc<Self>) -> Pin {
        self.held.fetch_add(1, Ordering::SeqCst);
        Pin(Arc::clone(self))
    }

    /// Waits until no pin is held, at most until `deadline`; returns whether there is none.
    pub(super) fn drain(&self, deadline: Instant) -> bool {
        while self.held.load(Ordering::SeqCst) > 0 {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_micros(20));
        }
        true
    }
}

/// One holder of the shared view.
#[derive(Debug)]
pub(super) struct Pin(Arc<Pins>);

impl Clone for Pin {
    fn clone(&self) -> Self {
        self.0.pin()
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::SeqCst);
    }
}
