//! Pins: how a conversion knows that no device still uses a page that becomes private.

use super::sync::{AtomicUsize, Counted, Deadline, Mutex, MutexGuard, Ordering, fence, full_fence, pause};
use std::sync::{Arc, PoisonError, TryLockError};

/// The holders of a shared view, and the phase that counts their pins.
///
/// Each holder has two tokens, and a pin is one more that shares a token, so that the token's count says how many pins
/// there are, and holders do not wait for each other's memory. A holder takes its pin first and reads the page-state map
/// after; the engine changes the map first and reads the counts after. Both have a full fence in between: either the engine
/// counts the pin, or its holder sees what has become of the map. The engine changes nothing for that, so that those who
/// convert at once do not wait for each other's memory either.
///
/// The phase says which token the pins to come share. A conversion that waits for pins changes it, so that pins which are taken
/// meanwhile share the other token. A holder that reads the old phase late, and shares the old token, is waited for too.
#[derive(Debug)]
pub(super) struct Pins<T> {
    phase: AtomicUsize,
    /// The holders that exist, and those that are gone but for a pin.
    holders: Mutex<Vec<Arc<Tokens<T>>>>,
    /// Held while a conversion waits for pins.
    draining: Mutex<()>,
}

impl<T> Default for Pins<T> {
    fn default() -> Self {
        Self { phase: AtomicUsize::new(0), holders: Mutex::new(Vec::new()), draining: Mutex::new(()) }
    }
}

/// A token's value, alone in its cache lines (two, which processors fetch together): each access of a device counts its token,
/// and two devices take up to twice as long if their counts share a line.
#[derive(Debug)]
#[repr(align(128))]
struct Padded<T>(T);

/// The tokens of one holder.
#[derive(Debug)]
struct Tokens<T> {
    name: String,
    phases: [Counted<Padded<T>>; 2],
}

impl<T> Tokens<T> {
    /// How many pins share the token of a phase.
    fn pins(&self, phase: usize) -> usize {
        let pins = self.phases[phase % 2].count() - 1;
        // And what those did who are gone has happened.
        fence(Ordering::Acquire);
        pins
    }

    fn has_pins(&self) -> bool {
        self.pins(0) + self.pins(1) > 0
    }
}

/// Somebody who looks at `T`, and pins it for that.
#[derive(Debug)]
pub(super) struct Holder<T> {
    tokens: Arc<Tokens<T>>,
    pins: Arc<Pins<T>>,
}

impl<T: Clone> Holder<T> {
    /// A holder called `name`.
    pub(super) fn new(pins: &Arc<Pins<T>>, name: String, value: T) -> Self {
        let phases = [(); 2].map(|()| Counted::new(Padded(value.clone())));
        let tokens = Arc::new(Tokens { name, phases });
        let mut holders = pins.lock_holders();
        // The list has the last reference to the tokens of a holder that is gone.
        holders.retain(|holder| {
            let is_there = Arc::strong_count(holder) > 1;
            // All pins of a holder that is gone were taken before.
            fence(Ordering::Acquire);
            is_there || holder.has_pins()
        });
        holders.push(Arc::clone(&tokens));
        drop(holders);
        Self { tokens, pins: Arc::clone(pins) }
    }

    pub(super) fn name(&self) -> &str {
        &self.tokens.name
    }

    pub(super) fn value(&self) -> &T {
        &self.tokens.phases[0].0
    }

    pub(super) fn pins(&self) -> &Arc<Pins<T>> {
        &self.pins
    }

    /// A pin: as long as it lives, no page that its holder sees as shared leaves the shared side.
    #[inline]
    pub(super) fn pin(&self) -> Pin<T> {
        let phase = self.pins.phase.load(Ordering::Relaxed);
        let token = self.tokens.phases[phase % 2].clone();
        full_fence();
        Pin { token }
    }
}

impl<T> Pins<T> {
    /// Waits until the pins are gone that were taken before the call, until `deadline` at most. Pins that come later do not
    /// matter.
    ///
    /// # Errors
    /// The names of the holders that still have a pin.
    pub(super) fn drain(&self, deadline: Deadline) -> Result<(), Vec<String>> {
        let holders = self.lock_holders();
        // A holder that is made after this sees the map as it is now.
        full_fence();
        // Mostly no holder has a pin, and then there is nothing to wait for.
        let left: Vec<_> = holders.iter().filter(|holder| holder.has_pins()).cloned().collect();
        drop(holders);
        if left.is_empty() {
            return Ok(());
        }
        // An earlier conversion may wait for pins until its own deadline.
        let Some(_draining) = self.lock_draining(deadline) else { return Err(names(&left)) };
        let phase = self.phase.load(Ordering::Relaxed);
        let next = phase.wrapping_add(1);
        // What is left of the phase before, when an earlier call has given up.
        wait(left.clone(), next, deadline)?;
        self.phase.store(next, Ordering::Relaxed);
        wait(left, phase, deadline)
    }

    fn lock_holders(&self) -> MutexGuard<'_, Vec<Arc<Tokens<T>>>> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a conversion that waits for pins holds.
    #[cfg(test)]
    pub(super) fn lock_for_drain(&self) -> MutexGuard<'_, ()> {
        self.draining.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_draining(&self, deadline: Deadline) -> Option<MutexGuard<'_, ()>> {
        loop {
            match self.draining.try_lock() {
                Ok(guard) => return Some(guard),
                Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) if deadline.is_over() => return None,
                Err(TryLockError::WouldBlock) => pause(),
            }
        }
    }
}

