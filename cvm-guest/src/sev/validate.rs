use super::Fault;
use cvm_core::{GpaRange, PAGE_SIZE};

/// 2 MiB: the larger of the two sizes of pages.
pub(super) const LARGE_PAGE: u64 = 2 << 20;

/// How much one instruction validates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum PageSize {
    /// 4 KiB.
    Small = 0,
    /// 2 MiB.
    Large = 1,
}

/// What PVALIDATE or RMPADJUST gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validated {
    /// The page is now as was asked for.
    Changed,
    /// It was so before (CF): somebody has put another page in its place, or the guest has lost track.
    Unchanged,
    /// The host has small pages where a large one was to be validated.
    SizeMismatch,
    /// Another error (EAX).
    Failed(u32),
}

/// Which private pages the guest holds for valid (AMD publication 24593, section 15.36.6).
///
/// A page is made invalid before it is given to the host, and valid after it has been taken. So a page that the host
/// replaces is one that the guest never made valid, and faults when it is used.
pub trait Validate {
    /// Makes the private page at `gpa`, a multiple of its size, valid or invalid.
    fn validate(&self, gpa: u64, size: PageSize, valid: bool) -> Validated;

    /// Makes the private page at `gpa` a state that a vCPU can start from: a VMSA, by RMPADJUST. It is a small page, and mapped
    /// to its own address.
    fn make_state(&self, gpa: u64) -> Validated;
}

impl<V: Validate + ?Sized> Validate for &V {
    fn validate(&self, gpa: u64, size: PageSize, valid: bool) -> Validated {
        (**self).validate(gpa, size, valid)
    }

    fn make_state(&self, gpa: u64) -> Validated {
        (**self).make_state(gpa)
    }
}

/// Makes all pages of `range` valid or invalid, by large ones where that is possible.
///
/// # Errors
/// [`Fault::Validation`], after which the guest cannot know what its memory is, and has to end.
pub(super) fn set_valid(validate: &impl Validate, range: GpaRange, valid: bool) -> Result<(), Fault> {
    let (mut at, end) = (range.start().0, range.end().0);
    // Below it are small pages, as the host has shown.
    let mut small_until = 0;
    while at < end {
        let is_large = at >= small_until && at.is_multiple_of(LARGE_PAGE) && end - at >= LARGE_PAGE;
        let (size, len) = if is_large { (PageSize::Large, LARGE_PAGE) } else { (PageSize::Small, PAGE_SIZE) };
        match validate.validate(at, size, valid) {
            Validated::Changed => at += len,
            Validated::SizeMismatch if is_large => small_until = at + LARGE_PAGE,
            found => return Err(Fault::Validation { gpa: at, found }),
        }
    }
    Ok(())
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::fake::Pages;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_page_that_was_valid_already_is_fatal() {
        let pages = Pages::default();
        let range = GpaRange::from_pages(0x1000, 2).unwrap();
        set_valid(&pages, range, true).unwrap();
        let twice = set_valid(&pages, range, true);
        assert_eq!(twice, Err(Fault::Validation { gpa: 0x1000, found: Validated::Unchanged }));
        set_valid(&pages, range, false).unwrap();
        assert!(set_valid(&pages, range, false).is_err());
    }

    #[test]
    fn an_error_of_the_instruction_is_passed_on() {
        let pages = Pages::default();
        pages.fail(0x3000, Validated::Failed(1));
        let range = GpaRange::from_pages(0x2000, 4).unwrap();
        let failed = set_valid(&pages, range, true);
        assert_eq!(failed, Err(Fault::Validation { gpa: 0x3000, found: Validated::Failed(1) }));
        pages.fail(0x3000, Validated::SizeMismatch);
        assert!(set_valid(&pages, GpaRange::from_pages(0x3000, 1).unwrap(), true).is_err());
    }

    proptest! {
        #[test]
        fn every_page_is_validated_once_in_whatever_sizes_the_host_has(
            start in 0u64..2000, pages in 1u64..3000, split in prop::collection::btree_set(0u64..10, 0..4),
        ) {
            let fake = Pages::default();
            split.iter().for_each(|block| fake.split(block * LARGE_PAGE));
            let range = GpaRange::from_pages(start * PAGE_SIZE, pages).unwrap();
            set_valid(&fake, range, true).unwrap();
            prop_assert_eq!(fake.valid(), (start..start + pages).collect::<Vec<_>>());
            set_valid(&fake, range, false).unwrap();
            prop_assert!(fake.valid().is_empty());
        }
    }
}
