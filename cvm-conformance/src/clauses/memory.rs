//! Chapter 3: the two sides of memory, and the view of the shared one.

use crate::Bench;
use crate::clause::{Clause, Verdict};
use crate::guest::{Assembler, DATA, EXTRA, GHCB, MEMORY};
use crate::vmm::{Guest, range};
use cvm_core::memory::{Allocated, ConversionTotals, ViewError};
use cvm_core::{Gpa, Launch, PAGE_SIZE, PageKind, PageState, Platform, Side, Vm, VmConfig};
use iced_x86::code_asm::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, Permissions};

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("3.1", "all memory is private before anything runs and until the guest asks", private_by_default),
        Clause::new("3.2", "an access is refused whole if a byte of it is not shared", refused_whole),
        Clause::new("3.3", "an access outside memory is refused", outside),
        Clause::new("3.4", "what one side writes the other reads", both_read),
        Clause::new("3.5", "each slot has memory from its first page to its last", slots),
        Clause::new("3.6", "what is behind the shared side never has private contents", backing),
        Clause::new("3.7", "a page takes up shared memory only while it is shared", shared_is_freed),
        Clause::new("3.8", "a page takes up private memory only while it is private", private_is_freed),
        Clause::new("3.9", "a view outlives its VM", outlives),
    ]
}

fn private_by_default<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(1), |a| {
        a.store(DATA, Side::Private, 0x1111)?;
        a.load(DATA, Side::Private)?;
        a.report()?;
        a.end(0)
    });
    let all = range(0, MEMORY / PAGE_SIZE);
    guest.assert_private(all);
    assert_eq!(guest.vm.memory().map().count(PageState::Private), all.pages());
    assert_eq!(guest.vm.allocated().unwrap().shared, 0);
    assert_eq!(guest.vm.conversions(), ConversionTotals::default());
    assert_eq!(guest.report(), 0x1111);
    guest.assert_private(range(0, GHCB / PAGE_SIZE));
    guest.end();
    guest.assert_private(range(0, GHCB / PAGE_SIZE));
    assert_eq!((guest.shared_pages(), guest.allocated().shared), (0, 0));
    assert_eq!(guest.conversions(), ConversionTotals::default());
    Verdict::Met
}

/// That the view refuses `len` bytes at `gpa` by whatever means, and says from where on and why.
fn assert_refused<V: Vm>(guest: &Guest<V>, gpa: u64, len: usize, named: ViewError) {
    let view = guest.vm.memory().memory();
    let at = GuestAddress(gpa);
    let mut read = vec![0xa5; len];
    let slices = view.get_slices(at, len, Permissions::Read).map(|slices| slices.map(|slice| slice.map(drop)));
    let results = [
        ("read_slice", view.read_slice(&mut read, at)),
        ("read", view.read(&mut read, at).map(drop)),
        ("write_slice", view.write_slice(&vec![0x5a; len], at)),
        ("write", view.write(&vec![0x5a; len], at).map(drop)),
        ("get_slices", slices.and_then(Iterator::collect)),
    ];
    for (how, result) in results {
        let error = result.expect_err(&format!("{len} bytes at {gpa:#x} by {how}"));
        assert_eq!(ViewError::of(&error), Some(named), "{len} bytes at {gpa:#x} by {how}: {error}");
    }
    assert!(read.iter().all(|byte| *byte == 0xa5), "{len} bytes at {gpa:#x} were refused and read");
    for access in [Permissions::Read, Permissions::Write, Permissions::ReadWrite] {
        assert!(!view.check_range(at, len, access), "{len} bytes at {gpa:#x}");
    }
}

fn refused_whole<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    // Pages 1, 2 and 4 are shared.
    let [first, second, third, fourth, fifth] = [1, 2, 3, 4, 5].map(|page| DATA + page * PAGE_SIZE);
    let mut guest = bench.guest(bench.config(1), |a| {
        a.store(third, Side::Private, 0x5ec2_e7e7)?;
        a.convert(first, 2, Side::Shared)?;
        a.convert(fourth, 1, Side::Shared)?;
        a.load(third, Side::Private)?;
        a.report()?;
        a.load(third, Side::Private)?;
        a.report()?;
        a.end(0)
    });
    assert_eq!((guest.convert().pages, guest.convert().pages), (2, 1));
    assert_eq!(guest.report(), 0x5ec2_e7e7);
    let mark = [0x77; 2 * PAGE_SIZE as usize];
    guest.vm.memory().memory().write_slice(&mark, GuestAddress(first)).unwrap();
    let page = PAGE_SIZE as usize;
    for (gpa, len, named) in [
        (third - 1, 2, third),
        (third - 8, 16, third),
        (first, 2 * page + 1, third),
        (first, 4 * page, third),
        (fourth, page + 1, fifth),
        (first - 1, 2, first - 1),
        (first - 8, 3 * page, first - 8),
        (third + 5, page, third + 5),
        (third + 5, 1, third + 5),
    ] {
        assert_refused(&guest, gpa, len, ViewError::Private(Gpa(named)));
    }
    let view = guest.vm.memory().memory();
    let mut whole = [0; 2 * PAGE_SIZE as usize];
    view.read_slice(&mut whole, GuestAddress(first)).unwrap();
    assert!(whole == mark, "an access that was refused has written");
    assert!(view.check_range(GuestAddress(second - 8), 16, Permissions::ReadWrite));
    drop(view);
    assert_eq!(guest.report(), 0x5ec2_e7e7, "a private page was written");
    guest.end();
    Verdict::Met
}

