//! What a host may leave in the GHCB and in the page of an answer, while a guest of SEV-SNP or SEV-ES works by them.

#![no_main]

use cvm_core::boot::{BootPage, Exits, MemoryRange};
use cvm_core::doorbell::{Doorbell, Transport};
use cvm_core::{Gpa, GpaRange, PAGE_SIZE, Side};
use cvm_guest::sev::{
    Acceptance, CpuidTable, Exit, GhcbVcpu, PageSize, Protection, Reporter, SecretsPage, Validate, Validated,
};
use cvm_guest::{Machine, SharedRegion};
use libfuzzer_sys::fuzz_target;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;
use std::sync::OnceLock;
use zerocopy::FromZeros;

const PAGE: usize = PAGE_SIZE as usize;
/// The GHCB, a message and its answer, pages to convert, the guest's secrets, and a page that nobody else may touch.
const PAGES: usize = 8;
const GHCB: u64 = 0;
const MESSAGES: u64 = 1;
const DATA: u64 = 3;
const SECRETS: u64 = 6;
const UNTOUCHED: u64 = 7;

const REGISTERED: u64 = 0x13;
const REQUESTS: [u64; 2] = [0x8000_0011, 0x8000_0012];

#[repr(C, align(4096))]
struct Memory([u8; PAGES * PAGE]);

/// Memory for all runs: it is used by its address alone.
fn base() -> *mut u8 {
    static MEMORY: OnceLock<usize> = OnceLock::new();
    let address = MEMORY.get_or_init(|| Box::into_raw(Box::new(Memory([0; PAGES * PAGE]))).expose_provenance());
    std::ptr::with_exposed_provenance_mut(*address)
}

fn range(page: u64, pages: u64) -> GpaRange {
    GpaRange::from_pages(base() as u64 + page * PAGE_SIZE, pages).unwrap()
}

fn region(page: u64, pages: u64) -> SharedRegion {
    let range = range(page, pages);
    let pointer = NonNull::new(std::ptr::with_exposed_provenance_mut(range.start().0 as usize)).unwrap();
    // SAFETY: the memory is leaked, and nobody has references into it.
    unsafe { SharedRegion::mapped_at(pointer, range) }
}

/// The guest has ended itself.
struct Terminated;

/// A host that writes bytes of the fuzzer's at each exit.
struct Host<'a> {
    bytes: RefCell<&'a [u8]>,
    ghcb: SharedRegion,
    messages: SharedRegion,
    /// The numbers of the messages since the last look.
    numbers: RefCell<Vec<u64>>,
    /// Whether the data pages are valid, by their numbers.
    valid: Cell<u8>,
    /// Whether they are the host's, or on their way.
    given: Cell<bool>,
}

impl Host<'_> {
    fn take<const N: usize>(&self) -> [u8; N] {
        let mut bytes = self.bytes.borrow_mut();
        let mut taken = [0; N];
        for byte in &mut taken {
            if let Some((first, rest)) = bytes.split_first() {
                (*byte, *bytes) = (*first, rest);
            }
        }
        taken
    }
}

impl Exit for Host<'_> {
    fn exit(&self, value: u64) -> u64 {
        match value & (PAGE_SIZE - 1) {
            0 => {
                let mut code = [0; 8];
                self.ghcb.read(0x390, &mut code).unwrap();
                if REQUESTS.contains(&u64::from_le_bytes(code)) {
                    let mut number = [0; 8];
                    self.messages.read(0x20, &mut number).unwrap();
                    self.numbers.borrow_mut().push(u64::from_le_bytes(number));
                }
                assert!(!self.given.get() || self.valid.get() == 0, "a page is valid while it is away");
                let [count] = self.take();
                for _ in 0..count % 24 {
                    let [place, word, low, high] = self.take();
                    let to = if place & 1 == 0 { &self.ghcb } else { &self.messages };
                    // Where something of interest is: exit informations and bitmap, buffer, answer.
                    let at = [0x390, 0x800, 0x1000, 0x1f8][usize::from(place >> 1 & 3)] + usize::from(word) * 8;
                    let value = u64::from(low) | u64::from(high) << 32;
                    let _ = to.write(at, &value.to_le_bytes());
                }
                value
            }
            0x002 => 2 << 48 | 1 << 32 | 1,
            0x012 => value & !(PAGE_SIZE - 1) | REGISTERED,
            0x014 => 0x15,
            0x100 => resume_unwind(Box::new(Terminated)),
            kind => panic!("{kind:#x}"),
        }
    }
}

