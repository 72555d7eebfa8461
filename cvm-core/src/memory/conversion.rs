//! The conversion engine: the one way in which pages change sides.

mod claims;
mod converter;
mod listener;
mod request;

pub use converter::{Converter, ConverterError, LeftAs, Sides};
pub use listener::{ConversionListener, Objection};
pub use request::{Conversion, ConversionRequest, ConversionTotals, Ticket};

use super::map::{PageState, PageStateMap};
use super::sync::Deadline;
use super::view::SharedMemory;
use crate::{Answer, Error, Gpa, GpaRange, Side};
use claims::{Claim, Claims};
use request::{Progress, Requests};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

/// How long one request may take before the guest must ask again, waits for other conversions and for pins included. A run
/// that was begun is not cut short.
const PATIENCE: Duration = Duration::from_millis(100);

/// How many runs of pages one request converts before the guest must ask again: so that a request over pages on
/// alternating sides does not hold up others for long.
const RUNS_PER_REQUEST: usize = 256;

/// The longest run that is converted at once: larger ones in parts, so that the time is looked at between them.
const LONGEST_RUN: u64 = 1 << 30;

/// Converts pages on behalf of the guest, in the order that [`memory`](super) states.
pub struct ConversionEngine<C> {
    converter: C,
    memory: SharedMemory,
    requests: Requests,
    claims: Claims,
    /// How many runs of pages in one state there are, each of which takes a mapping.
    runs: AtomicI64,
    lost: AtomicBool,
}

