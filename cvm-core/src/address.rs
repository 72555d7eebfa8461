//! Guest physical addresses and page ranges, with their arithmetic checked once, where they are made.

use core::fmt;

/// The unit of every conversion, in bytes. Larger pages are runs of these.
pub const PAGE_SIZE: u64 = 4096;

/// The first address that no x86-64 guest can have: physical addresses are at most 52 bits wide
/// (AMD64 Architecture Programmer's Manual, volume 2, section 5.3; Intel SDM, volume 3, section 4.1.4).
pub const GPA_LIMIT: u64 = 1 << 52;

/// A guest physical address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpa({:#x})", self.0)
    }
}

/// Why two numbers are not a page range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// There is no page in it.
    #[error("the range at {0} is empty")]
    Empty(Gpa),
    /// Start or length is not a multiple of [`PAGE_SIZE`].
    #[error("{start} with length {len:#x} is not aligned to pages of 4 KiB")]
    Unaligned {
        /// Where it would start.
        start: Gpa,
        /// Its length in bytes.
        len: u64,
    },
    /// It ends beyond [`GPA_LIMIT`].
    #[error("{start} with length {len:#x} ends beyond the 52 bits of a guest physical address")]
    TooHigh {
        /// Where it would start.
        start: Gpa,
        /// Its length in bytes.
        len: u64,
    },
}

/// At least one whole page of guest physical memory: aligned, not empty, below [`GPA_LIMIT`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GpaRange {
    start: u64,
    end: u64,
}

impl GpaRange {
    /// `len` bytes from `start`.
    ///
    /// # Errors
    /// Both must be multiples of [`PAGE_SIZE`], `len` positive, and the end at most [`GPA_LIMIT`].
    pub const fn new(start: u64, len: u64) -> Result<Self, RangeError> {
        let gpa = Gpa(start);
        if len == 0 {
            return Err(RangeError::Empty(gpa));
        }
        if !start.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(RangeError::Unaligned { start: gpa, len });
        }
        match start.checked_add(len) {
            Some(end) if end <= GPA_LIMIT => Ok(Self { start, end }),
            _ => Err(RangeError::TooHigh { start: gpa, len }),
        }
    }

    /// `pages` pages from `start`.
    ///
    /// # Errors
    /// As [`GpaRange::new`].
    pub const fn from_pages(start: u64, pages: u64) -> Result<Self, RangeError> {
        match pages.checked_mul(PAGE_SIZE) {
            Some(len) => Self::new(start, len),
            None => Err(RangeError::TooHigh { start: Gpa(start), len: u64::MAX }),
        }
    }

    /// The smallest range that holds the `len` bytes at `start`, or nothing when there is no byte or it ends too high.
    pub fn covering(start: u64, len: u64) -> Option<Self> {
        let first = start & !(PAGE_SIZE - 1);
        let end = start.checked_add(len)?.checked_next_multiple_of(PAGE_SIZE)?;
        (len > 0).then(|| Self::new(first, end - first).ok()).flatten()
    }

    /// The first address.
    pub const fn start(&self) -> Gpa {
        Gpa(self.start)
    }

    /// The first address behind it.
    pub const fn end(&self) -> Gpa {
        Gpa(self.end)
    }

    /// Its length in bytes; never 0.
    #[allow(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub const fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Its length in pages; never 0.
    pub const fn pages(&self) -> u64 {
        self.len() / PAGE_SIZE
    }

    /// Whether `gpa` lies in it.
    pub const fn contains(&self, gpa: Gpa) -> bool {
        self.start <= gpa.0 && gpa.0 < self.end
    }

    /// Whether all of `other` lies in it.
    pub const fn contains_range(&self, other: &Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The smallest range that holds both.
    pub fn hull(&self, other: &Self) -> Self {
        Self { start: self.start.min(other.start), end: self.end.max(other.end) }
    }

    /// What the two have in common.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        (start < end).then_some(Self { start, end })
    }
}

impl fmt::Display for GpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

impl fmt::Debug for GpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GpaRange({self})")
    }
}

#[cfg(all(test, feature = "std"))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_range_says_what_is_wrong_with_its_numbers() {
        assert_eq!(GpaRange::new(0x1000, 0), Err(RangeError::Empty(Gpa(0x1000))));
        assert!(matches!(GpaRange::new(0x1001, 0x1000), Err(RangeError::Unaligned { .. })));
        assert!(matches!(GpaRange::new(0x1000, 0x800), Err(RangeError::Unaligned { .. })));
        assert!(matches!(GpaRange::new(GPA_LIMIT - 0x1000, 0x2000), Err(RangeError::TooHigh { .. })));
        assert!(matches!(GpaRange::new(u64::MAX - 0xfff, 0x1000), Err(RangeError::TooHigh { .. })));
        assert!(matches!(GpaRange::from_pages(0, u64::MAX), Err(RangeError::TooHigh { .. })));
        assert!(GpaRange::new(GPA_LIMIT - 0x1000, 0x1000).is_ok());
    }

    proptest! {
        #[test]
        fn any_two_numbers_make_a_sound_range_or_none(start: u64, len: u64, other_start: u64, other_len: u64) {
            for range in [GpaRange::new(start, len).ok(), GpaRange::covering(start, len)].into_iter().flatten() {
                prop_assert!(range.start() < range.end() && range.end().0 <= GPA_LIMIT);
                prop_assert_eq!(range.pages() * PAGE_SIZE, range.len());
                if let Some(other) = GpaRange::covering(other_start, other_len)
                    && let Some(both) = range.intersection(&other)
                {
                    prop_assert!(range.contains_range(&both) && other.contains_range(&both));
                }
            }
        }

        #[test]
        fn the_covering_range_is_the_smallest(start in 0..1u64 << 40, len in 1..1u64 << 20) {
            let range = GpaRange::covering(start, len).unwrap();
            prop_assert!(range.start().0 <= start && start + len <= range.end().0);
            prop_assert!(start - range.start().0 < PAGE_SIZE && range.end().0 - (start + len) < PAGE_SIZE);
        }
    }
}
