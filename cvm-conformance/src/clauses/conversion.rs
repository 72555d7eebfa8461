//! Chapter 4: conversions.

mod at_once;
mod contents;
mod listeners;
mod refusals;
mod transports;

use super::fresh;
use crate::Bench;
use crate::clause::{Clause, Verdict};
use crate::guest::{DATA, EXTRA, MEMORY};
use crate::vmm::{Guest, range};
use cvm_core::doorbell::Doorbell;
use cvm_core::memory::ConversionTotals;
use cvm_core::{Answer, Gpa, Launch, PAGE_SIZE, PageKind, PageState, Platform, Side, Vm, VmConfig};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    let there_and_back = vec![
        Clause::new("4.1", "a page goes there and back and leaves its contents behind", there_and_back),
        Clause::new("4.2", "a page that becomes private is zero", zero),
        Clause::new("4.3", "a page that becomes shared has nothing of what was loaded into it", loaded),
        Clause::new("4.4", "a request for pages that are there already is done and changes nothing", idempotent),
        Clause::new("4.5", "a request converts those of its pages that are not there yet", overlapping),
    ];
    let rest =
        [contents::clauses(), at_once::clauses(), refusals::clauses(), listeners::clauses(), transports::clauses()];
    there_and_back.into_iter().chain(rest.into_iter().flatten()).collect()
}

fn there_and_back<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    for doorbell in [Doorbell::Port, Doorbell::Msr] {
        let mut guest = bench.guest(VmConfig { doorbell, ..bench.config(1) }, |a| {
            a.store(DATA, Side::Private, 0x1111)?;
            a.load(DATA, Side::Private)?;
            a.report()?;
            a.convert(DATA, 1, Side::Shared)?;
            a.report()?;
            a.load(DATA, Side::Shared)?;
            a.report()?;
            a.store(DATA, Side::Shared, 0x2222)?;
            a.report()?;
            a.load(DATA, Side::Shared)?;
            a.report()?;
            a.convert(DATA, 1, Side::Private)?;
            a.report()?;
            a.store(DATA, Side::Private, 0x4444)?;
            a.load(DATA, Side::Private)?;
            a.report()?;
            a.end(0)
        });
        assert_eq!(guest.report(), 0x1111);
        let before = guest.vm.allocated().unwrap();

        let converted = guest.convert();
        assert_eq!((converted.answer, converted.pages), (Answer::Done, 1), "{}", converted.cause);
        assert_eq!(guest.report(), 0);
        assert_eq!(guest.report(), 0, "private contents were kept");
        guest.report();
        assert_eq!(guest.read(DATA).unwrap(), 0x2222);
        let shared = guest.vm.allocated().unwrap();
        assert_eq!(shared.shared, before.shared + PAGE_SIZE);
        assert_eq!(
            shared.private,
            before.private.map(|private| private - PAGE_SIZE),
            "the private page is still there"
        );
        guest.write(DATA, 0x3333);
        assert_eq!(guest.report(), 0x3333);

        assert_eq!(guest.convert().pages, 1);
        assert_eq!(guest.report(), 0);
        guest.assert_private(range(DATA, 1));
        // The guest has written before it reads: what it would find otherwise is the matter of 4.2.
        assert_eq!(guest.report(), 0x4444);
        assert_eq!(guest.vm.allocated().unwrap(), before);
        guest.assert_private(range(0, MEMORY / PAGE_SIZE / 2));
        guest.end();
        let totals = ConversionTotals { requests: 2, refused: 0, to_private: 1, to_shared: 1 };
        assert_eq!(guest.conversions(), totals);
    }
    Verdict::Met
}

fn zero<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let words = [DATA, DATA + PAGE_SIZE - 4, DATA + PAGE_SIZE, DATA + 2 * PAGE_SIZE - 4];
    let mut guest = bench.guest(bench.config(1), |a| {
        for gpa in words {
            a.store(gpa, Side::Private, 0x1111)?;
        }
        a.convert(DATA, 2, Side::Shared)?;
        for gpa in words {
            a.store(gpa, Side::Shared, 0x2222)?;
        }
        a.convert(DATA, 2, Side::Private)?;
        fresh::tell(a, &words)?;
        a.end(0)
    });
    assert_eq!((guest.convert().pages, guest.convert().pages), (2, 2));
    let verdict = fresh::listen(&mut guest, &words);
    guest.end();
    verdict
}

fn loaded<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const PAGES: u64 = 3;
    let load = |_: &Bench<'_, P>, launch: &mut Launch<P::Loader>| {
        launch.load(Gpa(EXTRA), &[0x5e; (PAGES * PAGE_SIZE) as usize], PageKind::Measured)
    };
    let launch = bench.load_after(bench.config(1), load, |a| {
        a.load(EXTRA, Side::Private)?;
        a.report()?;
        a.convert(EXTRA, PAGES, Side::Shared)?;
        a.report()?;
        a.load(EXTRA, Side::Shared)?;
        a.report()?;
        a.end(0)
    });
    let mut guest = Guest::from_launch(launch.unwrap());
    guest.assert_private(range(EXTRA, PAGES));
    assert_eq!(guest.report(), 0x5e5e_5e5e);
    assert_eq!(guest.convert().pages, PAGES);
    let mut contents = [1; (PAGES * PAGE_SIZE) as usize];
    guest.vm.memory().memory().read_slice(&mut contents, GuestAddress(EXTRA)).unwrap();
    assert!(contents.iter().all(|byte| *byte == 0), "the host sees what was loaded, or something else of the guest's");
    assert_eq!((guest.report(), guest.report()), (0, 0));
    guest.end();
    Verdict::Met
}

