//! First contents for private memory that the host cannot write.
//!
//! A staging area, which the host shares with the VM above its memory, holds page tables, a stub
//! (`guests/stub`), and the pages to load. The first vCPU runs the stub, which copies them into private memory and says
//! what it finds there. Before the guest starts, the area is gone and the vCPU's registers are set anew.
//!
//! No one vouches for the stub: a host that wants to can load something else and report what it should have loaded.
//! What the stub shows is that private memory holds what the transcript says, to a VMM that trusts itself.

#![allow(unsafe_code, reason = "KVM is told where the staging area is")]

use super::kick::Kicker;
use super::memory::{Backing, Window};
use super::{vcpu, vcpu_fd};
use crate::Error;
use cvm_core::doorbell::{PORT_BASE, control};
use cvm_core::image::Image;
use cvm_core::launch::digest;
use cvm_core::x86::{VcpuState, entry};
use cvm_core::{BoxError, Error as CoreError, Gpa, GpaRange, Kick, PAGE_SIZE, Watchdog};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

/// The built image of `guests/stub`.
const STUB: &[u8] = include_bytes!("loader-stub.elf");

/// The parts of the area, which the stub sees from address 0 on: page tables, then the stub where it is linked.
const DIGESTS: u64 = 0x30_0000;
const DATA: u64 = 0x40_0000;
const LEN: u64 = 0x80_0000;
/// How many pages are loaded at once.
const PAGES: u64 = (LEN - DATA) / PAGE_SIZE;

/// Where the stub sees the guest's memory: its address plus this, which the second entry of the root table begins at.
const MEMORY: u64 = 1 << 39;
const LARGE_PAGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
/// How many second-level tables fit below the stub, behind the four pages of the other tables.
const MOST_GIBIBYTES: u64 = LARGE_PAGE / PAGE_SIZE - 4;

/// The port by which the stub says that it is done.
const DONE: u16 = PORT_BASE + control::END;

/// How long the stub may take for [`PAGES`] pages, on a processor that is emulated twice over.
const PATIENCE: Duration = Duration::from_secs(60);

/// The staging area of a VM that is being loaded.
#[derive(Debug)]
pub(crate) struct Staging {
    backing: Backing,
    window: Window,
    range: GpaRange,
    slot: u32,
    entry: u64,
}

impl Staging {
    /// An area above `top`, the end of the guest's memory, as slot `slot` of `vm`.
    pub(crate) fn new(vm: &VmFd, top: Gpa, slot: u32) -> Result<Self, BoxError> {
        let base = top.0.next_multiple_of(LARGE_PAGE);
        let range = GpaRange::new(base, LEN)?;
        let backing = Backing::new("cvm-staging", LEN)?;
        let window = Window::new(range).map_err(Error::memory("reserve address space for", range))?;
        window.show(range, &backing, 0).map_err(Error::memory("map", range))?;
        let stub = Image::from_elf(STUB)?;
        let write = |contents: &[u8], at| {
            backing.file().write_all_at(contents, at).map_err(Error::memory("write the loader stub to", range))
        };
        write(&tables(base, top.0)?, 0)?;
        for (range, contents) in stub.pages() {
            write(contents.as_deref().unwrap_or_default(), range.start().0)?;
        }
        let staging = Self { backing, window, range, slot, entry: stub.entry().0 };
        staging.register(vm, LEN)?;
        Ok(staging)
    }

    /// Makes the area a slot of the VM, or with a size of 0 removes it.
    fn register(&self, vm: &VmFd, size: u64) -> Result<(), Error> {
        // SAFETY: only the vCPU that loads reaches the window, while this is borrowed.
        unsafe { self.window.register(vm, self.slot, size) }.map_err(Error::kvm("register the staging area"))
    }

    /// Removes the area from the VM.
    pub(crate) fn remove(self, vm: &VmFd) -> Result<(), Error> {
        self.register(vm, 0)
    }

    /// Puts `contents` into private memory at `range`, by running the stub on `vcpu`.
    pub(crate) fn load(&self, vcpu: &mut VcpuFd, range: GpaRange, contents: &[u8]) -> Result<(), BoxError> {
        let chunk = (PAGES * PAGE_SIZE) as usize;
        for (part, contents) in (0..).zip(contents.chunks(chunk)) {
            let to = range.start().0 + part * chunk as u64;
            let pages = contents.len() as u64 / PAGE_SIZE;
            let part = GpaRange::from_pages(to, pages)?;
            self.backing.file().write_all_at(contents, DATA).map_err(Error::memory("stage", part))?;
            vcpu_fd::pre_fault(vcpu, part);
            self.run(vcpu, to, pages)?;
            for (page, contents) in (0..).zip(contents.chunks(PAGE_SIZE as usize)) {
                let mut found = [0; 48];
                let at = DIGESTS + page * size_of::<[u8; 48]>() as u64;
                self.backing.file().read_exact_at(&mut found, at).map_err(Error::memory("check", part))?;
                if found != digest(contents) {
                    let gpa = Gpa(to + page * PAGE_SIZE);
                    return Err(format!("private memory at {gpa} does not hold what was loaded").into());
                }
            }
        }
        Ok(())
    }

