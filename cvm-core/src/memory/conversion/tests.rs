mod deadline;

use super::*;
use crate::memory::Slots;
use crate::{BoxError, PAGE_SIZE};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::sync::Mutex;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

/// What the guest sees of a page of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Side(Side),
    /// A failure left it in an unknown state.
    Unknown,
    Nothing,
}

/// How the next calls of a mock go; when there is no more, they go well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Well,
    FailsAndLeavesAsBefore,
    FailsAndLeavesUnknown,
}

/// A converter that does to a list what a backend does to memory.
#[derive(Debug)]
struct Model {
    seen: Mutex<BTreeMap<u64, Seen>>,
    most_runs: u64,
    /// Pages with memory behind them, by side.
    allocated: Mutex<[BTreeMap<u64, ()>; 2]>,
    fates: Mutex<VecDeque<Fate>>,
}

impl Model {
    fn new(pages: impl Iterator<Item = u64> + Clone, fates: Vec<Fate>) -> Self {
        Self {
            seen: Mutex::new(pages.clone().map(|page| (page, Seen::Side(Side::Private))).collect()),
            allocated: Mutex::new([pages.map(|page| (page, ())).collect(), BTreeMap::new()]),
            fates: Mutex::new(fates.into()),
            most_runs: 1000,
        }
    }

    fn fate(&self) -> Fate {
        self.fates.lock().unwrap().pop_front().unwrap_or(Fate::Well)
    }

    fn see(&self, range: GpaRange, seen: Seen) {
        for page in pages(range) {
            self.seen.lock().unwrap().insert(page, seen);
        }
    }
}

fn pages(range: GpaRange) -> std::ops::Range<u64> {
    range.start().0 / PAGE_SIZE..range.end().0 / PAGE_SIZE
}

impl Sides for Model {
    fn show(&self, range: GpaRange, to: Side) -> Result<(), ConverterError> {
        let fate = self.fate();
        let failed =
            |left_as| Err(ConverterError { step: "convert", left_as, source: "the model was told to fail".into() });
        match fate {
            Fate::Well => {
                self.see(range, Seen::Side(to));
                for page in pages(range) {
                    self.allocated.lock().unwrap()[to as usize].insert(page, ());
                }
                Ok(())
            }
            Fate::FailsAndLeavesAsBefore => failed(LeftAs::Before),
            Fate::FailsAndLeavesUnknown => {
                self.see(range, Seen::Unknown);
                failed(LeftAs::Unknown)
            }
        }
    }

    fn discard(&self, range: GpaRange, losing: Side) -> Result<(), BoxError> {
        if self.fate() != Fate::Well {
            return Err("the model was told to fail".into());
        }
        for page in pages(range) {
            self.allocated.lock().unwrap()[losing as usize].remove(&page);
        }
        Ok(())
    }

    fn most_runs(&self) -> u64 {
        self.most_runs
    }

    fn poison(&self, range: GpaRange) -> Result<(), BoxError> {
        if self.fate() != Fate::Well {
            return Err("the model was told to fail".into());
        }
        self.see(range, Seen::Nothing);
        Ok(())
    }
}

/// A listener that remembers what it heard and objects when told to.
#[derive(Debug, Default)]
struct Ear {
    heard: Mutex<Vec<(&'static str, GpaRange)>>,
    objections: Mutex<VecDeque<Option<Objection>>>,
}

impl Ear {
    fn hear(&self, what: &'static str, range: GpaRange) {
        self.heard.lock().unwrap().push((what, range));
    }
}

impl ConversionListener for Ear {
    fn name(&self) -> &str {
        "ear"
    }

    fn prepare(&self, range: GpaRange, _to: Side) -> Result<(), Objection> {
        if let Some(objection) = self.objections.lock().unwrap().pop_front().flatten() {
            return Err(objection);
        }
        self.hear("prepare", range);
        Ok(())
    }

    fn committed(&self, range: GpaRange, _to: Side) {
        self.hear("committed", range);
    }

    fn aborted(&self, range: GpaRange, _to: Side) {
        self.hear("aborted", range);
    }

