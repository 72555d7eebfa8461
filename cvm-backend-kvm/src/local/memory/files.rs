//! Memory for any KVM: two files, and a window per slot that shows one or the other.

#![allow(unsafe_code, reason = "KVM is told where the windows are")]

use super::backing::Backing;
use super::layout::Layout;
use super::window::Windows;
use crate::Error;
use cvm_core::memory::{Allocated, ConverterError, LeftAs, Sides};
use cvm_core::{BoxError, GpaRange, Side};
use kvm_ioctls::VmFd;
use std::io;
use std::os::unix::fs::FileExt;

/// The memory of one VM, in slots.
#[derive(Debug)]
pub(crate) struct FilesMemory {
    private: Backing,
    shared: Backing,
    windows: Windows,
    most_runs: u64,
}

impl FilesMemory {
    /// Memory for all slots of `layout`, all of it private and zero; `shared` is behind the shared side.
    pub(crate) fn new(layout: Layout, shared: Backing, most_runs: u64) -> Result<Self, Error> {
        let private = Backing::new("cvm-private", layout.bytes())?;
        Ok(Self { windows: Windows::onto(&private, layout)?, private, shared, most_runs })
    }

    /// Makes the windows the guest's memory. The vCPUs of `vm` must keep this memory alive.
    pub(crate) fn attach(&self, vm: &VmFd) -> Result<(), Error> {
        // SAFETY: the guest reaches the windows only through vCPUs, which keep them alive.
        unsafe { self.windows.register(vm) }
    }

    pub(super) fn shared(&self) -> &Backing {
        &self.shared
    }

    pub(super) fn layout(&self) -> &Layout {
        self.windows.layout()
    }

    /// Writes to the private side, before there is a guest.
    pub(crate) fn write_private(&self, range: GpaRange, contents: &[u8]) -> Result<(), Error> {
        let offset = self.windows.find(range)?.in_file;
        self.private.file().write_all_at(contents, offset).map_err(Error::memory("write", range))
    }

    pub(super) fn allocated(&self) -> io::Result<Allocated> {
        Ok(Allocated { private: Some(self.private.allocated()?), shared: self.shared.allocated()? })
    }

    fn backing(&self, side: Side) -> &Backing {
        match side {
            Side::Private => &self.private,
            Side::Shared => &self.shared,
        }
    }
}

impl Sides for FilesMemory {
    fn show(&self, range: GpaRange, side: Side) -> Result<(), ConverterError> {
        let show = |side: Side| self.windows.show(range, self.backing(side));
        show(side).map_err(|error| ConverterError {
            step: "show the other side",
            // A mapping that fails may have removed the one before it.
            left_as: if show(side.other()).is_ok() { LeftAs::Before } else { LeftAs::Unknown },
            source: error.into(),
        })
    }

    fn discard(&self, range: GpaRange, losing: Side) -> Result<(), BoxError> {
        let offset = self.windows.find(range)?.in_file;
        Ok(self.backing(losing).free(offset, range.len()).map_err(Error::memory("free", range))?)
    }

    fn most_runs(&self) -> u64 {
        self.most_runs
    }

