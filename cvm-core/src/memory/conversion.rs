//! The conversion engine: the one way in which pages change sides.

use super::map::{PageState, PageStateMap};
use super::view::SharedMemory;
use crate::{Answer, BoxError, Error, Gpa, GpaRange, PAGE_SIZE, Side};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// A guest's wish to move pages to a side, as it came: nothing in it is validated yet.
///
/// A request is good for one conversion, and only after a backend has seen the guest make it: a host cannot start one
/// on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConversionRequest {
    vcpu: u32,
    gpa: u64,
    pages: u64,
    to: Side,
}

impl ConversionRequest {
    /// What vCPU `vcpu` asked for: `pages` pages from `gpa` to the side `to`.
    ///
    /// For backends, which call it with what an exit of that vCPU exposed. Anybody may make up a request, but the
    /// engine refuses those that no guest has made.
    pub fn from_guest(vcpu: u32, gpa: u64, pages: u64, to: Side) -> Self {
        Self { vcpu, gpa, pages, to }
    }

    /// Which vCPU asked.
    pub fn vcpu(&self) -> u32 {
        self.vcpu
    }

    /// The first address, as the guest gave it.
    pub fn gpa(&self) -> Gpa {
        Gpa(self.gpa)
    }

    /// How many pages, as the guest gave it.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The side that the pages shall be on.
    pub fn to(&self) -> Side {
        self.to
    }

    fn range(&self) -> Result<GpaRange, Error> {
        let range = GpaRange::from_pages(self.gpa, self.pages);
        range.map_err(|source| Error::InvalidRequest { vcpu: self.vcpu, source })
    }
}

/// Names one request that a guest has made: no other one has the same, of whichever VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(u64);

impl Ticket {
    fn new() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(LAST.fetch_add(1, Ordering::Relaxed))
    }
}

/// What became of a request: made by the engine alone, and the only thing that a guest's request is answered with, so
/// that no guest hears of a conversion which did not take place.
#[derive(Debug)]
#[must_use = "the guest waits for the answer"]
pub struct Conversion {
    request: ConversionRequest,
    /// Nothing if no guest has made the request.
    ticket: Option<Ticket>,
    answer: Answer,
    pages: u64,
    cause: Option<Error>,
}

impl Conversion {
    /// The request.
    pub fn request(&self) -> &ConversionRequest {
        &self.request
    }

    /// For backends: whether this is what became of the request that has this ticket.
    pub fn answers(&self, ticket: Ticket) -> bool {
        self.ticket == Some(ticket)
    }

    /// What the guest will hear.
    pub fn answer(&self) -> Answer {
        self.answer
    }

    /// How many pages changed sides; pages that already were where the guest wants them do not count.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Why the answer is not [`Answer::Done`].
    pub fn cause(&self) -> Option<&Error> {
        self.cause.as_ref()
    }
}

/// In which state a converter left the range that it could not convert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeftAs {
    /// As it was before the call, contents included.
    Before,
    /// Nobody knows.
    Unknown,
}

/// Why a converter did not convert.
#[derive(Debug)]
pub struct ConverterError {
    /// What failed.
    pub step: &'static str,
    /// How the range was left.
    pub left_as: LeftAs,
    /// What went wrong.
    pub source: BoxError,
}

/// A backend's part in a conversion. Every range lies within one slot; `vcpu` is the one that asked.
pub trait Converter: Send + Sync {
    /// Makes the guest see side `to` for every page of `range`, and frees the memory that backs it on the side that has
    /// lost it, contents and all.
    ///
    /// # Errors
    /// With the state that the range was left in.
    fn convert(&self, vcpu: u32, range: GpaRange, to: Side) -> Result<(), ConverterError>;

    /// Takes `range` from the guest: neither side may be seen there any more.
    ///
    /// # Errors
    /// The guest may then still see one, so the engine is [lost](ConversionEngine::is_lost).
    fn poison(&self, vcpu: u32, range: GpaRange) -> Result<(), BoxError>;

    /// How many runs of pages on one side there may be: what the host has mappings for. A guest that alternates sides
    /// page by page is refused beyond it.
    fn most_runs(&self) -> u64;
}