    fn poisoned(&self, range: GpaRange) {
        self.hear("poisoned", range);
    }
}

/// Two slots that touch and one apart.
fn slots() -> [GpaRange; 3] {
    [(0, 40), (40, 24), (80, 8)].map(|(start, pages)| GpaRange::from_pages(start * PAGE_SIZE, pages).unwrap())
}

fn engine(fates: Vec<Fate>) -> ConversionEngine<Model> {
    engine_of(Model::new(slots().into_iter().flat_map(pages), fates))
}

fn engine_of(model: Model) -> ConversionEngine<Model> {
    let map = Arc::new(PageStateMap::new(Slots::new(&slots()).unwrap()).unwrap());
    let regions = slots().map(|slot| (GuestAddress(slot.start().0), slot.len() as usize));
    let memory = SharedMemory::new(GuestMemoryMmap::from_ranges(&regions).unwrap(), map).unwrap();
    ConversionEngine::new(model, memory)
}

fn ask(engine: &ConversionEngine<Model>, start: u64, pages: u64, to: Side) -> Conversion {
    ask_from(engine, 0, start, pages, to)
}

fn ask_from(engine: &ConversionEngine<Model>, vcpu: u32, start: u64, pages: u64, to: Side) -> Conversion {
    let request = ConversionRequest::from_guest(vcpu, start * PAGE_SIZE, pages, to);
    engine.ask(request);
    engine.convert(&request)
}

/// How many runs the engine has counted.
fn runs<C>(engine: &ConversionEngine<C>) -> u64 {
    engine.runs.load(Ordering::Relaxed).try_into().unwrap()
}

#[test]
fn a_host_cannot_convert_what_no_guest_has_asked_for() {
    let engine = engine(vec![]);
    let forged = ConversionRequest::from_guest(0, 0, 1, Side::Shared);
    let refuse = || {
        let refused = engine.convert(&forged);
        assert!(matches!(refused.cause, Some(Error::NotAsked { vcpu: 0, .. })), "{:?}", refused.cause);
    };
    refuse();
    engine.ask(ConversionRequest::from_guest(0, 0, 2, Side::Shared));
    refuse();
    engine.ask(ConversionRequest::from_guest(1, 0, 1, Side::Shared));
    refuse();
    assert_eq!(engine.memory().map().count(PageState::Private), 72);
    engine.ask(forged);
    assert_eq!(engine.convert(&forged).answer, Answer::Done);
    refuse();
}

#[test]
fn a_request_across_slots_is_done_and_doing_it_again_is_free() {
    let engine = engine(vec![]);
    let done = ask(&engine, 30, 20, Side::Shared);
    assert_eq!((done.answer, done.pages()), (Answer::Done, 20));
    assert_eq!(engine.memory().map().count(PageState::Shared), 20);
    let again = ask(&engine, 30, 20, Side::Shared);
    assert_eq!((again.answer, again.pages()), (Answer::Done, 0));
    let totals = ConversionTotals { requests: 2, refused: 0, to_private: 0, to_shared: 20 };
    assert_eq!(engine.totals(), totals);
}

#[test]
fn requests_that_make_no_sense_are_invalid_and_change_nothing() {
    let engine = engine(vec![]);
    for (gpa, pages) in [(0, 0), (1, 1), (0x800, 2), (62 * PAGE_SIZE, 4), (1 << 52, 1), (0, u64::MAX), (u64::MAX, 1)] {
        let request = ConversionRequest::from_guest(7, gpa, pages, Side::Shared);
        engine.ask(request);
        let refused = engine.convert(&request);
        assert_eq!((refused.answer, refused.pages()), (Answer::Invalid, 0), "{gpa:#x}, {pages} pages");
        assert!(matches!(refused.cause, Some(Error::InvalidRequest { vcpu: 7, .. } | Error::OutsideMemory { .. })));
    }
    assert_eq!(engine.memory().map().count(PageState::Private), 72);
}

#[test]
fn listeners_that_agreed_hear_that_a_later_one_objects() {
    for (objection, answer) in
        [(Objection::Wait("busy".into()), Answer::Retry), (Objection::Refuse("never".into()), Answer::Invalid)]
    {
        let engine = engine(vec![]);
        let (first, second) = (Arc::new(Ear::default()), Arc::new(Ear::default()));
        engine.add_listener(Arc::clone(&first) as _);
        engine.add_listener(Arc::clone(&second) as _);
        second.objections.lock().unwrap().push_back(Some(objection));
        let outcome = ask(&engine, 0, 4, Side::Shared);
        assert_eq!(outcome.answer, answer);
        let range = GpaRange::from_pages(0, 4).unwrap();
        assert_eq!(*first.heard.lock().unwrap(), [("prepare", range), ("aborted", range)]);
        assert!(second.heard.lock().unwrap().is_empty());
        assert_eq!(engine.memory().map().count(PageState::Private), 72);
        assert_eq!(ask(&engine, 0, 4, Side::Shared).answer, Answer::Done);
    }
}

#[test]
fn a_page_does_not_become_private_while_the_view_is_pinned() {
    let engine = engine(vec![]);
    assert_eq!(ask(&engine, 0, 8, Side::Shared).answer, Answer::Done);
    let pinned = engine.memory().memory();
    let refused = ask(&engine, 2, 2, Side::Private);
    assert_eq!(refused.answer, Answer::Retry);
    assert!(matches!(refused.cause, Some(Error::Pinned { .. })));
    pinned.write_slice(&[1; 16], GuestAddress(2 * PAGE_SIZE)).unwrap();
    assert_eq!(ask(&engine, 10, 2, Side::Shared).answer, Answer::Done, "sharing more does not wait for pins");
    drop(pinned);
    assert_eq!(ask(&engine, 2, 2, Side::Private).answer, Answer::Done);
    assert!(engine.memory().memory().write_slice(&[1; 16], GuestAddress(2 * PAGE_SIZE)).is_err());
}

#[test]
fn a_discard_that_fails_is_undone() {
    let engine = engine(vec![Fate::Well, Fate::FailsAndLeavesAsBefore]);
    let refused = ask(&engine, 0, 4, Side::Shared);
    assert_eq!((refused.answer, refused.pages()), (Answer::Invalid, 0));
    assert_eq!(engine.memory().map().count(PageState::Private), 72);
    assert_eq!(engine.converter().seen.lock().unwrap()[&0], Seen::Side(Side::Private));
}

#[test]
fn what_cannot_be_undone_is_poisoned_and_stays_so() {
    let engine = engine(vec![Fate::FailsAndLeavesUnknown]);
    let ear = Arc::new(Ear::default());
    engine.add_listener(Arc::clone(&ear) as _);
    let lost = ask(&engine, 0, 4, Side::Shared);
    assert!(matches!(lost.cause, Some(Error::Poisoned { contained: true, .. })));
    assert_eq!(lost.answer, Answer::Invalid);
    assert_eq!(engine.memory().map().count(PageState::Poisoned), 4);
    assert_eq!(engine.converter().seen.lock().unwrap()[&0], Seen::Nothing);
    let range = GpaRange::from_pages(0, 4).unwrap();
    assert_eq!(*ear.heard.lock().unwrap(), [("prepare", range), ("poisoned", range)]);
    for side in [Side::Private, Side::Shared] {
        assert!(matches!(ask(&engine, 0, 4, side).cause, Some(Error::Inaccessible { .. })));
    }
}

#[test]
fn a_guest_that_may_still_see_lost_pages_is_lost_as_a_whole() {
    let engine = engine(vec![Fate::FailsAndLeavesUnknown, Fate::FailsAndLeavesUnknown]);
    assert!(!engine.is_lost());
    let lost = ask(&engine, 0, 4, Side::Shared);
    assert!(matches!(lost.cause, Some(Error::Poisoned { contained: false, .. })));
    assert!(engine.is_lost());
    assert!(matches!(ask(&engine, 20, 4, Side::Shared).cause, Some(Error::Lost)));
    assert_eq!(engine.memory().map().count(PageState::Private), 68);
}

#[test]
fn a_guest_that_was_refused_cannot_be_converted_afterwards() {
    let engine = engine(vec![]);
    let request = ConversionRequest::from_guest(0, 0, 1, Side::Shared);
    engine.ask(request);
    engine.withdraw(0);
    assert!(matches!(engine.convert(&request).cause, Some(Error::NotAsked { .. })));
    assert_eq!(engine.memory().map().count(PageState::Private), 72);
}

/// Pages as a range.
fn part(start: u64, pages: u64) -> GpaRange {
    GpaRange::from_pages(start * PAGE_SIZE, pages).unwrap()
}

fn request(vcpu: u32, start: u64, pages: u64, to: Side) -> ConversionRequest {
    ConversionRequest::from_guest(vcpu, start * PAGE_SIZE, pages, to)
}

fn assert_not_asked<T: std::fmt::Debug>(outcome: Result<T, Error>, why: &str) {
    assert!(matches!(outcome, Err(Error::NotAsked { .. })), "{why}: {outcome:?}");
}

#[test]
fn parts_of_what_was_asked_are_carried_out_and_nothing_else() {
    let engine = engine(vec![]);
    assert_not_asked(engine.convert_part(0, part(10, 1), Side::Shared), "nothing was asked");
    engine.ask(request(0, 10, 10, Side::Shared));
    engine.convert_part(0, part(12, 3), Side::Shared).unwrap();
    for (vcpu, start, pages, to, why) in [
        (0, 12, 3, Side::Private, "the other side"),
        (0, 9, 2, Side::Shared, "begins before"),
        (0, 19, 2, Side::Shared, "ends behind"),
        (0, 9, 12, Side::Shared, "larger"),
        (0, 20, 1, Side::Shared, "the page after"),
        (0, 50, 1, Side::Shared, "elsewhere"),
        (1, 10, 1, Side::Shared, "another vcpu, which asked for nothing"),
    ] {
        assert_not_asked(engine.convert_part(vcpu, part(start, pages), to), why);
    }
    assert_eq!(engine.memory().map().count(PageState::Shared), 3);
    engine.convert_part(0, part(12, 3), Side::Shared).unwrap();
    engine.convert_part(0, part(10, 10), Side::Shared).unwrap();
    assert_eq!(engine.memory().map().count(PageState::Shared), 10);
    check_agreement(&engine);
}

#[test]
fn a_vcpu_gets_what_it_asked_for_itself_and_last() {
    let engine = engine(vec![]);
    engine.ask(request(0, 0, 4, Side::Shared));
    engine.ask(request(1, 8, 4, Side::Shared));
    assert_not_asked(engine.convert_part(0, part(8, 1), Side::Shared), "what the second one asked for");
    assert_not_asked(engine.convert_part(1, part(0, 1), Side::Shared), "what the first one asked for");
    engine.convert_part(1, part(8, 4), Side::Shared).unwrap();
    engine.ask(request(0, 20, 1, Side::Shared));
    assert_not_asked(engine.convert_part(0, part(0, 4), Side::Shared), "what it asked for before");
    let conclusion = engine.conclude(1, Answer::Done).unwrap();
    assert_eq!(*conclusion.request(), request(1, 8, 4, Side::Shared));
    engine.convert_part(0, part(20, 1), Side::Shared).unwrap();
    assert_eq!(engine.memory().map().count(PageState::Shared), 5);
}

#[test]
fn a_request_is_done_when_all_its_pages_are_there_and_not_before() {
    let engine = engine(vec![]);
    engine.ask(request(0, 30, 20, Side::Shared));
    assert_not_asked(engine.conclude(0, Answer::Done), "nothing is done");
    engine.convert_part(0, part(30, 19), Side::Shared).unwrap();
    assert_not_asked(engine.conclude(0, Answer::Done), "the last page lacks");
    engine.convert_part(0, part(49, 1), Side::Shared).unwrap();
    let conclusion = engine.conclude(0, Answer::Done).unwrap();
    assert_eq!((conclusion.answer(), *conclusion.request()), (Answer::Done, request(0, 30, 20, Side::Shared)));
    assert_not_asked(engine.conclude(0, Answer::Done), "it is concluded");

    engine.ask(request(0, 30, 20, Side::Shared));
    assert_eq!(engine.conclude(0, Answer::Done).unwrap().answer(), Answer::Done, "pages that are there already");
}

#[test]
fn a_refusal_always_ends_a_request_and_then_nothing_of_it_is_carried_out() {
    for answer in [Answer::Retry, Answer::Invalid] {
        let engine = engine(vec![]);
        assert_not_asked(engine.conclude(0, answer), "nothing was asked");
        engine.ask(request(0, 0, 4, Side::Shared));
        engine.convert_part(0, part(0, 1), Side::Shared).unwrap();
        assert_eq!(engine.conclude(0, answer).unwrap().answer(), answer);
        assert_not_asked(engine.convert_part(0, part(1, 1), Side::Shared), "it is concluded");
        assert_not_asked(engine.conclude(0, answer), "it is concluded");
        let whole = engine.convert(&request(0, 0, 4, Side::Shared));
        assert!(matches!(whole.cause, Some(Error::NotAsked { .. })), "{:?}", whole.cause);
        assert_eq!(engine.memory().map().count(PageState::Shared), 1);
    }
}

#[test]
fn a_request_that_makes_no_sense_has_no_parts_and_is_never_done() {
    let engine = engine(vec![]);
    for (gpa, pages) in [(0, 0), (1, 1), (1 << 52, 1), (0, u64::MAX)] {
        engine.ask(ConversionRequest::from_guest(0, gpa, pages, Side::Private));
        assert_not_asked(engine.convert_part(0, part(0, 1), Side::Private), "no range");
        assert_not_asked(engine.conclude(0, Answer::Done), "no range");
        assert_eq!(engine.conclude(0, Answer::Invalid).unwrap().answer(), Answer::Invalid);
    }
    // Partly where there is no memory.
    engine.ask(request(0, 60, 10, Side::Private));
    let outside = engine.convert_part(0, part(60, 10), Side::Private);
    assert!(matches!(outside, Err(Error::OutsideMemory { .. })), "{outside:?}");
    assert_not_asked(engine.conclude(0, Answer::Done), "there is no memory at the end");
}

#[test]
fn pages_that_were_lost_on_the_way_are_not_done() {
    let engine = engine(vec![Fate::FailsAndLeavesUnknown]);
    engine.ask(request(0, 0, 4, Side::Shared));
    let lost = engine.convert_part(0, part(0, 2), Side::Shared);
    assert!(matches!(lost, Err(Error::Poisoned { contained: true, .. })), "{lost:?}");
    engine.convert_part(0, part(2, 2), Side::Shared).unwrap();
    assert_not_asked(engine.conclude(0, Answer::Done), "two pages are lost");
    let again = engine.convert_part(0, part(0, 2), Side::Shared);
    assert!(matches!(again, Err(Error::Inaccessible { .. })), "{again:?}");
    assert_eq!(engine.conclude(0, Answer::Invalid).unwrap().answer(), Answer::Invalid);
}

#[test]
fn alternating_pages_are_refused_before_the_host_runs_out_of_mappings() {
    let mut model = Model::new(slots().into_iter().flat_map(pages), vec![]);
    model.most_runs = 9;
    let engine = engine_of(model);
    // Three slots are three runs, and each page in the middle of one makes two more.
    for page in [2, 4, 6] {
        assert_eq!(ask(&engine, page, 1, Side::Shared).answer, Answer::Done);
    }
    let refused = ask(&engine, 8, 1, Side::Shared);
    assert!(matches!(refused.cause, Some(Error::TooFragmented { most: 9, .. })), "{:?}", refused.cause);
    assert_eq!((refused.answer, refused.pages()), (Answer::Invalid, 0));
    assert_eq!(ask(&engine, 7, 1, Side::Shared).answer, Answer::Done, "a run that only grows is no more runs");
    assert_eq!(ask(&engine, 2, 1, Side::Private).answer, Answer::Done);
    assert_eq!(ask(&engine, 20, 1, Side::Shared).answer, Answer::Done, "there is room again");
}

#[test]
fn a_request_over_many_runs_is_done_in_parts() {
    let slot = GpaRange::from_pages(0, 4 * RUNS_PER_REQUEST as u64).unwrap();
    let map = Arc::new(PageStateMap::new(Slots::new(&[slot]).unwrap()).unwrap());
    let backing = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), slot.len() as usize)]).unwrap();
    let mut model = Model::new(pages(slot), vec![]);
    model.most_runs = u64::MAX;
    let engine = ConversionEngine::new(model, SharedMemory::new(backing, map).unwrap());
    for page in (0..slot.pages()).step_by(2) {
        assert_eq!(ask(&engine, page, 1, Side::Shared).answer, Answer::Done);
    }
    let first = ask(&engine, 0, slot.pages(), Side::Private);
    assert_eq!((first.answer, first.pages()), (Answer::Retry, RUNS_PER_REQUEST as u64));
    assert!(matches!(first.cause, Some(Error::Unfinished { .. })));
    let second = ask(&engine, 0, slot.pages(), Side::Private);
    assert_eq!((second.answer, second.pages()), (Answer::Done, RUNS_PER_REQUEST as u64));
    assert_eq!(runs(&engine), 1);
}

