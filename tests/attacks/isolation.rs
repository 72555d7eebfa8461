//! The isolations under attack, and whom a guest has to trust under each.

use cvm::Protection;
use cvm::platform::{Asset, Party, Powers};

/// A way to keep a guest from its host, in the order of the table's columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isolation {
    None,
    GuestMemfd,
    Vault,
}

impl Isolation {
    pub const ALL: [Self; 3] = [Self::None, Self::GuestMemfd, Self::Vault];

    /// What the library calls it; nothing if it does not have it.
    pub fn protection(self) -> Option<Protection> {
        match self {
            Self::None => Some(Protection::None),
            Self::GuestMemfd => Some(Protection::GuestMemfd),
            Self::Vault => Some(Protection::Vault),
        }
    }

    /// Those that the library has.
    pub fn offered() -> impl Iterator<Item = (Self, Protection)> {
        Self::ALL.into_iter().filter_map(|isolation| Some((isolation, isolation.protection()?)))
    }

    /// The column of the table.
    pub fn column(self) -> usize {
        self as usize
    }

    /// What the trust model has to say.
    pub fn powers(self, party: Party, asset: Asset) -> Powers {
        match (self, party, asset) {
            (_, Party::OtherVms, _) => Powers::empty(),
            (Self::GuestMemfd, Party::VmmProcess | Party::SameUser, Asset::PrivateMemory) => {
                Powers::STEER | Powers::REMAP
            }
            (Self::Vault, Party::VmmProcess | Party::SameUser, _) => Powers::empty(),
            _ => Powers::all(),
        }
    }
}

/// How the document calls a party.
pub fn party(party: Party) -> &'static str {
    match party {
        Party::OtherVms => "another VM",
        Party::SameUser => "a process of the same user",
        Party::VmmProcess => "the VMM's process",
        Party::Root => "root",
        Party::HostKernel => "the host's kernel",
        Party::Hypervisor => "the hypervisor",
        Party::PhysicalAttacker => "a probe on the memory bus",
    }
}

pub const ASSETS: [(Asset, &str); 3] =
    [(Asset::PrivateMemory, "private memory"), (Asset::Registers, "registers"), (Asset::Interrupts, "interrupts")];

/// How the document writes powers.
pub fn words(powers: Powers) -> String {
    if powers.is_empty() {
        return "nothing".into();
    }
    if powers.is_all() {
        return "everything".into();
    }
    powers.iter_names().map(|(name, _)| name.to_lowercase()).collect::<Vec<_>>().join(", ")
}
