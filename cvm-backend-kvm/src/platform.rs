use crate::handles::{KvmLoader, LoaderOf};
use crate::host::Host;
use crate::local::{Backing, Isolation, LocalLoader};
use crate::vault::Program;
use crate::{Error, hypercall, probe, vault};
use cvm_core::doorbell::Transport;
use cvm_core::launch::VmConfig;
use cvm_core::platform::{Asset, Offer, Party, Platform, Powers, TrustModel};
use cvm_core::{Error as CoreError, Launch, Policy, Protection};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Plain KVM on this host.
///
/// vCPUs are [kicked](cvm_core::Kick) by the first real-time signal (`SIGRTMIN`), for which this crate sets a handler
/// when it makes the first vCPU, and which it unblocks on a thread that runs a vCPU. A VMM must use it for nothing else.
#[derive(Debug)]
pub struct KvmPlatform {
    device: PathBuf,
    host: Host,
    /// How private memory is kept from the process that holds the VM.
    isolation: Isolation,
    /// What starts vaults, if one is to hold the VM.
    vault: Option<Program>,
    hypercalls: OnceLock<bool>,
}

impl KvmPlatform {
    /// The platform behind `/dev/kvm`, with the strongest protection that it offers.
    ///
    /// # Errors
    /// As [`KvmPlatform::open`].
    pub fn new() -> Result<Self, Error> {
        Self::open(Path::new("/dev/kvm"), None)
    }

    /// The platform behind the KVM device at `path`, with this protection, or else the strongest that it offers.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::ApiVersion`], or [`Error::NotOffered`] for a protection that the host does not offer.
    pub fn open(path: &Path, protection: Option<Protection>) -> Result<Self, Error> {
        let local = Self::local(path)?;
        if vault::is_vault() {
            let what = "this process is one: its main must begin with cvm::kvm::vault::init()".into();
            return Err(Error::NotOffered { protection: Protection::Vault, what });
        }
        match protection {
            None => Ok(Self { vault: Program::find().ok(), ..local }),
            Some(Protection::Vault) => Ok(Self { vault: Some(Program::find()?), ..local }),
            Some(Protection::None) => Ok(Self { isolation: Isolation::None, ..local }),
            Some(Protection::GuestMemfd) => match probe::guest_memfd(&local.host).missing {
                lacks if lacks.is_empty() => Ok(Self { isolation: Isolation::GuestMemfd, ..local }),
                lacks => {
                    let what = lacks.into_iter().map(|missing| missing.what).collect::<Vec<_>>().join("; ");
                    Err(Error::NotOffered { protection: Protection::GuestMemfd, what })
                }
            },
            Some(protection) => Err(Error::NotOffered { protection, what: "it is not software-only isolation".into() }),
        }
    }

    /// The platform behind the KVM device at `path`, for VMs of this process, with the strongest protection from it.
    pub(crate) fn local(path: &Path) -> Result<Self, Error> {
        let host = Host::open(path)?;
        let lacks = probe::guest_memfd(&host).missing;
        let isolation = if lacks.is_empty() { Isolation::GuestMemfd } else { Isolation::None };
        Ok(Self { device: path.to_owned(), host, isolation, vault: None, hypercalls: OnceLock::new() })
    }

    /// What protects the guests that are launched here.
    pub fn protection(&self) -> Protection {
        match (&self.vault, self.isolation) {
            (Some(_), _) => Protection::Vault,
            (None, Isolation::None) => Protection::None,
            (None, Isolation::GuestMemfd) => Protection::GuestMemfd,
        }
    }

    /// Whether guests can ask for conversions by hypercall. The first call tries it out, which takes up to 0.2 s.
    pub fn hypercalls_work(&self) -> bool {
        *self.hypercalls.get_or_init(|| hypercall::works(&self.host))
    }

    fn transport(&self, wish: Option<Transport>) -> Result<Transport, CoreError> {
        match wish {
            Some(Transport::Doorbell) => Ok(Transport::Doorbell),
            Some(Transport::Hypercall) if !self.hypercalls_work() => {
                Err(CoreError::Config("hypercalls do not work on this kvm: use a doorbell".into()))
            }
            Some(Transport::PageState) => Err(CoreError::Config("page state changes are amd sev-snp's".into())),
            None if !self.hypercalls_work() => Ok(Transport::Doorbell),
            Some(Transport::Hypercall) | None => Ok(Transport::Hypercall),
        }
    }

    /// For the vault: the launch of a VM that this process will hold on behalf of another, whose shared side is behind
    /// `shared`. The configuration says by what transport.
    pub(crate) fn launch_in_vault(&self, config: VmConfig, shared: Backing) -> Result<Launch<LocalLoader>, CoreError> {
        self.host.check(&config, Policy::NO_DEBUG)?;
        // The VMM has found out what works, and nobody but the guest is worse off if that is not true.
        let transport = config.transport.unwrap_or(Transport::Doorbell);
        let loader = LocalLoader::new(&self.host, self.isolation, config.clone(), transport, Some(shared));
        Launch::new(loader.map_err(create)?, config, transport)
    }
}

fn create(source: cvm_core::BoxError) -> CoreError {
    CoreError::Backend { step: "create the vm", range: None, source }
}

impl Platform for KvmPlatform {
    type Loader = KvmLoader;

    fn probe() -> Vec<Offer> {
        probe::offers(Path::new("/dev/kvm"))
    }

    fn trust_model(&self) -> TrustModel {
        match self.protection() {
            // The VMM's process has neither memory nor registers, and the kernel keeps its user's other processes out of
            // the vault. Both can keep interrupts from arriving, and no more.
            Protection::Vault => TrustModel::new(|party, asset| match (party, asset) {
                (Party::OtherVms | Party::VmmProcess | Party::SameUser, _) => Powers::empty(),
                _ => Powers::all(),
            }),
            // The kernel gives no process a way to private memory, but who has the vCPUs can set their registers, and who
            // has the VM can have the guest see something else; and other processes of the user can take over the VMM.
            Protection::GuestMemfd => TrustModel::new(|party, asset| match (party, asset) {
                (Party::OtherVms, _) => Powers::empty(),
                (Party::VmmProcess | Party::SameUser, Asset::PrivateMemory) => Powers::STEER | Powers::REMAP,
                _ => Powers::all(),
            }),
            // The files and registers are in the VMM's process, and nothing is encrypted.
            _ => TrustModel::new(|party, _| match party {
                Party::OtherVms => Powers::empty(),
                _ => Powers::all(),
            }),
        }
    }

    fn launch(&self, config: VmConfig) -> Result<Launch<KvmLoader>, CoreError> {
        let transport = self.transport(config.transport)?;
        let loader = match &self.vault {
            Some(program) => {
                self.host.check(&config, Policy::NO_DEBUG)?;
                LoaderOf::Vault(vault::launch(program, &self.device, &config, transport).map_err(create)?)
            }
            None => {
                self.host.check(&config, Policy::empty())?;
                let loader = LocalLoader::new(&self.host, self.isolation, config.clone(), transport, None);
                LoaderOf::Local(loader.map_err(create)?)
            }
        };
        Launch::new(KvmLoader(loader), config, transport)
    }
}