#[test]
fn vcpus_that_convert_at_once_end_with_a_map_and_a_model_that_agree() {
    let engine = engine(vec![]);
    std::thread::scope(|scope| {
        for vcpu in 0..4u64 {
            let engine = &engine;
            scope.spawn(move || {
                for round in 0..200 {
                    let to = if (round + vcpu) % 2 == 0 { Side::Shared } else { Side::Private };
                    let start = (round * 7 + vcpu * 3) % 50;
                    assert_eq!(ask_from(engine, vcpu as u32, start, 10, to).answer, Answer::Done);
                }
            });
        }
    });
    check_agreement(&engine);
}

/// A listener that says when it is asked, and agrees when it is told to.
struct Gate {
    asked: std::sync::mpsc::SyncSender<GpaRange>,
    agreed: Mutex<std::sync::mpsc::Receiver<()>>,
}

impl ConversionListener for Gate {
    fn name(&self) -> &str {
        "gate"
    }

    fn prepare(&self, range: GpaRange, _to: Side) -> Result<(), Objection> {
        self.asked.send(range).unwrap();
        let agreed = self.agreed.lock().unwrap().recv_timeout(Duration::from_secs(120));
        agreed.map_err(|_| Objection::Refuse("nobody told it to agree".into()))
    }

    fn committed(&self, _: GpaRange, _: Side) {}

