//! The floor: the same guests on plain KVM, by the system calls that there is no doing without.

#![allow(unsafe_code, reason = "memory is mapped at fixed places, and KVM is told where")]

use crate::guest::Guest;
use cvm::doorbell::{PORT_BASE, control};
use cvm::{GpaRange, Side};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_create_guest_memfd,
    kvm_memory_attributes, kvm_regs, kvm_segment, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::null_mut;

/// `KVM_X86_SW_PROTECTED_VM` (Linux arch/x86/include/uapi/asm/kvm.h).
const SW_PROTECTED_VM: u64 = 1;

/// Control-register bits of 64-bit mode (AMD64 APM volume 2, sections 3.1 and 3.1.7).
const CR0_PE_ET_WP_PG: u64 = 1 | 1 << 4 | 1 << 16 | 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

/// This host's KVM.
pub struct Host {
    kvm: Kvm,
    cpuid: CpuId,
}

impl Host {
    /// What is behind `/dev/kvm`.
    pub fn open() -> Result<Self, kvm_ioctls::Error> {
        let kvm = Kvm::new()?;
        Ok(Self { cpuid: kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?, kvm })
    }
}

/// What a guest's private memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Private {
    /// A file that the window shows.
    File,
    /// A `guest_memfd`.
    GuestMemfd,
}

fn file(bytes: u64) -> File {
    let file = memfd_create("raw", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, bytes).unwrap();
    file.into()
}

fn free(file: &File, range: GpaRange) {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, hole, range.start().0, range.len()).unwrap();
}

/// Where KVM finds a guest's memory in this process.
struct Window {
    base: *mut c_void,
    len: usize,
}

impl Window {
    /// One that shows all of `file`.
    fn new(file: &File, len: u64) -> Self {
        let (len, access) = (len as usize, ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: without MAP_FIXED the kernel chooses an address where nothing is.
        let base = unsafe { mmap(null_mut(), len, access, MapFlags::SHARED | MapFlags::NORESERVE, file, 0) };
        Self { base: base.unwrap(), len }
    }

    fn place(&self, range: GpaRange) -> *mut c_void {
        assert!(range.end().0 <= self.len as u64);
        self.base.wrapping_byte_add(range.start().0 as usize)
    }

    fn show(&self, range: GpaRange, file: &File) {
        let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
        let (access, len) = (ProtFlags::READ | ProtFlags::WRITE, range.len() as usize);
        // SAFETY: what it replaces is a part of this window, to which there are no references.
        unsafe { mmap(self.place(range), len, access, flags, file, range.start().0) }.unwrap();
    }

    fn hide(&self, range: GpaRange) {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: as in `show`.
        unsafe { mmap_anonymous(self.place(range), range.len() as usize, ProtFlags::empty(), flags) }.unwrap();
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the window is this address range, nothing else is in it, and its VM is gone.
        unsafe { munmap(self.base, self.len) }.unwrap();
    }
}

/// A VM with one vCPU and one file of memory.
pub struct Machine {
    // Dropped before the memory that they see.
    vcpu: VcpuFd,
    vm: VmFd,
    window: Window,
    file: File,
}

impl Machine {
    /// A VM with `guest` in it, whose vCPU has not run yet.
    pub fn new(host: &Host, guest: &Guest) -> Self {
        Self::assemble(host, host.kvm.create_vm().unwrap(), guest, None)
    }

