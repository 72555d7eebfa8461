//! Memory of VMs that have private memory: a `guest_memfd` for each slot, which no process can map, read or write.

#![allow(unsafe_code, reason = "KVM is told where the shared side is, and hands out descriptors as numbers")]

use super::backing::Backing;
use super::layout::Layout;
use super::window::Windows;
use crate::Error;
use cvm_core::memory::{Allocated, ConverterError, LeftAs, Sides};
use cvm_core::{BoxError, GpaRange, Side};
use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_create_guest_memfd, kvm_memory_attributes,
    kvm_userspace_memory_region2,
};
use kvm_ioctls::VmFd;
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

/// The memory of one VM. KVM's memory attributes say which side the guest sees.
#[derive(Debug)]
pub(crate) struct GmemMemory {
    /// Where KVM finds the shared side. They show shared pages only: where KVM has to emulate an instruction, it fetches
    /// it here even if the guest runs private code, and should rather find nothing than bytes of the host's.
    windows: Windows,
    /// One for each slot.
    private: Vec<File>,
    shared: Backing,
    vm: Arc<VmFd>,
    most_runs: u64,
}

impl GmemMemory {
    /// Memory for all slots of `layout`, all of it private and zero, as the memory of `vm`; `shared` is behind
    /// the shared side.
    pub(crate) fn new(vm: Arc<VmFd>, layout: Layout, shared: Backing, most_runs: u64) -> Result<Self, Error> {
        let mut memory = Self { windows: Windows::new(layout)?, private: Vec::new(), shared, vm, most_runs };
        for (number, range) in (0..).zip(memory.windows.slots().iter().copied()) {
            let gmem = kvm_create_guest_memfd { size: range.len(), ..Default::default() };
            let fd = memory.vm.create_guest_memfd(gmem).map_err(Error::kvm("create a guest_memfd"))?;
            // SAFETY: KVM has just made the descriptor, and nobody else knows of it.
            let private = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
            let region = kvm_userspace_memory_region2 {
                slot: number,
                flags: KVM_MEM_GUEST_MEMFD,
                guest_phys_addr: range.start().0,
                memory_size: range.len(),
                userspace_addr: memory.windows.address(range)?,
                guest_memfd: private.as_raw_fd() as u32,
                ..Default::default()
            };
            // SAFETY: the region is a window, which holds nothing but guest memory for as long as it lives; the guest
            // reaches it only through vCPUs, which keep it alive.
            unsafe { memory.vm.set_user_memory_region2(region) }.map_err(Error::kvm("register a memory slot"))?;
            memory.private.push(private);
            memory.set_side(range, Side::Private)?;
        }
        Ok(memory)
    }

    pub(super) fn shared(&self) -> &Backing {
        &self.shared
    }

    pub(super) fn layout(&self) -> &Layout {
        self.windows.layout()
    }

    pub(super) fn allocated(&self) -> io::Result<Allocated> {
        // The kernel does not count what is behind a guest_memfd.
        Ok(Allocated { private: None, shared: self.shared.allocated()? })
    }

    /// Lets the guest see a side.
    fn switch(&self, range: GpaRange, side: Side) -> Result<(), Error> {
        // KVM would take a range across slots.
        self.windows.find(range)?;
        match side {
            Side::Private => {
                self.set_side(range, side)?;
                self.windows.hide(range)
            }
            Side::Shared => {
                self.windows.show(range, &self.shared)?;
                self.set_side(range, side)
            }
        }
    }

    /// Tells KVM which side the guest is to see.
    fn set_side(&self, range: GpaRange, side: Side) -> Result<(), Error> {
        let attributes = match side {
            Side::Private => u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE),
            Side::Shared => 0,
        };
        let attributes =
            kvm_memory_attributes { address: range.start().0, size: range.len(), attributes, ..Default::default() };
        self.vm.set_memory_attributes(attributes).map_err(Error::memory("set the attributes of", range))
    }
}

