use super::sev::{self, Encrypted, InPlaceLoader};
use super::snp::SnpLoader;
use super::{Error, PlatformKeys, Receiving, SevOptions, SnpOptions, cpuid, device, probe};
use crate::{SevFeatures, SevFlags, SnpFlags, snp};
use cvm_backend_kvm::Error as KvmError;
use cvm_backend_kvm::backend::{Host, LocalVm, failed, open_device};
use cvm_core::boot::Interface;
use cvm_core::doorbell::Transport;
use cvm_core::export::Origin;
use cvm_core::launch::{Loader, PageKind, Transcript, VmConfig};
use cvm_core::platform::{Asset, Offer, Party, Platform, Powers, TrustModel};
use cvm_core::x86::VcpuState;
use cvm_core::{BoxError, Error as CoreError, GpaRange, Launch, Policy, Protection};
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

const KVM: &str = "/dev/kvm";
const FIRMWARE: &str = "/dev/sev";

/// In EBX of the leaf of memory encryption: which bit of page-table entries makes memory private.
const PRIVATE_BIT: u32 = 0x3f;

/// What the hardware sees to whatever the host does: of what a guest demands besides isolation.
const BY_HARDWARE: Policy = Policy::NO_SMT.union(Policy::NO_DEBUG);

/// A host with AMD's secure processor.
///
/// vCPUs are [kicked](cvm_core::Kick) as those of plain KVM: see [`KvmPlatform`](cvm_backend_kvm::KvmPlatform).
#[derive(Debug)]
pub struct SevPlatform {
    host: Host,
    device: Arc<File>,
    protection: Protection,
    private_bit: u8,
    snp: SnpOptions,
    sev: SevOptions,
}

impl SevPlatform {
    /// The platform behind `/dev/kvm` and `/dev/sev`, whose guests have this protection.
    ///
    /// # Errors
    /// [`Error::Kvm`] for a device that cannot be opened, and for a protection that the host does not offer.
    pub fn open(protection: Protection) -> Result<Self, Error> {
        Self::open_at(Path::new(KVM), Path::new(FIRMWARE), protection)
    }

    /// The same behind other device files.
    ///
    /// # Errors
    /// As [`SevPlatform::open`].
    pub fn open_at(kvm: &Path, firmware: &Path, protection: Protection) -> Result<Self, Error> {
        let host = Host::open(kvm)?;
        let lacks = match probe::offer(&host, firmware, protection) {
            Some(offer) => offer.missing.into_iter().map(|missing| missing.what).collect(),
            None => vec!["it is none of AMD's".to_owned()],
        };
        let not_offered = |what| Error::Kvm(KvmError::NotOffered { protection, what });
        if !lacks.is_empty() {
            return Err(not_offered(lacks.join("; ")));
        }
        let device = open_device(firmware, |kind| match kind {
            ErrorKind::NotFound => "load the module ccp, on a host with AMD's secure processor",
            ErrorKind::PermissionDenied => "run as a user who may use it, such as root",
            _ => "it must be the device of AMD's secure processor",
        })?;
        let Some(private_bit) = cpuid::encryption(&host).map(|leaf| leaf.ebx & PRIVATE_BIT).filter(|bit| *bit != 0)
        else {
            return Err(not_offered("kvm does not say which bit of a page-table entry makes memory private".into()));
        };
        let (snp, sev) = (SnpOptions::default(), SevOptions::default());
        Ok(Self { host, device: Arc::new(device), protection, private_bit: private_bit as u8, snp, sev })
    }

    /// The same with what is particular to launches of SEV-SNP guests from here.
    pub fn with_snp(self, options: SnpOptions) -> Self {
        Self { snp: options, ..self }
    }

    /// The same with what is particular to launches of SEV and SEV-ES guests from here.
    pub fn with_sev(self, options: SevOptions) -> Self {
        Self { sev: options, ..self }
    }

    /// Who this platform is, for owners of SEV and SEV-ES guests, and for who sends such a guest here.
    ///
    /// # Errors
    /// [`Error::Command`].
    pub fn keys(&self) -> Result<PlatformKeys, Error> {
        device::platform_keys(&self.device)
    }

    /// What protects the guests that are launched here.
    pub fn protection(&self) -> Protection {
        self.protection
    }

    /// What is active in the guests, which enters their measurement: see [`of_transcript`](crate::snp::of_transcript).
    pub fn features(&self) -> SevFeatures {
        match self.protection {
            Protection::SevSnp => self.snp.active_features(),
            _ => self.sev.features,
        }
    }

    /// Makes a VM of this configuration for an SEV guest that was [exported](cvm_core::export::Export) for this platform.
    ///
    /// # Errors
    /// As [`Platform::launch`]; [`CoreError::Config`] for a platform of another protection than [`Protection::Sev`].
    pub fn receive(&self, config: VmConfig, origin: &Origin) -> Result<Receiving, CoreError> {
        if self.protection != Protection::Sev {
            return Err(CoreError::Config(format!("kvm cannot receive guests of {}", self.protection)));
        }
        self.host.check(&config, Policy::empty())?;
        let transport = sev::interface(false, &config, self.private_bit)?.transport;
        let made = Encrypted::new(&self.host, &self.device, false, SevFeatures::empty(), config, transport);
        made.and_then(|made| Receiving::new(made, origin)).map_err(failed("create the vm"))
    }

    /// Starts the launch of an SEV or SEV-ES guest.
    fn launch_in_place(&self, config: VmConfig) -> Result<(InPlaceLoader, Interface), CoreError> {
        let es = self.protection == Protection::SevEs;
        let interface = sev::interface(es, &config, self.private_bit)?;
        let loader = InPlaceLoader::new(&self.host, &self.device, es, self.sev.clone(), config, interface.transport);
        Ok((loader.map_err(failed("create the vm"))?, interface))
    }

