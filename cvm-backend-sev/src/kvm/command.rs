//! Commands to KVM's SEV code, which passes them on to the firmware; and what that code can do.

#![allow(unsafe_code, reason = "ioctls whose arguments are addresses")]

use super::Error;
use crate::{FirmwareError, SevFeatures};
use cvm_backend_kvm::backend::Host;
use cvm_core::Protection;
use kvm_bindings::{
    KVM_X86_SEV_ES_VM, KVM_X86_SEV_VM, KVM_X86_SNP_VM, KVMIO, kvm_device_attr, kvm_sev_cmd, kvm_sev_init,
};
use kvm_ioctls::{Kvm, VmFd};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::{from_mut, null_mut};
use std::sync::Arc;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

// Linux include/uapi/linux/kvm.h
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// What KVM can be told to do (Linux arch/x86/include/uapi/asm/kvm.h, `enum sev_cmd_id`), by its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Command {
    LaunchStart = 2,
    LaunchUpdateData = 3,
    LaunchUpdateVmsa = 4,
    LaunchSecret = 5,
    LaunchMeasure = 6,
    LaunchFinish = 7,
    SendStart = 8,
    SendUpdateData = 9,
    SendFinish = 11,
    ReceiveStart = 12,
    ReceiveUpdateData = 13,
    ReceiveFinish = 15,
    SendCancel = 21,
    Init2 = 22,
    SnpLaunchStart = 100,
    SnpLaunchUpdate = 101,
    SnpLaunchFinish = 102,
    SnpEnableReqCerts = 103,
}

impl Command {
    /// What it does, for errors.
    fn step(self) -> &'static str {
        match self {
            Self::LaunchStart => "start the launch (LAUNCH_START)",
            Self::LaunchUpdateData => "encrypt pages (LAUNCH_UPDATE_DATA)",
            Self::LaunchUpdateVmsa => "encrypt the vcpus' states (LAUNCH_UPDATE_VMSA)",
            Self::LaunchSecret => "inject a secret (LAUNCH_SECRET)",
            Self::LaunchMeasure => "measure the launch (LAUNCH_MEASURE)",
            Self::LaunchFinish => "finish the launch (LAUNCH_FINISH)",
            Self::SendStart => "start sending the guest (SEND_START)",
            Self::SendUpdateData => "send pages (SEND_UPDATE_DATA)",
            Self::SendFinish => "finish sending the guest (SEND_FINISH)",
            Self::ReceiveStart => "start receiving a guest (RECEIVE_START)",
            Self::ReceiveUpdateData => "receive pages (RECEIVE_UPDATE_DATA)",
            Self::ReceiveFinish => "finish receiving a guest (RECEIVE_FINISH)",
            Self::SendCancel => "cancel sending the guest (SEND_CANCEL)",
            Self::Init2 => "make the vm a protected one (INIT2)",
            Self::SnpLaunchStart => "start the launch (SNP_LAUNCH_START)",
            Self::SnpLaunchUpdate => "load pages (SNP_LAUNCH_UPDATE)",
            Self::SnpLaunchFinish => "finish the launch (SNP_LAUNCH_FINISH)",
            Self::SnpEnableReqCerts => "have the guest's requests for certificates come here (SNP_ENABLE_REQ_CERTS)",
        }
    }
}

/// The version of the protocol by which SEV-ES and SEV-SNP guests talk to their host: the one that SEV-SNP has to have (AMD
/// publication 56421, section 2.3.1).
const GHCB_VERSION: u16 = 2;

/// The type of the VMs that have this protection, which is one of AMD's.
pub(super) fn vm_type(protection: Protection) -> u32 {
    match protection {
        Protection::SevSnp => KVM_X86_SNP_VM,
        Protection::SevEs => KVM_X86_SEV_ES_VM,
        _ => KVM_X86_SEV_VM,
    }
}

/// The way of commands to one VM.
#[derive(Debug, Clone)]
pub(super) struct Commands {
    vm: Arc<VmFd>,
    /// `/dev/sev`: who has it open may use the firmware.
    device: Arc<File>,
}

