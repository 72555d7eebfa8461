//! What can be done with a running VM, and if not, why not.

/// Something that one may want to do with a VM after its launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lifecycle {
    /// Move it to another host while it runs.
    Migrate,
    /// Stop it, and go on with it on another host: [`Vm::export`](crate::Vm::export).
    StopAndCopy,
    /// Keep its state and continue later.
    Snapshot,
    /// Write its memory and registers to a file for analysis.
    Dump,
    /// Let the host kernel swap its private memory.
    Swap,
    /// Start it anew without a new launch.
    Reset,
    /// Add memory or vCPUs.
    Hotplug,
    /// Give it a physical device.
    AssignDevice,
}

impl Lifecycle {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Migrate,
        Self::StopAndCopy,
        Self::Snapshot,
        Self::Dump,
        Self::Swap,
        Self::Reset,
        Self::Hotplug,
        Self::AssignDevice,
    ];
}

/// Whether a VM can do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LifecycleAnswer {
    /// Yes.
    Yes,
    /// No, for this reason.
    No(&'static str),
}