    fn aborted(&self, _: GpaRange, _: Side) {}

    fn poisoned(&self, _: GpaRange) {}
}

fn gated(engine: &ConversionEngine<Model>) -> (std::sync::mpsc::Receiver<GpaRange>, std::sync::mpsc::Sender<()>) {
    let (asked, hears) = std::sync::mpsc::sync_channel(10);
    let (agree, agreed) = std::sync::mpsc::channel();
    engine.add_listener(Arc::new(Gate { asked, agreed: Mutex::new(agreed) }));
    (hears, agree)
}

#[test]
fn pages_whose_conversion_panicked_are_out_of_the_hosts_reach_and_others_are_not() {
    struct Panics;

    impl ConversionListener for Panics {
        fn name(&self) -> &str {
            "panics"
        }

        fn prepare(&self, _: GpaRange, _: Side) -> Result<(), Objection> {
            Ok(())
        }

        fn committed(&self, range: GpaRange, to: Side) {
            panic!("a bug of the listener's, at {range} on its way to {to}");
        }

        fn aborted(&self, range: GpaRange, to: Side) {
            panic!("a bug of the listener's, at {range} on its way to {to}");
        }

        fn poisoned(&self, _: GpaRange) {}
    }

    impl Converter for Panics {
        fn convert(&self, _: u32, range: GpaRange, to: Side) -> Result<(), ConverterError> {
            if range.contains(Gpa(0)) { panic!("a bug of the backend's, on the way to {to}") } else { Ok(()) }
        }

        fn poison(&self, _: u32, _: GpaRange) -> Result<(), BoxError> {
            Ok(())
        }

        fn most_runs(&self) -> u64 {
            100
        }
    }

    let map = Arc::new(PageStateMap::new(Slots::new(&[part(0, 16)]).unwrap()).unwrap());
    let backing = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 * PAGE_SIZE as usize)]).unwrap();
    let engine = ConversionEngine::new(Panics, SharedMemory::new(backing, map).unwrap());
    let convert = |request| {
        engine.ask(request);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| engine.convert(&request).answer())).ok()
    };
    assert_eq!(convert(request(0, 0, 4, Side::Shared)), None);
    assert_eq!(engine.map().count(PageState::Poisoned), 4);
    assert_eq!(convert(request(0, 3, 4, Side::Shared)), Some(Answer::Invalid), "and nobody waits for who panicked");
    assert_eq!(convert(request(1, 4, 4, Side::Shared)), Some(Answer::Done));
    engine.add_listener(Arc::new(Panics));
    assert_eq!(convert(request(1, 8, 4, Side::Shared)), None);
    let state = engine.map().get(Gpa(8 * PAGE_SIZE));
    assert_eq!(state, Some(PageState::Shared), "it was committed before the listener heard of it");
    assert_eq!(runs(&engine), engine.map().runs(part(0, 16)).count() as u64);
}