    /// `guest` in `vm`, with `private` beside what the window shows.
    fn assemble(host: &Host, vm: VmFd, guest: &Guest, private: Option<&File>) -> Self {
        let file = file(guest.memory);
        for (gpa, contents) in &guest.pages {
            file.write_all_at(contents, gpa.0).unwrap();
        }
        let window = Window::new(&file, guest.memory);
        let (memory_size, userspace_addr) = (guest.memory, window.base as u64);
        let registered = match private {
            None => {
                let region = kvm_userspace_memory_region { memory_size, userspace_addr, ..Default::default() };
                // SAFETY: the region is the window, which is nothing but guest memory and outlives the VM.
                unsafe { vm.set_user_memory_region(region) }
            }
            Some(private) => {
                let region = kvm_userspace_memory_region2 {
                    flags: KVM_MEM_GUEST_MEMFD,
                    memory_size,
                    userspace_addr,
                    guest_memfd: private.as_raw_fd() as u32,
                    ..Default::default()
                };
                // SAFETY: as above.
                unsafe { vm.set_user_memory_region2(region) }
            }
        };
        registered.unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&host.cpuid).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        let code =
            kvm_segment { limit: u32::MAX, selector: 8, type_: 11, present: 1, s: 1, l: 1, g: 1, ..Default::default() };
        let data = kvm_segment { selector: 16, type_: 3, db: 1, l: 0, ..code };
        (sregs.cs, sregs.ss, sregs.ds, sregs.es) = (code, data, data, data);
        (sregs.cr0, sregs.cr3, sregs.cr4) = (CR0_PE_ET_WP_PG, guest.state.cr3, CR4_PAE);
        sregs.efer = EFER_LME_LMA;
        vcpu.set_sregs(&sregs).unwrap();
        vcpu.set_regs(&kvm_regs { rip: guest.state.rip, rflags: 2, ..Default::default() }).unwrap();
        Self { vcpu, vm, window, file }
    }

    /// Runs the guest up to its next ring.
    pub fn ring(&mut self) {
        match self.vcpu.run() {
            Ok(VcpuExit::IoOut(..)) => {}
            other => panic!("{other:?} where a port should be written"),
        }
    }

    /// Runs the guest up to its next request, and returns to which side.
    fn ask(&mut self) -> Side {
        const CONVERT: u16 = PORT_BASE + control::CONVERT;
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(CONVERT, value)) => return Side::from_u32(value[0].into()).unwrap(),
                Ok(VcpuExit::IoOut(..)) => {}
                Ok(VcpuExit::IoIn(_, answer)) => answer.fill(0),
                other => panic!("{other:?} where a port should be accessed"),
            }
        }
    }
}

/// A VM whose guest converts a range, which is private at first.
pub struct Converting {
    machine: Machine,
    range: GpaRange,
    private: Private,
    /// The side that the machine's own file is not.
    other: File,
}

impl Converting {
    /// A VM that waits in its first request.
    pub fn new(host: &Host, private: Private, range: GpaRange, guest: &Guest) -> Self {
        let (machine, other) = match private {
            Private::File => (Machine::new(host, guest), file(guest.memory)),
            Private::GuestMemfd => {
                let vm = host.kvm.create_vm_with_type(SW_PROTECTED_VM).unwrap();
                let gmem = kvm_create_guest_memfd { size: guest.memory, ..Default::default() };
                let gmem = vm.create_guest_memfd(gmem).unwrap();
                // SAFETY: KVM has just made the descriptor, and nobody else knows of it.
                let gmem = File::from(unsafe { OwnedFd::from_raw_fd(gmem) });
                (Machine::assemble(host, vm, guest, Some(&gmem)), gmem)
            }
        };
        let mut it = Self { machine, range, private, other };
        it.remap(Side::Private);
        assert_eq!(it.machine.ask(), Side::Shared);
        it
    }

    /// There and back, without the guest.
    pub fn remap_twice(&self) {
        self.remap(Side::Shared);
        self.remap(Side::Private);
    }

    /// There and back, as the guest asks for it.
    pub fn convert_twice(&mut self) {
        for side in [Side::Shared, Side::Private] {
            self.remap(side);
            assert_eq!(self.machine.ask(), side.other());
        }
    }

    fn remap(&self, to: Side) {
        let (window, own) = (&self.machine.window, &self.machine.file);
        match (self.private, to) {
            (Private::File, Side::Private) => {
                window.show(self.range, own);
                free(&self.other, self.range);
            }
            (Private::File, Side::Shared) => {
                window.show(self.range, &self.other);
                free(own, self.range);
            }
            (Private::GuestMemfd, Side::Private) => {
                self.set_attributes(KVM_MEMORY_ATTRIBUTE_PRIVATE.into());
                window.hide(self.range);
                free(own, self.range);
            }
            (Private::GuestMemfd, Side::Shared) => {
                window.show(self.range, own);
                self.set_attributes(0);
                free(&self.other, self.range);
            }
        }
    }

    fn set_attributes(&self, attributes: u64) {
        let (address, size) = (self.range.start().0, self.range.len());
        let attributes = kvm_memory_attributes { address, size, attributes, ..Default::default() };
        self.machine.vm.set_memory_attributes(attributes).unwrap();
    }
}