impl Sides for GmemMemory {
    fn show(&self, range: GpaRange, side: Side) -> Result<(), ConverterError> {
        self.switch(range, side).map_err(|error| ConverterError {
            step: "show the other side",
            left_as: if self.switch(range, side.other()).is_ok() { LeftAs::Before } else { LeftAs::Unknown },
            source: error.into(),
        })
    }

    fn discard(&self, range: GpaRange, losing: Side) -> Result<(), BoxError> {
        let place = self.windows.find(range)?;
        let freed = match losing {
            Side::Private => {
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&self.private[place.slot], hole, place.in_slot, range.len()).map_err(Into::into)
            }
            Side::Shared => self.shared.free(place.in_file, range.len()),
        };
        Ok(freed.map_err(Error::memory("free", range))?)
    }

    fn poison(&self, range: GpaRange) -> Result<(), BoxError> {
        // The shared side, of which there is nothing left to see.
        self.windows.hide(range)?;
        Ok(self.set_side(range, Side::Shared)?)
    }

    fn most_runs(&self) -> u64 {
        self.most_runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KvmPlatform;
    use cvm_core::PAGE_SIZE;
    use cvm_core::Protection;
    use kvm_ioctls::Kvm;
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    use vm_memory::{FileOffset, MmapRegion};

    /// Memory of a VM that exists for it, where KVM has such VMs.
    fn memory(slots: &[GpaRange]) -> Option<GmemMemory> {
        let required = std::env::var("CVM_ISOLATION").is_ok_and(|isolation| isolation == "guest-memfd");
        match KvmPlatform::open(Path::new("/dev/kvm"), Some(Protection::GuestMemfd)) {
            Ok(_) => {}
            Err(error) if required => panic!("{error}"),
            Err(error) => {
                eprintln!("SKIPPED: {error}");
                return None;
            }
        }
        let vm = Kvm::new().unwrap().create_vm_with_type(1).unwrap();
        let layout = Layout::new(slots).unwrap();
        let shared = Backing::new("cvm-shared", layout.bytes()).unwrap();
        Some(GmemMemory::new(Arc::new(vm), layout, shared, 1000).unwrap())
    }

    fn range(start: u64, pages: u64) -> GpaRange {
        GpaRange::from_pages(start * PAGE_SIZE, pages).unwrap()
    }

    #[test]
    fn no_system_call_of_this_process_reaches_private_memory() {
        let Some(memory) = memory(&[range(0, 16)]) else { return };
        let private = &memory.private[0];
        assert!(private.read_at(&mut [0; 16], 0).is_err());
        assert!(private.write_at(&[1; 16], 0).is_err());
        let file = FileOffset::new(private.try_clone().unwrap(), 0);
        assert!(MmapRegion::<()>::from_file(file, 0x1000).is_err());
    }

    #[test]
    fn private_pages_show_kvm_nothing_to_fetch_and_shared_ones_their_backing() {
        let Some(memory) = memory(&[range(0, 16), range(16, 8)]) else { return };
        let process = File::open("/proc/self/mem").unwrap();
        let shown = |page: u64| {
            let at = memory.windows.address(range(page, 1)).unwrap();
            let mut byte = [0; 1];
            process.read_exact_at(&mut byte, at).ok().map(|()| byte[0])
        };
        memory.shared.file().write_all_at(&[7; 24 * PAGE_SIZE as usize], 0).unwrap();
        assert!((0..24).all(|page| shown(page).is_none()));
        memory.show(range(3, 2), Side::Shared).unwrap();
        memory.show(range(17, 1), Side::Shared).unwrap();
        let open: Vec<_> = (0..24).filter(|page| shown(*page) == Some(7)).collect();
        assert_eq!(open, [3, 4, 17]);
        memory.discard(range(3, 1), Side::Shared).unwrap();
        assert_eq!((shown(3), shown(4)), (Some(0), Some(7)));
        memory.show(range(4, 1), Side::Private).unwrap();
        memory.poison(range(17, 1)).unwrap();
        assert!([4, 17].into_iter().all(|page| shown(page).is_none()));
        assert!(memory.show(range(15, 2), Side::Shared).is_err(), "a range across slots was converted");
    }
}