#[test]
fn a_guest_that_is_to_ask_again_hears_where_it_may_go_on() {
    let engine = engine(vec![]);
    assert_eq!(ask(&engine, 4, 4, Side::Shared).reached(), Gpa(8 * PAGE_SIZE));
    let ear = Arc::new(Ear::default());
    ear.objections.lock().unwrap().extend([None, Some(Objection::Wait("busy".into()))]);
    engine.add_listener(ear);
    let retry = ask(&engine, 0, 30, Side::Shared);
    assert_eq!((retry.answer, retry.pages(), retry.reached()), (Answer::Retry, 4, Gpa(8 * PAGE_SIZE)));
    let rest = ask(&engine, 8, 22, Side::Shared);
    assert_eq!((rest.answer, rest.reached()), (Answer::Done, Gpa(30 * PAGE_SIZE)));

    engine.ask(request(0, 28, 8, Side::Shared));
    engine.convert_part(0, part(32, 2), Side::Shared).unwrap();
    assert_eq!(engine.conclude(0, Answer::Retry).unwrap().reached(), Gpa(30 * PAGE_SIZE));
}

#[test]
fn ranges_without_a_common_page_are_converted_at_the_same_time() {
    let engine = engine(vec![]);
    let (hears, agree) = gated(&engine);
    std::thread::scope(|scope| {
        let [first, second] = [(0, 0), (1, 8)].map(|(vcpu, start)| {
            scope.spawn({
                let engine = &engine;
                move || ask_from(engine, vcpu, start, 8, Side::Shared).answer
            })
        });
        let mut under_way = [(); 2].map(|()| hears.recv_timeout(Duration::from_secs(120)).unwrap());
        under_way.sort();
        assert_eq!(under_way, [part(0, 8), part(8, 8)]);
        // Both wait in the one listener, one behind the other's lock.
        agree.send(()).unwrap();
        agree.send(()).unwrap();
        assert_eq!([first.join().unwrap(), second.join().unwrap()], [Answer::Done; 2]);
    });
}

