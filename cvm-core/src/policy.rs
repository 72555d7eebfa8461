//! Protections beyond memory and registers.

bitflags::bitflags! {
    /// What a guest demands of its host besides isolation. Each demand is enforced or the launch is refused; none is
    /// ever ignored. They are part of the measured configuration.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
    pub struct Policy: u64 {
        /// No other code runs on the sibling thread of a processor that the guest runs on: simultaneous multithreading
        /// is off.
        const NO_SMT = 1;
        /// Neither guest nor host counts the guest's events with performance counters on the guest's behalf.
        const NO_PERFORMANCE_COUNTERS = 1 << 1;
        /// The first-level data cache is flushed whenever the processor enters the guest, or need not be.
        const FLUSH_L1D = 1 << 2;
        /// Nobody can single-step the guest or set breakpoints in it.
        const NO_DEBUG = 1 << 3;
    }
}
