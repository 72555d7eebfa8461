//! What a host can do, and whom one has to trust there.

use crate::Error;
use crate::launch::{Launch, Loader, VmConfig};
use std::fmt;

/// A kind of protection that a guest can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protection {
    /// Plain KVM, private and shared memory kept apart by the VMM itself: protects from nobody, for development.
    None,
    /// Plain KVM, private memory in a `guest_memfd` that no process can map.
    GuestMemfd,
    /// Plain KVM, held by a process of its own that gives its VMM the shared side and what exits expose.
    Vault,
    /// AMD Secure Encrypted Virtualization.
    Sev,
    /// AMD SEV with Encrypted State.
    SevEs,
    /// AMD SEV with Secure Nested Paging.
    SevSnp,
    /// Intel Trust Domain Extensions.
    Tdx,
    /// IBM Secure Execution.
    SecureExecution,
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::GuestMemfd => "guest-memfd",
            Self::Vault => "vault",
            Self::Sev => "sev",
            Self::SevEs => "sev-es",
            Self::SevSnp => "sev-snp",
            Self::Tdx => "tdx",
            Self::SecureExecution => "secure-execution",
        })
    }
}

/// Something that a host lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// What, as found on this host.
    pub what: String,
    /// How to get it.
    pub remedy: String,
}

impl Missing {
    /// That this lacks, and how to get it.
    pub fn new(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what: what.into(), remedy: remedy.into() }
    }
}

/// What a host offers of one kind of protection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// The kind.
    pub protection: Protection,
    /// What the host lacks for it; nothing if it is offered.
    pub missing: Vec<Missing>,
    /// What is worth knowing although nothing lacks, such as which transports work.
    pub notes: Vec<String>,
}

/// A party that a guest may or may not have to trust.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Party {
    /// The VMM's process with its device models.
    VmmProcess,
    /// Other processes of the same user.
    SameUser,
    /// Processes with all privileges.
    Root,
    /// The host's kernel.
    HostKernel,
    /// The hypervisor, where it is not the host's kernel.
    Hypervisor,
    /// Other guests.
    OtherVms,
    /// Somebody with a probe on the memory bus.
    PhysicalAttacker,
}

impl Party {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::OtherVms,
        Self::SameUser,
        Self::VmmProcess,
        Self::Root,
        Self::HostKernel,
        Self::Hypervisor,
        Self::PhysicalAttacker,
    ];
}

/// Something of the guest's that is to be protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Asset {
    /// The pages on the private side.
    PrivateMemory,
    /// The vCPUs' registers.
    Registers,
    /// Which interrupts arrive.
    Interrupts,
}

impl Asset {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::PrivateMemory, Self::Registers, Self::Interrupts];
}

bitflags::bitflags! {
    /// What a party can do to an asset, by itself or, with `STEER`, by making the guest do it.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Powers: u8 {
        /// See it.
        const READ = 1;
        /// Change it.
        const WRITE = 2;
        /// Put something else in its place.
        const REMAP = 4;
        /// Put an earlier state of it in its place.
        const REPLAY = 8;
        /// Have the guest itself read or change it: by setting its registers, say.
        const STEER = 16;
    }
}

/// The powers of each party over each asset of a guest.
///
/// A platform computes it from the host as it is, so the same platform may answer differently after a process has changed its
/// credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrustModel {
    /// By party and asset, in the order of their declarations.
    powers: [[Powers; Asset::ALL.len()]; Party::ALL.len()],
}

impl TrustModel {
    /// The model that `powers` describes.
    pub fn new(powers: impl Fn(Party, Asset) -> Powers) -> Self {
        let mut table = [[Powers::empty(); Asset::ALL.len()]; Party::ALL.len()];
        for party in Party::ALL {
            for asset in Asset::ALL {
                table[party as usize][asset as usize] = powers(party, asset);
            }
        }
        Self { powers: table }
    }

    /// What `party` can do to `asset`.
    pub fn powers(&self, party: Party, asset: Asset) -> Powers {
        self.powers[party as usize][asset as usize]
    }
}

/// A host with one trusted entity, or with none.
pub trait Platform {
    /// Loads the pages of a VM to be.
    type Loader: Loader;

    /// What this host offers of the kinds of protection that the platform knows of, with a reason for each that it
    /// does not offer. Never fails: that `/dev/kvm` cannot be opened is a finding.
    fn probe() -> Vec<Offer>
    where
        Self: Sized;

    /// The parties that a guest launched here has to trust, as the host and the processes are now.
    fn trust_model(&self) -> TrustModel;

    /// Starts the launch of a VM.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Layout`] for what makes no sense or is not offered, [`Error::Backend`] when the
    /// host refuses. Nothing is left of the VM then.
    fn launch(&self, config: VmConfig) -> Result<Launch<Self::Loader>, Error>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_gives_each_party_and_asset_the_powers_that_it_was_made_with() {
        let bits = |party, asset| Powers::from_bits_truncate(party as u8 * 3 + asset as u8);
        let model = TrustModel::new(bits);
        for party in Party::ALL {
            for asset in Asset::ALL {
                assert_eq!(model.powers(party, asset), bits(party, asset), "{party:?}, {asset:?}");
            }
        }
    }
}
