//! The host's KVM and what it can do.

use crate::Error;
use crate::local::apic_lacks;
use crate::policy::Facts;
use cvm_core::launch::VmConfig;
use cvm_core::{Error as CoreError, InterruptController, Policy};
use kvm_bindings::{
    CpuId, KVM_CAP_EXIT_HYPERCALL, KVM_CAP_GUEST_MEMFD, KVM_CAP_VM_TYPES, KVM_MAX_CPUID_ENTRIES,
    KVM_X86_SW_PROTECTED_VM,
};
use kvm_ioctls::{Kvm, VmFd};
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

/// The bit of `KVM_HC_MAP_GPA_RANGE` in the masks of `KVM_CAP_EXIT_HYPERCALL`, and its number
/// (Linux include/uapi/linux/kvm_para.h).
pub(crate) const HC_MAP_GPA_RANGE: u32 = 12;

/// What the kernel says in one of its files, without its line end; nothing where there is no such file.
pub fn setting(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim_end().to_owned())
}

/// How many mappings a process may have, if the kernel does not say (Linux include/linux/mm.h, DEFAULT_MAX_MAP_COUNT).
const DEFAULT_MAX_MAPPINGS: u64 = 65_530;

/// How many runs of pages a VM may have: each takes a mapping, and half of those of a process are for the rest of it.
pub(crate) fn most_runs() -> u64 {
    let limit = setting("/proc/sys/vm/max_map_count");
    limit.and_then(|text| text.parse().ok()).unwrap_or(DEFAULT_MAX_MAPPINGS) / 2
}

/// Opens the file of a device, to read and to write.
///
/// # Errors
/// [`Error::Open`], with what `remedy` has for the reason.
pub fn open_device(path: &Path, remedy: impl Fn(ErrorKind) -> &'static str) -> Result<File, Error> {
    OpenOptions::new().read(true).write(true).open(path).map_err(Error::open(path, remedy))
}

/// An opened KVM device, and what the kernel's files say of the host: nothing is opened later, so that a process which
/// has this can give up the right to open files.
#[derive(Debug)]
pub struct Host {
    pub(crate) kvm: Kvm,
    cpuid: CpuId,
    /// What decides about policies.
    pub(crate) facts: Facts,
    /// How many runs of pages on one side a VM may have.
    pub(crate) most_runs: u64,
}

