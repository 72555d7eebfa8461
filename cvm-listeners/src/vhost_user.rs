//! Shared memory for a vhost-user backend: a process that serves a virtio device knows the shared pages, and no others.
//!
//! A backend hears of memory in regions, each with a descriptor to map. It gets no region that has a private page: what
//! is to become private leaves its regions first. There are two ways, and [`VhostUser::new`] takes the second where
//! both ends can (vhost-user specification, `docs/interop/vhost-user.rst` of QEMU):
//!
//! | | `VHOST_USER_SET_MEM_TABLE` | `VHOST_USER_ADD_MEM_REG` and `VHOST_USER_REM_MEM_REG` |
//! |---|---|---|
//! | needs | nothing | `VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS` |
//! | how many | 8 regions | what the backend says |
//! | a region is | a run of shared pages, as long as can be | what was shared at once; neighbours are merged when slots run out |
//! | a change | sends all regions | touches just those regions that change |
//! | no shared page at all | cannot be said: the last region stays, and its conversion is refused | no region |
//!
//! By the second way a region that shrinks is removed and its rest added again. A backend that accesses the rest
//! meanwhile fails that access. A guest avoids this by converting what it shared at once, whole.
//!
//! The descriptor is that of the whole shared file. A hostile backend can map more than its regions; private pages are not
//! in that file, so it finds nothing there but what other devices share.

use crate::iommu::{DmaError, DmaMap, explain};
use crate::mapper::{Hindrance, Mapper, is_shared};
use crate::ranges::RangeSet;
use cvm_core::memory::{Backing, ConversionListener, Objection, SharedMemory};
use cvm_core::{GpaRange, Side};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};

/// How many regions every backend takes in a memory table: `VHOST_MEMORY_BASELINE_NREGIONS` in QEMU's
/// `hw/virtio/vhost-user.c`.
const TABLE_REGIONS: u64 = 8;