impl<C: Converter> ConversionEngine<C> {
    /// An engine that converts by `converter` what `memory` shows to devices.
    pub fn new(converter: C, memory: SharedMemory) -> Self {
        let runs = memory.map().slots().ranges().len() as i64;
        Self {
            converter,
            memory,
            requests: Requests::default(),
            claims: Claims::default(),
            runs: AtomicI64::new(runs),
            lost: AtomicBool::new(false),
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

    /// Adds a listener for conversions to come; waits for those under way.
    pub fn add_listener(&self, listener: Arc<dyn ConversionListener>) {
        if let Some(all) = self.claims.claim(self.map().slots().span(), Deadline::NEVER) {
            self.claims.add_listener(&all, listener);
        }
    }

    /// What was done so far.
    pub fn totals(&self) -> ConversionTotals {
        self.requests.totals()
    }

    /// For backends: a guest has just made this request. It replaces an earlier one of the same vCPU. The conversion that
    /// has the ticket is the only one that answers it.
    pub fn ask(&self, request: ConversionRequest) -> Ticket {
        self.requests.ask(request)
    }

    /// Carries out what a guest has asked for, page run by page run; may be called by several vCPUs' threads at once.
    ///
    /// A request for pages that are on that side already is done without asking listeners or the backend, when no conversion of
    /// these pages is under way. A request that no guest has made, or that was carried out before, is refused.
    ///
    /// It waits for other conversions and for pins for 100 ms in all, and then the guest has to ask again.
    pub fn convert(&self, request: &ConversionRequest) -> Conversion {
        let mut progress = Progress { pages: 0, reached: request.gpa() };
        let Some(ticket) = self.requests.take(request) else {
            let cause = Error::NotAsked { vcpu: request.vcpu(), gpa: request.gpa() };
            return Conversion {
                request: *request,
                ticket: None,
                answer: Answer::Invalid,
                progress,
                cause: Some(cause),
            };
        };
        let cause = self.carry_out(request, &mut progress).err();
        let answer = match &cause {
            None => Answer::Done,
            Some(
                Error::Pinned { .. } | Error::Busy { .. } | Error::ListenerWaits { .. } | Error::Unfinished { .. },
            ) => Answer::Retry,
            Some(_) => Answer::Invalid,
        };
        Conversion { request: *request, ticket: Some(ticket), answer, progress, cause }
    }

    /// For a trusted entity on whose behalf an untrusted VMM's engine decides what happens when: carries out a part of
    /// what vCPU `vcpu` has asked for. [`conclude`](ConversionEngine::conclude) ends the request.
    ///
    /// # Errors
    /// [`Error::NotAsked`] if the guest has not asked for this, and what [`Conversion::cause`] may be.
    pub fn convert_part(&self, vcpu: u32, part: GpaRange, to: Side) -> Result<(), Error> {
        let asked = self.requests.get(vcpu).filter(|(_, asked)| asked.to() == to);
        let whole = asked.and_then(|(_, asked)| asked.range().ok());
        if !whole.is_some_and(|whole| whole.contains_range(&part)) {
            return Err(Error::NotAsked { vcpu, gpa: part.start() });
        }
        let request = ConversionRequest::from_guest(vcpu, part.start().0, part.pages(), to);
        self.carry_out(&request, &mut Progress { pages: 0, reached: part.start() })
    }

    /// Ends the request of vCPU `vcpu` that was carried out in parts, with the answer that a VMM wants to give.
    ///
    /// # Errors
    /// [`Error::NotAsked`] if there is no request, or if the answer is [`Answer::Done`] and that is not true.
    pub fn conclude(&self, vcpu: u32, answer: Answer) -> Result<Conversion, Error> {
        let (ticket, request) = self.requests.get(vcpu).ok_or(Error::NotAsked { vcpu, gpa: Gpa(0) })?;
        let not_asked = Error::NotAsked { vcpu, gpa: request.gpa() };
        let looked = request.range().and_then(|range| {
            self.map().slots().check(range)?;
            // A conversion of some of these pages that is under way may not be done.
            let _claim = self.claims.claim(range, Deadline::NEVER);
            let left = self.map().first_not_in(range, request.to().into());
            Ok((left.unwrap_or(range.end()), left.is_none()))
        });
        let (reached, is_done) = looked.unwrap_or((request.gpa(), false));
        if answer == Answer::Done && !is_done || self.requests.take(&request).is_none() {
            return Err(not_asked);
        }
        let progress = Progress { pages: 0, reached };
        Ok(Conversion { request, ticket: Some(ticket), answer, progress, cause: None })
    }

    /// For backends: the guest hears that its request is refused, so it cannot be carried out any more.
    pub fn withdraw(&self, vcpu: u32) {
        self.requests.withdraw(vcpu);
    }

    /// Whether pages are lost that the guest may still see: no vCPU may run any more.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    fn map(&self) -> &PageStateMap {
        self.memory.map()
    }

    fn carry_out(&self, request: &ConversionRequest, progress: &mut Progress) -> Result<(), Error> {
        let result = self.convert_all(request, progress);
        self.requests.count(request, progress.pages, result.is_err());
        result
    }

    fn convert_all(&self, request: &ConversionRequest, progress: &mut Progress) -> Result<(), Error> {
        if self.is_lost() {
            return Err(Error::Lost);
        }
        let range = request.range()?;
        self.map().slots().check(range)?;
        let deadline = Deadline::after(PATIENCE);
        let busy = Error::Busy { range, waited: PATIENCE };
        let claim = self.claims.claim(range, deadline).ok_or(busy)?;
        let mut runs = 0;
        while let Some((run, state)) = self.next_run(progress.reached, range.end()) {
            if state != PageState::from(request.to()) {
                if state == PageState::Poisoned {
                    return Err(Error::Inaccessible { range: run });
                }
                if runs == RUNS_PER_REQUEST || runs > 0 && deadline.is_over() {
                    return Err(Error::Unfinished { range: run });
                }
                runs += 1;
                self.convert_run(request.vcpu(), run, request.to(), &claim, deadline)?;
                progress.pages += run.pages();
            }
            progress.reached = run.end();
        }
        Ok(())
    }

    /// The pages in one state that memory has from `start` on, as many as are converted at once; nothing at `end`.
    fn next_run(&self, start: Gpa, end: Gpa) -> Option<(GpaRange, PageState)> {
        let range = GpaRange::new(start.0, LONGEST_RUN.min(end.0 - start.0)).ok()?;
        self.map().first_run(range)
    }

    /// Puts `range`, which is claimed and all of it in one state, into `state`.
    fn set(&self, range: GpaRange, state: PageState) {
        self.runs.fetch_add(self.map().set(range, state), Ordering::Relaxed);
    }

    /// Sees to it that there are mappings for what a conversion leaves. Others may use them up meanwhile, so that there are
    /// two runs too many at worst for each vCPU that converts at the same time.
    fn check_runs(&self, range: GpaRange, to: Side) -> Result<(), Error> {
        let most = self.converter.most_runs();
        let has_room =
            |more| self.runs.load(Ordering::Relaxed).saturating_add(more) <= i64::try_from(most).unwrap_or(i64::MAX);
        // A conversion adds two at most: itself, and what is left of the run that it was in.
        if has_room(2) {
            return Ok(());
        }
        let more = self.map().more_runs(range, to.into());
        if more > 0 && !has_room(more) {
            return Err(Error::TooFragmented { range, most });
        }
        Ok(())
    }

    fn convert_run(
        &self,
        vcpu: u32,
        range: GpaRange,
        to: Side,
        claim: &Claim<'_>,
        deadline: Deadline,
    ) -> Result<(), Error> {
        self.check_runs(range, to)?;
        let listeners = claim.listeners();
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
        let run = Run { engine: self, range, to, claim, is_concluded: false };
        // Pages on their way to the shared side were never in the view, so nobody can hold them.
        if to == Side::Private {
            self.set(range, PageState::Private);
            if let Err(holders) = self.memory.pins().drain(deadline) {
                run.roll_back();
                return Err(Error::Pinned { range, waited: PATIENCE, holders });
            }
        }
        match self.converter.convert(vcpu, range, to) {
            Ok(()) => {
                run.commit();
                Ok(())
            }
            Err(ConverterError { step, left_as, source }) => {
                let error = Error::Backend { step, range: Some(range), source };
                match left_as {
                    LeftAs::Before => {
                        run.roll_back();
                        Err(error)
                    }
                    LeftAs::Unknown => {
                        let contained = run.poison(vcpu);
                        Err(Error::Poisoned { range, contained, source: Box::new(error) })
                    }
                }
            }
        }
    }
}

/// A run of pages under conversion, which the listeners have agreed to.
///
/// Until it is concluded its pages count as lost: who is called on the way and panics leaves them out of the host's reach.
struct Run<'a, C: Converter> {
    engine: &'a ConversionEngine<C>,
    range: GpaRange,
    to: Side,
    claim: &'a Claim<'a>,
    is_concluded: bool,
}

impl<C: Converter> Run<'_, C> {
    fn conclude(&mut self, state: PageState) {
        // In the map, all runs are private on the way.
        if state != PageState::Private {
            self.engine.set(self.range, state);
        }
        self.is_concluded = true;
    }

    fn commit(mut self) {
        self.conclude(self.to.into());
        self.claim.listeners().iter().for_each(|listener| listener.committed(self.range, self.to));
    }

    fn roll_back(mut self) {
        self.conclude(self.to.other().into());
        self.claim.listeners().iter().for_each(|listener| listener.aborted(self.range, self.to));
    }

    /// Returns whether the pages are out of the guest's reach, too.
    fn poison(mut self, vcpu: u32) -> bool {
        self.conclude(PageState::Poisoned);
        self.claim.listeners().iter().for_each(|listener| listener.poisoned(self.range));
        let contained = self.engine.converter.poison(vcpu, self.range).is_ok();
        if !contained {
            self.engine.lost.store(true, Ordering::SeqCst);
        }
        contained
    }
}

impl<C: Converter> Drop for Run<'_, C> {
    fn drop(&mut self) {
        if !self.is_concluded {
            self.engine.set(self.range, PageState::Poisoned);
        }
    }
}

#[cfg(test)]
mod tests;
