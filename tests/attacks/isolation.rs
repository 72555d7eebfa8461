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

    /// What the trust model has to say in a situation, where private memory of a vault is or is not in a `guest_memfd`.
    pub fn powers(self, situation: Situation, guest_memfd: bool, party: Party, asset: Asset) -> Powers {
        let open = self != Self::Vault || situation.is_open(party);
        match (party, asset) {
            (Party::OtherVms, _) => Powers::empty(),
            (Party::VmmProcess | Party::SameUser, _) if !open => Powers::empty(),
            (Party::VmmProcess | Party::SameUser, Asset::PrivateMemory)
                if self == Self::GuestMemfd || self == Self::Vault && guest_memfd =>
            {
                Powers::STEER | Powers::REMAP
            }
            _ => Powers::all(),
        }
    }
}

/// What a vault is beside: the processes that could trace it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Situation {
    /// None can: it is of its own user, or closed from its first instruction on.
    Closed,
    /// An unprivileged VMM starts it, and other processes of the user can attach to it as it starts.
    OpenStart,
    /// The VMM is root.
    RootVmm,
}

impl Situation {
    pub const ALL: [(Self, &'static str); 3] = [
        (Self::Closed, "under its own user, or closed to its user from the start"),
        (Self::OpenStart, "started by an unprivileged VMM, and open to its user as it starts"),
        (Self::RootVmm, "of a VMM that is root"),
    ];

    /// The situation of a row.
    pub fn of_row(id: &str) -> Self {
        match id.split_once('/') {
            Some(("vmm-root", _)) => Self::RootVmm,
            Some(("start", "child")) => Self::OpenStart,
            _ => Self::Closed,
        }
    }

    fn is_open(self, party: Party) -> bool {
        self == Self::RootVmm || self == Self::OpenStart && party == Party::SameUser
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
