//! A backend's part in a conversion.

use crate::{BoxError, GpaRange, Side};

/// In which state a converter left the range that it could not convert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeftAs {
    /// As it was before the call, contents included.
    Before,
    /// Nobody knows.
    Unknown,
}

/// Why a converter did not convert.
#[derive(Debug)]
pub struct ConverterError {
    /// What failed.
    pub step: &'static str,
    /// How the range was left.
    pub left_as: LeftAs,
    /// What went wrong.
    pub source: BoxError,
}

/// A backend's part in a conversion. Every range lies within one slot; `vcpu` is the one that asked.
pub trait Converter: Send + Sync {
    /// Makes the guest see side `to` for every page of `range`, and frees the memory that backs it on the side that has
    /// lost it, contents and all.
    ///
    /// # Errors
    /// With the state that the range was left in.
    fn convert(&self, vcpu: u32, range: GpaRange, to: Side) -> Result<(), ConverterError>;

    /// Takes `range` from the guest: neither side may be seen there any more.
    ///
    /// # Errors
    /// The guest may then still see one, so the engine is [lost](super::ConversionEngine::is_lost).
    fn poison(&self, vcpu: u32, range: GpaRange) -> Result<(), BoxError>;

    /// How many runs of pages on one side there may be: what the host has mappings for. A guest that alternates sides
    /// page by page is refused beyond it.
    fn most_runs(&self) -> u64;
}

/// Memory of which this process can show the guest either side: a [`Converter`] in two steps. Every range lies within
/// one slot.
pub trait Sides: Send + Sync {
    /// Makes the guest see `side` for every page of `range`.
    ///
    /// # Errors
    /// With the state that the range was left in.
    fn show(&self, range: GpaRange, side: Side) -> Result<(), ConverterError>;

    /// Frees the memory that backs `range` on the side that has just lost it, contents and all.
    ///
    /// # Errors
    /// The memory may then be still there, in part or in whole.
    fn discard(&self, range: GpaRange, losing: Side) -> Result<(), BoxError>;

    /// As [`Converter::poison`].
    ///
    /// # Errors
    /// As there.
    fn poison(&self, range: GpaRange) -> Result<(), BoxError>;

    /// As [`Converter::most_runs`].
    fn most_runs(&self) -> u64;
}

impl<S: Sides> Converter for S {
    fn convert(&self, _vcpu: u32, range: GpaRange, to: Side) -> Result<(), ConverterError> {
        self.show(range, to)?;
        self.discard(range, to.other()).map_err(|source| {
            // What was written to the new side meanwhile must not come back with a later conversion.
            let undone = self.show(range, to.other()).is_ok() && self.discard(range, to).is_ok();
            let left_as = if undone { LeftAs::Before } else { LeftAs::Unknown };
            ConverterError { step: "discard the losing side", left_as, source }
        })
    }

    fn poison(&self, _vcpu: u32, range: GpaRange) -> Result<(), BoxError> {
        Sides::poison(self, range)
    }

    fn most_runs(&self) -> u64 {
        Sides::most_runs(self)
    }
}