/// Memory of which this process can show the guest either side: a [`Converter`] in two steps. Every range lies within
/// one slot.
pub trait Sides: Send + Sync {
    /// Makes the guest see `side` for every page of `range`.
    ///
    /// # Errors
    /// With the state that the range was left in.
    fn show(&self, range: GpaRange, side: Side) -> Result<(), ConverterError>;

    /// Frees the memory that backs `range` on the side that has just lost it, contents and all.
    ///
    /// # Errors
    /// The memory may then be still there, in part or in whole.
    fn discard(&self, range: GpaRange, losing: Side) -> Result<(), BoxError>;

    /// As [`Converter::poison`].
    ///
    /// # Errors
    /// As there.
    fn poison(&self, range: GpaRange) -> Result<(), BoxError>;

    /// As [`Converter::most_runs`].
    fn most_runs(&self) -> u64;
}

impl<S: Sides> Converter for S {
    fn convert(&self, _vcpu: u32, range: GpaRange, to: Side) -> Result<(), ConverterError> {
        self.show(range, to)?;
        self.discard(range, to.other()).map_err(|source| {
            // What was written to the new side meanwhile must not come back with a later conversion.
            let undone = self.show(range, to.other()).is_ok() && self.discard(range, to).is_ok();
            let left_as = if undone { LeftAs::Before } else { LeftAs::Unknown };
            ConverterError { step: "discard the losing side", left_as, source }
        })
    }

    fn poison(&self, _vcpu: u32, range: GpaRange) -> Result<(), BoxError> {
        Sides::poison(self, range)
    }

    fn most_runs(&self) -> u64 {
        Sides::most_runs(self)
    }
}

/// Why a listener does not let a conversion happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Objection {
    /// Not now; the guest shall ask again.
    Wait(String),
    /// Never.
    Refuse(String),
}

/// Somebody who must know of conversions: an IOMMU mapper, a vhost process, a balloon.
///
/// The engine calls from the thread that runs the conversion. Conversions of ranges that have no page in common may run
/// at the same time, those of ranges that have one never do. Each [`prepare`] that returned `Ok` is followed by just one
/// of the other three for the same range. A listener must not call the engine back: it would wait for itself.
///
/// [`prepare`]: ConversionListener::prepare
pub trait ConversionListener: Send + Sync {
    /// What to call it in errors.
    fn name(&self) -> &str;

    /// `range` is about to move to side `to`; give it up, or object.
    ///
    /// # Errors
    /// An objection: nothing has happened to the range, nor will.
    fn prepare(&self, range: GpaRange, to: Side) -> Result<(), Objection>;

    /// `range` is on side `to` now.
    fn committed(&self, range: GpaRange, to: Side);

    /// `range` stayed on the side where it was before [`prepare`](ConversionListener::prepare); its contents may be
    /// lost.
    fn aborted(&self, range: GpaRange, to: Side);

    /// `range` is lost to guest and host.
    fn poisoned(&self, range: GpaRange);
}

/// What an engine has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConversionTotals {
    /// Requests answered.
    pub requests: u64,
    /// Requests not answered with [`Answer::Done`].
    pub refused: u64,
    /// Pages that became private.
    pub to_private: u64,
    /// Pages that became shared.
    pub to_shared: u64,
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    refused: AtomicU64,
    to_private: AtomicU64,
    to_shared: AtomicU64,
}

/// How long a conversion to private waits for pins of the shared view before the guest must ask again.
const PIN_PATIENCE: Duration = Duration::from_millis(100);

/// How many runs of pages one request converts before the guest must ask again: so that a request over pages on
/// alternating sides does not hold up others for long.
const RUNS_PER_REQUEST: usize = 256;

/// The longest run that is converted at once: larger ones in parts, so that the time is looked at between them.
const LONGEST_RUN: u64 = 1 << 30;

/// How long one request may take before the guest must ask again. A run that was begun is not cut short.
const TIME_PER_REQUEST: Duration = Duration::from_millis(100);

/// Converts pages on behalf of the guest, in the order that [`memory`](super) states.
pub struct ConversionEngine<C> {
    converter: C,
    memory: SharedMemory,
    listeners: RwLock<Vec<Arc<dyn ConversionListener>>>,
    /// What guests have asked for and nobody has carried out yet: at most one request for each vCPU.
    asked: Mutex<BTreeMap<u32, (Ticket, ConversionRequest)>>,
    claims: Claims,
    ledger: Mutex<Ledger>,
    lost: AtomicBool,
    counters: Counters,
}

