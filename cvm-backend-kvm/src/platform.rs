use crate::error::failed;
use crate::handles::{KvmLoader, LoaderOf};
use crate::host::Host;
use crate::local::{Backing, Isolation, LocalLoader};
use crate::trust::{self, Facts, Finding, Start};
use crate::vault::Program;
use crate::{Error, hypercall, probe, vault};
use cvm_core::doorbell::Transport;
use cvm_core::interrupt::Guarding;
use cvm_core::launch::VmConfig;
use cvm_core::platform::{Missing, Offer, Party, Platform, Powers, TrustModel};
use cvm_core::{Error as CoreError, Launch, Policy, Protection};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

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
    /// How a vault starts that another program starts.
    peer: Option<Start>,
    vault_deadline: Duration,
    hypercalls: OnceLock<bool>,
}

impl KvmPlatform {
    /// The platform behind `/dev/kvm` with the strongest protection, a [vault](crate::vault).
    ///
    /// A host or program that cannot have a vault gets an error that names the alternatives: less protection is given by
    /// name only, see [`KvmPlatform::open`].
    ///
    /// # Errors
    /// As [`KvmPlatform::open`].
    pub fn new() -> Result<Self, Error> {
        Self::open(Path::new("/dev/kvm"), None)
    }

    /// The platform behind the KVM device at `path` with this protection, or with the strongest if none is named.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::ApiVersion`]; [`Error::NotOffered`] for a protection that the host does not offer,
    /// [`Error::NoDefault`] if none is named and the strongest is not offered.
    pub fn open(path: &Path, protection: Option<Protection>) -> Result<Self, Error> {
        let local = Self::local(path)?;
        if vault::is_vault() {
            let what = "this process is one: its main must begin with cvm::kvm::vault::init()".into();
            return Err(Error::NotOffered { protection: Protection::Vault, what });
        }
        match protection {
            None => match Program::find() {
                Ok(program) => local.with_vault(program),
                Err(Error::NotOffered { what, .. }) => {
                    let none = "none (no protection, for development)";
                    let alternatives = match local.isolation {
                        Isolation::GuestMemfd => format!("guest-memfd or {none}"),
                        Isolation::None => none.into(),
                    };
                    Err(Error::NoDefault { what, alternatives })
                }
                Err(error) => Err(error),
            },
            Some(Protection::Vault) => local.with_vault(Program::find()?),
            Some(Protection::None) => Ok(Self { isolation: Isolation::None, ..local }),
            Some(Protection::GuestMemfd) => {
                if local.isolation == Isolation::GuestMemfd {
                    return Ok(local);
                }
                let lacks = probe::guest_memfd(&local.host).missing;
                let what = lacks.into_iter().map(|missing| missing.what).collect::<Vec<_>>().join("; ");
                Err(Error::NotOffered { protection: Protection::GuestMemfd, what })
            }
            Some(protection) => Err(Error::NotOffered { protection, what: "it is not software-only isolation".into() }),
        }
    }

    /// The platform behind the KVM device at `path`, for VMs of this process, with the strongest protection from it.
    pub(crate) fn local(path: &Path) -> Result<Self, Error> {
        let host = Host::open(path)?;
        let isolation = if host.has_guest_memfd()? { Isolation::GuestMemfd } else { Isolation::None };
        Ok(Self {
            device: path.to_owned(),
            host,
            isolation,
            vault: None,
            peer: None,
            vault_deadline: vault::DEADLINE,
            hypercalls: OnceLock::new(),
        })
    }

    fn with_vault(self, mut program: Program) -> Result<Self, Error> {
        let peer = vault::try_out(&mut program)?;
        Ok(Self { vault: Some(program), peer, ..self })
    }

    /// The same platform, whose [vaults](crate::vault) must answer within `deadline`: 60 s if nothing else is said, which is
    /// generous even where processors are emulated.
    ///
    /// The deadline is for all that a vault does by itself, such as its start, each step of a launch, and each conversion,
    /// and for the return of a vCPU that was kicked. A guest may run for as long as it likes. A vault that misses it, because
    /// it is stopped or hostile, is given up: it is killed, and every handle of its VM fails with
    /// [`Error::VaultOverdue`] at first and [`Error::VaultDied`] from then on.
    #[must_use]
    pub fn with_vault_deadline(self, deadline: Duration) -> Self {
        Self { vault_deadline: deadline, ..self }
    }

    /// What protects the guests that are launched here.
    pub fn protection(&self) -> Protection {
        match (&self.vault, self.isolation) {
            (Some(_), _) => Protection::Vault,
            (None, Isolation::None) => Protection::None,
            (None, Isolation::GuestMemfd) => Protection::GuestMemfd,
        }
    }

    /// Whether guests can ask for conversions by hypercall, as a trial shows: on a host where they do not, the first call
    /// takes about 0.2 s.
    ///
    /// # Errors
    /// [`Error::HypercallUnknown`] when the trial itself failed.
    pub fn hypercalls_work(&self) -> Result<bool, Error> {
        if let Some(known) = self.hypercalls.get() {
            return Ok(*known);
        }
        let work = hypercall::works(&self.host)?;
        Ok(*self.hypercalls.get_or_init(|| work))
    }

