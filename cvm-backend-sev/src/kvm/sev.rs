//! The launch of SEV and SEV-ES guests: memory is encrypted in place, and measured before the guest's owner gives it secrets.
//!
//! | step | commands |
//! |---|---|
//! | make | `INIT2`, memory and its pinning, vCPUs, `LAUNCH_START` |
//! | load | `LAUNCH_UPDATE_DATA` for all pages, in the order of loading |
//! | seal | the vCPUs' states; with SEV-ES `LAUNCH_UPDATE_VMSA`; `LAUNCH_MEASURE`; the owner, `LAUNCH_SECRET`; `LAUNCH_FINISH` |
//!
//! Three things a guest's owner has to know of these technologies:
//!
//! - The launch configuration is measured by the boot page, which has its digest. SEV and SEV-ES have no field for data of the host's
//!   as SEV-SNP has, so **a guest without a boot page is not bound to its configuration**.
//! - The measurement is of contents in the order of loading, not of their addresses, and with SEV alone not of the initial states of
//!   vCPUs.
//! - Memory that was not loaded is undefined: the guest decrypts what nobody has encrypted. A launch with a boot page loads zeros up
//!   to the address from which on its guest has to write before it reads.

#![allow(unsafe_code, reason = "commands hold addresses")]

use super::command::{Command, Commands};
use super::export::SevExport;
use super::{Error, cpuid, device, exits};
use crate::owner::Secret;
use crate::sev::{LaunchMeasurement, NOT_MEASURED, Running, SevDigest};
use crate::{SevFeatures, SevFlags, SevPolicy};
use cvm_backend_kvm::backend::{GuestMemory, Host, LocalVcpu, LocalVm, Machine, PinnedMemory, Traits};
use cvm_core::boot::{Exits, FreshMemory, Interface};
use cvm_core::doorbell::Transport;
use cvm_core::export::Export;
use cvm_core::launch::{Loader, Transcript, VmConfig};
use cvm_core::x86::VcpuState;
use cvm_core::{
    BoxError, Error as CoreError, GpaRange, Lifecycle, LifecycleAnswer, PAGE_SIZE, PageKind, Protection, SharedMemory,
};
use kvm_bindings::{
    kvm_run, kvm_sev_launch_measure, kvm_sev_launch_secret, kvm_sev_launch_start, kvm_sev_launch_update_data,
};
use std::any::Any;
use std::fmt;
use std::fs::File;
use std::ptr::from_mut;
use std::sync::Arc;

/// How much is encrypted by one call: its pages are pinned once more meanwhile, against the limit of locked memory.
const MOST_AT_ONCE: u64 = 2 << 20;

/// The most bytes in what the firmware is handed, which the kernel copies (Linux include/linux/psp-sev.h,
/// `SEV_FW_BLOB_MAX_SIZE`).
pub(super) const MOST_BLOB: usize = 0x4000;

/// What the guest's owner has made for one launch on this platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// The certificate of his Diffie-Hellman key.
    pub certificate: Vec<u8>,
    /// Keys for the launch, wrapped for the platform.
    pub session: Vec<u8>,
}

/// What a launch measurement and the digest that this host expects in it are to a guest's owner: no secrets, some, or a reason
/// to give the launch up.
type Ask = dyn Fn(&LaunchMeasurement, &SevDigest) -> Result<Vec<Secret>, BoxError> + Send + Sync;

/// Who is asked before a guest starts: [`SevOptions::with_owner`].
#[derive(Clone)]
pub struct Owner(Arc<Ask>);

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Owner")
    }
}

/// What a launch of SEV or SEV-ES is to be.
#[derive(Debug, Clone)]
pub struct SevOptions {
    /// What the owner allows. SEV-ES has the flag for it in addition, whatever this says.
    pub policy: SevPolicy,
    /// The owner's keys; without them nobody can check the measurement or give secrets.
    pub session: Option<Session>,
    /// What is active in an SEV-ES guest.
    pub features: SevFeatures,
    /// The owner, if he is to be asked.
    pub owner: Option<Owner>,
}

