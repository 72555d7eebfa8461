//! Those who must know of conversions.

use crate::Bench;
use crate::clause::{Clause, Verdict};
use crate::guest::DATA;
use crate::vmm::{is_ghcb, range};
use cvm_core::memory::{ConversionListener, ConversionTotals, Objection};
use cvm_core::{Answer, GpaRange, PAGE_SIZE, PageState, Platform, SharedMemory, Side, Vm};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("4.19", "a listener can put a conversion off", waits),
        Clause::new("4.20", "a listener can refuse a conversion for good", refuses),
        Clause::new("4.21", "a listener hears of each conversion as the map has it", hears),
        Clause::new("4.22", "listeners that agreed hear that a later one objects", aborts),
        Clause::new("4.23", "what was converted is counted", counts),
    ]
}

/// What a listener is called for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    Prepare,
    Committed,
    Aborted,
    Poisoned,
}

/// A call of a listener.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heard {
    pub(super) word: Word,
    pub(super) range: GpaRange,
    pub(super) to: Option<Side>,
    /// Whether the view had all of the first and the last page at that moment, or nothing of them.
    in_view: [bool; 2],
}

/// A listener that remembers what it hears, and objects when it is told to. Pages by which vCPUs talk to the host it does not
/// hear of.
pub(super) struct Ear {
    name: &'static str,
    memory: SharedMemory,
    heard: Mutex<Vec<Heard>>,
    objections: Mutex<VecDeque<Objection>>,
    /// How long it takes to prepare.
    pause: Duration,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ear {
    pub(super) fn new(name: &'static str, memory: &SharedMemory) -> Arc<Self> {
        Self::slow(name, memory, Duration::ZERO)
    }

    /// One that takes its time to prepare, so that others come in between if they can.
    pub(super) fn slow(name: &'static str, memory: &SharedMemory, pause: Duration) -> Arc<Self> {
        let memory = memory.named(name);
        Arc::new(Self { name, memory, heard: Mutex::default(), objections: Mutex::default(), pause })
    }

    /// Has it object to the next conversion.
    fn object(&self, objection: Objection) {
        lock(&self.objections).push_back(objection);
    }

    /// What it has heard since the last time.
    pub(super) fn take(&self) -> Vec<Heard> {
        std::mem::take(&mut *lock(&self.heard))
    }

    /// The same without what the view has.
    fn words(&self) -> Vec<(Word, GpaRange, Option<Side>)> {
        self.take().into_iter().map(|heard| (heard.word, heard.range, heard.to)).collect()
    }

    fn hear(&self, word: Word, range: GpaRange, to: Option<Side>) {
        if is_ghcb(range.start(), range.pages()) {
            return;
        }
        let view = self.memory.memory();
        let has = |gpa: u64| view.read_obj::<u8>(GuestAddress(gpa)).is_ok();
        let in_view = [range.start().0, range.end().0 - 1].map(has);
        lock(&self.heard).push(Heard { word, range, to, in_view });
    }
}

impl ConversionListener for Ear {
    fn name(&self) -> &str {
        self.name
    }

    fn prepare(&self, range: GpaRange, to: Side) -> Result<(), Objection> {
        if !is_ghcb(range.start(), range.pages())
            && let Some(objection) = lock(&self.objections).pop_front()
        {
            return Err(objection);
        }
        self.hear(Word::Prepare, range, Some(to));
        thread::sleep(self.pause);
        Ok(())
    }

    fn committed(&self, range: GpaRange, to: Side) {
        self.hear(Word::Committed, range, Some(to));
    }

    fn aborted(&self, range: GpaRange, to: Side) {
        self.hear(Word::Aborted, range, Some(to));
    }

    fn poisoned(&self, range: GpaRange) {
        self.hear(Word::Poisoned, range, None);
    }
}

/// A guest whose listener objects once to each direction, and what comes of it.
fn objected<P: Platform>(
    bench: &Bench<'_, P>,
    objection: impl Fn() -> Objection,
    answer: Answer,
    says: &str,
) -> Verdict {
    let mut guest = bench.guest(bench.config(1), |a| {
        for (side, value) in [(Side::Private, 0x1111), (Side::Shared, 0x2222)] {
            a.store(DATA, side, value)?;
            a.convert(DATA, 1, side.other())?;
            a.report()?;
            // It goes on as if it had never asked.
            a.load(DATA, side)?;
            a.report()?;
            a.convert(DATA, 1, side.other())?;
            a.report()?;
        }
        a.end(0)
    });
    let ear = Ear::new("mapper", guest.vm.memory());
    guest.vm.add_listener(Arc::clone(&ear) as _);
    for (side, value) in [(Side::Private, 0x1111), (Side::Shared, 0x2222)] {
        ear.object(objection());
        let refused = guest.convert();
        assert_eq!((refused.answer, refused.pages), (answer, 0), "{}", refused.cause);
        let said = ["mapper", says, "0x300000..0x301000"];
        assert!(said.iter().all(|part| refused.cause.contains(part)), "{}", refused.cause);
        assert_eq!(super::guest_state(&guest, DATA), Some(side.into()));
        assert!(ear.take().is_empty(), "a listener hears what becomes of a conversion that it has objected to");
        assert_ne!(guest.report(), 0, "the guest was told that it is done");
        assert_eq!(guest.report(), value, "contents were lost although nothing was converted");
        let done = guest.convert();
        assert_eq!((done.answer, done.pages), (Answer::Done, 1), "{}", done.cause);
        assert_eq!(guest.report(), 0);
        ear.take();
    }
    guest.assert_private(range(DATA, 1));
    guest.end();
    Verdict::Met
}

fn waits<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    objected(bench, || Objection::Wait("the disk is busy".into()), Answer::Retry, "the disk is busy")
}

