//! A guest, its devices and its listeners around a conversion engine, and a plain model of all of them, to compare it
//! with after each step.

use cvm_core::memory::{
    Conversion, ConversionEngine, ConversionListener, ConverterError, LeftAs, Objection, PageState, PageStateMap,
    Pinned, SharedMemory, Sides, Slots,
};
use cvm_core::{Answer, BoxError, ConversionRequest, Error, Gpa, GpaRange, PAGE_SIZE, Side};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

/// Slots of pages: two that touch, one apart, together more than one block of the map.
const SLOTS: [(u64, u64); 3] = [(0, 600), (600, 40), (1024, 64)];
const PAGES: u64 = 1088;
const VCPUS: u64 = 3;
/// How many runs the backend has mappings for.
const MOST_RUNS: u64 = 60;

/// Where a step takes its decisions from: a number below the bound.
pub trait Source {
    fn below(&mut self, bound: u64) -> u64;
}

/// Decisions from a seed: xorshift64*.
#[allow(dead_code, reason = "who includes this decides by one of the two")]
pub struct Seed(pub u64);

impl Source for Seed {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % bound.max(1)
    }
}

/// Decisions from somebody's bytes; zeros when they are used up.
#[allow(dead_code, reason = "who includes this decides by one of the two")]
pub struct Given<'a>(pub &'a [u8]);

impl Source for Given<'_> {
    fn below(&mut self, bound: u64) -> u64 {
        let (taken, left) = self.0.split_at(self.0.len().min(2));
        self.0 = left;
        taken.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)) % bound.max(1)
    }
}

fn pages(range: GpaRange) -> impl Iterator<Item = usize> {
    (range.start().0 / PAGE_SIZE..range.end().0 / PAGE_SIZE).map(|page| page as usize)
}

/// How the next calls of a double go; when there is no more, they go well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Well,
    Fails,
    FailsAndLosesTrack,
}

/// The guest's memory, as a backend has it: what the guest sees, and a number in each page of each side.
struct Memory {
    sees: Mutex<Vec<Option<Side>>>,
    private: Mutex<Vec<u64>>,
    shared: GuestMemoryMmap,
    fates: Mutex<VecDeque<Fate>>,
}

impl Memory {
    fn fate(&self) -> Fate {
        self.fates.lock().unwrap().pop_front().unwrap_or(Fate::Well)
    }

    fn read(&self, page: usize) -> Option<u64> {
        match self.sees.lock().unwrap()[page]? {
            Side::Private => Some(self.private.lock().unwrap()[page]),
            Side::Shared => Some(self.shared.read_obj(GuestAddress(page as u64 * PAGE_SIZE)).unwrap()),
        }
    }

    fn write(&self, page: usize, number: u64) {
        match self.sees.lock().unwrap()[page] {
            Some(Side::Private) => self.private.lock().unwrap()[page] = number,
            Some(Side::Shared) => self.shared.write_obj(number, GuestAddress(page as u64 * PAGE_SIZE)).unwrap(),
            None => {}
        }
    }
}

impl Sides for Memory {
    fn show(&self, range: GpaRange, side: Side) -> Result<(), ConverterError> {
        let fate = self.fate();
        let left_as = if fate == Fate::FailsAndLosesTrack { LeftAs::Unknown } else { LeftAs::Before };
        for page in pages(range) {
            match fate {
                Fate::Well => self.sees.lock().unwrap()[page] = Some(side),
                Fate::Fails => {}
                // Some of the pages, as when a call is cut short.
                Fate::FailsAndLosesTrack if page % 2 == 0 => self.sees.lock().unwrap()[page] = Some(side),
                Fate::FailsAndLosesTrack => {}
            }
        }
        match fate {
            Fate::Well => Ok(()),
            _ => Err(ConverterError { step: "show", left_as, source: "it was told to fail".into() }),
        }
    }

    fn discard(&self, range: GpaRange, losing: Side) -> Result<(), BoxError> {
        if self.fate() != Fate::Well {
            // A guest that runs on has written to the side that it sees by now.
            pages(range).for_each(|page| self.write(page, u64::MAX));
            return Err("it was told to fail".into());
        }
        for page in pages(range) {
            match losing {
                Side::Private => self.private.lock().unwrap()[page] = 0,
                Side::Shared => self.shared.write_obj(0u64, GuestAddress(page as u64 * PAGE_SIZE)).unwrap(),
            }
        }
        Ok(())
    }