/// Which ranges are being converted, and by whom first.
#[derive(Debug, Default)]
struct Claims {
    queue: Mutex<(u64, Vec<(u64, GpaRange)>)>,
    left: Condvar,
}

impl Claims {
    /// Waits until nobody who came before claims a page of `range`, and keeps out those who come after.
    fn claim(&self, range: GpaRange) -> Claim<'_> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let number = queue.0;
        queue.0 += 1;
        queue.1.push((number, range));
        let is_before = |(other, theirs): &(u64, GpaRange)| *other < number && theirs.intersection(&range).is_some();
        while queue.1.iter().any(is_before) {
            queue = self.left.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        Claim { claims: self, number }
    }
}

/// A range that nobody else converts.
struct Claim<'a> {
    claims: &'a Claims,
    number: u64,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut queue = self.claims.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.1.retain(|(number, _)| *number != self.number);
        drop(queue);
        self.claims.left.notify_all();
    }
}

/// Keeps count of the runs of pages in one state, each of which takes a mapping.
#[derive(Debug)]
struct Ledger {
    runs: u64,
    /// How many more there may be when the conversions under way are done.
    reserved: u64,
}

/// A run of pages under conversion, with the listeners that have agreed to it.
struct Prepared<'a> {
    vcpu: u32,
    range: GpaRange,
    from: Side,
    to: Side,
    listeners: &'a [Arc<dyn ConversionListener>],
}

/// Runs that a conversion may add, until it has.
struct Reserved<'a> {
    ledger: &'a Mutex<Ledger>,
    runs: u64,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner).reserved -= self.runs;
    }
}

impl<C: Converter> ConversionEngine<C> {
    /// An engine that converts by `converter` what `memory` shows to devices.
    pub fn new(converter: C, memory: SharedMemory) -> Self {
        let runs = memory.map().slots().ranges().len() as u64;
        Self {
            converter,
            memory,
            listeners: RwLock::default(),
            asked: Mutex::default(),
            claims: Claims::default(),
            ledger: Mutex::new(Ledger { runs, reserved: 0 }),
            lost: AtomicBool::new(false),
            counters: Counters::default(),
        }
    }

    /// The backend's part.
    pub fn converter(&self) -> &C {
        &self.converter
    }

    /// The shared side of the memory.
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// Adds a listener for conversions to come.
    pub fn add_listener(&self, listener: Arc<dyn ConversionListener>) {
        self.listeners.write().unwrap_or_else(PoisonError::into_inner).push(listener);
    }

    /// What was done so far.
    pub fn totals(&self) -> ConversionTotals {
        ConversionTotals {
            requests: self.counters.requests.load(Ordering::Relaxed),
            refused: self.counters.refused.load(Ordering::Relaxed),
            to_private: self.counters.to_private.load(Ordering::Relaxed),
            to_shared: self.counters.to_shared.load(Ordering::Relaxed),
        }
    }

