use crate::Refusal;
use crate::sev::Fault;
use cvm_core::{Answer, GpaRange, Side};

/// What can go wrong in a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The boot page is none, or speaks of things that this version does not know.
    #[error("the boot page has no known {0}")]
    BootPage(&'static str),
    /// The host did not convert.
    #[error("the host did not make {range} {to}: it answered {answer:?}")]
    NotConverted {
        /// The pages, of which some may have been converted.
        range: GpaRange,
        /// The side that they were to be on.
        to: Side,
        /// What the host said last.
        answer: Answer,
    },
    /// The host gave an answer that means nothing.
    #[error("the host answered a conversion of {range} with {answer:#x}")]
    UnknownAnswer {
        /// The pages.
        range: GpaRange,
        /// What the host said.
        answer: u64,
    },
    /// A range that no pointer of the guest leads to: it begins at 0, or ends beyond the address space.
    #[error("{0} cannot be accessed by pointer")]
    NoPointer(GpaRange),
    /// A vector that belongs to an exception, which no host may raise.
    #[error("vector {0} belongs to an exception")]
    Exception(u8),
    /// A device beyond the last one.
    #[error("there is no device {0}")]
    NoDevice(u16),
    /// A range that the transport has too few bits for.
    #[error("{0} is beyond what the doorbell can name")]
    TooFar(GpaRange),
    /// An access beyond the end of a shared region or buffer.
    #[error("{len} bytes at offset {offset} end beyond the {limit} bytes that are there")]
    OutOfBounds {
        /// Where the access would begin.
        offset: usize,
        /// How long it would be.
        len: usize,
        /// How much there is.
        limit: usize,
    },
    /// There is no buffer.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A buffer of another pool.
    #[error("the buffer is of another pool")]
    ForeignBuffer,
    /// A range that is no chunk of a pool: 2 MiB at a multiple of 2 MiB.
    #[error("{0} is not 2 MiB at a multiple of 2 MiB")]
    NotAChunk(GpaRange),
    /// There is no record for another chunk of a pool.
    #[error("the pool has no record for another chunk")]
    PoolFull,
    /// There is no record for another queue of a pool.
    #[error("the pool has no record for another queue")]
    NoQueue,
    /// What a guest of SEV finds wrong.
    #[error(transparent)]
    Sev(#[from] Fault),
}
