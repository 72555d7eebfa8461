//! Notifications by eventfds that are `OwnedFd`s: `kvm-ioctls` takes eventfds of its own type, and knows no width of what a guest writes.

#![allow(unsafe_code, reason = "an ioctl, and a descriptor that gets another type")]

use kvm_bindings::{KVMIO, kvm_ioeventfd, kvm_ioeventfd_flag_nr_pio};
use kvm_ioctls::VmFd;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

// Linux include/uapi/linux/kvm.h
ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);

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
    let result = unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), &notification) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes KVM raise what `gsi` is routed to when `eventfd` is written.
pub(crate) fn raise_on_signal(vm: &VmFd, gsi: u32, eventfd: impl AsFd) -> io::Result<()> {
    let copy = eventfd.as_fd().try_clone_to_owned()?;
    // SAFETY: nothing else owns the copy.
    let eventfd = unsafe { EventFd::from_raw_fd(copy.into_raw_fd()) };
    // The kernel takes its own reference to the eventfd.
    Ok(vm.register_irqfd(&eventfd, gsi)?)
}
