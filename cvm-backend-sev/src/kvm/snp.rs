//! The launch of an SEV-SNP guest, command by command.

#![allow(unsafe_code, reason = "commands have addresses in them")]

use super::command::{Command, Commands};
use super::exits::SnpTraits;
use super::{Error, SnpOptions, cpuid};
use crate::{FirmwareError, PageType, SnpPolicy};
use cvm_backend_kvm::Error as KvmError;
use cvm_backend_kvm::backend::{GuestMemory, Host, LocalVm, Machine};
use cvm_core::doorbell::Transport;
use cvm_core::launch::{Loader, PageKind, Transcript, VmConfig};
use cvm_core::x86::VcpuState;
use cvm_core::{BoxError, GpaRange, PAGE_SIZE, Protection};
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_sev_snp_launch_finish, kvm_sev_snp_launch_start, kvm_sev_snp_launch_update,
};
use std::fs::File;
use std::io::ErrorKind;
use std::sync::Arc;

/// How many pages go to the firmware by one command: it copies and hashes them one after the other, whatever there is.
const PAGES_AT_ONCE: usize = 512;

const PAGE: usize = PAGE_SIZE as usize;

/// How often in a row an update may fail without a page and without the firmware: so Linux reports a signal that comes before the
/// first page (arch/x86/kvm/svm/sev.c, `snp_launch_update`), which it tells from no other failure.
const MOST_HIDDEN: u32 = 1000;

/// What KVM takes pages from: it wants them where pages begin.
#[derive(Debug, Clone)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// Loads the pages of an SEV-SNP guest.
#[derive(Debug)]
pub(super) struct SnpLoader {
    machine: Machine,
    commands: Commands,
    options: SnpOptions,
    /// Pages on their way to the firmware.
    staged: Vec<Page>,
}

impl SnpLoader {
    /// A launch that has been started and has no pages yet.
    pub(super) fn new(
        host: &Host,
        device: &Arc<File>,
        config: VmConfig,
        options: SnpOptions,
        policy: SnpPolicy,
    ) -> Result<Self, Error> {
        let commands = Commands::new(host, device, Protection::SevSnp, options.wished_features())?;
        let vm = Arc::clone(commands.vm());
        if options.certificates.is_some() {
            commands.give(Command::SnpEnableReqCerts)?;
        }
        let memory = GuestMemory::guest_memfd(host, &vm, &config.memory)?;
        let cpuid = cpuid::encrypted(host.supported_cpuid().clone(), Protection::SevSnp);
        let mut cpuid = cpuid::vouchable(cpuid);
        if let Some(change) = &options.cpuid {
            change(&mut cpuid);
        }
        let machine = Machine::new(host, vm, memory, config, Transport::PageState, &cpuid)?;
        let mut start = kvm_sev_snp_launch_start { policy: policy.bits(), gosvw: options.gosvw, ..Default::default() };
        // SAFETY: the data is what the kernel has for the command, and has no address in it.
        unsafe { commands.give_with(Command::SnpLaunchStart, &mut start)? };
        Ok(Self { machine, commands, options, staged: vec![Page([0; PAGE]); PAGES_AT_ONCE] })
    }

