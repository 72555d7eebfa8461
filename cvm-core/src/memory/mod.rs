//! Guest memory: which side each page is on, how it changes sides, and the view of the shared side.
//!
//! One conversion, in order, for every backend:
//!
//! | step | who | when it fails |
//! |---|---|---|
//! | validate the request | engine | the guest hears `Invalid`; nothing happened |
//! | wait for conversions of the same pages | engine | the guest hears `Retry`; nothing happened |
//! | prepare | [`ConversionListener`]s, in the order they were added | those already prepared are told to abort |
//! | take the pages out of the view and wait for the pins that may see them | engine | listeners abort, the guest hears `Retry` |
//! | let the guest see the other side, and free the losing side | [`Converter`] | rolled back, or the pages are poisoned |
//! | commit to the [`PageStateMap`] | engine | cannot fail |
//! | tell | listeners | cannot fail |
//!
//! One deadline bounds both waits together.
//!
//! A poisoned page is in nobody's reach: the view refuses it, and the backend takes it from the guest.

mod conversion;
mod map;
mod pins;
mod slots;
mod sync;
mod view;

pub use conversion::{
    Conversion, ConversionEngine, ConversionListener, ConversionRequest, ConversionTotals, Converter, ConverterError,
    LeftAs, Objection, Sides, Ticket,
};
pub use map::{PageState, PageStateMap, Snapshot};
pub use slots::Slots;
pub use view::{Backing, Pinned, SharedMemory, SharedView, ViewError};

/// How much memory a VM occupies on the host, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocated {
    /// Behind the private side, where the host can tell.
    pub private: Option<u64>,
    /// Behind the shared side.
    pub shared: u64,
}