impl Commands {
    /// The way to a new VM of this protection, which has its address space identifier; `features` are active in the guest, if
    /// its registers are encrypted.
    pub(super) fn new(
        host: &Host,
        device: &Arc<File>,
        protection: Protection,
        features: SevFeatures,
    ) -> Result<Self, Error> {
        let commands = Self { vm: host.create_vm(vm_type(protection))?, device: Arc::clone(device) };
        let mut init = kvm_sev_init::default();
        if protection != Protection::Sev {
            (init.vmsa_features, init.ghcb_version) = (features.bits(), GHCB_VERSION);
        }
        // SAFETY: the kernel reads a kvm_sev_init, in which there is no address.
        let given = unsafe { commands.give_with(Command::Init2, &mut init) };
        given.map_err(|error| error.or_exhausted(protection))?;
        Ok(commands)
    }

    /// The VM.
    pub(super) fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// `/dev/sev`.
    pub(super) fn device(&self) -> &File {
        &self.device
    }

    /// The same, for the VM's life.
    pub(super) fn into_device(self) -> Arc<File> {
        self.device
    }

    /// Gives a command that has no data.
    pub(super) fn give(&self, command: Command) -> Result<(), Error> {
        // SAFETY: the kernel does not look at the data of such a command.
        unsafe { self.issue(command, null_mut()) }
    }

    /// Gives a command.
    ///
    /// # Safety
    /// `data` must be what the kernel has for the command, and each address in it must lead to as many bytes as it says, which
    /// the kernel may read, and write where the command says so, until this returns.
    pub(super) unsafe fn give_with<T>(&self, command: Command, data: &mut T) -> Result<(), Error> {
        // SAFETY: the caller promises it.
        unsafe { self.issue(command, from_mut(data).cast()) }
    }

    /// # Safety
    /// As [`Commands::give_with`].
    unsafe fn issue(&self, command: Command, data: *mut u8) -> Result<(), Error> {
        let mut order = kvm_sev_cmd {
            id: command as u32,
            data: data as u64,
            sev_fd: self.device.as_raw_fd() as u32,
            ..Default::default()
        };
        self.vm.encrypt_op_sev(&mut order).map_err(|error| Error::Command {
            step: command.step(),
            range: None,
            firmware: FirmwareError::from_status(order.error),
            source: error.into(),
        })
    }
}

/// What KVM says of its SEV code: attributes of the KVM device, in the group for it (Linux
/// arch/x86/include/uapi/asm/kvm.h, `KVM_X86_GRP_SEV`).
#[derive(Debug, Clone, Copy)]
#[repr(u64)]
pub(super) enum Attribute {
    /// The bits of `SEV_FEATURES` that a VM can have.
    VmsaFeatures = 0,
    /// The bits that a guest policy of SEV-SNP can have.
    SnpPolicyBits = 1,
    /// Whether guests' requests for certificates can come to user space.
    SnpReqCerts = 2,
}

const GROUP: u32 = 1;