    fn poison(&self, range: GpaRange) -> Result<(), BoxError> {
        pages(range).for_each(|page| self.sees.lock().unwrap()[page] = None);
        Ok(())
    }

    fn most_runs(&self) -> u64 {
        MOST_RUNS
    }
}

/// What a listener must keep right: every prepared range gets one verdict, and its own idea of the shared pages.
#[derive(Default)]
struct Listener {
    prepared: Mutex<Vec<(GpaRange, Side)>>,
    shared: Mutex<Vec<bool>>,
    objections: Mutex<VecDeque<Option<Objection>>>,
}

impl Listener {
    fn settle(&self, range: GpaRange, to: Option<Side>) {
        let mut prepared = self.prepared.lock().unwrap();
        let at = prepared.iter().position(|(known, side)| *known == range && to.is_none_or(|to| *side == to));
        prepared.remove(at.expect("a verdict on what was never prepared"));
    }
}

impl ConversionListener for Listener {
    fn name(&self) -> &str {
        "double"
    }

    fn prepare(&self, range: GpaRange, to: Side) -> Result<(), Objection> {
        if let Some(objection) = self.objections.lock().unwrap().pop_front().flatten() {
            return Err(objection);
        }
        self.prepared.lock().unwrap().push((range, to));
        Ok(())
    }

    fn committed(&self, range: GpaRange, to: Side) {
        self.settle(range, Some(to));
        pages(range).for_each(|page| self.shared.lock().unwrap()[page] = to == Side::Shared);
    }

    fn aborted(&self, range: GpaRange, to: Side) {
        self.settle(range, Some(to));
    }

    fn poisoned(&self, range: GpaRange) {
        self.settle(range, None);
        pages(range).for_each(|page| self.shared.lock().unwrap()[page] = false);
    }
}

/// What is true of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Page {
    state: PageState,
    /// The number that the guest finds there.
    number: u64,
}

/// All of it.
pub struct World {
    engine: ConversionEngine<Memory>,
    listeners: [Arc<Listener>; 2],
    /// What should be true; nothing where there is no memory.
    model: Vec<Option<Page>>,
    pins: Vec<Pinned>,
    next: u64,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    pub fn new() -> Self {
        let slots = SLOTS.map(|(start, pages)| GpaRange::from_pages(start * PAGE_SIZE, pages).unwrap());
        let regions = slots.map(|slot| (GuestAddress(slot.start().0), slot.len() as usize));
        let shared = GuestMemoryMmap::from_ranges(&regions).unwrap();
        let map = Arc::new(PageStateMap::new(Slots::new(&slots).unwrap()).unwrap());
        let view = SharedMemory::new(shared.clone(), map).unwrap();
        let memory = Memory {
            sees: Mutex::new(vec![Some(Side::Private); PAGES as usize]),
            private: Mutex::new(vec![0; PAGES as usize]),
            shared,
            fates: Mutex::default(),
        };
        let listener = || Arc::new(Listener { shared: Mutex::new(vec![false; PAGES as usize]), ..Listener::default() });
        let engine = ConversionEngine::new(memory, view);
        let listeners = [listener(), listener()];
        listeners.iter().for_each(|listener| engine.add_listener(Arc::clone(listener) as _));
        let mut model = vec![None; PAGES as usize];
        for slot in slots {
            pages(slot).for_each(|page| model[page] = Some(Page { state: PageState::Private, number: 0 }));
        }
        Self { engine, listeners, model, pins: Vec::new(), next: 0 }
    }

    /// One thing that a guest, a device or a hostile host does.
    pub fn step(&mut self, source: &mut impl Source) {
        match source.below(16) {
            0..8 => self.convert(source),
            8 => self.convert_in_parts(source),
            9 => self.convert_unasked(source),
            10 | 11 => self.guest_writes(source),
            12 | 13 => self.device_accesses(source),
            14 if self.pins.is_empty() => {
                let pin = self.engine.memory().memory();
                self.pins.push(pin.clone());
                self.pins.push(pin);
            }
            _ => self.pins.clear(),
        }
    }

    fn request(&self, source: &mut impl Source) -> ConversionRequest {
        let start = source.below(PAGES + 8);
        // Mostly what makes sense, around the borders of slots and blocks too.
        let start = [start, start, start, 0, 512, 590, 639, 1024][source.below(8) as usize];
        let most = [1, 4, 64, PAGES][source.below(4) as usize];
        let pages = source.below(most + 1);
        let to = if source.below(2) == 0 { Side::Shared } else { Side::Private };
        let within = if source.below(64) == 0 { 7 } else { 0 };
        ConversionRequest::from_guest(source.below(VCPUS) as u32, start * PAGE_SIZE + within, pages, to)
    }