impl Default for SevOptions {
    fn default() -> Self {
        let policy = SevPolicy { least_api: (0, 0), flags: SevFlags::NO_DEBUG };
        Self { policy, session: None, features: SevFeatures::empty(), owner: None }
    }
}

impl SevOptions {
    /// Asks `owner` at the seal of each launch, when all is loaded and measured and nothing runs: he gets the measurement, and
    /// the digest that this host expects; what he says goes into the guest's memory. If he says no, the launch is over.
    pub fn with_owner(
        mut self,
        owner: impl Fn(&LaunchMeasurement, &SevDigest) -> Result<Vec<Secret>, BoxError> + Send + Sync + 'static,
    ) -> Self {
        self.owner = Some(Owner(Arc::new(owner)));
        self
    }
}

/// What the guest will find, with `private_bit` in its page tables.
pub(super) fn interface(es: bool, config: &VmConfig, private_bit: u8) -> Result<Interface, CoreError> {
    let transport = match config.transport {
        None | Some(Transport::Hypercall) => Transport::Hypercall,
        Some(Transport::Doorbell) => Transport::Doorbell,
        Some(Transport::PageState) => {
            return Err(CoreError::Config("page state changes are amd sev-snp's".into()));
        }
    };
    Ok(Interface {
        transport,
        exits: if es { Exits::Ghcb } else { Exits::Direct },
        private_bit: Some(private_bit),
        acceptance: false,
        fresh_memory: FreshMemory::Undefined,
        vouched_pages: false,
    })
}

/// A VM whose memory is encrypted in place, made and not started.
#[derive(Debug)]
pub(super) struct Encrypted {
    machine: Machine,
    pub(super) commands: Commands,
    es: bool,
}

impl Encrypted {
    pub(super) fn new(
        host: &Host,
        device: &Arc<File>,
        es: bool,
        features: SevFeatures,
        config: VmConfig,
        transport: Transport,
    ) -> Result<Self, Error> {
        let protection = if es { Protection::SevEs } else { Protection::Sev };
        let commands = Commands::new(host, device, protection, features)?;
        let vm = Arc::clone(commands.vm());
        let memory = GuestMemory::pinned(&vm, &config.memory)?;
        let cpuid = cpuid::encrypted(host.supported_cpuid().clone(), protection);
        let machine = Machine::new(host, vm, memory, config, transport, &cpuid)?;
        Ok(Self { machine, commands, es })
    }

    /// Where memory is.
    pub(super) fn slots(&self) -> &[GpaRange] {
        &self.machine.config().memory
    }

    pub(super) fn vcpus(&self) -> usize {
        self.machine.config().vcpus as usize
    }

    pub(super) fn memory(&self) -> Result<&PinnedMemory, Error> {
        self.machine.memory().as_pinned().ok_or_else(|| Error::Options("its memory is not pinned".into()))
    }

    /// The VM, which runs from here on, with these pages shared.
    pub(super) fn finish(
        self,
        policy: SevPolicy,
        transcript: Transcript,
        shared: &[GpaRange],
    ) -> Result<LocalVm, BoxError> {
        let may_send = !self.es && !policy.flags.contains(SevFlags::NO_SEND);
        let export = match may_send {
            true => Some(SevExport::new(&self, policy)?),
            false => None,
        };
        self.machine.finish(Box::new(SevTraits { es: self.es, export }), transcript, shared)
    }
}

/// What `LAUNCH_MEASURE` answers (Secure Encrypted Virtualization API, section 6.5).
#[repr(C)]
struct Answer {
    measurement: [u8; 32],
    nonce: [u8; 16],
}

/// Loads an SEV or SEV-ES guest.
#[derive(Debug)]
pub(super) struct InPlaceLoader {
    made: Encrypted,
    options: SevOptions,
    policy: SevPolicy,
    digest: Running,
}

