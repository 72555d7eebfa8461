//! Shared memory in areas that somebody outside is told of one by one: an IOMMU, or a backend's memory slots.

use crate::iommu::{DmaError, DmaMap};
use cvm_core::memory::SharedMemory;
use cvm_core::{GpaRange, PageState, Side};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Why a conversion cannot be.
#[derive(Debug)]
pub(crate) enum Hindrance {
    /// It may need `more` areas than there may be. Conversions under way may leave room when they are `done`.
    NoRoom {
        more: u64,
        others: bool,
    },
    Failed(DmaError),
}

/// Keeps areas outside such that they are the shared pages, no two overlap, and there are at most so many.
///
/// What cannot be mapped when it should be is kept as absent, counts as an area, and is tried again with every call.
#[derive(Debug)]
pub(crate) struct Mapper<D> {
    dma: D,
    memory: SharedMemory,
    most: u64,
    /// No area crosses a multiple of it; in bytes.
    block: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By start.
    areas: BTreeMap<u64, GpaRange>,
    /// Starts of those that should be mapped and are not.
    absent: BTreeSet<u64>,
    /// How many areas the conversions under way may add.
    reserved: u64,
    remapped: u64,
}

impl State {
    fn used(&self) -> u64 {
        self.areas.len() as u64 + self.reserved
    }

    fn overlapping(&self, range: GpaRange) -> Vec<GpaRange> {
        let before = self.areas.range(..range.end().0).rev();
        before.map(|(_, area)| *area).take_while(|area| area.end() > range.start()).collect()
    }

    fn add_absent(&mut self, area: GpaRange) {
        self.areas.insert(area.start().0, area);
        self.absent.insert(area.start().0);
    }

    fn remove(&mut self, area: GpaRange) {
        self.areas.remove(&area.start().0);
        self.absent.remove(&area.start().0);
    }
}

/// What is left of `area` without `range`.
fn rest(area: GpaRange, range: GpaRange) -> impl Iterator<Item = GpaRange> {
    let parts = [(area.start().0, range.start().0), (range.end().0, area.end().0)];
    parts.into_iter().filter_map(|(start, end)| GpaRange::new(start, end.checked_sub(start)?).ok())
}

impl<D: DmaMap> Mapper<D> {
    /// Maps what is shared now.
    pub(crate) fn new(dma: D, memory: SharedMemory, most: u64, block: u64) -> Result<Self, Hindrance> {
        let mapper = Self { dma, memory, most, block, state: Mutex::default() };
        let mut state = mapper.lock();
        let map = mapper.memory.map();
        for (run, _) in map.slots().ranges().iter().flat_map(|slot| map.runs(*slot)).filter(is_shared) {
            mapper.pieces(run).for_each(|piece| state.add_absent(piece));
        }
        if state.used() > most {
            return Err(Hindrance::NoRoom { more: state.used() - most, others: false });
        }
        mapper.mend_locked(&mut state).map_err(Hindrance::Failed)?;
        drop(state);
        Ok(mapper)
    }

    pub(crate) fn dma(&self) -> &D {
        &self.dma
    }

    pub(crate) fn most(&self) -> u64 {
        self.most
    }

    pub(crate) fn block(&self) -> u64 {
        self.block
    }

    /// The areas that are mapped, and those that should be and are not; by address.
    pub(crate) fn areas(&self) -> (Vec<GpaRange>, Vec<GpaRange>) {
        let state = self.lock();
        state.areas.values().partition(|area| !state.absent.contains(&area.start().0))
    }

    pub(crate) fn remapped(&self) -> u64 {
        self.lock().remapped
    }

    /// Maps what should be and is not.
    pub(crate) fn mend(&self) -> Result<(), DmaError> {
        self.mend_locked(&mut self.lock())
    }

    /// Makes one area of neighbours in the same block and slot.
    pub(crate) fn compact(&self) -> Result<(), DmaError> {
        self.merge(&mut self.lock(), 0)
    }

    pub(crate) fn prepare(&self, range: GpaRange, to: Side) -> Result<(), Hindrance> {
        let mut state = self.lock();
        let mended = self.mend_locked(&mut state);
        // What is absent does not keep the guest from taking pages back.
        if to == Side::Shared {
            mended.map_err(Hindrance::Failed)?;
        }
        let reserve = self.pieces(range).count() as u64;
        // What is left of areas that `range` cuts, less those areas.
        let cut = |state: &State| {
            let areas = state.overlapping(range);
            let left = areas.iter().flat_map(|area| rest(*area, range)).count();
            left as i64 - areas.len() as i64
        };
        let beyond = |used: Option<u64>| used.unwrap_or(u64::MAX).saturating_sub(self.most);
        let more = |state: &State| beyond((state.used() + reserve).checked_add_signed(cut(state)));
        if more(&state) > 0 {
            let room = state.used().saturating_sub(more(&state));
            self.merge(&mut state, room).map_err(Hindrance::Failed)?;
        }
        if more(&state) > 0 {
            // When nobody else can add areas, what `range` adds in the end can be merged with its neighbours.
            let areas = state.areas.len() as u64;
            let more = match to {
                _ if state.reserved > 0 => more(&state),
                Side::Private => beyond(areas.checked_add_signed(cut(&state))),
                Side::Shared => beyond((areas + reserve).checked_sub(self.joints(&state, range))),
            };
            if more > 0 {
                return Err(Hindrance::NoRoom { more, others: state.reserved > 0 });
            }
        }
        let areas = state.overlapping(range);
        self.unmap(&mut state, &areas).map_err(Hindrance::Failed)?;
        let left: Vec<_> = areas.iter().flat_map(|area| rest(*area, range)).collect();
        areas.iter().for_each(|area| state.remove(*area));
        left.iter().for_each(|area| state.add_absent(*area));
        state.remapped += left.len() as u64;
        state.reserved += reserve;
        if left.is_empty() {
            return Ok(());
        }
        self.mend_these(&mut state, left.iter().map(|area| area.start().0)).map_err(|error| {
            self.conclude(&mut state, range, true);
            Hindrance::Failed(error)
        })
    }

