//! Pins: how a conversion knows that nobody still looks at a page which it takes away.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Counts the holders of a shared view, by the phase that they came in.
///
/// A holder takes its pin first and reads the page-state map after; the engine changes the map first and looks at the
/// pins after. All of that is sequentially consistent, so one of the two sees the other.
#[derive(Debug, Default)]
pub(super) struct Pins {
    phase: AtomicUsize,
    /// How many came in an even and in an odd phase.
    held: [AtomicUsize; 2],
}

impl Pins {
    /// A pin: as long as it lives, no page that its holder sees as shared leaves the shared side.
    pub(super) fn pin(self: &Arc<Self>) -> Pin {
        loop {
            let phase = self.phase.load(Ordering::SeqCst);
            self.held[phase % 2].fetch_add(1, Ordering::SeqCst);
            if self.phase.load(Ordering::SeqCst) == phase {
                return Pin { pins: Arc::clone(self), phase };
            }
            // The engine may have looked in between and missed this one.
            self.held[phase % 2].fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Waits until the pins are gone that were taken before the call, at most until `deadline`; returns whether they
    /// are. Pins that come later do not matter. Only one thread may drain at a time.
    pub(super) fn drain(&self, deadline: Instant) -> bool {
        let phase = self.phase.load(Ordering::SeqCst);
        // What is left of the phase before, when an earlier call has given up.
        if !self.wait(phase + 1, deadline) {
            return false;
        }
        self.phase.store(phase.wrapping_add(1), Ordering::SeqCst);
        self.wait(phase, deadline)
    }

    fn wait(&self, phase: usize, deadline: Instant) -> bool {
        while self.held[phase % 2].load(Ordering::SeqCst) > 0 {
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
pub(super) struct Pin {
    pins: Arc<Pins>,
    phase: usize,
}

impl Clone for Pin {
    /// A pin that is as old as this one, so that who waits for this one waits for both.
    fn clone(&self) -> Self {
        self.pins.held[self.phase % 2].fetch_add(1, Ordering::SeqCst);
        Self { pins: Arc::clone(&self.pins), phase: self.phase }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.pins.held[self.phase % 2].fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(30)
    }

    #[test]
    fn earlier_pins_and_their_clones_are_waited_for_and_later_ones_are_not() {
        let pins = Arc::new(Pins::default());
        assert!(pins.drain(soon()));
        let early = pins.pin();
        assert!(!pins.drain(soon()));
        let late = pins.pin();
        assert!(!pins.drain(soon()), "the early pin is still there");
        let clone = early.clone();
        drop(early);
        assert!(!pins.drain(soon()), "its clone is still there");
        drop(clone);
        drop(late);
        assert!(pins.drain(soon()));
    }

    #[test]
    fn holders_that_come_and_go_all_the_time_do_not_starve_a_conversion() {
        let pins = Arc::new(Pins::default());
        let stop = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    // Each takes the next pin before it drops the one before, so that there is always one.
                    let mut pin = pins.pin();
                    while stop.load(Ordering::SeqCst) == 0 {
                        pin = pins.pin();
                        std::hint::spin_loop();
                    }
                    drop(pin);
                });
            }
            for round in 0..20 {
                let patient = Instant::now() + Duration::from_secs(20);
                if !pins.drain(patient) {
                    stop.store(1, Ordering::SeqCst);
                    panic!("starved in round {round}");
                }
            }
            stop.store(1, Ordering::SeqCst);
        });
    }
}