fn idempotent<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(1), |a| {
        a.store(DATA, Side::Private, 0x1111)?;
        a.report()?;
        a.ask(DATA, 1, Side::Private)?;
        a.report()?;
        a.load(DATA, Side::Private)?;
        a.report()?;
        a.convert(DATA, 1, Side::Shared)?;
        a.store(DATA, Side::Shared, 0x2222)?;
        a.report()?;
        a.ask(DATA, 1, Side::Shared)?;
        a.report()?;
        a.load(DATA, Side::Shared)?;
        a.report()?;
        a.end(0)
    });
    for (contents, converts) in [(0x1111, false), (0x2222, true)] {
        if converts {
            assert_eq!(guest.convert().pages, 1);
        }
        guest.report();
        let (before, shared) = (guest.allocated(), guest.shared_pages());
        let again = guest.convert();
        assert_eq!((again.answer, again.pages), (Answer::Done, 0), "{}", again.cause);
        assert_eq!((guest.report(), guest.report()), (0, contents), "the contents were not kept");
        assert_eq!((guest.allocated(), guest.shared_pages()), (before, shared));
    }
    assert_eq!(guest.read(DATA).unwrap(), 0x2222);
    guest.end();
    let totals = ConversionTotals { requests: 3, refused: 0, to_private: 0, to_shared: 1 };
    assert_eq!(guest.conversions(), totals);
    Verdict::Met
}

fn overlapping<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let page = |number: u64| DATA + number * PAGE_SIZE;
    let mut guest = bench.guest(bench.config(1), |a| {
        for number in 0..8 {
            a.store(page(number), Side::Private, 0x1100 + number as u32)?;
        }
        a.convert(page(3), 2, Side::Shared)?;
        for number in [3, 4] {
            a.store(page(number), Side::Shared, 0x2200 + number as u32)?;
        }
        // Those are in the middle of more.
        a.rescind(page(1), 2)?;
        a.rescind(page(5), 2)?;
        a.ask(page(1), 6, Side::Shared)?;
        for number in 1..7 {
            a.load(page(number), Side::Shared)?;
            a.report()?;
            a.store(page(number), Side::Shared, 0x3300 + number as u32)?;
        }
        // The middle alone, and then a range that begins before what is shared and ends within it.
        a.convert(page(3), 2, Side::Private)?;
        for number in [3, 4] {
            a.store(page(number), Side::Private, 0x4400 + number as u32)?;
        }
        a.report()?;
        a.ask(page(0), 4, Side::Private)?;
        a.accept(page(1), 2)?;
        for number in [1, 2] {
            a.store(page(number), Side::Private, 0x5500 + number as u32)?;
        }
        for number in [0, 1, 2, 3, 4, 7] {
            a.load(page(number), Side::Private)?;
            a.report()?;
        }
        a.end(0)
    });
    let states = |guest: &Guest<_>, shared: &[u64]| {
        for number in 0..8 {
            let state = guest_state(guest, page(number));
            let expected = if shared.contains(&number) { PageState::Shared } else { PageState::Private };
            assert_eq!(state, Some(expected), "page {number}");
        }
    };
    assert_eq!(guest.convert().pages, 2);
    states(&guest, &[3, 4]);
    let converted = guest.convert();
    assert_eq!((converted.answer, converted.pages), (Answer::Done, 4), "{}", converted.cause);
    states(&guest, &[1, 2, 3, 4, 5, 6]);
    for expected in [0, 0, 0x2203, 0x2204, 0, 0] {
        assert_eq!(guest.report(), expected);
    }
    assert_eq!(guest.convert().pages, 2);
    guest.report();
    states(&guest, &[1, 2, 5, 6]);
    for number in [1, 2, 5, 6] {
        assert_eq!(guest.read(page(number)).unwrap(), 0x3300 + number as u32);
    }
    let converted = guest.convert();
    assert_eq!((converted.answer, converted.pages), (Answer::Done, 2), "{}", converted.cause);
    states(&guest, &[5, 6]);
    for expected in [0x1100, 0x5501, 0x5502, 0x4403, 0x4404, 0x1107] {
        assert_eq!(guest.report(), expected);
    }
    for number in [5, 6] {
        assert_eq!(guest.read(page(number)).unwrap(), 0x3300 + number as u32);
    }
    guest.end();
    assert_eq!(guest.conversions(), ConversionTotals { requests: 4, refused: 0, to_private: 4, to_shared: 6 });
    Verdict::Met
}

/// On which side a page is.
fn guest_state<V: Vm>(guest: &Guest<V>, gpa: u64) -> Option<PageState> {
    guest.vm.memory().map().get(Gpa(gpa))
}