impl Host {
    /// Opens `path`, which is usually `/dev/kvm`.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::ApiVersion`], [`Error::Kvm`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let remedy = |kind| match kind {
            ErrorKind::NotFound => {
                "load kvm_intel or kvm_amd, and enable virtualization in the firmware or the outer hypervisor"
            }
            ErrorKind::PermissionDenied => "add your user to the group that owns it (usually kvm), or run as root",
            _ => "it must be a kvm device",
        };
        // Opened once without kvm-ioctls for an error that tells a missing device from a forbidden one.
        open_device(path, remedy)?;
        let opened = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from);
        let opened = opened.and_then(|name| Ok(Kvm::new_with_path(name)?));
        let kvm = opened.map_err(Error::open(path, remedy))?;
        match kvm.get_api_version() {
            // The only version that there is (Linux Documentation/virt/kvm/api.rst, section 4.1).
            12 => {}
            ..0 => return Err(Error::open(path, remedy)(io::Error::last_os_error())),
            version => return Err(Error::ApiVersion { path: path.to_owned(), version }),
        }
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Error::kvm("list cpuid leaves"))?;
        Ok(Self { facts: Facts::of(&kvm), kvm, cpuid, most_runs: most_runs() })
    }

    /// The KVM device.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The processor that KVM could show to guests when it was opened. What is in it by permission of the kernel's, as AMX is
    /// (`ARCH_REQ_XCOMP_GUEST_PERM`), is there if this process had asked for it before.
    pub fn supported_cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// Whether the processor is AMD's, or of that kind, and so has AMD's hypercall instruction.
    pub fn is_amd(&self) -> bool {
        // EBX holds the first four letters of the vendor's name: of "AuthenticAMD" or "HygonGenuine".
        let vendor = self.cpuid.as_slice().iter().find(|entry| entry.function == 0);
        vendor.is_some_and(|entry| [*b"Auth", *b"Hygo"].contains(&entry.ebx.to_le_bytes()))
    }

    /// What KVM says of a capability (Linux include/uapi/linux/kvm.h); 0 if it has none of it, or does not say.
    pub(crate) fn capability(&self, capability: u32) -> u32 {
        self.ask_capability(capability).unwrap_or(0)
    }

    /// What KVM says of a capability (Linux include/uapi/linux/kvm.h); 0 if it has none of it.
    ///
    /// # Errors
    /// [`Error::Kvm`] if KVM does not say.
    fn ask_capability(&self, capability: u32) -> Result<u32, Error> {
        let answer = self.kvm.check_extension_raw(capability.into());
        // A call that fails gives -1, in which every bit is set.
        u32::try_from(answer).map_err(|_| Error::kvm("say what it can do")(kvm_ioctls::Error::last()))
    }

    /// Whether KVM has VMs whose private memory is a guest_memfd. It decides who can read a guest's memory, so a KVM that does
    /// not say is no KVM without them.
    ///
    /// # Errors
    /// [`Error::Kvm`] if KVM does not say.
    pub(crate) fn has_guest_memfd(&self) -> Result<bool, Error> {
        let vm_types = self.ask_capability(KVM_CAP_VM_TYPES)?;
        Ok(vm_types >> KVM_X86_SW_PROTECTED_VM & 1 == 1 && self.ask_capability(KVM_CAP_GUEST_MEMFD)? != 0)
    }

    /// Whether KVM has VMs of this type (`KVM_CAP_VM_TYPES`).
    pub fn has_vm_type(&self, vm_type: u32) -> bool {
        self.capability(KVM_CAP_VM_TYPES) >> vm_type & 1 == 1
    }

    /// A VM of this type, `KVM_X86_DEFAULT_VM` or another one.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    pub fn create_vm(&self, vm_type: u32) -> Result<Arc<VmFd>, Error> {
        loop {
            match self.kvm.create_vm_with_type(vm_type.into()) {
                // The kernel does not finish this when a signal comes meanwhile, and leaves nothing.
                Err(error) if error.errno() == libc::EINTR => {}
                made => return Ok(Arc::new(made.map_err(Error::kvm("create a vm"))?)),
            }
        }
    }

    /// Refuses what this host cannot do, but for those demands of the policy that are `fulfilled` whatever the host does.
    ///
    /// # Errors
    /// As [`VmConfig::check`]; [`CoreError::Config`] with the reasons.
    pub fn check(&self, config: &VmConfig, fulfilled: Policy) -> Result<(), CoreError> {
        config.check()?;
        let most = self.kvm.get_max_vcpus();
        if config.vcpus as usize > most {
            return Err(CoreError::Config(format!("{} vcpus; this kvm takes at most {most}", config.vcpus)));
        }
        let refusals = self.facts.refusals(config.policy - fulfilled);
        if !refusals.is_empty() {
            return Err(CoreError::Config(format!("the policy cannot be fulfilled: {}", refusals.join("; "))));
        }
        if config.interrupt_controller == InterruptController::Apic
            && let Some(what) = apic_lacks(self)
        {
            return Err(CoreError::Config(format!("this kvm has no {what}: launch without interrupt controller")));
        }
        Ok(())
    }

    /// Whether the kernel says that a hypercall for conversions can be handed to user space.
    pub(crate) fn offers_hypercall(&self) -> bool {
        self.capability(KVM_CAP_EXIT_HYPERCALL) >> HC_MAP_GPA_RANGE & 1 == 1
    }
}
