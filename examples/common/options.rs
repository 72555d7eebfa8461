//! What the examples' command lines have in common.

use clap::ValueEnum;
use cvm::Protection;

/// What keeps private memory private.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum IsolationChoice {
    /// Nothing: two files of this process, on any KVM
    None,
    /// Memory that no process can map, where KVM has it
    GuestMemfd,
    /// A process beside this one that holds the VM, with such memory where KVM has it
    Vault,
}

impl From<IsolationChoice> for Protection {
    fn from(isolation: IsolationChoice) -> Self {
        match isolation {
            IsolationChoice::None => Self::None,
            IsolationChoice::GuestMemfd => Self::GuestMemfd,
            IsolationChoice::Vault => Self::Vault,
        }
    }
}