    fn run(&self, vcpu: &mut VcpuFd, to: u64, pages: u64) -> Result<(), BoxError> {
        let base = VcpuState::LONG_MODE;
        let state = VcpuState { rip: self.entry, rdi: MEMORY + to, rsi: DATA, cr3: self.range.start().0, ..base };
        vcpu::set_state(vcpu, &state)?;
        let mut regs = vcpu.get_regs().map_err(Error::kvm("read the registers"))?;
        (regs.rdx, regs.rcx) = (pages, DIGESTS);
        vcpu.set_regs(&regs).map_err(Error::kvm("set the registers"))?;
        let kicker = Kicker::new(vcpu)?;
        let watchdog = Watchdog::new(PATIENCE, vec![Arc::clone(&kicker) as Arc<dyn Kick>])
            .map_err(|source| Error::Kvm { step: "watch the loader stub", source })?;
        loop {
            let _entered = kicker.enter();
            match vcpu.run() {
                Ok(VcpuExit::IoOut(DONE, _)) => break,
                Ok(other) => return Err(format!("the loader stub left by {other:?}").into()),
                Err(error) if error.errno() == libc::EINTR && !watchdog.fired() => {}
                Err(error) => return Err(Error::kvm("run the loader stub")(error).into()),
            }
        }
        // KVM completes the instruction when it runs next, at whatever address the vCPU is then: it must not be one of
        // the guest's.
        vcpu.set_kvm_immediate_exit(1);
        let completed = vcpu.run().map(drop);
        vcpu.set_kvm_immediate_exit(0);
        match completed {
            Err(error) if error.errno() == libc::EINTR => Ok(()),
            Err(error) => Err(Error::kvm("stop the loader stub")(error).into()),
            Ok(()) => Err("the loader stub did not stop at its end".into()),
        }
    }
}

/// The stub's page tables: the staging area at `base` from address 0 on, and all memory below `top` from [`MEMORY`] on.
fn tables(base: u64, top: u64) -> Result<Vec<u8>, CoreError> {
    let gibibytes = top.div_ceil(GIB);
    if gibibytes > MOST_GIBIBYTES {
        return Err(CoreError::Layout(format!("the loader stub reaches {MOST_GIBIBYTES} GiB of memory at most")));
    }
    let flags = entry::PRESENT | entry::WRITABLE;
    let table = |index: u64| (base + index * PAGE_SIZE) | flags;
    let page = |address: u64| address | flags | entry::LARGE;
    let mut tables = vec![[0u64; 512]; 4 + gibibytes as usize];
    (tables[0][0], tables[0][1]) = (table(1), table(2));
    tables[1][0] = table(3);
    for (large, slot) in (0..LEN / LARGE_PAGE).zip(&mut tables[3]) {
        *slot = page(base + large * LARGE_PAGE);
    }
    for gibibyte in 0..gibibytes {
        tables[2][gibibyte as usize] = table(4 + gibibyte);
        for (large, slot) in (0..).zip(&mut tables[4 + gibibyte as usize]) {
            *slot = page(gibibyte * GIB + large * LARGE_PAGE);
        }
    }
    Ok(tables.as_flattened().iter().flat_map(|entry| entry.to_le_bytes()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stub_sees_the_staging_area_from_0_on_and_all_memory_above_it() {
        let (base, top) = (3 * GIB, 3 * GIB - LARGE_PAGE);
        let tables = tables(base, top).unwrap();
        let entry = |table: u64, index: u64| {
            let at = (table - base + 8 * index) as usize;
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        let walk = |address: u64| {
            let mut table = base;
            for shift in [39, 30, 21] {
                let entry = entry(table, address >> shift & 0x1ff);
                if entry & entry::PRESENT == 0 {
                    return None;
                }
                table = entry & !0xfff;
            }
            Some(table + address % LARGE_PAGE)
        };
        for address in [0, 0x1234, DIGESTS, DATA, LEN - 1] {
            assert_eq!(walk(address), Some(base + address));
        }
        assert_eq!(walk(LEN), None);
        for address in [0, 0x20_1234, GIB - 1, 2 * GIB + 5, top - 1] {
            assert_eq!(walk(MEMORY + address), Some(address));
        }
        assert_eq!(walk(MEMORY + 3 * GIB), None);
        assert!(super::tables(base, (MOST_GIBIBYTES + 1) * GIB).is_err());
        assert!(super::tables(base, MOST_GIBIBYTES * GIB).unwrap().len() as u64 <= LARGE_PAGE);
    }
}
