//! Page state changes by the GHCB (AMD publication 56421, section 4.1.6).

use super::event::code;
use super::ghcb::{BUFFER_LEN, Event, offset};
use super::msr::operation;
use super::validate::LARGE_PAGE;
use super::{Exit, Fault, Ghcb};
use cvm_core::{GpaRange, PAGE_SIZE, Side};

/// The header: the entry that the host is at, the last one, and nothing; two, two and four bytes.
const HEADER_LEN: usize = 8;
const ENTRY_LEN: usize = 8;

/// How many entries one exit has.
pub(super) const MOST_ENTRIES: usize = (BUFFER_LEN - HEADER_LEN) / ENTRY_LEN;

/// The bit of an entry that stands for 2 MiB.
const LARGE: u64 = 1 << 56;

/// How much the entry at `at` has, of what ends at `end`.
fn entry_len(at: u64, end: u64) -> u64 {
    if at.is_multiple_of(LARGE_PAGE) && end - at >= LARGE_PAGE { LARGE_PAGE } else { PAGE_SIZE }
}

/// Has the host change the state of all pages of `range`: what is private after it must not be valid before, and is not yet.
///
/// What the host did not finish is asked for again, from the entry on that it says it is at, as long as it makes progress. Of the
/// entries nothing is read back. A host that claims to be done and is not gains nothing: the guest's next access to the page faults.
///
/// # Errors
/// [`Fault::Progress`], [`Fault::PageState`] when the host gets nowhere, and as for every exit.
pub(super) fn change(ghcb: &Ghcb, exit: &impl Exit, range: GpaRange, to: Side) -> Result<(), Fault> {
    let (mut at, end) = (range.start().0, range.end().0);
    while at < end {
        let mut entries = 0;
        let mut next = at;
        while next < end && entries < MOST_ENTRIES {
            let len = entry_len(next, end);
            let entry = next | operation(to) << 52 | if len == LARGE_PAGE { LARGE } else { 0 };
            ghcb.write(offset::BUFFER + HEADER_LEN + entries * ENTRY_LEN, &entry.to_le_bytes())?;
            next += len;
            entries += 1;
        }
        let entries = entries as u16;
        let header = u64::from(entries - 1) << 16;
        ghcb.write(offset::BUFFER, &header.to_le_bytes())?;
        let reply = ghcb.exit(exit, Event { code: code::PAGE_STATE, buffer: true, ..Event::default() })?;
        let answer = reply.info2()?;
        // The one read of what the host says about its progress: both numbers at once.
        let header = ghcb.read(offset::BUFFER)?;
        let (done, last) = (header as u16, (header >> 16) as u16);
        if done > entries || last != entries - 1 {
            return Err(Fault::Progress { at: done, entries });
        }
        if done == entries && answer == 0 {
            at = next;
            continue;
        }
        for _ in 0..done {
            at += entry_len(at, end);
        }
        if done == 0 || at >= end {
            let left = GpaRange::new(at, end - at).unwrap_or(range);
            return Err(Fault::PageState { range: left, to, answer });
        }
    }
    Ok(())
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::fake::Host;
    use super::super::{Ghcb, Protection};
    use super::*;
    use cvm_core::GpaRange;
    use proptest::prelude::*;

    const BLOCK_PAGES: u64 = LARGE_PAGE / PAGE_SIZE;

    fn ghcb(host: &Host) -> Ghcb {
        let base =
            core::ptr::NonNull::new(core::ptr::with_exposed_provenance_mut(host.memory.gpa(0).0 as usize)).unwrap();
        #[allow(unsafe_code, reason = "it is leaked memory of the test's own")]
        // SAFETY: the fake host's memory is leaked, and nobody has references into it.
        let page =
            unsafe { crate::SharedRegion::mapped_at(base, GpaRange::from_pages(host.memory.gpa(0).0, 1).unwrap()) };
        Ghcb::new(page, 2).unwrap()
    }

    fn range(start: u64, pages: u64) -> GpaRange {
        GpaRange::from_pages(start * PAGE_SIZE, pages).unwrap()
    }

    proptest! {
        #[test]
        fn every_page_changes_once_however_far_the_host_gets_at_a_time(
            start in 0u64..1500, pages in 1u64..2600, pace in 1u16..400,
        ) {
            let host = Host::new(Protection::SevEs, 1);
            host.pace.set(pace);
            change(&ghcb(&host), &host, range(start, pages), Side::Shared).unwrap();
            prop_assert_eq!(host.shared.borrow().iter().copied().collect::<Vec<_>>(), (start..start + pages).collect::<Vec<_>>());
            let exits = host.exits.borrow().len() as u64;
            // At most the pages of two blocks are single ones, and the rest large.
            prop_assert!(exits <= (2 * BLOCK_PAGES + pages / BLOCK_PAGES).div_ceil(u64::from(pace.min(253))) + 4);
            change(&ghcb(&host), &host, range(start, pages), Side::Private).unwrap();
            prop_assert!(host.shared.borrow().is_empty());
        }

        #[test]
        fn whatever_a_host_says_of_its_progress_the_guest_comes_to_an_end(
            headers in prop::collection::vec((0u16..300, prop::option::of(0u16..300), 0u64..2), 1..8), pages in 1u64..600,
        ) {
            let host = Host::new(Protection::SevEs, 1);
            let turn = std::cell::Cell::new(0);
            host.answer_by(move |host, _| {
                let (at, last, answer) = headers[turn.get() % headers.len()];
                turn.set(turn.get() + 1);
                let last = last.unwrap_or((host.read(offset::BUFFER) >> 16) as u16);
                host.write(offset::BUFFER, u64::from(last) << 16 | u64::from(at));
                host.write(offset::EXIT_INFO_2, answer << 40);
                true
            });
            match change(&ghcb(&host), &host, range(1, pages), Side::Shared) {
                Ok(()) | Err(Fault::Progress { .. } | Fault::PageState { .. }) => {}
                Err(other) => prop_assert!(false, "{other:?}"),
            }
        }
    }

    #[test]
    fn a_large_range_goes_by_large_entries_and_as_many_as_fit() {
        let host = Host::new(Protection::SevEs, 1);
        change(&ghcb(&host), &host, range(0, 300 * BLOCK_PAGES), Side::Shared).unwrap();
        assert_eq!(host.exits.borrow().len(), 2);
        assert_eq!(MOST_ENTRIES, 253);
    }

    #[test]
    fn a_host_that_gets_nowhere_is_reported_with_what_is_left() {
        let host = Host::new(Protection::SevEs, 1);
        host.answer_by(|host, _| {
            host.write(offset::EXIT_INFO_2, 0x100 << 32);
            true
        });
        let error = Fault::PageState { range: range(1, 3), to: Side::Private, answer: 0x100 << 32 };
        assert_eq!(change(&ghcb(&host), &host, range(1, 3), Side::Private), Err(error));
        assert_eq!(host.exits.borrow().len(), 1);
        // One page done, and then no more.
        host.answer_by(|host, _| {
            let last = host.read(offset::BUFFER) >> 16;
            host.write(offset::BUFFER, last << 16 | u64::from(last == 2));
            host.write(offset::EXIT_INFO_2, 0x100 << 32);
            true
        });
        let error = Fault::PageState { range: range(2, 2), to: Side::Private, answer: 0x100 << 32 };
        assert_eq!(change(&ghcb(&host), &host, range(1, 3), Side::Private), Err(error));
    }

    #[test]
    fn an_index_beyond_the_entries_or_another_last_one_is_an_error() {
        let host = Host::new(Protection::SevEs, 1);
        host.answer_by(|host, _| {
            host.write(offset::BUFFER, 2 << 16 | 4);
            true
        });
        let error = Err(Fault::Progress { at: 4, entries: 3 });
        assert_eq!(change(&ghcb(&host), &host, range(1, 3), Side::Private), error);
        host.answer_by(|host, _| {
            host.write(offset::BUFFER, 9 << 16 | 1);
            true
        });
        assert_eq!(change(&ghcb(&host), &host, range(1, 3), Side::Private), Err(Fault::Progress { at: 1, entries: 3 }));
    }
}
