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

/// Has KVM map the private memory of `range` before the guest touches it, as far as it can. What is left, whatever the reason,
/// is mapped page by page as the guest touches it, and a page that cannot be mapped at all is an error of that access.
pub(crate) fn pre_fault(vcpu: &VcpuFd, range: GpaRange) {
    let left = PreFaultMemory { gpa: range.start().0, size: range.len(), ..Default::default() };
    pre_fault_by(left, |left| {
        // SAFETY: the descriptor is a vCPU's, and the kernel reads and writes a kvm_pre_fault_memory, which has this
        // layout.
        match unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), left) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    });
}

/// How often in a row a call may be interrupted or find somebody in its way.
const MOST_ATTEMPTS: u32 = 16;

/// Calls `ioctl`, which takes what it has done off what is left, until nothing is left or it gets no further.
fn pre_fault_by(mut left: PreFaultMemory, mut ioctl: impl FnMut(&mut PreFaultMemory) -> io::Result<()>) {
    let mut attempts = 0;
    while left.size > 0 && attempts < MOST_ATTEMPTS {
        let before = left.size;
        match ioctl(&mut left) {
            Err(error) if ![ErrorKind::Interrupted, ErrorKind::WouldBlock].contains(&error.kind()) => return,
            _ if left.size < before => attempts = 0,
            _ => attempts += 1,
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    /// How often the kernel is asked for ten pages if it answers so, and in the end always by the last answer.
    fn calls(answers: &[Result<u64, Errno>]) -> usize {
        let mut calls = 0;
        pre_fault_by(PreFaultMemory { size: 10, ..Default::default() }, |left| {
            let answer = answers.get(calls).or(answers.last()).copied().unwrap();
            calls += 1;
            left.size -= answer?;
            Ok(())
        });
        calls
    }

    #[test]
    fn memory_is_mapped_in_parts_until_nothing_is_left() {
        assert_eq!(calls(&[Ok(10)]), 1);
        assert_eq!(calls(&[Ok(4), Err(Errno::INTR), Err(Errno::AGAIN), Ok(5), Ok(1)]), 5);
    }

    #[test]
    fn whatever_keeps_the_kernel_from_it_is_left_to_the_guest() {
        for errno in [Errno::NOTTY, Errno::OPNOTSUPP, Errno::NOENT, Errno::FAULT, Errno::INVAL, Errno::IO] {
            assert_eq!(calls(&[Err(errno)]), 1, "{errno}");
            assert_eq!(calls(&[Ok(4), Err(errno)]), 2, "{errno}");
        }
    }

    #[test]
    fn a_kernel_that_gets_no_further_is_not_asked_for_ever() {
        for answer in [Ok(0), Err(Errno::AGAIN), Err(Errno::INTR)] {
            assert_eq!(calls(&[answer]), MOST_ATTEMPTS as usize, "{answer:?}");
        }
    }
}
