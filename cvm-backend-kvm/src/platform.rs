use crate::handles::{KvmLoader, LoaderOf};
use crate::host::Host;
use crate::local::{Isolation, LocalLoader};
use crate::policy::Holder;
use crate::{Error, hypercall, probe};
use cvm_core::doorbell::Transport;
use cvm_core::launch::VmConfig;
use cvm_core::platform::{Asset, Offer, Party, Platform, Powers, TrustModel};
use cvm_core::{Error as CoreError, Launch, Protection};
use std::path::Path;
use std::sync::OnceLock;

/// Plain KVM on this host.
///
/// vCPUs are [kicked](cvm_core::Kick) by the first real-time signal (`SIGRTMIN`), for which this crate sets a handler
/// when it makes the first vCPU, and which it unblocks on a thread that runs a vCPU. A VMM must use it for nothing else.
#[derive(Debug)]
pub struct KvmPlatform {
    host: Host,
    isolation: Isolation,
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
        let host = Host::open(path)?;
        let lacks = probe::guest_memfd(&host).missing;
        let isolation = match protection {
            Some(Protection::GuestMemfd) if !lacks.is_empty() => {
                let what = lacks.into_iter().map(|missing| missing.what).collect::<Vec<_>>().join("; ");
                return Err(Error::NotOffered { protection: Protection::GuestMemfd, what });
            }
            Some(Protection::GuestMemfd) => Isolation::GuestMemfd,
            None if lacks.is_empty() => Isolation::GuestMemfd,
            Some(Protection::None) | None => Isolation::None,
            Some(protection) => {
                return Err(Error::NotOffered { protection, what: "it is not software-only isolation".into() });
            }
        };
        Ok(Self { host, isolation, hypercalls: OnceLock::new() })
    }

    /// What protects the guests that are launched here.
    pub fn protection(&self) -> Protection {
        match self.isolation {
            Isolation::None => Protection::None,
            Isolation::GuestMemfd => Protection::GuestMemfd,
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
            None if !self.hypercalls_work() => Ok(Transport::Doorbell),
            Some(Transport::Hypercall) | None => Ok(Transport::Hypercall),
        }
    }
}

impl Platform for KvmPlatform {
    type Loader = KvmLoader;

    fn probe() -> Vec<Offer> {
        probe::offers(Path::new("/dev/kvm"))
    }

    fn trust_model(&self) -> TrustModel {
        match self.isolation {
            // The files and registers are in the VMM's process, and nothing is encrypted.
            Isolation::None => TrustModel::new(|party, _| match party {
                Party::OtherVms => Powers::empty(),
                _ => Powers::all(),
            }),
            // The kernel gives no process a way to private memory, but who has the vCPUs can set their registers; and
            // other processes of the user can take over the VMM.
            Isolation::GuestMemfd => TrustModel::new(|party, asset| match (party, asset) {
                (Party::OtherVms, _) => Powers::empty(),
                (Party::VmmProcess | Party::SameUser, Asset::PrivateMemory) => Powers::STEER,
                _ => Powers::all(),
            }),
        }
    }

    fn launch(&self, config: VmConfig) -> Result<Launch<KvmLoader>, CoreError> {
        config.check()?;
        let most = self.host.kvm.get_max_vcpus();
        if config.vcpus as usize > most {
            return Err(CoreError::Config(format!("{} vcpus; this kvm takes at most {most}", config.vcpus)));
        }
        let refusals = self.host.facts.refusals(config.policy, Holder::Vmm);
        if !refusals.is_empty() {
            return Err(CoreError::Config(format!("the policy cannot be fulfilled: {}", refusals.join("; "))));
        }
        let transport = self.transport(config.transport)?;
        let loader = LocalLoader::new(&self.host, self.isolation, config.clone(), transport)
            .map_err(|source| CoreError::Backend { step: "create the vm", range: None, source })?;
        Launch::new(KvmLoader(LoaderOf::Local(loader)), config, transport)
    }
}