    fn transport(&self, wish: Option<Transport>) -> Result<Transport, CoreError> {
        match wish {
            // It is measured, so the default is the one that works on every KVM.
            None | Some(Transport::Doorbell) => Ok(Transport::Doorbell),
            Some(Transport::PageState) => Err(CoreError::Config("page state changes are amd sev-snp's".into())),
            Some(Transport::Hypercall) => match self.hypercalls_work() {
                Ok(true) => Ok(Transport::Hypercall),
                Ok(false) => Err(CoreError::Config("hypercalls do not work on this kvm: use a doorbell".into())),
                Err(error) => Err(failed("try a hypercall")(error)),
            },
        }
    }

    /// For the vault: the launch of a VM that this process will hold on behalf of another, whose shared side is behind
    /// `shared`. The configuration says by what transport.
    pub(crate) fn launch_in_vault(&self, config: VmConfig, shared: Backing) -> Result<Launch<LocalLoader>, CoreError> {
        self.host.check(&config, Policy::NO_DEBUG)?;
        // The VMM chooses by trial, and nobody but the guest is worse off if it chooses what does not work.
        let transport = config.transport.unwrap_or(Transport::Doorbell);
        let loader = LocalLoader::new(&self.host, self.isolation, config.clone(), transport, Some(shared));
        Launch::new(loader.map_err(failed("create the vm"))?, config, transport)
    }
}

impl Platform for KvmPlatform {
    type Loader = KvmLoader;

    fn probe() -> Vec<Offer> {
        probe::offers(Path::new("/dev/kvm"))
    }

    fn trust_model(&self) -> TrustModel {
        if let Some(program) = &self.vault {
            return trust::model(&Facts::read(program, self.peer).findings(), self.isolation);
        }
        TrustModel::new(|party, asset| match party {
            Party::OtherVms => Powers::empty(),
            // Other processes of the user can take over the VMM.
            Party::VmmProcess | Party::SameUser => trust::held_by(self.isolation, asset),
            _ => Powers::all(),
        })
    }

    fn launch(&self, config: VmConfig) -> Result<Launch<KvmLoader>, CoreError> {
        let transport = self.transport(config.transport)?;
        let loader = match &self.vault {
            Some(program) => {
                // A VMM that can trace the vault can make it debug the guest and inject any interrupt.
                let facts = Facts::read(program, self.peer);
                if let Some(why) = facts.unknown().filter(|_| config.policy.contains(Policy::NO_DEBUG)) {
                    return Err(failed("find out whether the vmm can debug its vault")(why));
                }
                let way = facts.findings().into_iter().find(|finding| finding.parties.contains(&Party::VmmProcess));
                match &way {
                    None => self.host.check(&config, Policy::NO_DEBUG)?,
                    Some(Finding { way, .. }) if config.policy.contains(Policy::NO_DEBUG) => {
                        let Missing { what, remedy } = way;
                        return Err(CoreError::Config(format!("the policy cannot be fulfilled: {what}: {remedy}")));
                    }
                    Some(_) => self.host.check(&config, Policy::empty())?,
                }
                let guarding = if way.is_none() { Guarding::Enforced } else { Guarding::Library };
                let deadline = self.vault_deadline;
                LoaderOf::Vault(
                    vault::launch(program, &self.device, &config, transport, self.isolation, guarding, deadline)
                        .map_err(failed("create the vm"))?,
                )
            }
            None => {
                self.host.check(&config, Policy::empty())?;
                let loader = LocalLoader::new(&self.host, self.isolation, config.clone(), transport, None);
                LoaderOf::Local(Box::new(loader.map_err(failed("create the vm"))?))
            }
        };
        Launch::new(KvmLoader(loader), config, transport)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_cannot_start_vaults_gets_less_by_name_only() {
        let error = match KvmPlatform::new() {
            // This program has neither called `init` nor named another one.
            Err(error @ Error::NoDefault { .. }) => error.to_string(),
            Err(error @ Error::Open { .. }) if std::env::var_os("CVM_REQUIRE_KVM").is_none() => {
                return eprintln!("SKIPPED: {error}");
            }
            other => panic!("{other:?}"),
        };
        for part in ["vault::init()", "name ", "none (no protection"] {
            assert!(error.contains(part), "{error}");
        }
        let none = KvmPlatform::open(Path::new("/dev/kvm"), Some(Protection::None)).unwrap();
        assert_eq!(none.protection(), Protection::None);
    }

    #[test]
    fn a_vmm_that_names_no_transport_gets_the_doorbell() {
        for hypercalls_work in [true, false] {
            let platform = match KvmPlatform::open(Path::new("/dev/kvm"), Some(Protection::None)) {
                Ok(platform) => KvmPlatform { hypercalls: OnceLock::from(hypercalls_work), ..platform },
                Err(error) if std::env::var_os("CVM_REQUIRE_KVM").is_some() => panic!("{error}"),
                Err(error) => return eprintln!("SKIPPED: {error}"),
            };
            assert_eq!(platform.transport(None).unwrap(), Transport::Doorbell);
            assert_eq!(platform.transport(Some(Transport::Hypercall)).is_ok(), hypercalls_work);
        }
    }
}