    fn launch_snp(&self, config: VmConfig) -> Result<(SnpLoader, Interface), CoreError> {
        if config.transport.is_some_and(|transport| transport != Transport::PageState) {
            return Err(CoreError::Config("guests of sev-snp ask for conversions by page state changes alone".into()));
        }
        let refuse = |error: Error| CoreError::Config(error.to_string());
        let policy = self.snp.policy_for(config.policy).map_err(refuse)?;
        self.snp.check(self.host.kvm(), policy).map_err(refuse)?;
        let loader = SnpLoader::new(&self.host, &self.device, config, self.snp.clone(), policy);
        Ok((loader.map_err(failed("create the vm"))?, snp::interface(self.private_bit)))
    }
}

/// Nobody but the hardware, its firmware and the guest itself reaches memory and registers. A host injects what it wants to
/// (upstream KVM has no restricted injection), and somebody with a probe can put back what was there before, as memory is
/// encrypted without a proof of freshness.
fn snp_trust(party: Party, asset: Asset) -> Powers {
    match (party, asset) {
        (Party::OtherVms, _) => Powers::empty(),
        (_, Asset::Interrupts) => Powers::all(),
        (Party::PhysicalAttacker, _) => Powers::WRITE | Powers::REMAP | Powers::REPLAY,
        _ => Powers::empty(),
    }
}

/// The same where the policy allows debugging: the firmware decrypts and encrypts memory for whoever reaches it.
fn debugged_trust(party: Party, asset: Asset) -> Powers {
    match (party, asset) {
        (Party::Root | Party::HostKernel | Party::Hypervisor, _) => Powers::all(),
        _ => snp_trust(party, asset),
    }
}

/// The host reads ciphertext and cannot know what it is, but it can move it, or put an earlier state of it in its place: nothing
/// checks that. What it changes makes garbage of 16 bytes.
fn es_trust(party: Party, asset: Asset) -> Powers {
    match (party, asset) {
        (Party::OtherVms, _) => Powers::empty(),
        (_, Asset::Interrupts) => Powers::all(),
        // Saved registers have a checksum that the processor keeps.
        (Party::PhysicalAttacker, Asset::Registers) => Powers::REPLAY,
        (_, Asset::Registers) => Powers::empty(),
        (_, Asset::PrivateMemory) => Powers::WRITE | Powers::REMAP | Powers::REPLAY,
    }
}

/// The same where registers are the host's to see and to set: with them the guest can be had to read out its memory.
fn sev_trust(party: Party, asset: Asset) -> Powers {
    match (party, asset) {
        (Party::OtherVms, _) => Powers::empty(),
        (Party::PhysicalAttacker, _) => es_trust(party, asset),
        (_, Asset::PrivateMemory) => es_trust(party, asset) | Powers::STEER,
        _ => Powers::all(),
    }
}

impl Platform for SevPlatform {
    type Loader = SevLoader;

    fn probe() -> Vec<Offer> {
        probe::offers(Path::new(KVM), Path::new(FIRMWARE))
    }

    fn trust_model(&self) -> TrustModel {
        match self.protection {
            Protection::SevSnp => {}
            _ if !self.sev.policy.flags.contains(SevFlags::NO_DEBUG) => return TrustModel::new(debugged_trust),
            Protection::SevEs => return TrustModel::new(es_trust),
            _ => return TrustModel::new(sev_trust),
        }
        let policy = self.snp.policy_for(Policy::empty());
        match policy {
            Ok(policy) if !policy.flags.contains(SnpFlags::DEBUG) => TrustModel::new(snp_trust),
            _ => TrustModel::new(debugged_trust),
        }
    }

    fn launch(&self, config: VmConfig) -> Result<Launch<SevLoader>, CoreError> {
        if self.protection == Protection::SevSnp {
            self.host.check(&config, BY_HARDWARE)?;
            let (loader, interface) = self.launch_snp(config.clone())?;
            return Launch::new(SevLoader(LoaderOf::Snp(loader)), config, interface);
        }
        // Whoever has the vCPUs of an SEV guest can debug it, whatever its policy says.
        let hides = self.protection == Protection::SevEs && self.sev.policy.flags.contains(SevFlags::NO_DEBUG);
        self.host.check(&config, if hides { Policy::NO_DEBUG } else { Policy::empty() })?;
        let (loader, interface) = self.launch_in_place(config.clone())?;
        Launch::new(SevLoader(LoaderOf::InPlace(loader)), config, interface)
    }
}

/// Loads the pages of a guest that AMD's hardware protects.
#[derive(Debug)]
pub struct SevLoader(LoaderOf);

#[derive(Debug)]
enum LoaderOf {
    InPlace(InPlaceLoader),
    Snp(SnpLoader),
}

impl Loader for SevLoader {
    type Vm = LocalVm;

    fn load(&mut self, range: GpaRange, contents: &[u8], kind: PageKind) -> Result<(), BoxError> {
        match &mut self.0 {
            LoaderOf::InPlace(loader) => loader.load(range, contents, kind),
            LoaderOf::Snp(loader) => loader.load(range, contents, kind),
        }
    }

    fn set_vcpu(&mut self, index: u32, state: &VcpuState) -> Result<(), BoxError> {
        match &mut self.0 {
            LoaderOf::InPlace(loader) => loader.set_vcpu(index, state),
            LoaderOf::Snp(loader) => loader.set_vcpu(index, state),
        }
    }

    fn seal(self, transcript: Transcript) -> Result<LocalVm, BoxError> {
        match self.0 {
            LoaderOf::InPlace(loader) => loader.seal(transcript),
            LoaderOf::Snp(loader) => loader.seal(transcript),
        }
    }
}
