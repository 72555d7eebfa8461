use super::{Protection, Validated};
use cvm_core::{GpaRange, Side};

/// What a guest of SEV finds wrong with its host, its processor, or what it was told of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The boot page says one thing and the processor another.
    #[error("the boot page says {said:?}, and the processor that its sev status is {status:#x}")]
    Protection {
        /// What the boot page says.
        said: Protection,
        /// The MSR `SEV_STATUS`.
        status: u64,
    },
    /// The launch switched on a feature that the guest has to do something for, and this one does not.
    #[error("the sev status {0:#x} has features that this guest does not support")]
    Features(u64),
    /// Guest and host have no version of the protocol in common.
    #[error("the host speaks versions {min} to {max} of the ghcb protocol")]
    Version {
        /// The host's lowest.
        min: u16,
        /// The host's highest.
        max: u16,
    },
    /// The host answered a request in the GHCB MSR with something else.
    #[error("the host answered the ghcb msr {request:#x} with {answer:#x}")]
    Answer {
        /// What the guest wrote.
        request: u64,
        /// What it read.
        answer: u64,
    },
    /// The host did not do what the guest exited for.
    #[error("the host refused the exit {code:#x}: {info1:#x}, {info2:#x}")]
    Refused {
        /// The exit code.
        code: u64,
        /// SW_EXITINFO1 as the host left it.
        info1: u64,
        /// SW_EXITINFO2 as the host left it; 0 where it was not looked at.
        info2: u64,
    },
    /// The host did not mark as valid what it had to answer with.
    #[error("the host answered the exit {0:#x} without a value")]
    NoValue(u64),
    /// The host claims progress in a page state change that cannot be.
    #[error("the host says that it is at entry {at} of {entries}")]
    Progress {
        /// Where it says that it is.
        at: u16,
        /// How many entries there are.
        entries: u16,
    },
    /// The host did not change the state of all pages.
    #[error("the host did not make {range} {to}: it answered {answer:#x}")]
    PageState {
        /// The pages that are left.
        range: GpaRange,
        /// The side that they were to be on.
        to: Side,
        /// SW_EXITINFO2, or the GHCB MSR.
        answer: u64,
    },
    /// A page was not as the guest left it, or the instruction failed.
    #[error("the page at {gpa:#x} is not what it should be: {found:?}")]
    Validation {
        /// The page.
        gpa: u64,
        /// What the instruction gave.
        found: Validated,
    },
    /// There are fewer records of blocks than the guest has memory to accept.
    #[error("{needed} blocks of memory are to be accepted, and there is room for {room}")]
    Blocks {
        /// How many are needed.
        needed: u64,
        /// How many there are.
        room: u64,
    },
    /// A page that has to be in memory, page-aligned, and private is not.
    #[error("there is no page for this at {0:#x}")]
    NoPage(u64),
    /// Only guests of SEV-SNP have it.
    #[error("only guests of sev-snp have this")]
    SnpOnly,
    /// There is no key for messages to the secure processor, or it has no numbers left.
    #[error("the key for messages to the secure processor is not used any more")]
    KeyDisabled,
    /// The host has no time for a message to the secure processor now. The message is the same when it is asked again.
    #[error("the host is busy, and the message to the secure processor has to be sent again")]
    Busy,
    /// What came back is not the answer of the secure processor to the last message.
    #[error("the answer is not from the secure processor, or not to this message")]
    NotAuthentic,
    /// The secure processor, or the host in its place, refused the message.
    #[error("the request was refused: firmware {firmware:#x}, host {host:#x}")]
    Request {
        /// The firmware's code.
        firmware: u32,
        /// The host's code.
        host: u32,
    },
    /// The secure processor gave no report.
    #[error("the secure processor gave no report: {0:#x}")]
    NoReport(u32),
}