#[test]
fn ranges_with_a_common_page_are_converted_one_after_the_other() {
    let engine = engine(vec![]);
    let (hears, agree) = gated(&engine);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| ask_from(&engine, 0, 0, 8, Side::Shared).answer);
        assert_eq!(hears.recv_timeout(Duration::from_secs(120)), Ok(part(0, 8)));
        let second = scope.spawn(|| ask_from(&engine, 1, 7, 8, Side::Shared));
        let third = scope.spawn(|| ask_from(&engine, 2, 40, 1, Side::Shared).answer);
        assert_eq!(hears.recv_timeout(Duration::from_secs(120)), Ok(part(40, 1)), "only this one does not overlap");
        assert!(hears.recv_timeout(Duration::from_millis(50)).is_err());
        for _ in 0..3 {
            agree.send(()).unwrap();
        }
        assert_eq!([first.join().unwrap(), third.join().unwrap()], [Answer::Done; 2]);
        let second = second.join().unwrap();
        assert_eq!((second.answer, second.pages()), (Answer::Done, 7), "the common page was converted already");
        assert_eq!(hears.recv_timeout(Duration::from_secs(120)), Ok(part(8, 7)));
    });
}

#[test]
fn vcpus_that_fragment_memory_at_once_exceed_the_mappings_by_two_each_at_worst() {
    let most = 12;
    let engine = engine_of(Model { most_runs: most, ..Model::new(slots().into_iter().flat_map(pages), vec![]) });
    std::thread::scope(|scope| {
        for vcpu in 0..4u32 {
            let engine = &engine;
            scope.spawn(move || {
                for round in 0..500u64 {
                    let page = (round * 7 + u64::from(vcpu) * 11) % 64;
                    let to = if round % 3 == 0 { Side::Private } else { Side::Shared };
                    let answer = ask_from(engine, vcpu, page, 1, to).answer;
                    assert_ne!(answer, Answer::Retry);
                }
            });
        }
    });
    let count: usize = slots().iter().map(|slot| engine.map().runs(*slot).count()).sum();
    assert!(count as u64 <= most + 2 * 3, "{count} runs: each of the other vcpus may have added two");
    assert_eq!(runs(&engine), count as u64, "the count has drifted from the map");
}