fn refuses<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    objected(bench, || Objection::Refuse("there is no room".into()), Answer::Invalid, "there is no room")
}

fn hears<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let page = |number: u64| DATA + number * PAGE_SIZE;
    let mut guest = bench.guest(bench.config(1), |a| {
        a.convert(page(2), 2, Side::Shared)?;
        a.ask(page(2), 2, Side::Shared)?;
        a.rescind(page(0), 2)?;
        a.rescind(page(4), 2)?;
        a.ask(page(0), 6, Side::Shared)?;
        a.ask(page(0), 6, Side::Private)?;
        a.ask(page(0), 6, Side::Private)?;
        a.end(0)
    });
    let ear = Ear::new("ear", guest.vm.memory());
    guest.vm.add_listener(Arc::clone(&ear) as _);
    let assert_heard = |expected: &[(Word, GpaRange, Side)]| {
        let heard = ear.take();
        let words: Vec<_> = heard.iter().map(|heard| (heard.word, heard.range, heard.to)).collect();
        let expected: Vec<_> = expected.iter().map(|(word, range, to)| (*word, *range, Some(*to))).collect();
        assert_eq!(words, expected);
        for heard in heard {
            // A page is in the view as long as it is shared and a listener that has prepared has not heard more.
            let is_before = heard.word != Word::Committed;
            let in_view = (heard.to == Some(Side::Shared)) != is_before;
            assert_eq!(heard.in_view, [in_view; 2], "{heard:?}");
        }
    };
    let there = |range| [(Word::Prepare, range, Side::Shared), (Word::Committed, range, Side::Shared)];
    assert_eq!(guest.convert().pages, 2);
    assert_heard(&there(range(page(2), 2)));
    assert_eq!(guest.convert().pages, 0);
    assert_heard(&[]);
    // Only of pages that change sides, run by run.
    assert_eq!(guest.convert().pages, 4);
    assert_heard(&[there(range(page(0), 2)), there(range(page(4), 2))].concat());
    // What was prepared and cannot happen is called off.
    let pinned = guest.vm.memory().named("disk").memory();
    let off = guest.convert();
    assert_eq!((off.answer, off.pages), (Answer::Retry, 0), "{}", off.cause);
    let whole = range(page(0), 6);
    assert_heard(&[(Word::Prepare, whole, Side::Private), (Word::Aborted, whole, Side::Private)]);
    drop(pinned);
    assert_eq!(guest.convert().pages, 6);
    assert_heard(&[(Word::Prepare, whole, Side::Private), (Word::Committed, whole, Side::Private)]);
    guest.end();
    assert_heard(&[]);
    assert_eq!(guest.shared_pages(), 0);
    Verdict::Met
}

fn aborts<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(1), |a| {
        for side in [Side::Shared, Side::Private] {
            for _ in 0..3 {
                a.ask(DATA, 4, side)?;
            }
        }
        a.end(0)
    });
    let [first, second] = ["first", "second"].map(|name| Ear::new(name, guest.vm.memory()));
    guest.vm.add_listener(Arc::clone(&first) as _);
    guest.vm.add_listener(Arc::clone(&second) as _);
    let all = range(DATA, 4);
    for to in [Side::Shared, Side::Private] {
        for (objection, answer) in
            [(Objection::Wait("busy".into()), Answer::Retry), (Objection::Refuse("never".into()), Answer::Invalid)]
        {
            second.object(objection);
            let refused = guest.convert();
            assert_eq!((refused.answer, refused.pages), (answer, 0), "{}", refused.cause);
            assert!(refused.cause.contains("second"), "{}", refused.cause);
            let expected = [(Word::Prepare, all, Some(to)), (Word::Aborted, all, Some(to))];
            assert_eq!(first.words(), expected);
            assert!(second.take().is_empty());
            assert_eq!(super::guest_state(&guest, DATA), Some(PageState::from(to.other())));
        }
        assert_eq!(guest.convert().pages, 4);
        for ear in [&first, &second] {
            assert_eq!(ear.words(), [(Word::Prepare, all, Some(to)), (Word::Committed, all, Some(to))]);
        }
    }
    guest.end();
    Verdict::Met
}

fn counts<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(1), |a| {
        a.convert(DATA, 5, Side::Shared)?;
        a.ask(DATA, 5, Side::Shared)?;
        a.convert(DATA + PAGE_SIZE, 3, Side::Private)?;
        a.ask(DATA + PAGE_SIZE, 3, Side::Shared)?;
        a.end(0)
    });
    let ear = Ear::new("ear", guest.vm.memory());
    guest.vm.add_listener(Arc::clone(&ear) as _);
    let mut expected = ConversionTotals::default();
    assert_eq!(guest.conversions(), expected);
    for (pages, to_shared, to_private) in [(5, 5, 0), (0, 0, 0), (3, 0, 3)] {
        assert_eq!(guest.convert().pages, pages);
        expected.requests += 1;
        expected.to_shared += to_shared;
        expected.to_private += to_private;
        assert_eq!(guest.conversions(), expected);
    }
    ear.object(Objection::Refuse("never".into()));
    assert_eq!(guest.convert().pages, 0);
    (expected.requests, expected.refused) = (expected.requests + 1, 1);
    assert_eq!(guest.conversions(), expected);
    guest.end();
    assert_eq!(guest.conversions(), expected);
    assert_eq!(guest.shared_pages(), 2);
    Verdict::Met
}
