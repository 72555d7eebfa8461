//! The host's KVM and what it can do.

use crate::Error;
use crate::policy::Facts;
use kvm_ioctls::{Cap, Kvm};
use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The bit of `KVM_HC_MAP_GPA_RANGE` in the masks of `KVM_CAP_EXIT_HYPERCALL`, and its number
/// (Linux include/uapi/linux/kvm_para.h).
pub(crate) const HC_MAP_GPA_RANGE: u32 = 12;

/// What the kernel says in one of its files, without its line end; nothing where there is no such file.
pub(crate) fn setting(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim_end().to_owned())
}

/// How many mappings a process may have, if the kernel does not say (Linux include/linux/mm.h, DEFAULT_MAX_MAP_COUNT).
const DEFAULT_MAX_MAPPINGS: u64 = 65_530;

/// How many runs of pages a VM may have: each takes a mapping, and half of those of a process are for the rest of it.
pub(crate) fn most_runs() -> u64 {
    let limit = setting("/proc/sys/vm/max_map_count");
    limit.and_then(|text| text.parse().ok()).unwrap_or(DEFAULT_MAX_MAPPINGS) / 2
}

/// An opened KVM device, and what the kernel's files say of the host: nothing is opened later, so that a process which
/// has this can give up the right to open files.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) kvm: Kvm,
    /// What decides about policies.
    pub(crate) facts: Facts,
    /// How many runs of pages on one side a VM may have.
    pub(crate) most_runs: u64,
}

impl Host {
    /// Opens `path`, which is usually `/dev/kvm`.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let fail = |source: io::Error| {
            let remedy = match source.kind() {
                ErrorKind::NotFound => {
                    "load kvm_intel or kvm_amd, and enable virtualization in the firmware or the outer hypervisor"
                }
                ErrorKind::PermissionDenied => "add your user to the group that owns it (usually kvm), or run as root",
                _ => "it must be a kvm device",
            };
            Error::Open { path: path.to_owned(), remedy, source }
        };
        // Opened once without kvm-ioctls for an error that tells a missing device from a forbidden one.
        OpenOptions::new().read(true).write(true).open(path).map_err(fail)?;
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|error| fail(error.into()))?;
        let kvm = Kvm::new_with_path(name).map_err(|error| fail(error.into()))?;
        match kvm.get_api_version() {
            // The only version that there is (Linux Documentation/virt/kvm/api.rst, section 4.1).
            12 => Ok(Self { facts: Facts::of(&kvm), kvm, most_runs: most_runs() }),
            version => Err(Error::ApiVersion { path: path.to_owned(), version }),
        }
    }

    /// Whether the kernel says that a hypercall for conversions can be handed to user space.
    pub(crate) fn offers_hypercall(&self) -> bool {
        self.kvm.check_extension_int(Cap::ExitHypercall) >> HC_MAP_GPA_RANGE & 1 == 1
    }
}
