//! Memory whose pages stay where they are: one file, which the guest sees through one window, whatever side a page is on.
//!
//! It is for guests whose own page tables decide, access by access, whether the processor encrypts: AMD SEV and SEV-ES. The
//! host switches nothing. The kernel pins all of it while the VM lives, because what is encrypted depends on where it lies.
//!
//! | a page becomes | what the host does with its contents |
//! |---|---|
//! | shared | overwrites them with zeros: it finds nothing of what was private there, not even encrypted |
//! | private | nothing: as the guest decrypts what was never encrypted, it finds garbage there, and has to write first |
//!
//! A processor whose caches are not coherent with encryption (CPUID 0x8000001f, EAX bit 10, says that they are) may keep a line
//! of a page twice. There a guest has to flush a page from the caches before it asks for its conversion, to either side: the
//! host cannot do it.

#![allow(unsafe_code, reason = "KVM is told where the windows are")]

use super::backing::Backing;
use super::layout::Layout;
use super::window::Windows;
use crate::{Error, Remedied};
use cvm_core::memory::{Allocated, ConverterError, LeftAs, Sides};
use cvm_core::{BoxError, GpaRange, Side};
use kvm_bindings::kvm_enc_region;
use kvm_ioctls::VmFd;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Memory of a VM whose guest decides, access by access, what the processor encrypts: both sides are one page, which stays
/// where it is.
#[derive(Debug)]
pub struct PinnedMemory {
    file: Backing,
    windows: Windows,
    /// How many bytes are on the shared side.
    shared_bytes: AtomicU64,
}

impl PinnedMemory {
    /// Memory for all slots of `layout` in `backing`, all of it private.
    pub(crate) fn new(layout: Layout, backing: Backing) -> Result<Self, Error> {
        let windows = Windows::onto(&backing, layout)?;
        Ok(Self { file: backing, windows, shared_bytes: AtomicU64::new(0) })
    }

    /// Makes the windows the memory of `vm`, and pins what is behind them. The vCPUs of `vm` must keep this memory alive.
    pub(crate) fn attach(&self, vm: &VmFd) -> Result<(), Error> {
        // SAFETY: the guest reaches the windows only through vCPUs, which keep them alive.
        unsafe { self.windows.register(vm)? };
        self.windows.slots().iter().try_for_each(|slot| self.pin(vm, *slot))
    }

    /// Pins a slot, which the kernel counts against a limit of this process.
    fn pin(&self, vm: &VmFd, slot: GpaRange) -> Result<(), Error> {
        let remedy = "raise the limit of locked memory above that (ulimit -l, LimitMEMLOCK=), or give CAP_IPC_LOCK";
        let region = kvm_enc_region { addr: self.windows.address(slot)?, size: slot.len() };
        vm.register_enc_memory_region(&region).map_err(|error| match error.errno() {
            libc::ENOMEM => {
                Error::Pin { bytes: self.layout().bytes(), source: Remedied { cause: error.into(), remedy } }
            }
            _ => Error::memory("pin", slot)(error),
        })
    }

    pub(super) fn shared(&self) -> &Backing {
        &self.file
    }

    pub(super) fn layout(&self) -> &Layout {
        self.windows.layout()
    }

    /// Where `range`, which must lie in one slot, is in this process. For the kernel: this process never reads or writes there.
    ///
    /// # Errors
    /// [`Error::Memory`] if it does not.
    pub fn address(&self, range: GpaRange) -> Result<u64, Error> {
        self.windows.address(range)
    }

    /// Writes as the host does, without encryption, before there is a guest.
    ///
    /// # Errors
    /// [`Error::Memory`] if `range` does not lie in one slot, or the host has no memory.
    pub fn write(&self, range: GpaRange, contents: &[u8]) -> Result<(), Error> {
        let offset = self.windows.find(range)?.in_file;
        self.file.file().write_all_at(contents, offset).map_err(Error::memory("write", range))
    }

    pub(super) fn allocated(&self) -> io::Result<Allocated> {
        // What is pinned is all there, so nobody but the side of a page decides what it counts as.
        let shared = self.shared_bytes.load(Ordering::Relaxed);
        Ok(Allocated { private: Some(self.file.allocated()?.saturating_sub(shared)), shared })
    }

    /// Overwrites `range` with zeros. A hole would be other memory than what is pinned.
    fn clear(&self, range: GpaRange) -> Result<(), Error> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let offset = self.windows.find(range)?.in_file;
        let clear = |done: u64| {
            let len = (range.len() - done).min(ZEROS.len() as u64) as usize;
            self.file.file().write_all_at(&ZEROS[..len], offset + done)
        };
        (0..range.len()).step_by(ZEROS.len()).try_for_each(clear).map_err(Error::memory("clear", range))
    }
}

impl Sides for PinnedMemory {
    fn show(&self, range: GpaRange, side: Side) -> Result<(), ConverterError> {
        let shown = match side {
            Side::Private => self.windows.find(range).map(drop),
            Side::Shared => self.clear(range),
        };
        shown.map_err(|error| ConverterError {
            step: "give up the contents",
            left_as: LeftAs::Unknown,
            source: error.into(),
        })?;
        match side {
            Side::Private => self.shared_bytes.fetch_sub(range.len(), Ordering::Relaxed),
            Side::Shared => self.shared_bytes.fetch_add(range.len(), Ordering::Relaxed),
        };
        Ok(())
    }

