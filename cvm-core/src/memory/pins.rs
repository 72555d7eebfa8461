//! Pins: how a conversion knows that nobody still looks at a page which it takes away.

use super::sync::{AtomicUsize, Mutex, Ordering, now, order, pause};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// Those who may look at a shared view, and the phase that they come in.
///
/// Each holder counts its pins by itself, so that holders do not wait for each other's memory. A holder takes its pin
/// first and reads the page-state map after; the engine changes the map first and looks at the pins after. All of that
/// is sequentially consistent, so one of the two sees the other.
#[derive(Debug, Default)]
pub(super) struct Pins {
    phase: AtomicUsize,
    /// Whoever counts pins, as long as he or a pin of his is there.
    holders: Mutex<Vec<Arc<Counts>>>,
    /// Held while somebody drains.
    draining: Mutex<()>,
}

/// The pins of one holder, alone in its cache lines (two, which processors fetch together).
#[derive(Debug)]
#[repr(align(128))]
struct Counts {
    name: String,
    /// How many came in an even and in an odd phase.
    held: [AtomicUsize; 2],
}

/// Somebody who looks at `T`, and pins it for that.
#[derive(Debug)]
pub(super) struct Holder<T> {
    inner: Arc<Held<T>>,
}

#[derive(Debug)]
#[repr(align(128))]
struct Held<T> {
    value: T,
    pins: Arc<Pins>,
    counts: Arc<Counts>,
}

impl<T: Clone> Holder<T> {
    /// A holder called `name`.
    pub(super) fn new(pins: &Arc<Pins>, name: String, value: T) -> Self {
        let counts = Arc::new(Counts { name, held: Default::default() });
        let mut holders = pins.holders.lock().unwrap_or_else(PoisonError::into_inner);
        // The others have nobody left but this list.
        holders.retain(|holder| Arc::strong_count(holder) > 1);
        holders.push(Arc::clone(&counts));
        drop(holders);
        Self { inner: Arc::new(Held { value, pins: Arc::clone(pins), counts }) }
    }

    pub(super) fn name(&self) -> &str {
        &self.inner.counts.name
    }

    pub(super) fn value(&self) -> &T {
        &self.inner.value
    }

    pub(super) fn pins(&self) -> &Arc<Pins> {
        &self.inner.pins
    }