    /// Ends what [`prepare`](Self::prepare) began: `range` is on the shared side, or not.
    pub(crate) fn end(&self, range: GpaRange, shared: bool) {
        self.conclude(&mut self.lock(), range, shared);
    }

    fn conclude(&self, state: &mut State, range: GpaRange, shared: bool) {
        let pieces: Vec<_> = self.pieces(range).collect();
        state.reserved = state.reserved.saturating_sub(pieces.len() as u64);
        if shared {
            pieces.iter().for_each(|piece| state.add_absent(*piece));
            if state.areas.len() as u64 > self.most {
                let _ = self.merge(state, self.most);
            }
            // Those that fail stay absent, and the next call tries again.
            let _ = self.mend_these(state, pieces.iter().map(|piece| piece.start().0));
        }
    }

    /// The parts of `range` that lie in a block each.
    fn pieces(&self, range: GpaRange) -> impl Iterator<Item = GpaRange> + use<D> {
        let (mut next, end, block) = (range.start().0, range.end().0, self.block);
        std::iter::from_fn(move || {
            let start = next;
            next = (start / block).saturating_add(1).saturating_mul(block).min(end);
            GpaRange::new(start, next.checked_sub(start)?).ok()
        })
    }

    /// Unmaps all of `areas`, which become absent; or none of them, as far as they can be mapped again.
    fn unmap(&self, state: &mut State, areas: &[GpaRange]) -> Result<(), DmaError> {
        for area in areas {
            if state.absent.contains(&area.start().0) {
                continue;
            }
            if let Err(source) = self.dma.unmap(*area) {
                let _ = self.mend_these(state, areas.iter().map(|area| area.start().0));
                return Err(DmaError { step: "unmap", range: *area, source });
            }
            state.absent.insert(area.start().0);
        }
        Ok(())
    }

    fn mend_locked(&self, state: &mut State) -> Result<(), DmaError> {
        if state.absent.is_empty() {
            return Ok(());
        }
        if state.areas.len() as u64 > self.most {
            self.merge(state, self.most)?;
        }
        let absent: Vec<_> = state.absent.iter().copied().collect();
        self.mend_these(state, absent.into_iter())
    }

    /// Maps those areas that are absent; the first error, after all have been tried.
    fn mend_these(&self, state: &mut State, starts: impl Iterator<Item = u64>) -> Result<(), DmaError> {
        let mut result = Ok(());
        for start in starts {
            let Some(area) = state.areas.get(&start).copied().filter(|_| state.absent.contains(&start)) else {
                continue;
            };
            let room = ((state.areas.len() - state.absent.len()) as u64) < self.most;
            let room = room.then_some(()).ok_or_else(|| io::Error::other("neighbours have yet to be merged"));
            let backing = room
                .and_then(|()| self.memory.backing(area).ok_or_else(|| io::Error::other("there is no shared backing")));
            match backing.and_then(|backing| self.dma.map(area, &backing)) {
                Ok(()) => drop(state.absent.remove(&start)),
                Err(source) => result = result.and(Err(DmaError { step: "map", range: area, source })),
            }
        }
        result
    }

    /// Whether two areas, one behind the other, can be one.
    fn joins(&self, a: GpaRange, b: GpaRange) -> bool {
        let slots = self.memory.map().slots();
        a.end() == b.start()
            && a.start().0 / self.block == b.start().0 / self.block
            && slots.find(a.start()) == slots.find(b.start())
    }

    /// How many of the areas next to `range` can be one with a piece of it.
    fn joints(&self, state: &State, range: GpaRange) -> u64 {
        let before = state.areas.range(..range.start().0).next_back().map(|(_, area)| *area);
        let behind = state.areas.get(&range.end().0).copied();
        let (first, last) = (self.pieces(range).next(), self.pieces(range).last());
        let joins = |pair: Option<(GpaRange, GpaRange)>| u64::from(pair.is_some_and(|(a, b)| self.joins(a, b)));
        joins(before.zip(first)) + joins(last.zip(behind))
    }

    /// Merges neighbours until at most `room` areas are used or reserved, or none can be merged.
    fn merge(&self, state: &mut State, room: u64) -> Result<(), DmaError> {
        let areas: Vec<_> = state.areas.values().copied().collect();
        for run in areas.chunk_by(|a, b| self.joins(*a, *b)) {
            if state.used() <= room {
                break;
            }
            let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
            let whole = GpaRange::new(first.start().0, last.end().0 - first.start().0);
            let Some(whole) = whole.ok().filter(|_| run.len() > 1) else { continue };
            self.unmap(state, run)?;
            run.iter().for_each(|area| state.remove(*area));
            state.add_absent(whole);
            state.remapped += 1;
            self.mend_these(state, std::iter::once(whole.start().0))?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a run of a page-state map is shared.
pub(crate) fn is_shared((_, state): &(GpaRange, PageState)) -> bool {
    *state == PageState::Shared
}
