//! A VM's memory, of any kind that KVM has for it.

mod backing;
mod files;
mod gmem;
mod layout;
mod pinned;
mod window;

pub(crate) use backing::Backing;
pub(crate) use files::FilesMemory;
pub(crate) use gmem::GmemMemory;
pub(crate) use layout::Layout;
pub use pinned::PinnedMemory;
pub(crate) use window::Window;

use crate::Error;
use crate::host::Host;
use cvm_core::memory::{Allocated, ConverterError, PageStateMap, SharedMemory, Sides};
use cvm_core::{BoxError, GpaRange, LifecycleAnswer, Side};
use kvm_ioctls::VmFd;
use std::io;
use std::sync::Arc;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

/// How the private memory of plain VMs is kept from the process that holds them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isolation {
    /// Not at all: it is a file.
    None,
    /// It is a `guest_memfd`.
    GuestMemfd,
}

impl Isolation {
    /// Whether the kernel swaps private memory.
    pub(crate) fn swap(self) -> LifecycleAnswer {
        match self {
            // As the pages of any other file.
            Self::None => LifecycleAnswer::Yes,
            // Its pages are unevictable (Linux virt/kvm/guest_memfd.c).
            Self::GuestMemfd => LifecycleAnswer::No("private memory is a guest_memfd, which the kernel does not swap"),
        }
    }
}

/// The memory of one VM.
#[derive(Debug)]
pub struct GuestMemory(pub(super) Kind);

#[derive(Debug)]
pub(super) enum Kind {
    /// Two files of this process.
    Files(FilesMemory),
    /// Private memory that no process can map.
    Gmem(GmemMemory),
    /// One file for both sides, pinned.
    Pinned(PinnedMemory),
}

/// Calls the same on whichever it is.
macro_rules! each {
    ($memory:expr, $it:ident => $call:expr) => {
        match &$memory.0 {
            Kind::Files($it) => $call,
            Kind::Gmem($it) => $call,
            Kind::Pinned($it) => $call,
        }
    };
}

impl GuestMemory {
    /// A `guest_memfd` for each range of `memory`, all of it private and zero, as the memory of `vm`, whose type has to
    /// have private memory; and one file behind the shared side of all.
    ///
    /// # Errors
    /// [`Error::Kvm`], [`Error::Memory`] or [`Error::Backing`] when the host refuses.
    pub fn guest_memfd(host: &Host, vm: &Arc<VmFd>, memory: &[GpaRange]) -> Result<Self, Error> {
        let layout = Layout::new(memory).map_err(Error::Layout)?;
        let shared = Backing::new("cvm-shared", layout.bytes())?;
        Ok(Self(Kind::Gmem(GmemMemory::new(Arc::clone(vm), layout, shared, host.most_runs)?)))
    }

    /// [Pinned](PinnedMemory) memory of `vm`, all of it private and zero as the host writes zeros. KVM must know already that
    /// the guest's memory is encrypted.
    ///
    /// # Errors
    /// [`Error::Pin`] when this process may not pin so much; [`Error::Kvm`], [`Error::Memory`] or [`Error::Backing`] when the
    /// host refuses.
    pub fn pinned(vm: &VmFd, memory: &[GpaRange]) -> Result<Self, Error> {
        let layout = Layout::new(memory).map_err(Error::Layout)?;
        let backing = Backing::new("cvm-memory", layout.bytes())?;
        let memory = PinnedMemory::new(layout, backing)?;
        memory.attach(vm)?;
        Ok(Self(Kind::Pinned(memory)))
    }

    /// It, if it is pinned.
    pub fn as_pinned(&self) -> Option<&PinnedMemory> {
        match &self.0 {
            Kind::Pinned(memory) => Some(memory),
            Kind::Files(_) | Kind::Gmem(_) => None,
        }
    }

    /// Whether the kernel swaps the private side.
    pub(crate) fn swap(&self) -> LifecycleAnswer {
        match &self.0 {
            Kind::Files(_) => Isolation::None.swap(),
            Kind::Gmem(_) => Isolation::GuestMemfd.swap(),
            Kind::Pinned(_) => LifecycleAnswer::No("what is encrypted depends on where it lies, so it is pinned"),
        }
    }

    /// The shared side, as devices see it.
    pub(crate) fn shared_view(&self) -> Result<SharedMemory, BoxError> {
        each!(self, memory => shared_view(memory.shared(), memory.layout()))
    }

    pub(crate) fn allocated(&self) -> io::Result<Allocated> {
        each!(self, memory => memory.allocated())
    }
}

/// The view of `backing`, in which the slots lie as `layout` says.
pub(crate) fn shared_view(backing: &Backing, layout: &Layout) -> Result<SharedMemory, BoxError> {
    let regions = layout.iter().map(|(range, offset)| {
        let file = backing.file().try_clone().map_err(Error::memory("copy the descriptor behind", range))?;
        let len = usize::try_from(range.len())?;
        Ok((GuestAddress(range.start().0), len, Some(FileOffset::new(file, offset))))
    });
    let mapped = GuestMemoryMmap::from_ranges_with_files(regions.collect::<Result<Vec<_>, BoxError>>()?);
    // What vm-memory says has its source in it.
    let mapped = mapped.map_err(|error| format!("failed to map the shared side: {error}"))?;
    Ok(SharedMemory::new(mapped, Arc::new(PageStateMap::new(layout.slots().clone())?))?)
}

impl Sides for GuestMemory {
    fn show(&self, range: GpaRange, side: Side) -> Result<(), ConverterError> {
        each!(self, memory => memory.show(range, side))
    }

    fn discard(&self, range: GpaRange, losing: Side) -> Result<(), BoxError> {
        each!(self, memory => memory.discard(range, losing))
    }

    fn poison(&self, range: GpaRange) -> Result<(), BoxError> {
        each!(self, memory => memory.poison(range))
    }

    fn most_runs(&self) -> u64 {
        each!(self, memory => memory.most_runs())
    }
}