/// Why a backend cannot be told of memory.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// More runs of pages are shared than the backend has memory slots.
    #[error("{runs} runs of shared pages are more than the {slots} memory slots of the backend")]
    TooFragmented {
        /// How many regions there would have to be.
        runs: u64,
        /// How many there may be.
        slots: u64,
    },
    /// A region could not be added or removed.
    #[error(transparent)]
    Region(#[from] DmaError),
    /// The backend did not take the memory table.
    #[error("failed to set the memory table")]
    Table(#[source] io::Error),
    /// The backend does not say how many memory slots it has.
    #[error("failed to ask for the number of memory slots")]
    Slots(#[source] vhost::Error),
}

/// Keeps the memory of a vhost-user backend up to date. See the [module](self).
#[derive(Debug)]
pub struct VhostUser<F> {
    name: String,
    way: Way<F>,
    detached: AtomicBool,
}

#[derive(Debug)]
enum Way<F> {
    Table(Table<F>),
    Slots(Mapper<Slots<F>>),
}

impl<F: VhostUserFrontend + Send> VhostUser<F> {
    /// Tells the backend behind `frontend` of what is shared, now and with each conversion. Errors call it `name`. No page
    /// may be converted between this and adding it to the VM's listeners.
    ///
    /// `acked` are the protocol features in force. With `REPLY_ACK`, and [`VhostUserHeaderFlag::NEED_REPLY`] set on the
    /// frontend, errors of the backend are heard of; without it only that the backend has read what it was sent.
    ///
    /// [`VhostUserHeaderFlag::NEED_REPLY`]: vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY
    ///
    /// # Errors
    /// The backend fails, or has too few memory slots for what is shared.
    pub fn new(
        name: impl Into<String>,
        mut frontend: F,
        memory: &SharedMemory,
        acked: VhostUserProtocolFeatures,
    ) -> Result<Self, VhostUserError> {
        let name = name.into();
        let memory = memory.named(&name);
        let way = if acked.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            let slots = frontend.get_max_mem_slots().map_err(VhostUserError::Slots)?;
            // A region may be as long as a slot of the VM.
            let sender = Slots { frontend: Mutex::new(frontend), memory: memory.clone() };
            let mapper = Mapper::new(sender, memory, slots, u64::MAX);
            Way::Slots(mapper.map_err(|hindrance| match hindrance {
                Hindrance::NoRoom { more, .. } => {
                    VhostUserError::TooFragmented { runs: slots.saturating_add(more), slots }
                }
                Hindrance::Failed(error) => VhostUserError::Region(error),
            })?)
        } else {
            Way::Table(Table::new(frontend, memory)?)
        };
        Ok(Self { name, way, detached: AtomicBool::new(false) })
    }

    /// Agrees to every conversion from now on, and says nothing to the backend any more. For a backend that has died or
    /// was disconnected: else each conversion would fail with it. What it has mapped stays harmless, as the
    /// [module](self) says.
    pub fn detach(&self) {
        self.detached.store(true, Ordering::SeqCst);
    }

    /// The regions that the backend should know, by address.
    pub fn regions(&self) -> Vec<GpaRange> {
        match &self.way {
            Way::Table(table) => table.regions(&table.lock().runs),
            Way::Slots(mapper) => {
                let (mut there, absent) = mapper.areas();
                there.extend(absent);
                there.sort();
                there
            }
        }
    }

    /// Tells the backend of what it could not be told before; each conversion does so too.
    ///
    /// # Errors
    /// The backend fails again.
    pub fn mend(&self) -> Result<(), VhostUserError> {
        match &self.way {
            Way::Table(table) => table.mend(&mut table.lock()).map_err(VhostUserError::Table),
            Way::Slots(mapper) => Ok(mapper.mend()?),
        }
    }
}

fn too_fragmented(runs: u64, slots: u64, others: bool) -> Objection {
    let reason = VhostUserError::TooFragmented { runs, slots }.to_string();
    if others { Objection::Wait(reason) } else { Objection::Refuse(reason) }
}

impl<F: VhostUserFrontend + Send> ConversionListener for VhostUser<F> {
    fn name(&self) -> &str {
        &self.name
    }

    fn prepare(&self, range: GpaRange, to: Side) -> Result<(), Objection> {
        if self.detached.load(Ordering::SeqCst) {
            return Ok(());
        }
        match &self.way {
            Way::Table(table) => table.prepare(range, to),
            Way::Slots(mapper) => mapper.prepare(range, to).map_err(|hindrance| match hindrance {
                Hindrance::NoRoom { more, others } => {
                    too_fragmented(mapper.most().saturating_add(more), mapper.most(), others)
                }
                Hindrance::Failed(error) => Objection::Wait(explain(&error)),
            }),
        }
    }

    fn committed(&self, range: GpaRange, to: Side) {
        self.end(range, to == Side::Shared);
    }

    fn aborted(&self, range: GpaRange, to: Side) {
        self.end(range, to == Side::Private);
    }

    fn poisoned(&self, range: GpaRange) {
        self.end(range, false);
    }
}

impl<F: VhostUserFrontend + Send> VhostUser<F> {
    /// Waits until the backend has handled what it was sent.
    ///
    /// # Errors
    /// The backend does not answer.
    pub fn fence(&self) -> io::Result<()> {
        match &self.way {
            Way::Table(table) => fence(&table.lock().frontend),
            Way::Slots(mapper) => fence(&*mapper.dma().frontend()),
        }
    }

    fn end(&self, range: GpaRange, shared: bool) {
        if self.detached.load(Ordering::SeqCst) {
            return;
        }
        match &self.way {
            Way::Table(table) => table.end(range, shared),
            Way::Slots(mapper) => mapper.end(range, shared),
        }
    }
}

fn region_of(memory: &SharedMemory, range: GpaRange) -> io::Result<VhostUserMemoryRegionInfo> {
    let backing = memory.backing(range).ok_or_else(|| io::Error::other("there is no shared backing"))?;
    region(range, &backing)
}

fn region(range: GpaRange, backing: &Backing) -> io::Result<VhostUserMemoryRegionInfo> {
    let file = backing.file.as_ref().ok_or_else(|| io::Error::other("the shared memory has no descriptor"))?;
    Ok(VhostUserMemoryRegionInfo {
        guest_phys_addr: range.start().0,
        memory_size: range.len(),
        userspace_addr: backing.address,
        mmap_offset: file.start(),
        mmap_handle: file.file().as_raw_fd(),
    })
}

/// Waits until the backend has handled what it was sent: it handles messages in order, and must answer this one.
fn fence(frontend: &impl VhostUserFrontend) -> io::Result<()> {
    frontend.get_features().map(drop).map_err(io::Error::other)
}

/// Regions that are added and removed one by one.
#[derive(Debug)]
struct Slots<F> {
    frontend: Mutex<F>,
    memory: SharedMemory,
}

impl<F: VhostUserFrontend + Send> Slots<F> {
    fn frontend(&self) -> MutexGuard<'_, F> {
        self.frontend.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F: VhostUserFrontend + Send> DmaMap for Slots<F> {
    fn map(&self, range: GpaRange, backing: &Backing) -> io::Result<()> {
        let mut frontend = self.frontend();
        frontend.add_mem_region(&region(range, backing)?).map(drop).map_err(io::Error::other)
    }

    fn unmap(&self, range: GpaRange) -> io::Result<()> {
        let region = region_of(&self.memory, range)?;
        let mut frontend = self.frontend();
        frontend.remove_mem_region(&region).map_err(io::Error::other)?;
        fence(&*frontend)
    }
}

/// Regions that are sent all at once.
#[derive(Debug)]
struct Table<F> {
    memory: SharedMemory,
    state: Mutex<TableState<F>>,
}

#[derive(Debug)]
struct TableState<F> {
    frontend: F,
    /// What the backend should know: the shared pages but those that are about to become private.
    runs: RangeSet,
    /// Conversions between `prepare` and what follows it: each may add a run yet.
    pending: u64,
    /// Whether the backend may know something else.
    stale: bool,
}

impl<F: VhostUserFrontend + Send> Table<F> {
    fn new(frontend: F, memory: SharedMemory) -> Result<Self, VhostUserError> {
        let mut runs = RangeSet::default();
        let map = memory.map();
        let shared = map.slots().ranges().iter().flat_map(|slot| map.runs(*slot)).filter(is_shared);
        shared.for_each(|(run, _)| runs.insert(run));
        let table = Self { memory, state: Mutex::new(TableState { frontend, runs, pending: 0, stale: true }) };
        let mut state = table.lock();
        let runs = table.count(&state.runs);
        if runs > TABLE_REGIONS {
            return Err(VhostUserError::TooFragmented { runs, slots: TABLE_REGIONS });
        }
        table.mend(&mut state).map_err(VhostUserError::Table)?;
        drop(state);
        Ok(table)
    }

    /// A region for each run of pages in a slot.
    fn regions(&self, runs: &RangeSet) -> Vec<GpaRange> {
        runs.runs().flat_map(|run| self.memory.map().slots().split(run).unwrap_or_default()).collect()
    }

    fn count(&self, runs: &RangeSet) -> u64 {
        self.regions(runs).len() as u64
    }

    fn prepare(&self, range: GpaRange, to: Side) -> Result<(), Objection> {
        let mut state = self.lock();
        let wait = |error| Objection::Wait(format!("failed to set the memory table: {error}"));
        if to == Side::Shared {
            self.mend(&mut state).map_err(wait)?;
        }
        let mut after = state.runs.clone();
        match to {
            Side::Shared => after.insert(range),
            Side::Private => after.remove(range),
        }
        let runs = self.count(&state.runs).max(self.count(&after)) + state.pending;
        if runs > TABLE_REGIONS {
            return Err(too_fragmented(runs, TABLE_REGIONS, state.pending > 0));
        }
        if to == Side::Private {
            if after.pages() == 0 {
                return Err(Objection::Refuse(format!(
                    "{range} is all that is shared, and a memory table is not empty"
                )));
            }
            let before = std::mem::replace(&mut state.runs, after);
            if let Err(error) = self.send(&mut state) {
                state.runs = before;
                // If the backend does not take this one either, the next call tries again.
                let _ = self.send(&mut state);
                return Err(wait(error));
            }
        }
        state.pending += 1;
        Ok(())
    }

    fn end(&self, range: GpaRange, shared: bool) {
        let mut state = self.lock();
        state.pending = state.pending.saturating_sub(1);
        if shared {
            state.runs.insert(range);
            // What fails is tried again by the next call.
            let _ = self.send(&mut state);
        }
    }

    fn mend(&self, state: &mut TableState<F>) -> io::Result<()> {
        if state.stale { self.send(state) } else { Ok(()) }
    }

    fn send(&self, state: &mut TableState<F>) -> io::Result<()> {
        state.stale = true;
        let regions = self.regions(&state.runs).into_iter().map(|range| region_of(&self.memory, range));
        let regions = regions.collect::<io::Result<Vec<_>>>()?;
        // Before the first page is shared there is nothing to say.
        if !regions.is_empty() {
            state.frontend.set_mem_table(&regions).map_err(io::Error::other)?;
            fence(&state.frontend)?;
        }
        state.stale = false;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, TableState<F>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;