impl Validate for Host<'_> {
    fn validate(&self, gpa: u64, size: PageSize, valid: bool) -> Validated {
        assert_eq!(size, PageSize::Small);
        let Some(page) = gpa.checked_sub(range(DATA, 2).start().0).map(|offset| offset / PAGE_SIZE) else {
            return Validated::Changed;
        };
        let bit = 1u8 << page;
        if (self.valid.get() & bit != 0) == valid {
            return Validated::Unchanged;
        }
        self.valid.set(self.valid.get() ^ bit);
        Validated::Changed
    }

    fn make_state(&self, gpa: u64) -> Validated {
        panic!("the guest starts no vcpu, and made a state of the page at {gpa:#x}");
    }
}

fn work(host: &Host<'_>) {
    let [snp, doorbell] = host.take::<2>().map(|byte| byte & 1 == 1);
    let protection = if snp { Protection::SevSnp } else { Protection::SevEs };
    let transport = if snp { Transport::PageState } else { Transport::Hypercall };
    let doorbell = if doorbell { Doorbell::Msr } else { Doorbell::Port };
    let mut boot = BootPage {
        doorbell: doorbell as u32,
        exits: Exits::Ghcb as u32,
        transport: transport as u32,
        accepted: u64::MAX,
        ..BootPage::new_zeroed()
    };
    boot.memory[0] = MemoryRange { start: base() as u64, len: (PAGES * PAGE) as u64 };
    let acceptance = Acceptance::new(&boot, protection, &[]).unwrap();
    static TABLE: Memory = Memory([1; PAGES * PAGE]);
    let table = TABLE.0[..PAGE].as_array().unwrap();
    let cpuid = snp.then(|| CpuidTable::new(table).or_else(one_leaf).unwrap());
    let gpa = Gpa(range(GHCB, 1).start().0);
    // SAFETY: the page is leaked memory, which only this host and this guest use.
    let vcpu = unsafe { GhcbVcpu::new(host, host, &boot, protection, gpa, acceptance, cpuid).unwrap() };

    let secrets = std::ptr::with_exposed_provenance_mut::<[u8; PAGE]>(range(SECRETS, 1).start().0 as usize);
    // SAFETY: the page is leaked memory, of which this is the only reference: the one of the run before is gone.
    let secrets = unsafe { &mut *secrets };
    secrets.fill(7);
    secrets[0xa0..0xa4].fill(0);
    let mut reporter = Reporter::new(SecretsPage::new(secrets), region(MESSAGES, 2)).unwrap();
    for _ in 0..8 {
        match host.take::<1>()[0] % 6 {
            // SAFETY: the register changes no memory.
            0 => unsafe { vcpu.write(0, 1) },
            1 => _ = vcpu.read(0),
            2 => {
                let to = if host.given.get() { Side::Private } else { Side::Shared };
                // Only there are pages valid or not.
                host.given.set(snp);
                // SAFETY: nothing uses these pages.
                if unsafe { vcpu.convert(range(DATA, 2), to) } != 0 {
                    return;
                }
                host.given.set(snp && to == Side::Shared);
            }
            3 => _ = vcpu.cpuid(0, 0),
            4 => _ = vcpu.features(),
            _ => {
                // Nobody here has the key, so each call sends the first message again.
                host.numbers.borrow_mut().clear();
                for data in [[9; 64], [8; 64]] {
                    reporter.report(&vcpu, &data, None).unwrap_err();
                }
                assert!(host.numbers.borrow().iter().all(|number| *number == 1), "a number is used for another message");
            }
        }
    }
}

/// A table of CPUID leaves with one that is nothing.
fn one_leaf() -> Option<CpuidTable> {
    static PAGE_OF_ONE: OnceLock<&'static Memory> = OnceLock::new();
    let page = PAGE_OF_ONE.get_or_init(|| {
        let mut page = Box::new(Memory([0; PAGES * PAGE]));
        page.0[0] = 1;
        Box::leak(page)
    });
    CpuidTable::new(page.0[..PAGE].as_array()?)
}

fuzz_target!(|bytes: &[u8]| {
    region(UNTOUCHED, 1).write(0, &[0xa5; PAGE]).unwrap();
    let host = Host {
        bytes: RefCell::new(bytes),
        ghcb: region(GHCB, 1),
        messages: region(MESSAGES, 2),
        numbers: RefCell::default(),
        valid: Cell::new(0b11),
        given: Cell::new(false),
    };
    if let Err(why) = catch_unwind(AssertUnwindSafe(|| work(&host)))
        && !why.is::<Terminated>()
    {
        resume_unwind(why);
    }
    let mut page = [0; PAGE];
    region(UNTOUCHED, 1).read(0, &mut page).unwrap();
    assert!(page == [0xa5; PAGE]);
});