    fn poison(&self, range: GpaRange) -> Result<(), BoxError> {
        Ok(self.windows.hide(range)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cvm_core::SharedMemory;
    use cvm_core::memory::ConversionEngine;
    use cvm_core::{Answer, ConversionRequest, PAGE_SIZE};
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    const PAGES: u64 = 600;

    fn memory() -> FilesMemory {
        let pages = |start, pages| GpaRange::from_pages(start * PAGE_SIZE, pages).unwrap();
        let layout = Layout::new(&[pages(0, 500), pages(1000, 100)]).unwrap();
        let shared = Backing::new("cvm-shared", layout.bytes()).unwrap();
        FilesMemory::new(layout, shared, 1000).unwrap()
    }

    fn shared_view(memory: &FilesMemory) -> SharedMemory {
        super::super::shared_view(memory.shared(), memory.layout()).unwrap()
    }

    fn fill_private(memory: &FilesMemory) {
        for slot in memory.windows.slots() {
            memory.write_private(*slot, &vec![0xa5; slot.len() as usize]).unwrap();
        }
    }

    #[test]
    fn a_page_has_memory_on_one_side_only_whatever_is_converted() {
        let memory = memory();
        fill_private(&memory);
        let view = shared_view(&memory);
        let engine = ConversionEngine::new(memory, view);
        let allocated = || engine.converter().allocated().unwrap();
        assert_eq!(allocated(), Allocated { private: Some(PAGES * PAGE_SIZE), shared: 0 });

        let ask = |start: u64, pages, to| {
            let request = ConversionRequest::from_guest(0, start * PAGE_SIZE, pages, to);
            engine.ask(request);
            let outcome = engine.convert(&request);
            assert_eq!(outcome.answer(), Answer::Done, "{:?}", outcome.cause());
        };
        ask(490, 10, Side::Shared);
        ask(1000, 10, Side::Shared);
        assert_eq!(allocated(), Allocated { private: Some((PAGES - 20) * PAGE_SIZE), shared: 0 });
        let pinned = engine.memory().memory();
        for page in (490..500).chain(1000..1010) {
            let mut contents = [1u8; PAGE_SIZE as usize];
            pinned.read_slice(&mut contents, GuestAddress(page * PAGE_SIZE)).unwrap();
            assert!(contents.iter().all(|byte| *byte == 0), "page {page} has kept its private contents");
            pinned.write_slice(&[0x5a; PAGE_SIZE as usize], GuestAddress(page * PAGE_SIZE)).unwrap();
        }
        drop(pinned);
        assert_eq!(
            allocated(),
            Allocated { private: Some((PAGES - 20) * PAGE_SIZE), shared: 20 * PAGE_SIZE },
            "shared pages are allocated when they are written"
        );
        ask(0, 500, Side::Private);
        ask(1000, 100, Side::Private);
        assert_eq!(allocated(), Allocated { private: Some((PAGES - 20) * PAGE_SIZE), shared: 0 });
        let mut contents = [1u8; PAGE_SIZE as usize];
        engine.converter().private.file().read_exact_at(&mut contents, 495 * PAGE_SIZE).unwrap();
        assert!(contents.iter().all(|byte| *byte == 0), "contents came back with the page");
    }

    #[test]
    fn a_guest_that_alternates_sides_cannot_use_up_the_mappings_of_the_process() {
        let most_runs = crate::host::most_runs();
        let pages = 2 * most_runs + 4;
        let layout = Layout::new(&[GpaRange::from_pages(0, pages).unwrap()]).unwrap();
        let memory = {
            let shared = Backing::new("cvm-shared", layout.bytes()).unwrap();
            FilesMemory::new(layout, shared, most_runs).unwrap()
        };
        let view = shared_view(&memory);
        let engine = ConversionEngine::new(memory, view);
        let refused = (0..pages).step_by(2).find_map(|page| {
            let request = ConversionRequest::from_guest(0, page * PAGE_SIZE, 1, Side::Shared);
            engine.ask(request);
            let outcome = engine.convert(&request);
            (outcome.answer() != Answer::Done).then_some(outcome)
        });
        let refused = refused.expect("every second page could be shared");
        assert!(matches!(refused.cause(), Some(cvm_core::Error::TooFragmented { .. })), "{:?}", refused.cause());
        std::thread::spawn(|| {}).join().expect("there is room for a thread");
    }

    #[test]
    fn ranges_outside_a_slot_are_refused_by_every_step() {
        let memory = memory();
        let outside = GpaRange::from_pages(499 * PAGE_SIZE, 2).unwrap();
        assert!(memory.show(outside, Side::Shared).is_err());
        assert!(memory.discard(outside, Side::Shared).is_err());
        assert!(memory.poison(outside).is_err());
        assert!(memory.write_private(outside, &[0; 0x2000]).is_err());
    }

    #[test]
    fn the_shared_view_does_not_reach_private_memory() {
        let memory = memory();
        fill_private(&memory);
        let view = shared_view(&memory);
        for page in [0, 499, 1000, 1099] {
            assert!(view.memory().read_obj::<u8>(GuestAddress(page * PAGE_SIZE)).is_err());
        }
    }
}