/// Map and model say the same of every page, and the guest never loses the memory that it sees.
fn check_agreement(engine: &ConversionEngine<Model>) {
    let model = engine.converter();
    let allocated = model.allocated.lock().unwrap();
    for (page, seen) in model.seen.lock().unwrap().iter() {
        let state = engine.memory().map().get(Gpa(page * PAGE_SIZE)).unwrap();
        match seen {
            Seen::Side(side) => {
                assert!(
                    state == PageState::from(*side) || state == PageState::Poisoned,
                    "page {page} is {state:?} in the map and seen as {side}"
                );
            }
            Seen::Unknown if engine.is_lost() => {}
            Seen::Unknown | Seen::Nothing => assert_eq!(state, PageState::Poisoned, "page {page} is {seen:?}"),
        }
        if state != PageState::Poisoned {
            assert!(allocated[state_side(state) as usize].contains_key(page), "page {page} has lost its memory");
        }
    }
}

fn state_side(state: PageState) -> Side {
    match state {
        PageState::Private => Side::Private,
        PageState::Shared => Side::Shared,
        PageState::Poisoned => panic!("{state:?} is no side"),
    }
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![8 => Just(Fate::Well), 1 => Just(Fate::FailsAndLeavesAsBefore), 1 => Just(Fate::FailsAndLeavesUnknown)]
}

/// What an untrusted VMM and its guest do.
#[derive(Debug, Clone)]
enum Step {
    Ask { vcpu: u32, range: GpaRange, to: Side },
    Part { vcpu: u32, range: GpaRange, to: Side },
    Conclude { vcpu: u32, answer: Answer },
}

fn step() -> impl Strategy<Value = Step> {
    let what = |pages| {
        let range = (0u64..70, 1..=pages).prop_map(|(start, pages)| part(start, pages));
        (0u32..2, range, prop::sample::select(&[Side::Private, Side::Shared][..]))
    };
    let answer = prop::sample::select(&[Answer::Done, Answer::Done, Answer::Invalid, Answer::Retry][..]);
    prop_oneof![
        2 => what(30u64).prop_map(|(vcpu, range, to)| Step::Ask { vcpu, range, to }),
        6 => what(12u64).prop_map(|(vcpu, range, to)| Step::Part { vcpu, range, to }),
        1 => (0u32..2, answer).prop_map(|(vcpu, answer)| Step::Conclude { vcpu, answer }),
    ]
}

