//! Chapter 4: conversions.

use crate::Bench;
use crate::clause::{Clause, Verdict};
use crate::guest::{DATA, MEMORY};
use crate::vmm::range;
use cvm_core::doorbell::Doorbell;
use cvm_core::memory::ConversionTotals;
use cvm_core::{Answer, PAGE_SIZE, Platform, Side, Vm, VmConfig};

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![Clause::new("4.1", "a page goes there and back and leaves its contents behind", there_and_back)]
}

fn there_and_back<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    for doorbell in [Doorbell::Port, Doorbell::Msr] {
        let mut guest = bench.guest(VmConfig { doorbell, ..bench.config(1) }, |a| {
            a.store(DATA, Side::Private, 0x1111)?;
            a.load(DATA, Side::Private)?;
            a.report()?;
            for _ in 0..2 {
                a.convert(DATA, 1, Side::Shared)?;
                a.report()?;
                a.load(DATA, Side::Shared)?;
                a.report()?;
                a.store(DATA, Side::Shared, 0x2222)?;
                a.report()?;
                a.load(DATA, Side::Shared)?;
                a.report()?;
            }
            a.convert(DATA, 1, Side::Private)?;
            a.report()?;
            a.load(DATA, Side::Private)?;
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

        // The same request again costs nothing, and keeps the contents.
        assert_eq!(guest.convert().pages, 0);
        assert_eq!(guest.report(), 0);
        assert_eq!(guest.report(), 0x3333);
        guest.report();
        assert_eq!(guest.read(DATA).unwrap(), 0x2222);
        assert_eq!(guest.report(), 0x2222);

        assert_eq!(guest.convert().pages, 1);
        assert_eq!(guest.report(), 0);
        guest.assert_private(range(DATA, 1));
        // Where both sides are one page it is not zero, but what the private key makes of what was shared: see 4.2.
        guest.report();
        assert_eq!(guest.report(), 0x4444);
        assert_eq!(guest.vm.allocated().unwrap(), before);
        guest.assert_private(range(0, MEMORY / PAGE_SIZE / 2));
        guest.end();
        let totals = ConversionTotals { requests: 3, refused: 0, to_private: 1, to_shared: 1 };
        assert_eq!(guest.conversions(), totals);
    }
    Verdict::Met
}
