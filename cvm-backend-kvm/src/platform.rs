use crate::host::Host;
use crate::loader::KvmLoader;
use crate::{Error, hypercall, probe};
use cvm_core::doorbell::Transport;
use cvm_core::launch::VmConfig;
use cvm_core::platform::{Asset, Offer, Party, Platform, Powers, TrustModel};
use cvm_core::{Error as CoreError, Launch};
use std::path::Path;
use std::sync::OnceLock;

/// Plain KVM on this host.
///
/// vCPUs are [kicked](cvm_core::Kick) by the first real-time signal (`SIGRTMIN`), for which this crate sets a handler
/// when it makes the first vCPU, and which it unblocks on a thread that runs a vCPU. A VMM must use it for nothing else.
#[derive(Debug)]
pub struct KvmPlatform {
    host: Host,
    hypercalls: OnceLock<bool>,
}

impl KvmPlatform {
    /// The platform behind `/dev/kvm`.
    ///
    /// # Errors
    /// As [`KvmPlatform::open`].
    pub fn new() -> Result<Self, Error> {
        Self::open(Path::new("/dev/kvm"))
    }

    /// The platform behind the KVM device at `path`.
    ///
    /// # Errors
    /// [`Error::Open`] or [`Error::ApiVersion`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        Ok(Self { host: Host::open(path)?, hypercalls: OnceLock::new() })
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
        TrustModel::new(|party, _: Asset| match party {
            Party::OtherVms => Powers::empty(),
            // The files and registers are in the VMM's process, and nothing is encrypted.
            Party::SameUser
            | Party::VmmProcess
            | Party::Root
            | Party::HostKernel
            | Party::Hypervisor
            | Party::PhysicalAttacker => Powers::all(),
        })
    }

    fn launch(&self, config: VmConfig) -> Result<Launch<KvmLoader>, CoreError> {
        config.check()?;
        let most = self.host.kvm.get_max_vcpus();
        if config.vcpus as usize > most {
            return Err(CoreError::Config(format!("{} vcpus; this kvm takes at most {most}", config.vcpus)));
        }
        let transport = self.transport(config.transport)?;
        let loader = KvmLoader::new(&self.host.kvm, config.clone(), transport).map_err(|error| CoreError::Backend {
            step: "create the vm",
            range: None,
            source: error.into(),
        })?;
        Launch::new(loader, config, transport)
    }
}
