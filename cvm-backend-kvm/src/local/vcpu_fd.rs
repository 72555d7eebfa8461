//! What a vCPU can do beyond `kvm-ioctls`.

#![allow(unsafe_code, reason = "answers go into the page that is shared with KVM, and one ioctl is missing")]

use crate::Error;
use cvm_core::GpaRange;
use kvm_bindings::{KVM_EXIT_IO, KVMIO, kvm_interrupt};
use kvm_ioctls::VcpuFd;
use std::io::{self, ErrorKind};
use std::ptr::NonNull;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

// Linux include/uapi/linux/kvm.h
ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);
ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, PreFaultMemory);

/// `kvm_pre_fault_memory` of Linux include/uapi/linux/kvm.h.
#[derive(Debug, Default)]
#[repr(C)]
struct PreFaultMemory {
    gpa: u64,
    size: u64,
    flags: u64,
    padding: [u64; 5],
}

/// Where the value goes that a guest reads from a port.
#[derive(Debug)]
pub(crate) struct PortAnswer {
    data: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory belongs to the vCPU, which moves between threads together with this.
unsafe impl Send for PortAnswer {}
// SAFETY: a shared reference to it gives no access to the memory.
unsafe impl Sync for PortAnswer {}

impl PortAnswer {
    /// Remembers the place that a port exit of a vCPU shows.
    pub(crate) fn new(data: &mut [u8]) -> Self {
        Self { len: data.len(), data: NonNull::from(data).cast() }
    }

    /// Hands the low bytes of `value` to the guest.
    ///
    /// # Safety
    /// `vcpu` must be the one that showed the place.
    pub(crate) unsafe fn give(self, _vcpu: &mut VcpuFd, value: u64) {
        for (at, byte) in value.to_le_bytes().into_iter().take(self.len).enumerate() {
            // SAFETY: the place is `len` bytes in the vCPU's mapping, which the caller promises is `_vcpu`'s, and so
            // still there; nobody else accesses it, as `_vcpu` is borrowed exclusively.
            unsafe { self.data.add(at).write(byte) };
        }
    }
}

/// How many accesses the last exit of `vcpu` stands for, if it was one of port I/O: more than one is string I/O.
pub(crate) fn port_accesses(vcpu: &mut VcpuFd) -> u32 {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_IO {
        return 0;
    }
    // SAFETY: every bit pattern is a valid count, and the exit reason says that it is the one that was written.
    unsafe { run.__bindgen_anon_1.io.count }
}

/// Hands `value` to a guest that reads an MSR.
pub(crate) fn answer_msr(vcpu: &mut VcpuFd, value: u64) {
    let run = vcpu.get_kvm_run();
    run.__bindgen_anon_1.msr.data = value;
}

/// Hands a hypercall's result to the guest.
pub(crate) fn answer_hypercall(vcpu: &mut VcpuFd, result: u64) {
    let run = vcpu.get_kvm_run();
    run.__bindgen_anon_1.hypercall.ret = result;
}

/// Has KVM map the private memory of `range` before the guest touches it. That it cannot is no error: the guest then
/// does so page by page.
pub(crate) fn pre_fault(vcpu: &VcpuFd, range: GpaRange) -> Result<(), Error> {
    let mut left = PreFaultMemory { gpa: range.start().0, size: range.len(), ..Default::default() };
    while left.size > 0 {
        // SAFETY: the descriptor is a vCPU's, and the kernel reads and writes a kvm_pre_fault_memory, which has this
        // layout.
        if unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), &mut left) } != 0 {
            return match io::Error::last_os_error() {
                error if [ErrorKind::Interrupted, ErrorKind::WouldBlock].contains(&error.kind()) => continue,
                error if error.raw_os_error() == Some(libc::ENOTTY) => Ok(()),
                source => Err(Error::Memory { step: "pre-fault", range, source }),
            };
        }
    }
    Ok(())
}

/// Injects a vector into a vCPU that is ready for it.
pub(crate) fn interrupt(vcpu: &VcpuFd, vector: u8) -> Result<(), Error> {
    let interrupt = kvm_interrupt { irq: vector.into() };
    // SAFETY: the descriptor is a vCPU's, and the kernel reads a kvm_interrupt.
    match unsafe { ioctl_with_ref(vcpu, KVM_INTERRUPT(), &interrupt) } {
        0 => Ok(()),
        _ => Err(Error::Kvm { step: "inject an interrupt", source: io::Error::last_os_error() }),
    }
}
