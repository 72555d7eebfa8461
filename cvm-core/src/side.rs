//! The two sides of guest memory, and what a guest is told when it asks to move a page between them.

use core::fmt;
use zerocopy::{TryFromBytes, try_transmute};

/// Whom a page belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, TryFromBytes)]
#[repr(u32)]
pub enum Side {
    /// The guest alone.
    Private = 0,
    /// Guest and host together.
    Shared = 1,
}

impl Side {
    /// The other one: what a conversion to `self` takes the page away from.
    pub const fn other(self) -> Self {
        match self {
            Self::Private => Self::Shared,
            Self::Shared => Self::Private,
        }
    }

    /// The visibility that a number on the wire stands for.
    pub fn from_u32(raw: u32) -> Option<Self> {
        try_transmute!(raw).ok()
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Private => "private",
            Self::Shared => "shared",
        })
    }
}

/// What a guest hears about its conversion request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, TryFromBytes)]
#[repr(u32)]
pub enum Answer {
    /// Every page of the range is on the side that was asked for.
    Done = 0,
    /// The request makes no sense, or the host refuses it for good. Some pages may have been converted.
    Invalid = 1,
    /// Not now: ask again for the same range. Pages that are already converted cost nothing then.
    Retry = 2,
}

impl Answer {
    /// The answer that a number on the wire stands for.
    pub fn from_u32(raw: u32) -> Option<Self> {
        try_transmute!(raw).ok()
    }
}