fn outside<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const BEHIND: u64 = MEMORY + 0x20_0000;
    const LAST: u64 = MEMORY - PAGE_SIZE;
    let memory = vec![range(0, MEMORY / PAGE_SIZE), range(BEHIND, 256)];
    let mut guest = bench.guest(VmConfig { memory, ..bench.config(1) }, |a| {
        a.convert(LAST, 1, Side::Shared)?;
        a.end(0)
    });
    assert_eq!(guest.convert().pages, 1);
    guest.write(LAST, 0x1111);
    for (gpa, len, named) in [
        (MEMORY, 1, MEMORY),
        (MEMORY - 4, 8, MEMORY),
        (LAST, 0x30_0000, MEMORY),
        (BEHIND - 1, 1, BEHIND - 1),
        (BEHIND + (256 << 12), 1, BEHIND + (256 << 12)),
        (1 << 40, 8, 1 << 40),
        (1 << 52, 8, 1 << 52),
        (u64::MAX - 3, 8, u64::MAX - 3),
        (u64::MAX, 1, u64::MAX),
    ] {
        assert_refused(&guest, gpa, len, ViewError::OutsideMemory(Gpa(named)));
    }
    for gpa in [MEMORY, BEHIND - PAGE_SIZE, 1 << 40, u64::MAX] {
        assert_eq!(guest.vm.memory().map().get(Gpa(gpa)), None, "{gpa:#x}");
    }
    assert_eq!(guest.read(LAST).unwrap(), 0x1111);
    guest.end();
    Verdict::Met
}

fn both_read<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    // The first word of a page, the last one, and one that two pages share.
    let words = [DATA, DATA + PAGE_SIZE - 4, DATA + 2 * PAGE_SIZE - 2, DATA + 3 * PAGE_SIZE - 4];
    let counter = DATA + 0x40;
    let mut guest = bench.guest(bench.config(1), |a| {
        a.convert(DATA, 3, Side::Shared)?;
        for round in [1, 2] {
            for (number, gpa) in (0..).zip(words) {
                a.store(gpa, Side::Shared, 0x1111_0000 * round + number)?;
            }
            a.report()?;
            for gpa in words {
                a.load(gpa, Side::Shared)?;
                a.report()?;
            }
            let address = a.address(counter, Side::Shared);
            a.mov(rbx, address)?;
            a.lock().inc(dword_ptr(rbx))?;
        }
        a.report()?;
        a.end(0)
    });
    // Whoever has a handle or a pin before a page is shared finds it afterwards.
    let handles = [guest.vm.memory().clone(), guest.vm.memory().named("disk")];
    let early = guest.vm.memory().memory();
    assert_eq!(guest.convert().pages, 3);
    for round in [1, 2] {
        guest.report();
        for (number, gpa) in (0..).zip(words) {
            let expected = 0x1111_0000 * round + number;
            let views = handles.each_ref().map(GuestAddressSpace::memory);
            for view in views.iter().chain([&early]) {
                assert_eq!(view.read_obj::<u32>(GuestAddress(gpa)).unwrap(), expected, "{gpa:#x}");
            }
            views[0].write_obj(!expected, GuestAddress(gpa)).unwrap();
        }
        for (number, gpa) in (0..).zip(words) {
            assert_eq!(guest.report(), !(0x1111_0000 * round + number), "{gpa:#x}");
        }
        if round == 1 {
            early.store(41u32, GuestAddress(counter), Ordering::SeqCst).unwrap();
        }
    }
    guest.report();
    assert_eq!(early.load::<u32>(GuestAddress(counter), Ordering::SeqCst).unwrap(), 43);
    guest.end();
    Verdict::Met
}

