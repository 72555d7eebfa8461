//! Who else has a say in a conversion.

use crate::{GpaRange, Side};

/// Why a listener does not let a conversion happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Objection {
    /// Not now; the guest shall ask again.
    Wait(String),
    /// Never.
    Refuse(String),
}

/// Somebody who must know of conversions: an IOMMU mapper, a vhost process, a balloon.
///
/// The engine calls from the thread that runs the conversion. Conversions of ranges that have no page in common may run
/// at the same time, those of ranges that have one never do. Each [`prepare`] that returned `Ok` is followed by just one
/// of the other three for the same range. A listener must not call the engine back: it would wait for itself.
///
/// [`prepare`]: ConversionListener::prepare
pub trait ConversionListener: Send + Sync {
    /// What to call it in errors.
    fn name(&self) -> &str;

    /// `range` is about to move to side `to`; give it up, or object.
    ///
    /// # Errors
    /// An objection: nothing has happened to the range, nor will.
    fn prepare(&self, range: GpaRange, to: Side) -> Result<(), Objection>;

    /// `range` is on side `to` now.
    fn committed(&self, range: GpaRange, to: Side);

    /// `range` stayed on the side where it was before [`prepare`](ConversionListener::prepare); its contents may be
    /// lost.
    fn aborted(&self, range: GpaRange, to: Side);

    /// `range` is lost to guest and host.
    fn poisoned(&self, range: GpaRange);
}