proptest! {
    #[test]
    fn whatever_fails_and_whatever_is_asked_map_and_model_agree(
        fates in prop::collection::vec(fate(), 0..60),
        objections in prop::collection::vec(prop::option::weighted(0.1, Just(Objection::Wait(String::new()))), 0..40),
        requests in prop::collection::vec((0u64..95, 0u64..30, any::<bool>()), 1..40),
    ) {
        let engine = engine(fates);
        let ear = Arc::new(Ear { objections: Mutex::new(objections.into()), ..Ear::default() });
        engine.add_listener(Arc::clone(&ear) as _);
        for (start, pages, share) in requests {
            let to = if share { Side::Shared } else { Side::Private };
            let outcome = ask(&engine, start, pages, to);
            prop_assert_eq!(outcome.answer == Answer::Done, outcome.cause.is_none());
            if outcome.answer == Answer::Done {
                let range = GpaRange::from_pages(start * PAGE_SIZE, pages).unwrap();
                prop_assert_eq!(engine.memory().map().first_not_in(range, to.into()), None);
            }
            let everything = GpaRange::from_pages(0, 100).unwrap();
            prop_assert_eq!(runs(&engine), engine.memory().map().runs(everything).count() as u64);
            check_agreement(&engine);
            if engine.is_lost() {
                return Ok(());
            }
        }
        let heard = ear.heard.lock().unwrap();
        for pair in heard.chunks(2) {
            prop_assert_eq!(pair[0].0, "prepare");
            prop_assert!(pair[1].0 != "prepare" && pair[0].1 == pair[1].1);
        }
        prop_assert_eq!(heard.len() % 2, 0);
    }

    #[test]
    fn a_vmm_that_converts_in_parts_gets_no_further_than_its_guest_has_asked(
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let engine = engine(vec![]);
        let mut asked = BTreeMap::new();
        let mut sides: BTreeMap<u64, Side> =
            slots().into_iter().flat_map(pages).map(|page| (page, Side::Private)).collect();
        for step in steps {
            match step {
                Step::Ask { vcpu, range, to } => {
                    engine.ask(request(vcpu, range.start().0 / PAGE_SIZE, range.pages(), to));
                    asked.insert(vcpu, (range, to));
                }
                Step::Part { vcpu, range, to } => {
                    let is_asked = asked.get(&vcpu).is_some_and(|(all, side)| all.contains_range(&range) && *side == to);
                    let exists = pages(range).all(|page| sides.contains_key(&page));
                    prop_assert_eq!(engine.convert_part(vcpu, range, to).is_ok(), is_asked && exists);
                    if is_asked && exists {
                        sides.extend(pages(range).map(|page| (page, to)));
                    }
                }
                Step::Conclude { vcpu, answer } => {
                    let may = asked.get(&vcpu).is_some_and(|(range, to)| {
                        answer != Answer::Done || pages(*range).all(|page| sides.get(&page) == Some(to))
                    });
                    let concluded = engine.conclude(vcpu, answer);
                    prop_assert_eq!(concluded.is_ok(), may, "{:?}", concluded);
                    if may {
                        asked.remove(&vcpu);
                    }
                }
            }
            for (page, side) in &sides {
                prop_assert_eq!(engine.memory().map().get(Gpa(page * PAGE_SIZE)), Some(PageState::from(*side)));
            }
        }
        check_agreement(&engine);
    }

    #[test]
    fn without_failures_each_page_has_memory_on_its_side_only(
        requests in prop::collection::vec((0u64..60, 1u64..4, any::<bool>()), 1..60),
    ) {
        let engine = engine(vec![]);
        for (start, pages, share) in requests {
            let to = if share { Side::Shared } else { Side::Private };
            prop_assert_eq!(ask(&engine, start, pages, to).answer, Answer::Done);
        }
        let allocated = engine.converter().allocated.lock().unwrap();
        for page in slots().into_iter().flat_map(pages) {
            let state = engine.memory().map().get(Gpa(page * PAGE_SIZE)).unwrap();
            prop_assert_eq!(allocated[0].contains_key(&page), state == PageState::Private);
            prop_assert_eq!(allocated[1].contains_key(&page), state == PageState::Shared);
        }
    }
}
