//! What guests ask for, and what becomes of it.

use crate::memory::padded::Padded;
use crate::{Answer, Error, Gpa, GpaRange, Side};
use std::ops::Range;
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
        range.map_err(|source| Error::InvalidRequest { vcpu: self.vcpu, source })
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

    /// Why the answer is not [`Answer::Done`].
    pub fn cause(&self) -> Option<&Error> {
        self.cause.as_ref()
    }
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

/// In how many places requests are kept, so that vCPUs which ask at once do not wait for each other's memory.
const DESKS: usize = 16;

/// What guests have asked for and nobody has carried out yet, at most one request for each vCPU; and what was carried
/// out.
#[derive(Debug, Default)]
pub(super) struct Requests {
    /// Each for some vCPUs.
    desks: [Padded<Mutex<Open>>; DESKS],
}

#[derive(Debug, Default)]
struct Open {
    /// Padded, as the allocator may put others' memory right beside.
    asked: Vec<Padded<(Ticket, ConversionRequest)>>,
    tickets: Range<u64>,
    totals: ConversionTotals,
}

impl Open {
    fn ticket(&mut self) -> Ticket {
        /// So many at a time, so that desks rarely ask for more.
        const BATCH: u64 = 1 << 20;
        static LAST: AtomicU64 = AtomicU64::new(0);
        if self.tickets.is_empty() {
            let first = LAST.fetch_add(BATCH, Ordering::Relaxed);
            self.tickets = first..first + BATCH;
        }
        self.tickets.start += 1;
        Ticket(self.tickets.start)
    }

    fn position(&self, vcpu: u32) -> Option<usize> {
        self.asked.iter().position(|Padded((_, asked))| asked.vcpu == vcpu)
    }
}

impl Requests {
    fn desk(&self, vcpu: u32) -> MutexGuard<'_, Open> {
        self.desks[vcpu as usize % DESKS].0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes down a request, in place of an earlier one of the same vCPU.
    pub(super) fn ask(&self, request: ConversionRequest) -> Ticket {
        let mut desk = self.desk(request.vcpu);
        let ticket = desk.ticket();
        match desk.position(request.vcpu) {
            Some(at) => desk.asked[at] = Padded((ticket, request)),
            None => desk.asked.push(Padded((ticket, request))),
        }
        ticket
    }

    /// What this vCPU has asked for.
    pub(super) fn get(&self, vcpu: u32) -> Option<(Ticket, ConversionRequest)> {
        let desk = self.desk(vcpu);
        desk.position(vcpu).map(|at| desk.asked[at].0)
    }

    /// Takes the request away if it is there.
    pub(super) fn take(&self, request: &ConversionRequest) -> Option<Ticket> {
        let mut desk = self.desk(request.vcpu);
        let at = desk.position(request.vcpu).filter(|at| desk.asked[*at].0.1 == *request)?;
        Some(desk.asked.swap_remove(at).0.0)
    }

    /// Takes away whatever this vCPU has asked for.
    pub(super) fn withdraw(&self, vcpu: u32) {
        let mut desk = self.desk(vcpu);
        desk.asked.retain(|Padded((_, asked))| asked.vcpu != vcpu);
    }

    /// Counts a request that was carried out as far as it could be.
    pub(super) fn count(&self, request: &ConversionRequest, pages: u64, refused: bool) {
        let totals = &mut self.desk(request.vcpu).totals;
        totals.requests += 1;
        totals.refused += u64::from(refused);
        match request.to {
            Side::Private => totals.to_private += pages,
            Side::Shared => totals.to_shared += pages,
        }
    }

    /// What was carried out so far.
    pub(super) fn totals(&self) -> ConversionTotals {
        (0..DESKS as u32).map(|desk| self.desk(desk).totals).fold(ConversionTotals::default(), |sum, desk| {
            ConversionTotals {
                requests: sum.requests + desk.requests,
                refused: sum.refused + desk.refused,
                to_private: sum.to_private + desk.to_private,
                to_shared: sum.to_shared + desk.to_shared,
            }
        })
    }
}