fn slots<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const PAGES: u64 = 16;
    // In no order, and with a gap.
    let memory = vec![range(MEMORY + 0x20_0000, PAGES), range(0, MEMORY / PAGE_SIZE), range(MEMORY, PAGES)];
    let [behind, _, adjoining] = [&memory[0], &memory[1], &memory[2]].map(|slot| slot.start().0);
    let edges = [behind, adjoining].map(|start| [start, start + (PAGES - 1) * PAGE_SIZE]);
    let edges = [0, MEMORY - PAGE_SIZE].into_iter().chain(edges.into_iter().flatten()).collect::<Vec<_>>();
    let mut guest = bench.guest(VmConfig { memory: memory.clone(), ..bench.config(1) }, |a| {
        for start in [adjoining, behind] {
            a.accept(start, PAGES)?;
        }
        for (number, page) in (1..).zip(&edges) {
            a.store(*page, Side::Private, number)?;
            a.store(page + PAGE_SIZE - 4, Side::Private, number)?;
        }
        for page in &edges {
            for word in [0, PAGE_SIZE - 4] {
                a.load(page + word, Side::Private)?;
                a.report()?;
            }
            a.convert(*page, 1, Side::Shared)?;
            a.store(*page, Side::Shared, *page as u32)?;
        }
        a.report()?;
        a.end(0)
    });
    let mut sorted = memory;
    sorted.sort();
    assert_eq!(guest.vm.memory().map().slots().ranges(), sorted);
    let all = sorted.iter().map(|slot| slot.pages()).sum::<u64>();
    assert_eq!(guest.vm.memory().map().count(PageState::Private), all);
    for (number, page) in (1..).zip(&edges) {
        assert_eq!([guest.report(), guest.report()], [number; 2], "{page:#x}");
        assert_eq!(guest.convert().pages, 1, "{page:#x}");
    }
    guest.report();
    for page in &edges {
        assert_eq!(guest.read(*page).unwrap(), *page as u32, "two pages are one");
    }
    guest.end();
    Verdict::Met
}

fn backing<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const MARK: u64 = 0x5ec2_e7e7_5ec2_e7e7;
    let load = |_: &Bench<'_, P>, launch: &mut Launch<P::Loader>| {
        launch.load(Gpa(EXTRA), &MARK.to_le_bytes().repeat(512), PageKind::Measured)
    };
    let write = |a: &mut Assembler| {
        for _ in 0..2 {
            for word in [0, 4] {
                a.store(DATA + word, Side::Private, MARK as u32)?;
            }
            a.report()?;
            a.convert(DATA, 1, Side::Shared)?;
            a.store(DATA, Side::Shared, 0x1111)?;
            a.convert(DATA, 1, Side::Private)?;
        }
        a.end(0)
    };
    let launch = bench.load_after(bench.config(1), load, write).unwrap();
    let mut guest = Guest::from_launch(launch);
    let process = File::open("/proc/self/mem").expect("a process may read its own memory");
    for _ in 0..2 {
        guest.report();
        for gpa in [EXTRA, DATA] {
            let backing = guest.vm.memory().backing(range(gpa, 1)).expect("a page in a slot");
            let mut bytes = [[0; 8]; 2];
            if let Some(file) = backing.file {
                file.file().read_at(&mut bytes[0], file.start()).unwrap();
            }
            process.read_at(&mut bytes[1], backing.address).unwrap();
            assert!(bytes.iter().all(|bytes| u64::from_le_bytes(*bytes) != MARK), "{gpa:#x} can be read");
        }
        assert_eq!((guest.convert().pages, guest.convert().pages), (1, 1));
    }
    guest.end();
    Verdict::Met
}

/// How many pages go there and back.
const PAGES: u64 = 16;

/// What is allocated while all pages are private and written to, while they are shared and written to, and when they are private
/// again and were written to.
fn allocations<P: Platform>(bench: &Bench<'_, P>) -> [Allocated; 3] {
    let mut guest = bench.guest(bench.config(1), |a| {
        for side in [Side::Private, Side::Shared, Side::Private] {
            a.convert(DATA, PAGES, side)?;
            for page in 0..PAGES {
                a.store(DATA + page * PAGE_SIZE, side, 1)?;
            }
            a.report()?;
        }
        a.end(0)
    });
    let allocated = [0, PAGES, PAGES].map(|pages| {
        assert_eq!(guest.convert().pages, pages);
        guest.report();
        guest.allocated()
    });
    guest.end();
    allocated
}

fn shared_is_freed<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let shared = allocations(bench).map(|allocated| allocated.shared);
    assert_eq!(shared, [0, PAGES * PAGE_SIZE, 0]);
    Verdict::Met
}

fn private_is_freed<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let [before, there, back] = allocations(bench).map(|allocated| allocated.private);
    let Some(before) = before else {
        assert_eq!((there, back), (None, None));
        return Verdict::NotOffered("the host does not say how much private memory there is".into());
    };
    assert!((PAGES * PAGE_SIZE..=MEMORY).contains(&before), "{before} bytes");
    assert_eq!(there, Some(before - PAGES * PAGE_SIZE), "pages that are shared still take up private memory");
    assert_eq!(back, Some(before));
    Verdict::Met
}

fn outlives<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(1), |a| {
        a.convert(DATA, 1, Side::Shared)?;
        a.store(DATA, Side::Shared, 0x1111)?;
        a.report()?;
        a.end(0)
    });
    assert_eq!(guest.convert().pages, 1);
    guest.report();
    let (view, pinned) = (guest.vm.memory().named("disk"), guest.vm.memory().memory());
    drop(guest);
    for view in [view.memory(), pinned] {
        assert_eq!(view.read_obj::<u32>(GuestAddress(DATA)).unwrap(), 0x1111);
        view.write_obj(0x2222u32, GuestAddress(DATA + 4)).unwrap();
        assert!(view.read_obj::<u32>(GuestAddress(DATA + PAGE_SIZE)).is_err());
    }
    Verdict::Met
}