impl InPlaceLoader {
    /// Starts a launch.
    pub(super) fn new(
        host: &Host,
        device: &Arc<File>,
        es: bool,
        options: SevOptions,
        config: VmConfig,
        transport: Transport,
    ) -> Result<Self, Error> {
        let mut policy = options.policy;
        if !es && policy.flags.contains(SevFlags::ES) {
            return Err(Error::Options("the guest policy demands sev-es".into()));
        }
        if !es && !options.features.is_empty() {
            return Err(Error::Options(format!("{:?} are of sev-es guests alone", options.features)));
        }
        policy.flags.set(SevFlags::ES, es);
        let made = Encrypted::new(host, device, es, options.features, config, transport)?;
        let mut start = kvm_sev_launch_start { policy: policy.bits(), ..Default::default() };
        if let Some(Session { certificate, session }) = &options.session {
            (start.dh_uaddr, start.dh_len) = blob("the owner's certificate", certificate)?;
            (start.session_uaddr, start.session_len) = blob("the owner's session", session)?;
        }
        // SAFETY: the kernel reads and writes a kvm_sev_launch_start, and reads the bytes of certificate and session.
        unsafe { made.commands.give_with(Command::LaunchStart, &mut start)? };
        Ok(Self { made, options, policy, digest: Running::default() })
    }

    /// Encrypts `range` where it is.
    fn encrypt(&self, range: GpaRange) -> Result<(), BoxError> {
        let memory = self.made.memory()?;
        for part in parts(range) {
            let mut update = kvm_sev_launch_update_data {
                uaddr: memory.address(part)?,
                len: part.len() as u32,
                ..Default::default()
            };
            // SAFETY: the kernel reads a kvm_sev_launch_update_data; its address leads to guest memory, which the firmware
            // encrypts there.
            let encrypted = unsafe { self.made.commands.give_with(Command::LaunchUpdateData, &mut update) };
            encrypted.map_err(|error| error.at(part))?;
        }
        Ok(())
    }

    fn measure(&self) -> Result<LaunchMeasurement, Error> {
        let api = device::api(self.made.commands.device())?;
        let mut answer = Answer { measurement: [0; 32], nonce: [0; 16] };
        let mut measure = kvm_sev_launch_measure {
            uaddr: from_mut(&mut answer) as u64,
            len: size_of::<Answer>() as u32,
            ..Default::default()
        };
        // SAFETY: the kernel reads and writes a kvm_sev_launch_measure, whose address leads to as many bytes as it says.
        unsafe { self.made.commands.give_with(Command::LaunchMeasure, &mut measure)? };
        let Answer { measurement, nonce } = answer;
        Ok(LaunchMeasurement { measurement, nonce, api, policy: self.policy })
    }

    /// Has the firmware open a secret in the guest's memory.
    fn inject(&self, Secret { gpa, sealed }: &Secret) -> Result<(), BoxError> {
        let len = sealed.data.len() as u64;
        let page = GpaRange::from_pages(gpa.0 & !(PAGE_SIZE - 1), 1)?;
        let is_aligned = len.is_multiple_of(16) && gpa.0.is_multiple_of(16);
        if !(1..=PAGE_SIZE).contains(&len) || !is_aligned || gpa.0 % PAGE_SIZE + len > PAGE_SIZE {
            let problem = "it takes a multiple of 16 bytes, at a multiple of 16, in one page";
            return Err(crate::Error::Secret { len: sealed.data.len(), problem }.into());
        }
        let mut secret = kvm_sev_launch_secret {
            hdr_uaddr: sealed.header.as_ptr() as u64,
            hdr_len: sealed.header.len() as u32,
            guest_uaddr: self.made.memory()?.address(page)? + gpa.0 % PAGE_SIZE,
            guest_len: len as u32,
            trans_uaddr: sealed.data.as_ptr() as u64,
            trans_len: len as u32,
            ..Default::default()
        };
        // SAFETY: the kernel reads a kvm_sev_launch_secret and the bytes of header and data; the third address leads to guest
        // memory, of which no more than the page is written.
        let given = unsafe { self.made.commands.give_with(Command::LaunchSecret, &mut secret) };
        Ok(given.map_err(|error| error.at(page))?)
    }
}