    /// Gives the firmware the first of the staged pages, as many as `range` has; or pages without contents.
    fn update(&mut self, range: GpaRange, kind: PageType) -> Result<(), Error> {
        let contents = match kind {
            PageType::Zero => 0,
            _ if range.pages() <= self.staged.len() as u64 => self.staged.as_mut_ptr() as u64,
            _ => return Err(Error::Options(format!("{range} is more than can be loaded at once"))),
        };
        let mut update = kvm_sev_snp_launch_update {
            gfn_start: range.start().0 / PAGE_SIZE,
            uaddr: contents,
            len: range.len(),
            type_: kind as u8,
            ..Default::default()
        };
        let mut hidden = 0;
        while update.len > 0 {
            let before = update.len;
            // SAFETY: the data is what the kernel has for the command. Without an address there are no contents; else they
            // are in the staged pages, of which there are as many as `range` has: the kernel moves the address and the
            // length on together.
            let given = unsafe { self.commands.give_with(Command::SnpLaunchUpdate, &mut update) };
            // What is left: all that comes before is loaded.
            let left = GpaRange::new(update.gfn_start * PAGE_SIZE, update.len).ok();
            match given {
                Ok(()) if update.len < before => hidden = 0,
                // An error after the first page is not told, but met again by the next command.
                Ok(()) => {
                    let source = ErrorKind::WriteZero.into();
                    return Err(Error::Command { step: "load pages", range: left, firmware: None, source });
                }
                Err(Error::Command { source, .. }) if source.kind() == ErrorKind::Interrupted => {}
                Err(Error::Command { firmware: None, source, .. })
                    if source.raw_os_error() == Some(libc::EIO) && hidden < MOST_HIDDEN =>
                {
                    hidden += 1;
                }
                Err(Error::Command { step, firmware, source, .. }) => {
                    return Err(Error::Command { step, range: left, firmware, source });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Loads pages that have contents.
    fn load_contents(&mut self, range: GpaRange, contents: &[u8], kind: PageType) -> Result<(), BoxError> {
        for (part, contents) in (0..).zip(contents.chunks(PAGES_AT_ONCE * PAGE)) {
            for (staged, page) in self.staged.iter_mut().zip(contents.chunks_exact(PAGE)) {
                staged.0.copy_from_slice(page);
            }
            let start = range.start().0 + part * (PAGES_AT_ONCE * PAGE) as u64;
            self.update(GpaRange::new(start, contents.len() as u64)?, kind)?;
        }
        Ok(())
    }

    /// Loads the page of CPUID leaves, those of the first vCPU; all others differ from it by their APIC's id alone.
    fn load_cpuid(&mut self, range: GpaRange) -> Result<(), BoxError> {
        let vcpu = self.machine.vcpus().first().ok_or("there is no vcpu")?;
        let leaves = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(KvmError::kvm("read the cpuid leaves"))?;
        let given = cpuid::page(&leaves)?;
        self.staged[0].0 = given;
        match self.update(range, PageType::Cpuid) {
            Err(Error::Command { firmware: Some(FirmwareError::InvalidParam), source, range: at, step }) => {
                // The firmware has put into the page what it would have instead.
                let corrections = cpuid::corrections(&given, &self.staged[0].0);
                if corrections.is_empty() {
                    let firmware = Some(FirmwareError::InvalidParam);
                    return Err(Error::Command { firmware, source, range: at, step }.into());
                }
                match &self.options.judge {
                    Some(judge) if judge(&corrections) => Ok(self.update(range, PageType::Cpuid)?),
                    _ => Err(Error::CpuidCorrected { corrections }.into()),
                }
            }
            loaded => Ok(loaded?),
        }
    }
}

impl Loader for SnpLoader {
    type Vm = LocalVm;

    fn load(&mut self, range: GpaRange, contents: &[u8], kind: PageKind) -> Result<(), BoxError> {
        match kind {
            PageKind::Measured => self.load_contents(range, contents, PageType::Normal),
            PageKind::Unmeasured => self.load_contents(range, contents, PageType::Unmeasured),
            PageKind::Zero => Ok(self.update(range, PageType::Zero)?),
            PageKind::Secrets => Ok(self.update(range, PageType::Secrets)?),
            PageKind::Cpuid => self.load_cpuid(range),
        }
    }

    fn set_vcpu(&mut self, index: u32, state: &VcpuState) -> Result<(), BoxError> {
        self.machine.set_vcpu(index, state);
        Ok(())
    }

    fn seal(mut self, transcript: Transcript) -> Result<LocalVm, BoxError> {
        // What the vCPUs are given here is measured by the command that follows.
        self.machine.set_states()?;
        self.machine.settle_states()?;
        let config = transcript.config().ok_or("the transcript has no launch configuration")?;
        let mut block = self.options.id.as_ref().map(|(block, _)| block.to_bytes());
        let mut auth = self.options.id.as_ref().map(|(_, auth)| Box::new(*auth.as_bytes()));
        let mut finish = kvm_sev_snp_launch_finish {
            id_block_uaddr: block.as_mut().map_or(0, |block| block.as_mut_ptr() as u64),
            id_auth_uaddr: auth.as_mut().map_or(0, |auth| auth.as_mut_ptr() as u64),
            id_block_en: block.is_some().into(),
            auth_key_en: self.options.id.as_ref().is_some_and(|(_, auth)| auth.has_author()).into(),
            vcek_disabled: self.options.no_vcek.into(),
            host_data: self.options.host_data.bytes(&config),
            ..Default::default()
        };
        // SAFETY: the data is what the kernel has for the command; its addresses lead to a block and signatures of the sizes
        // that it has for them, which live until this returns.
        unsafe { self.commands.give_with(Command::SnpLaunchFinish, &mut finish)? };
        self.machine.finish(
            Box::new(SnpTraits { certificates: self.options.certificates, _device: self.commands.into_device() }),
            transcript,
            &[],
        )
    }
}