/// The value of an attribute; nothing where the kernel does not have it.
pub(super) fn attribute(kvm: &Kvm, attribute: Attribute) -> Option<u64> {
    let mut value = 0u64;
    let question =
        kvm_device_attr { flags: 0, group: GROUP, attr: attribute as u64, addr: from_mut(&mut value) as u64 };
    // SAFETY: the descriptor is KVM's; the kernel reads a kvm_device_attr, and writes the 64 bits that its address leads to.
    let answer = unsafe { ioctl_with_ref(kvm, KVM_GET_DEVICE_ATTR(), &question) };
    (answer == 0).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::*;
    use std::mem::offset_of;

    #[test]
    fn layouts_are_those_of_the_kernels_headers() {
        let sizes = [
            (size_of::<kvm_sev_cmd>(), 24),
            (size_of::<kvm_sev_init>(), 48),
            (size_of::<kvm_sev_launch_start>(), 40),
            (size_of::<kvm_sev_launch_update_data>(), 16),
            (size_of::<kvm_sev_launch_secret>(), 48),
            (size_of::<kvm_sev_launch_measure>(), 16),
            (size_of::<kvm_sev_send_start>(), 72),
            (size_of::<kvm_sev_send_update_data>(), 48),
            (size_of::<kvm_sev_receive_start>(), 40),
            (size_of::<kvm_sev_receive_update_data>(), 48),
            (size_of::<kvm_sev_snp_launch_start>(), 64),
            (size_of::<kvm_sev_snp_launch_update>(), 64),
            (size_of::<kvm_sev_snp_launch_finish>(), 88),
        ];
        for (index, (size, expected)) in sizes.into_iter().enumerate() {
            assert_eq!(size, expected, "layout {index}");
        }
        let offsets = [
            (offset_of!(kvm_sev_cmd, data), 8),
            (offset_of!(kvm_sev_cmd, error), 16),
            (offset_of!(kvm_sev_cmd, sev_fd), 20),
            (offset_of!(kvm_sev_init, flags), 8),
            (offset_of!(kvm_sev_init, ghcb_version), 12),
            (offset_of!(kvm_sev_snp_launch_start, gosvw), 8),
            (offset_of!(kvm_sev_snp_launch_start, flags), 24),
            (offset_of!(kvm_sev_snp_launch_update, len), 16),
            (offset_of!(kvm_sev_snp_launch_update, type_), 24),
            (offset_of!(kvm_sev_snp_launch_finish, id_block_en), 16),
            (offset_of!(kvm_sev_snp_launch_finish, auth_key_en), 17),
            (offset_of!(kvm_sev_snp_launch_finish, vcek_disabled), 18),
            (offset_of!(kvm_sev_snp_launch_finish, host_data), 19),
            (offset_of!(kvm_sev_snp_launch_finish, flags), 54),
        ];
        for (index, (offset, expected)) in offsets.into_iter().enumerate() {
            assert_eq!(offset, expected, "offset {index}");
        }
        assert_eq!(KVM_GET_DEVICE_ATTR(), 0x4018_aee2);
    }

    #[test]
    fn commands_have_the_kernels_numbers() {
        let numbers = [
            (Command::LaunchStart, sev_cmd_id_KVM_SEV_LAUNCH_START),
            (Command::LaunchUpdateData, sev_cmd_id_KVM_SEV_LAUNCH_UPDATE_DATA),
            (Command::LaunchUpdateVmsa, sev_cmd_id_KVM_SEV_LAUNCH_UPDATE_VMSA),
            (Command::LaunchSecret, sev_cmd_id_KVM_SEV_LAUNCH_SECRET),
            (Command::LaunchMeasure, sev_cmd_id_KVM_SEV_LAUNCH_MEASURE),
            (Command::LaunchFinish, sev_cmd_id_KVM_SEV_LAUNCH_FINISH),
            (Command::SendStart, sev_cmd_id_KVM_SEV_SEND_START),
            (Command::SendUpdateData, sev_cmd_id_KVM_SEV_SEND_UPDATE_DATA),
            (Command::SendFinish, sev_cmd_id_KVM_SEV_SEND_FINISH),
            (Command::ReceiveStart, sev_cmd_id_KVM_SEV_RECEIVE_START),
            (Command::ReceiveUpdateData, sev_cmd_id_KVM_SEV_RECEIVE_UPDATE_DATA),
            (Command::ReceiveFinish, sev_cmd_id_KVM_SEV_RECEIVE_FINISH),
            (Command::SendCancel, sev_cmd_id_KVM_SEV_SEND_CANCEL),
            (Command::Init2, sev_cmd_id_KVM_SEV_INIT2),
            (Command::SnpLaunchStart, sev_cmd_id_KVM_SEV_SNP_LAUNCH_START),
            (Command::SnpLaunchUpdate, sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE),
            (Command::SnpLaunchFinish, sev_cmd_id_KVM_SEV_SNP_LAUNCH_FINISH),
            // These bindings end with the command before.
            (Command::SnpEnableReqCerts, sev_cmd_id_KVM_SEV_NR_MAX),
        ];
        for (command, number) in numbers {
            assert_eq!(command as u32, number, "{command:?}");
        }
    }
}