impl Loader for InPlaceLoader {
    type Vm = LocalVm;

    fn load(&mut self, range: GpaRange, contents: &[u8], kind: PageKind) -> Result<(), BoxError> {
        match kind {
            PageKind::Measured => {
                self.made.memory()?.write(range, contents)?;
                self.digest.contents(contents);
            }
            // Fresh memory is zero, as the host sees it.
            PageKind::Zero => self.digest.zeros(range.pages()),
            PageKind::Unmeasured | PageKind::Secrets | PageKind::Cpuid => return Err(NOT_MEASURED.into()),
        }
        self.encrypt(range)
    }

    fn set_vcpu(&mut self, index: u32, state: &VcpuState) -> Result<(), BoxError> {
        self.made.machine.set_vcpu(index, state);
        Ok(())
    }

    fn seal(mut self, transcript: Transcript) -> Result<LocalVm, BoxError> {
        self.made.machine.set_states()?;
        if self.made.es {
            self.made.machine.settle_states()?;
            self.made.commands.give(Command::LaunchUpdateVmsa)?;
        }
        let launch = self.measure()?;
        if let Some(Owner(owner)) = &self.options.owner {
            let es = self.made.es.then_some(self.options.features);
            let secrets = owner(&launch, &self.digest.clone().finish(&transcript, es));
            for secret in secrets.map_err(Error::Owner)? {
                self.inject(&secret)?;
            }
        }
        self.made.commands.give(Command::LaunchFinish)?;
        self.made.finish(self.policy, transcript, &[])
    }
}

/// Address and length of bytes for the firmware.
pub(super) fn blob(what: &'static str, bytes: &[u8]) -> Result<(u64, u32), Error> {
    match bytes.len() {
        1..=MOST_BLOB => Ok((bytes.as_ptr() as u64, bytes.len() as u32)),
        len => Err(Error::Blob { what, len }),
    }
}

/// The parts of `range` that are encrypted by one call.
fn parts(range: GpaRange) -> impl Iterator<Item = GpaRange> {
    let starts = (range.start().0..range.end().0).step_by(MOST_AT_ONCE as usize);
    starts.filter_map(move |start| GpaRange::new(start, MOST_AT_ONCE.min(range.end().0 - start)).ok())
}

/// What is particular to SEV and SEV-ES guests.
#[derive(Debug)]
struct SevTraits {
    es: bool,
    export: Option<SevExport>,
}

impl Traits for SevTraits {
    fn hides_registers(&self) -> bool {
        self.es
    }

    fn lifecycle(&self, what: Lifecycle) -> Option<LifecycleAnswer> {
        Some(match what {
            Lifecycle::Migrate | Lifecycle::StopAndCopy | Lifecycle::Snapshot if self.es => {
                LifecycleAnswer::No("kvm cannot export the vcpus of sev-es: it has no SEND_UPDATE_VMSA")
            }
            Lifecycle::StopAndCopy if self.export.is_some() => LifecycleAnswer::Yes,
            Lifecycle::StopAndCopy => LifecycleAnswer::No("the guest policy forbids to send it"),
            Lifecycle::Migrate => LifecycleAnswer::No("pages are exported while the vcpus are stopped: stop and copy"),
            Lifecycle::Snapshot => {
                LifecycleAnswer::No("an export is for one target, which has to be there: stop and copy")
            }
            Lifecycle::Dump => LifecycleAnswer::No("private memory is encrypted, also for its host"),
            Lifecycle::Swap | Lifecycle::Reset | Lifecycle::Hotplug | Lifecycle::AssignDevice => return None,
        })
    }

    fn export(&self) -> Option<&dyn Export<LocalVcpu>> {
        self.export.as_ref().map(|export| export as _)
    }

    fn exit(&self, vcpu: u32, run: &mut kvm_run, _memory: &SharedMemory) -> Result<Option<Box<dyn Any>>, CoreError> {
        Err(exits::ended(vcpu, run))
    }
}