    /// Says how backend and listeners fare in the next conversion: mostly well.
    fn faults(&self, source: &mut impl Source) -> bool {
        let mut fates = self.engine.converter().fates.lock().unwrap();
        let faulty = source.below(4) == 0;
        if faulty {
            fates.extend((0..4).map(|_| match source.below(40) {
                0..8 => Fate::Fails,
                8 => Fate::FailsAndLosesTrack,
                _ => Fate::Well,
            }));
        }
        let mut objects = false;
        for listener in &self.listeners {
            let objection = match source.below(32) {
                0 => Some(Objection::Wait("it was told to".into())),
                1 => Some(Objection::Refuse("it was told to".into())),
                _ => None,
            };
            objects |= objection.is_some();
            listener.objections.lock().unwrap().push_back(objection);
        }
        faulty || objects
    }

    fn no_faults(&self) {
        self.engine.converter().fates.lock().unwrap().clear();
        self.listeners.iter().for_each(|listener| listener.objections.lock().unwrap().clear());
    }

    fn convert(&mut self, source: &mut impl Source) {
        let request = self.request(source);
        // A conversion to private would wait for pins until its patience ends.
        if request.to() == Side::Private {
            self.pins.clear();
        }
        let before = self.model.clone();
        let faulty = self.faults(source);
        self.engine.ask(request);
        let conversion = self.engine.convert(&request);
        self.no_faults();
        self.settle(&request, &conversion);
        if !faulty {
            self.judge(&before, &request, &conversion);
        }
    }

    /// Takes over what the engine says of the pages that it may have changed, and checks that nothing else is.
    fn settle(&mut self, request: &ConversionRequest, conversion: &Conversion) {
        let range = GpaRange::from_pages(request.gpa().0, request.pages()).ok();
        let mut changed = 0;
        for page in 0..self.model.len() {
            let Some(was) = self.model[page] else { continue };
            let state = self.state(page);
            let inside = range.is_some_and(|range| range.contains(Gpa(page as u64 * PAGE_SIZE)));
            assert!(inside || state == was.state, "page {page} changed, which nobody asked for");
            if state != was.state {
                assert!(state == request.to().into() || state == PageState::Poisoned, "page {page} is {state:?}");
                assert_ne!(was.state, PageState::Poisoned, "page {page} came back from the dead");
                changed += u64::from(state == request.to().into());
                self.model[page] = Some(Page { state, number: 0 });
            }
        }
        assert_eq!(conversion.pages(), changed, "pages are counted that did not change");
        if conversion.answer() == Answer::Done {
            let range = range.expect("what is no range was done");
            assert_eq!(self.engine.memory().map().first_not_in(range, request.to().into()), None);
        }
        // A rollback may lose the contents of pages that stayed; what the guest finds now is what it has.
        for page in range.into_iter().flat_map(pages).filter(|page| *page < PAGES as usize) {
            if let Some(known) = self.model[page]
                && known.state != PageState::Poisoned
                && conversion.answer() != Answer::Done
            {
                let found = self.engine.converter().read(page).unwrap();
                assert!(found == known.number || found == 0, "page {page} has what was never there");
                self.model[page] = Some(Page { number: found, ..known });
            }
        }
    }

    /// When nothing fails, the answer is determined.
    fn judge(&self, before: &[Option<Page>], request: &ConversionRequest, conversion: &Conversion) {
        let range = GpaRange::from_pages(request.gpa().0, request.pages()).ok();
        let all = range.and_then(|range| pages(range).map(|page| *before.get(page)?).collect::<Option<Vec<_>>>());
        let expected = match all {
            None => Answer::Invalid,
            Some(all) if all.iter().any(|page| page.state == PageState::Poisoned) => Answer::Invalid,
            Some(_) => Answer::Done,
        };
        match conversion.cause() {
            Some(Error::TooFragmented { .. }) => assert!(self.runs() + 2 > MOST_RUNS, "there were mappings left"),
            Some(Error::Unfinished { .. }) => assert_eq!(conversion.answer(), Answer::Retry),
            cause => assert_eq!(conversion.answer(), expected, "{request:?}: {cause:?}"),
        }
    }