    fn discard(&self, _range: GpaRange, _losing: Side) -> Result<(), BoxError> {
        // There is one page for both sides, and what was in it is gone.
        Ok(())
    }

    fn most_runs(&self) -> u64 {
        // No mapping changes.
        u64::MAX
    }

    fn poison(&self, range: GpaRange) -> Result<(), BoxError> {
        Ok(self.windows.hide(range)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cvm_core::memory::ConversionEngine;
    use cvm_core::{Answer, ConversionRequest, PAGE_SIZE};
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    fn pages(start: u64, pages: u64) -> GpaRange {
        GpaRange::from_pages(start * PAGE_SIZE, pages).unwrap()
    }

    fn memory() -> PinnedMemory {
        let layout = Layout::new(&[pages(0, 500), pages(1000, 100)]).unwrap();
        let backing = Backing::new("cvm-memory", layout.bytes()).unwrap();
        let memory = PinnedMemory::new(layout, backing).unwrap();
        for slot in memory.windows.slots() {
            memory.write(*slot, &vec![0xa5; slot.len() as usize]).unwrap();
        }
        memory
    }

    fn engine(memory: PinnedMemory) -> ConversionEngine<PinnedMemory> {
        let view = super::super::shared_view(memory.shared(), memory.layout()).unwrap();
        ConversionEngine::new(memory, view)
    }

    fn ask(engine: &ConversionEngine<PinnedMemory>, range: GpaRange, to: Side) {
        let request = ConversionRequest::from_guest(0, range.start().0, range.pages(), to);
        engine.ask(request);
        let outcome = engine.convert(&request);
        assert_eq!(outcome.answer(), Answer::Done, "{:?}", outcome.cause());
    }

    #[test]
    fn a_page_that_becomes_shared_has_lost_its_contents_and_no_memory() {
        let engine = engine(memory());
        let all = 600 * PAGE_SIZE;
        let allocated = || engine.converter().allocated().unwrap();
        assert_eq!(allocated(), Allocated { private: Some(all), shared: 0 });
        let shared = [pages(0, 40), pages(1099, 1)];
        for range in shared {
            ask(&engine, range, Side::Shared);
            let mut contents = vec![1; range.len() as usize];
            engine.memory().memory().read_slice(&mut contents, GuestAddress(range.start().0)).unwrap();
            assert!(contents.iter().all(|byte| *byte == 0), "{range} has kept its private contents");
        }
        assert_eq!(allocated(), Allocated { private: Some(all - 41 * PAGE_SIZE), shared: 41 * PAGE_SIZE });
        for range in shared {
            ask(&engine, range, Side::Private);
        }
        assert_eq!(allocated(), Allocated { private: Some(all), shared: 0 });
    }

    #[test]
    fn both_sides_are_one_page_of_which_the_view_shows_the_shared_side_only() {
        let engine = engine(memory());
        let view = engine.memory();
        let byte = |page: u64| view.memory().read_obj::<u8>(GuestAddress(page * PAGE_SIZE)).ok();
        assert!([0, 499, 1000, 1099].into_iter().all(|page| byte(page).is_none()));
        ask(&engine, pages(7, 1), Side::Shared);
        assert_eq!([6, 7, 8].map(byte), [None, Some(0), None]);
        view.memory().write_obj(9u8, GuestAddress(7 * PAGE_SIZE)).unwrap();
        ask(&engine, pages(7, 1), Side::Private);
        assert_eq!(byte(7), None);
        // What the guest sees is the window: it lies where it always has, and has what the host wrote.
        let process = std::fs::File::open("/proc/self/mem").unwrap();
        let mut seen = [0; 1];
        process.read_exact_at(&mut seen, engine.converter().address(pages(7, 1)).unwrap()).unwrap();
        assert_eq!(seen, [9]);
    }

    #[test]
    fn a_guest_may_alternate_sides_page_by_page_since_no_mapping_changes() {
        let engine = engine(memory());
        for page in (0..500).step_by(2) {
            ask(&engine, pages(page, 1), Side::Shared);
        }
        let mapped = std::fs::read_to_string("/proc/self/maps").unwrap();
        let windows = mapped.lines().filter(|line| line.contains("memfd:cvm-memory")).count();
        assert!(windows < 50, "{windows} mappings");
    }

    #[test]
    fn a_poisoned_page_is_out_of_the_guests_reach() {
        let memory = memory();
        memory.poison(pages(3, 1)).unwrap();
        let process = std::fs::File::open("/proc/self/mem").unwrap();
        let shows = |page| {
            let mut byte = [0; 1];
            let read = process.read_exact_at(&mut byte, memory.address(pages(page, 1)).unwrap());
            read.is_ok() && byte == [0xa5]
        };
        assert_eq!([2, 3, 4].map(shows), [true, false, true]);
    }

    #[test]
    fn ranges_outside_a_slot_are_refused_by_every_step() {
        let memory = memory();
        let outside = pages(499, 2);
        assert!(memory.show(outside, Side::Shared).is_err() && memory.show(outside, Side::Private).is_err());
        assert!(memory.poison(outside).is_err() && memory.address(outside).is_err());
        assert!(memory.write(outside, &[0; 0x2000]).is_err());
    }
}