fn names<T>(holders: &[Arc<Tokens<T>>]) -> Vec<String> {
    holders.iter().map(|holder| holder.name.clone()).collect()
}

/// Waits until none of `holders` has a pin of this phase.
fn wait<T>(mut holders: Vec<Arc<Tokens<T>>>, phase: usize, deadline: Deadline) -> Result<(), Vec<String>> {
    loop {
        holders.retain(|holder| holder.pins(phase) > 0);
        if holders.is_empty() {
            return Ok(());
        }
        if deadline.is_over() {
            return Err(names(&holders));
        }
        pause();
    }
}

/// A pin of one holder; a clone of it belongs to the same phase, so that who waits for this one waits for both.
#[derive(Debug)]
pub(super) struct Pin<T> {
    token: Counted<Padded<T>>,
}

impl<T> Clone for Pin<T> {
    fn clone(&self) -> Self {
        Self { token: self.token.clone() }
    }
}

impl<T> Pin<T> {
    #[inline]
    pub(super) fn value(&self) -> &T {
        &self.token.0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    /// A deadline that a test meets if nothing gives up its pins.
    fn soon() -> Deadline {
        Deadline::after(Duration::from_millis(30))
    }

    fn holder(pins: &Arc<Pins<()>>, name: &str) -> Holder<()> {
        Holder::new(pins, name.into(), ())
    }

    #[test]
    fn earlier_pins_and_their_clones_are_waited_for_and_later_ones_are_not() {
        let pins = Arc::<Pins<_>>::default();
        let (disk, net) = (holder(&pins, "disk"), holder(&pins, "net"));
        pins.drain(soon()).unwrap();
        let early = disk.pin();
        assert_eq!(pins.drain(soon()), Err(vec!["disk".into()]));
        let late = net.pin();
        assert_eq!(pins.drain(soon()), Err(vec!["disk".into()]), "the early pin is still there");
        let clone = early.clone();
        drop(early);
        drop(disk);
        assert_eq!(
            pins.drain(soon()),
            Err(vec!["disk".into()]),
            "its clone is still there, although its holder is not"
        );
        drop(clone);
        drop(late);
        pins.drain(soon()).unwrap();
    }

    #[test]
    fn holders_that_are_gone_are_forgotten() {
        let pins = Arc::<Pins<_>>::default();
        for _ in 0..100 {
            drop(holder(&pins, "passing"));
        }
        let _stays = holder(&pins, "stays");
        assert_eq!(pins.holders.lock().unwrap().len(), 1);
    }

    #[test]
    fn holders_that_come_and_go_all_the_time_do_not_starve_a_conversion() {
        let pins = Arc::<Pins<_>>::default();
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
            let drained = (0..20).all(|_| pins.drain(Deadline::after(Duration::from_secs(120))).is_ok());
            stop.store(true, Ordering::SeqCst);
            assert!(drained, "starved");
        });
    }
}

/// Every interleaving of a holder and an engine, within loom's bounds.
#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::sync::atomic::AtomicUsize as State;
    use loom::thread;

    /// A page-state map of one page, and the page: what the host may see there, or not any more.
    struct Page {
        shared: State,
        private: State,
    }

    fn model(holders: usize, conversions: usize) {
        let mut model = loom::model::Builder::new();
        // Each turn of a pin or a drain takes one at most; more of them only repeat what was seen.
        model.preemption_bound = Some(3);
        model.check(move || {
            let pins = Arc::<Pins<_>>::default();
            let page = Arc::new(Page { shared: State::new(1), private: State::new(0) });
            let readers: Vec<_> = (0..holders)
                .map(|_| {
                    let holder = Holder::new(&pins, "reader".into(), Arc::clone(&page));
                    thread::spawn(move || {
                        let pin = holder.pin();
                        let page = pin.value();
                        if page.shared.load(Ordering::Acquire) == 1 {
                            assert_eq!(page.private.load(Ordering::Relaxed), 0, "a private page was seen");
                        }
                    })
                })
                .collect();
            for _ in 0..conversions {
                page.shared.store(0, Ordering::Release);
                pins.drain(Deadline::NEVER).unwrap();
                page.private.store(1, Ordering::Relaxed);
                // And back, so that a later conversion finds it shared.
                page.private.store(0, Ordering::Relaxed);
                page.shared.store(1, Ordering::Release);
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

    #[test]
    fn nor_when_two_pages_go_at_once() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(2);
        model.check(|| {
            let pins = Arc::<Pins<_>>::default();
            let pages = Arc::new([(); 2].map(|()| Page { shared: State::new(1), private: State::new(0) }));
            let holder = Holder::new(&pins, "reader".into(), Arc::clone(&pages));
            let reader = thread::spawn(move || {
                for _ in 0..2 {
                    let pin = holder.pin();
                    for page in pin.value().iter() {
                        if page.shared.load(Ordering::Acquire) == 1 {
                            assert_eq!(page.private.load(Ordering::Relaxed), 0, "a private page was seen");
                        }
                    }
                }
            });
            let convert = |pins: &Pins<_>, pages: &[Page; 2], at: usize| {
                pages[at].shared.store(0, Ordering::Release);
                pins.drain(Deadline::NEVER).unwrap();
                pages[at].private.store(1, Ordering::Relaxed);
            };
            let other = thread::spawn({
                let (pins, pages) = (Arc::clone(&pins), Arc::clone(&pages));
                move || convert(&pins, &pages, 1)
            });
            convert(&pins, &pages, 0);
            other.join().unwrap();
            reader.join().unwrap();
        });
    }
}