    fn convert_in_parts(&mut self, source: &mut impl Source) {
        self.pins.clear();
        let request = self.request(source);
        let vcpu = request.vcpu();
        self.engine.ask(request);
        let before = self.engine.memory().map().snapshot();
        for _ in 0..source.below(4) {
            let part = self.request(source);
            let Ok(range) = GpaRange::from_pages(part.gpa().0, part.pages()) else { continue };
            let asked = GpaRange::from_pages(request.gpa().0, request.pages());
            let allowed = asked.is_ok_and(|asked| asked.contains_range(&range)) && part.to() == request.to();
            let result = self.engine.convert_part(vcpu, range, part.to());
            assert!(allowed || matches!(result, Err(Error::NotAsked { .. })), "{part:?} of {request:?}");
        }
        for (range, _, now) in before.differences(&self.engine.memory().map().snapshot()) {
            let state = now.expect("memory does not go away");
            assert_eq!(state, request.to().into());
            pages(range).for_each(|page| self.model[page] = Some(Page { state, number: 0 }));
        }
        let answer = [Answer::Done, Answer::Retry, Answer::Invalid][source.below(3) as usize];
        let asked = GpaRange::from_pages(request.gpa().0, request.pages());
        let map = self.engine.memory().map();
        let is_done = asked.is_ok_and(|asked| map.first_not_in(asked, request.to().into()).is_none());
        let concluded = self.engine.conclude(vcpu, answer);
        assert_eq!(concluded.is_ok(), answer != Answer::Done || is_done);
        self.engine.withdraw(vcpu);
    }

    fn convert_unasked(&mut self, source: &mut impl Source) {
        let request = self.request(source);
        self.engine.withdraw(request.vcpu());
        let conversion = self.engine.convert(&request);
        assert!(matches!(conversion.cause(), Some(Error::NotAsked { .. })));
        assert_eq!((conversion.answer(), conversion.pages()), (Answer::Invalid, 0));
    }

    fn guest_writes(&mut self, source: &mut impl Source) {
        let page = source.below(PAGES) as usize;
        if let Some(known) = self.model[page].as_mut().filter(|known| known.state != PageState::Poisoned) {
            self.next += 1;
            known.number = self.next;
            self.engine.converter().write(page, self.next);
        }
    }

    /// A device reads and writes, once within a page and once across the border to the next.
    fn device_accesses(&mut self, source: &mut impl Source) {
        let view = self.engine.memory().memory();
        let page = source.below(PAGES) as usize;
        let shared =
            |page: usize| self.model.get(page).copied().flatten().filter(|known| known.state == PageState::Shared);
        let at = page as u64 * PAGE_SIZE;
        match (shared(page), view.read_obj::<u64>(GuestAddress(at))) {
            (Some(known), Ok(found)) => assert_eq!(found, known.number, "page {page}"),
            (None, Err(_)) => {}
            (known, found) => panic!("page {page} is {known:?} and gave {found:?}"),
        }
        let across = view.read_obj::<u64>(GuestAddress(at + PAGE_SIZE - 4));
        assert_eq!(across.is_ok(), shared(page).is_some() && shared(page + 1).is_some(), "across page {page}");
        if shared(page).is_some() {
            self.next += 1;
            view.write_obj(self.next, GuestAddress(at)).unwrap();
            self.model[page] = Some(Page { state: PageState::Shared, number: self.next });
        } else {
            assert!(view.write_obj(1u64, GuestAddress(at)).is_err());
        }
    }

    fn state(&self, page: usize) -> PageState {
        self.engine.memory().map().get(Gpa(page as u64 * PAGE_SIZE)).expect("the model has the map's pages")
    }

    fn runs(&self) -> u64 {
        let map = self.engine.memory().map();
        map.slots().ranges().iter().map(|slot| map.runs(*slot).count() as u64).sum()
    }

    /// Compares all of it.
    pub fn check(&self) {
        assert!(self.runs() <= MOST_RUNS.max(SLOTS.len() as u64), "more runs than mappings");
        for listener in &self.listeners {
            assert!(listener.prepared.lock().unwrap().is_empty(), "a listener waits for a verdict");
        }
        for (page, known) in self.model.iter().enumerate() {
            let Some(known) = known else { continue };
            assert_eq!(self.state(page), known.state, "page {page}");
            let number = (known.state != PageState::Poisoned).then_some(known.number);
            assert_eq!(self.engine.converter().read(page), number, "page {page}");
            for listener in &self.listeners {
                let shared = listener.shared.lock().unwrap()[page];
                assert_eq!(shared, known.state == PageState::Shared, "a listener is wrong about page {page}");
            }
        }
    }
}