    /// A pin: as long as it lives, no page that its holder sees as shared leaves the shared side.
    pub(super) fn pin(&self) -> Pin<T> {
        let Held { pins, counts, .. } = &*self.inner;
        loop {
            let phase = pins.phase.load(Ordering::SeqCst);
            counts.held[phase % 2].fetch_add(1, Ordering::SeqCst);
            order();
            if pins.phase.load(Ordering::SeqCst) == phase {
                return Pin { held: Arc::clone(&self.inner), phase };
            }
            // The engine may have looked in between and missed this one.
            counts.held[phase % 2].fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Pins {
    /// Waits until the pins are gone that were taken before the call, at most for `patience`. Pins that come later do not
    /// matter.
    ///
    /// # Errors
    /// The names of those who still have one.
    pub(super) fn drain(&self, patience: Duration) -> Result<(), Vec<String>> {
        let _draining = self.draining.lock().unwrap_or_else(PoisonError::into_inner);
        order();
        let phase = self.phase.load(Ordering::SeqCst);
        // What is left of the phase before, when an earlier call has given up.
        self.wait(phase.wrapping_add(1), patience)?;
        self.phase.store(phase.wrapping_add(1), Ordering::SeqCst);
        order();
        self.wait(phase, patience)
    }

    /// Waits for the pins of one phase. Who becomes a holder after this has looked takes its pins in a later one.
    fn wait(&self, phase: usize, patience: Duration) -> Result<(), Vec<String>> {
        let has_pins = |counts: &Arc<Counts>| counts.held[phase % 2].load(Ordering::SeqCst) > 0;
        let holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        // Mostly nobody, and then nothing is allocated and no clock is read.
        let mut left: Vec<_> = holders.iter().filter(|counts| has_pins(counts)).cloned().collect();
        drop(holders);
        if left.is_empty() {
            return Ok(());
        }
        let deadline = now() + patience;
        loop {
            left.retain(has_pins);
            if left.is_empty() {
                return Ok(());
            }
            if now() >= deadline {
                return Err(left.iter().map(|counts| counts.name.clone()).collect());
            }
            pause();
        }
    }
}

/// A pin of one holder.
#[derive(Debug)]
pub(super) struct Pin<T> {
    held: Arc<Held<T>>,
    phase: usize,
}

impl<T> Pin<T> {
    pub(super) fn value(&self) -> &T {
        &self.held.value
    }
}

impl<T> Clone for Pin<T> {
    /// A pin that is as old as this one, so that who waits for this one waits for both.
    fn clone(&self) -> Self {
        self.held.counts.held[self.phase % 2].fetch_add(1, Ordering::SeqCst);
        Self { held: Arc::clone(&self.held), phase: self.phase }
    }
}

impl<T> Drop for Pin<T> {
    fn drop(&mut self) {
        self.held.counts.held[self.phase % 2].fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    const SOON: Duration = Duration::from_millis(30);

    fn holder(pins: &Arc<Pins>, name: &str) -> Holder<()> {
        Holder::new(pins, name.into(), ())
    }

    #[test]
    fn earlier_pins_and_their_clones_are_waited_for_and_later_ones_are_not() {
        let pins = Arc::<Pins>::default();
        let (disk, net) = (holder(&pins, "disk"), holder(&pins, "net"));
        pins.drain(SOON).unwrap();
        let early = disk.pin();
        assert_eq!(pins.drain(SOON), Err(vec!["disk".into()]));
        let late = net.pin();
        assert_eq!(pins.drain(SOON), Err(vec!["disk".into()]), "the early pin is still there");
        let clone = early.clone();
        drop(early);
        drop(disk);
        assert_eq!(pins.drain(SOON), Err(vec!["disk".into()]), "its clone is still there, although its holder is not");
        drop(clone);
        drop(late);
        pins.drain(SOON).unwrap();
    }

    #[test]
    fn holders_that_are_gone_are_forgotten() {
        let pins = Arc::<Pins>::default();
        for _ in 0..100 {
            drop(holder(&pins, "passing"));
        }
        let _stays = holder(&pins, "stays");
        assert_eq!(pins.holders.lock().unwrap().len(), 1);
    }

    #[test]
    fn holders_that_come_and_go_all_the_time_do_not_starve_a_conversion() {
        let pins = Arc::<Pins>::default();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let holder = holder(&pins, "device");
                    // Each takes the next pin before it drops the one before, so that there is always one.
                    let mut pin = holder.pin();
                    while !stop.load(Ordering::SeqCst) {
                        pin = holder.pin();
                        std::hint::spin_loop();
                    }
                    drop(pin);
                });
            }
            let drained = (0..20).all(|_| pins.drain(Duration::from_secs(20)).is_ok());
            stop.store(true, Ordering::SeqCst);
            assert!(drained, "starved");
        });
    }
}

/// Every interleaving of a holder and an engine, within loom's bounds.
#[cfg(all(test, loom))]
mod model {
    use super::super::map::PageState;
    use super::*;
    use loom::sync::atomic::AtomicUsize as State;
    use loom::thread;

    /// A page-state map of one page, and the page: what the host may see there, or not any more.
    struct Page {
        state: State,
        private: State,
    }

    fn model(holders: usize, conversions: usize) {
        let mut model = loom::model::Builder::new();
        // Each turn of a pin or a drain takes one at most; more of them only repeat what was seen.
        model.preemption_bound = Some(3);
        model.check(move || {
            let pins = Arc::<Pins>::default();
            let page = Arc::new(Page { state: State::new(PageState::Shared as usize), private: State::new(0) });
            let readers: Vec<_> = (0..holders)
                .map(|_| {
                    let holder = Holder::new(&pins, "reader".into(), Arc::clone(&page));
                    thread::spawn(move || {
                        let pin = holder.pin();
                        let page = pin.value();
                        if page.state.load(Ordering::SeqCst) == PageState::Shared as usize {
                            assert_eq!(page.private.load(Ordering::SeqCst), 0, "a private page was seen");
                        }
                    })
                })
                .collect();
            for _ in 0..conversions {
                page.state.store(PageState::Converting as usize, Ordering::SeqCst);
                pins.drain(Duration::from_secs(1)).unwrap();
                page.private.store(1, Ordering::SeqCst);
                page.state.store(PageState::Private as usize, Ordering::SeqCst);
                // And back, so that a later conversion finds it shared.
                page.private.store(0, Ordering::SeqCst);
                page.state.store(PageState::Shared as usize, Ordering::SeqCst);
            }
            readers.into_iter().for_each(|reader| reader.join().unwrap());
        });
    }

    #[test]
    fn no_holder_sees_a_page_that_has_become_private() {
        model(2, 1);
    }

    #[test]
    fn nor_when_the_page_comes_and_goes() {
        model(1, 2);
    }
}
