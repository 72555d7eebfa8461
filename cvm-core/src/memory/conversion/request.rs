//! What guests ask for, and what becomes of it.

use crate::{Answer, Error, Gpa, GpaRange, Side};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

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

    pub(super) fn range(&self) -> Result<GpaRange, Error> {
        let range = GpaRange::from_pages(self.gpa, self.pages);
        range.map_err(|reason| Error::InvalidRequest { vcpu: self.vcpu, reason })
    }
}

/// Names one request that a guest has made: no other one has the same, of whichever VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(u64);

/// What became of a request: made by the engine alone, and the only thing that a guest's request is answered with, so
/// that no guest hears of a conversion which did not take place.
#[derive(Debug)]
#[must_use = "the guest waits for the answer"]
pub struct Conversion {
    pub(super) request: ConversionRequest,
    /// Nothing if no guest has made the request.
    pub(super) ticket: Option<Ticket>,
    pub(super) answer: Answer,
    pub(super) progress: Progress,
    pub(super) cause: Option<Error>,
}

/// How far a request got.
#[derive(Debug, Clone, Copy)]
pub(super) struct Progress {
    /// How many pages changed sides.
    pub(super) pages: u64,
    /// All pages of the request before this address are on the wanted side.
    pub(super) reached: Gpa,
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
        self.progress.pages
    }

    /// Where a guest that is to ask again may go on: all pages of its request before this address are where it wants
    /// them.
    pub fn reached(&self) -> Gpa {
        self.progress.reached
    }

    /// Why the answer is not [`Answer::Done`], if the engine decided that.
    pub fn cause(&self) -> Option<&Error> {
        self.cause.as_ref()
    }

    /// The same, for who answers no guest.
    pub fn into_cause(self) -> Option<Error> {
        self.cause
    }
}

/// What an engine has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConversionTotals {
    /// Requests carried out as far as they could be; where an untrusted VMM has them carried out in parts, parts.
    pub requests: u64,
    /// Those of them that were not carried out whole.
    pub refused: u64,
    /// Pages that became private.
    pub to_private: u64,
    /// Pages that became shared.
    pub to_shared: u64,
}

/// What guests have asked for and no conversion has answered yet, at most one request for each vCPU; and what was carried
/// out.
#[derive(Debug, Default)]
pub(super) struct Requests(Mutex<Open>);

#[derive(Debug, Default)]
struct Open {
    /// By vCPU.
    asked: BTreeMap<u32, (Ticket, ConversionRequest)>,
    totals: ConversionTotals,
}

impl Requests {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes down a request, in place of an earlier one of the same vCPU.
    pub(super) fn ask(&self, request: ConversionRequest) -> Ticket {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let ticket = Ticket(LAST.fetch_add(1, Ordering::Relaxed));
        self.lock().asked.insert(request.vcpu, (ticket, request));
        ticket
    }

    /// What this vCPU has asked for.
    pub(super) fn get(&self, vcpu: u32) -> Option<(Ticket, ConversionRequest)> {
        self.lock().asked.get(&vcpu).copied()
    }

    /// Takes the request away if it is there.
    pub(super) fn take(&self, request: &ConversionRequest) -> Option<Ticket> {
        let mut open = self.lock();
        let (ticket, _) = open.asked.get(&request.vcpu).copied().filter(|(_, asked)| asked == request)?;
        open.asked.remove(&request.vcpu);
        Some(ticket)
    }

    /// Takes away whatever this vCPU has asked for.
    pub(super) fn withdraw(&self, vcpu: u32) {
        self.lock().asked.remove(&vcpu);
    }

    /// Counts a request that was carried out as far as it could be.
    pub(super) fn count(&self, request: &ConversionRequest, pages: u64, refused: bool) {
        let totals = &mut self.lock().totals;
        totals.requests += 1;
        totals.refused += u64::from(refused);
        match request.to {
            Side::Private => totals.to_private += pages,
            Side::Shared => totals.to_shared += pages,
        }
    }

    /// What was carried out so far.
    pub(super) fn totals(&self) -> ConversionTotals {
        self.lock().totals
    }
}
