//! What a VM can do beyond `kvm-ioctls`, which knows no eventfd but its own, and no notification of a given width.

#![allow(unsafe_code, reason = "two ioctls")]

use kvm_bindings::{KVMIO, kvm_ioeventfd, kvm_ioeventfd_flag_nr_pio, kvm_irqfd};
use kvm_ioctls::VmFd;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

// Linux include/uapi/linux/kvm.h
ioctl_iow_nr!(KVM_IRQFD, KVMIO, 0x76, kvm_irqfd);
ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);

fn done(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes KVM signal `eventfd` when the guest writes 32 bits to `port`, instead of an exit.
///
/// # Errors
/// [`io::ErrorKind::AlreadyExists`] if it signals one already.
pub(crate) fn signal_on_write(vm: &VmFd, port: u16, eventfd: impl AsFd) -> io::Result<()> {
    let notification = kvm_ioeventfd {
        addr: port.into(),
        len: 4,
        fd: eventfd.as_fd().as_raw_fd(),
        flags: 1 << kvm_ioeventfd_flag_nr_pio,
        ..Default::default()
    };
    // SAFETY: the descriptor is a VM's, and the kernel reads a kvm_ioeventfd; it takes its own reference to the eventfd.
    done(unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), &notification) })
}

/// Makes KVM raise what `gsi` is routed to when `eventfd` is written.
pub(crate) fn raise_on_signal(vm: &VmFd, gsi: u32, eventfd: impl AsFd) -> io::Result<()> {
    let interrupt = kvm_irqfd { fd: eventfd.as_fd().as_raw_fd() as u32, gsi, ..Default::default() };
    // SAFETY: the descriptor is a VM's, and the kernel reads a kvm_irqfd; it takes its own reference to the eventfd.
    done(unsafe { ioctl_with_ref(vm, KVM_IRQFD(), &interrupt) })
}
