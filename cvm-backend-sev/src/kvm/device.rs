//! `/dev/sev`: what the firmware says of the platform.

#![allow(unsafe_code, reason = "an ioctl whose argument holds addresses")]

use super::Error;
use crate::FirmwareError;
use crate::sev::Api;
use std::fs::File;
use std::io;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

// Linux include/uapi/linux/psp-sev.h
ioctl_iowr_nr!(SEV_ISSUE_CMD, b'S'.into(), 0, Order);
const PLATFORM_STATUS: u32 = 1;
const PDH_CERT_EXPORT: u32 = 5;

/// `struct sev_issue_cmd` there.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Order {
    command: u32,
    data: u64,
    error: u32,
}

/// `struct sev_user_data_status` there.
#[derive(Default)]
#[repr(C, packed)]
struct Status {
    api_major: u8,
    api_minor: u8,
    state: u8,
    flags: u32,
    build: u8,
    guests: u32,
}

/// `struct sev_user_data_pdh_cert_export` there.
#[repr(C, packed)]
struct PdhCertExport {
    certificate: u64,
    certificate_len: u32,
    chain: u64,
    chain_len: u32,
}

/// Length of one of the platform's certificates (Secure Encrypted Virtualization API, the format of certificates), and how many
/// are in the chain below the first: PEK, OCA, CEK.
const CERTIFICATE_BYTES: usize = 2084;
const CHAIN: usize = 3;

/// # Safety
/// As for [`Commands::give_with`](super::command::Commands::give_with).
unsafe fn issue<T>(device: &File, command: u32, step: &'static str, data: &mut T) -> Result<(), Error> {
    let mut order = Order { command, data: std::ptr::from_mut(data) as u64, error: 0 };
    // SAFETY: the descriptor is the device's, or the kernel says that it is not; it reads and writes a sev_issue_cmd, and the
    // caller answers for its data.
    if unsafe { ioctl_with_mut_ref(device, SEV_ISSUE_CMD(), &mut order) } == 0 {
        return Ok(());
    }
    let source = io::Error::last_os_error();
    Err(Error::Command { step, range: None, firmware: FirmwareError::from_status(order.error), source })
}

/// The firmware's version.
pub(super) fn api(device: &File) -> Result<Api, Error> {
    let mut status = Status::default();
    // SAFETY: the kernel writes a sev_user_data_status, in which there is no address.
    unsafe { issue(device, PLATFORM_STATUS, "ask for the platform's status (PLATFORM_STATUS)", &mut status)? };
    Ok(Api { major: status.api_major, minor: status.api_minor, build: status.build })
}

/// Who a platform is, for those who share keys with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlatformKeys {
    /// The certificate of its Diffie-Hellman key.
    pub certificate: Vec<u8>,
    /// Those that vouch for it, up to the one of its endorsement key. AMD signs that one.
    pub chain: Vec<u8>,
}

pub(super) fn platform_keys(device: &File) -> Result<PlatformKeys, Error> {
    let (mut certificate, mut chain) = (vec![0; CERTIFICATE_BYTES], vec![0; CHAIN * CERTIFICATE_BYTES]);
    let mut export = PdhCertExport {
        certificate: certificate.as_mut_ptr() as u64,
        certificate_len: certificate.len() as u32,
        chain: chain.as_mut_ptr() as u64,
        chain_len: chain.len() as u32,
    };
    // SAFETY: the kernel reads and writes a sev_user_data_pdh_cert_export, whose addresses lead to as many bytes as it says.
    unsafe { issue(device, PDH_CERT_EXPORT, "export the platform's keys (PDH_CERT_EXPORT)", &mut export)? };
    certificate.truncate(export.certificate_len as usize);
    chain.truncate(export.chain_len as usize);
    Ok(PlatformKeys { certificate, chain })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_those_of_the_kernels_headers() {
        assert_eq!((size_of::<Order>(), size_of::<Status>(), size_of::<PdhCertExport>()), (16, 12, 24));
        assert_eq!(SEV_ISSUE_CMD(), 0xc010_5300);
    }
}
