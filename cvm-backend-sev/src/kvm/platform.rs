use super::sev::{self, InPlaceLoader, SevOptions};

/// Loads.
pub type SevLoader = InPlaceLoader;
use super::{Error, PlatformKeys, device};
use cvm_backend_kvm::backend::Host;
use cvm_core::platform::{Offer, Platform, Powers, TrustModel};
use cvm_core::{Error as CoreError, Launch, Policy, Protection, VmConfig};
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// AMD SEV on this host.
#[derive(Debug)]
pub struct SevPlatform {
    host: Host,
    device: Arc<File>,
    protection: Protection,
    sev: SevOptions,
}

impl SevPlatform {
    /// The platform.
    pub fn open(protection: Protection) -> Result<Self, Error> {
        let host = Host::open(Path::new("/dev/kvm"))?;
        let path = PathBuf::from("/dev/sev");
        let device = OpenOptions::new().read(true).write(true).open(&path);
        let device = device.map_err(|source| Error::Open { path, remedy: "", source })?;
        Ok(Self { host, device: Arc::new(device), protection, sev: SevOptions::default() })
    }

    /// With options.
    pub fn with_sev(self, sev: SevOptions) -> Self {
        Self { sev, ..self }
    }

    /// Who this platform is, for those who share keys with it.
    ///
    /// # Errors
    /// [`Error::Command`].
    pub fn keys(&self) -> Result<PlatformKeys, Error> {
        device::platform_keys(&self.device)
    }
}

impl Platform for SevPlatform {
    type Loader = SevLoader;

    fn probe() -> Vec<Offer> {
        Vec::new()
    }

    fn trust_model(&self) -> TrustModel {
        TrustModel::new(|_, _| Powers::all())
    }

    fn launch(&self, config: VmConfig) -> Result<Launch<SevLoader>, CoreError> {
        self.host.check(&config, Policy::empty())?;
        let es = self.protection == Protection::SevEs;
        let interface = sev::interface(es, &config, 51)?;
        let loader = InPlaceLoader::new(
            &self.host,
            Arc::clone(&self.device),
            es,
            self.sev.clone(),
            config.clone(),
            interface.transport,
        );
        let loader =
            loader.map_err(|error| CoreError::Backend { step: "create the vm", range: None, source: error.into() })?;
        Launch::new(loader, config, interface)
    }
}