    /// For backends: a guest has just made this request. It replaces an earlier one of the same vCPU. The conversion that
    /// has the ticket is the only one that answers it.
    pub fn ask(&self, request: ConversionRequest) -> Ticket {
        let ticket = Ticket::new();
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).insert(request.vcpu, (ticket, request));
        ticket
    }

    /// Carries out what a guest has asked for, page run by page run; may be called by several vCPUs' threads at once.
    ///
    /// A request for pages that already are on that side is done at once, without asking anybody. One that no guest
    /// has made, or that was carried out before, is refused.
    pub fn convert(&self, request: &ConversionRequest) -> Conversion {
        let Some(ticket) = self.take(request) else {
            let cause = Error::NotAsked { vcpu: request.vcpu, gpa: request.gpa() };
            return Conversion {
                request: *request,
                ticket: None,
                answer: Answer::Invalid,
                pages: 0,
                cause: Some(cause),
            };
        };
        let mut pages = 0;
        let cause = self.carry_out(request, &mut pages).err();
        let answer = match &cause {
            None => Answer::Done,
            Some(Error::Pinned { .. } | Error::ListenerWaits { .. } | Error::Unfinished { .. }) => Answer::Retry,
            Some(_) => Answer::Invalid,
        };
        Conversion { request: *request, ticket: Some(ticket), answer, pages, cause }
    }

    /// Takes the ticket of a request that a guest has made.
    fn take(&self, request: &ConversionRequest) -> Option<Ticket> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let (ticket, _) = *asked.get(&request.vcpu).filter(|(_, asked)| asked == request)?;
        asked.remove(&request.vcpu);
        Some(ticket)
    }

    /// For a trusted entity on whose behalf an untrusted VMM's engine decides what happens when: carries out a part of
    /// what vCPU `vcpu` has asked for. [`conclude`](ConversionEngine::conclude) ends the request.
    ///
    /// # Errors
    /// [`Error::NotAsked`] if the guest has not asked for this, and what [`Conversion::cause`] may be.
    pub fn convert_part(&self, vcpu: u32, part: GpaRange, to: Side) -> Result<(), Error> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner).get(&vcpu).copied();
        let whole = asked.filter(|(_, asked)| asked.to == to).and_then(|(_, asked)| asked.range().ok());
        if !whole.is_some_and(|whole| whole.contains_range(&part)) {
            return Err(Error::NotAsked { vcpu, gpa: part.start() });
        }
        let request = ConversionRequest::from_guest(vcpu, part.start().0, part.pages(), to);
        self.carry_out(&request, &mut 0)
    }

    /// Ends the request of vCPU `vcpu` that was carried out in parts, with the answer that a VMM wants to give.
    ///
    /// # Errors
    /// [`Error::NotAsked`] if there is no request, or if the answer is [`Answer::Done`] and that is not true.
    pub fn conclude(&self, vcpu: u32, answer: Answer) -> Result<Conversion, Error> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let (ticket, request) = asked.get(&vcpu).copied().ok_or(Error::NotAsked { vcpu, gpa: Gpa(0) })?;
        let done = || request.range().is_ok_and(|range| self.map().first_not_in(range, request.to.into()).is_none());
        if answer == Answer::Done && !done() {
            return Err(Error::NotAsked { vcpu, gpa: request.gpa() });
        }
        asked.remove(&vcpu);
        Ok(Conversion { request, ticket: Some(ticket), answer, pages: 0, cause: None })
    }

    /// For backends: the guest hears that its request is refused, so it cannot be carried out any more.
    pub fn withdraw(&self, vcpu: u32) {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).remove(&vcpu);
    }

    /// Whether pages are lost that the guest may still see: no vCPU may run any more.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    fn map(&self) -> &PageStateMap {
        self.memory.map()
    }

    fn carry_out(&self, request: &ConversionRequest, done: &mut u64) -> Result<(), Error> {
        let result = self.convert_all(request, done);
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        if result.is_err() {
            self.counters.refused.fetch_add(1, Ordering::Relaxed);
        }
        result
    }

    fn convert_all(&self, request: &ConversionRequest, done: &mut u64) -> Result<(), Error> {
        if self.is_lost() {
            return Err(Error::Lost);
        }
        let range = request.range()?;
        let parts = self.map().slots().split(range)?;
        // A listener that panicked left its pages as `Converting` at worst: out of everybody's reach, so going on is safe.
        let _claim = self.claims.claim(range);
        let listeners = self.listeners.read().unwrap_or_else(PoisonError::into_inner);
        let mut begin = None;
        let mut left = RUNS_PER_REQUEST;
        for part in parts {
            for (run, state) in self.map().runs(part).flat_map(|(run, state)| cut(run).map(move |run| (run, state))) {
                match state {
                    _ if state == PageState::from(request.to) => continue,
                    PageState::Private | PageState::Shared => {}
                    PageState::Converting | PageState::Poisoned => {
                        return Err(Error::Inaccessible { range: run });
                    }
                }
                left = left.checked_sub(1).ok_or(Error::Unfinished { range: run })?;
                // Counted from the second run on, so that requests of one run read no clock.
                if left < RUNS_PER_REQUEST - 1 && begin.get_or_insert_with(Instant::now).elapsed() > TIME_PER_REQUEST {
                    return Err(Error::Unfinished { range: run });
                }
                self.convert_run(request.vcpu, run, request.to, &listeners)?;
                *done += run.pages();
                let counter = match request.to {
                    Side::Private => &self.counters.to_private,
                    Side::Shared => &self.counters.to_shared,
                };
                counter.fetch_add(run.pages(), Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// How many more runs of pages there are when `range`, all of it in state `from`, is in state `to`.
    fn more_runs(&self, range: GpaRange, from: PageState, to: PageState) -> i64 {
        let before = range.start().0.checked_sub(PAGE_SIZE).map(Gpa);
        let slot = self.map().slots().find(range.start());
        let neighbours = [before, Some(range.end())].into_iter().flatten();
        let neighbours = neighbours.filter(|gpa| self.map().slots().find(*gpa) == slot);
        let border = |neighbour, state| i64::from(neighbour != Some(state));
        neighbours.map(|gpa| self.map().get(gpa)).map(|neighbour| border(neighbour, to) - border(neighbour, from)).sum()
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that there are mappings for what a conversion leaves, whatever others do meanwhile.
    fn reserve(&self, range: GpaRange, from: Side, to: Side) -> Result<Reserved<'_>, Error> {
        let most = self.converter.most_runs();
        let mut ledger = self.ledger();
        let more = self.more_runs(range, from.into(), to.into()).max(0) as u64;
        if more > 0 && ledger.runs.saturating_add(ledger.reserved).saturating_add(more) > most {
            return Err(Error::TooFragmented { range, most });
        }
        ledger.reserved += more;
        Ok(Reserved { ledger: &self.ledger, runs: more })
    }

    /// Puts `range`, which is claimed and all of it in state `from`, into state `to`.
    fn set(&self, range: GpaRange, from: PageState, to: PageState) {
        let mut ledger = self.ledger();
        ledger.runs = ledger.runs.saturating_add_signed(self.more_runs(range, from, to));
        self.map().set(range, to);
    }

    fn convert_run(
        &self,
        vcpu: u32,
        range: GpaRange,
        to: Side,
        listeners: &[Arc<dyn ConversionListener>],
    ) -> Result<(), Error> {
        let from = to.other();
        let _reserved = self.reserve(range, from, to)?;
        for (agreed, listener) in listeners.iter().enumerate() {
            if let Err(objection) = listener.prepare(range, to) {
                for earlier in &listeners[..agreed] {
                    earlier.aborted(range, to);
                }
                let listener = listener.name().to_owned();
                return Err(match objection {
                    Objection::Wait(reason) => Error::ListenerWaits { listener, range, reason },
                    Objection::Refuse(reason) => Error::ListenerRefuses { listener, range, reason },
                });
            }
        }
        let run = Prepared { vcpu, range, from, to, listeners };
        self.set(range, from.into(), PageState::Converting);
        // Pages on their way to the shared side were never in the view, so nobody can hold them.
        if to == Side::Private
            && let Err(holders) = self.memory.pins().drain(PIN_PATIENCE)
        {
            return Err(self.roll_back(&run, Error::Pinned { range, waited: PIN_PATIENCE, holders }));
        }
        if let Err(ConverterError { step, left_as, source }) = self.converter.convert(vcpu, range, to) {
            let error = Error::Backend { step, range: Some(range), source };
            return Err(match left_as {
                LeftAs::Before => self.roll_back(&run, error),
                LeftAs::Unknown => self.poison(&run, error),
            });
        }
        self.set(range, PageState::Converting, to.into());
        for listener in listeners {
            listener.committed(range, to);
        }
        Ok(())
    }

    fn roll_back(&self, run: &Prepared<'_>, error: Error) -> Error {
        self.set(run.range, PageState::Converting, run.from.into());
        for listener in run.listeners {
            listener.aborted(run.range, run.to);
        }
        error
    }

    fn poison(&self, run: &Prepared<'_>, error: Error) -> Error {
        self.set(run.range, PageState::Converting, PageState::Poisoned);
        for listener in run.listeners {
            listener.poisoned(run.range);
        }
        let contained = self.converter.poison(run.vcpu, run.range).is_ok();
        if !contained {
            self.lost.store(true, Ordering::SeqCst);
        }
        Error::Poisoned { range: run.range, contained, source: Box::new(error) }
    }
}

/// The parts of `run` that are converted at once.
fn cut(run: GpaRange) -> impl Iterator<Item = GpaRange> {
    let starts = (run.start().0..run.end().0).step_by(LONGEST_RUN as usize);
    starts.filter_map(move |start| GpaRange::new(start, LONGEST_RUN.min(run.end().0 - start)).ok())
}

#[cfg(test)]
mod tests;
