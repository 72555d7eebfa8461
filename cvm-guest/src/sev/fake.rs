//! A host of SEV-ES and SEV-SNP guests, honest or not, and a processor whose pages can be valid.

use super::event::code;
use super::ghcb::{offset, valid_bit};
use super::{Acceptance, BlockRecord, CpuidTable, Exit, GhcbVcpu, PageSize, Protection, Validate, Validated};
use crate::{Error, SharedRegion};
use cvm_core::boot::{self, BootPage, Exits, MemoryRange};
use cvm_core::doorbell::{Doorbell, Transport};
use cvm_core::{Gpa, PAGE_SIZE};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;
use zerocopy::FromZeros;

const LARGE_PAGE: u64 = 2 << 20;

/// Which pages are valid, and which are vCPUs' states, by their numbers.
#[derive(Debug, Default)]
pub struct Pages {
    valid: RefCell<BTreeSet<u64>>,
    split: RefCell<BTreeSet<u64>>,
    failing: RefCell<BTreeMap<u64, Validated>>,
    states: RefCell<BTreeSet<u64>>,
}

impl Pages {
    /// The host has small pages in the block at `gpa`.
    pub fn split(&self, gpa: u64) {
        self.split.borrow_mut().insert(gpa);
    }

    /// The instruction gives this for the page at `gpa`.
    pub fn fail(&self, gpa: u64, found: Validated) {
        self.failing.borrow_mut().insert(gpa, found);
    }

    /// The page with this number is valid.
    pub fn set(&self, page: u64) {
        self.valid.borrow_mut().insert(page);
    }

    /// The numbers of all that are valid.
    pub fn valid(&self) -> Vec<u64> {
        self.valid.borrow().iter().copied().collect()
    }

    /// The numbers of all that are states.
    pub fn states(&self) -> Vec<u64> {
        self.states.borrow().iter().copied().collect()
    }
}

impl Validate for Pages {
    fn validate(&self, gpa: u64, size: PageSize, valid: bool) -> Validated {
        if let Some(found) = self.failing.borrow().get(&gpa) {
            return *found;
        }
        let count = match size {
            PageSize::Large if self.split.borrow().contains(&gpa) => return Validated::SizeMismatch,
            PageSize::Large => {
                assert_eq!(gpa % LARGE_PAGE, 0);
                LARGE_PAGE / PAGE_SIZE
            }
            PageSize::Small => 1,
        };
        let pages = gpa / PAGE_SIZE..gpa / PAGE_SIZE + count;
        let mut all = self.valid.borrow_mut();
        if pages.clone().any(|page| all.contains(&page) == valid) {
            return Validated::Unchanged;
        }
        pages.for_each(|page| _ = if valid { all.insert(page) } else { all.remove(&page) });
        Validated::Changed
    }

    fn make_state(&self, gpa: u64) -> Validated {
        /// FAIL_INPUT.
        const NOT_VALID: u32 = 1;
        if let Some(found) = self.failing.borrow().get(&gpa) {
            return *found;
        }
        if !self.valid.borrow().contains(&(gpa / PAGE_SIZE)) {
            return Validated::Failed(NOT_VALID);
        }
        self.states.borrow_mut().insert(gpa / PAGE_SIZE);
        Validated::Changed
    }
}

/// Memory of the test's own that stands for shared pages.
pub fn shared(pages: u64) -> NonNull<u8> {
    #[derive(Clone)]
    #[repr(align(4096))]
    struct Page {
        _bytes: [u8; 4096],
    }
    NonNull::new(vec![Page { _bytes: [0; 4096] }; pages as usize].leak().as_mut_ptr().cast()).unwrap()
}

/// What a host does with the GHCB at an exit, in place of what the protocol says.
pub type Answer = Box<dyn Fn(&Host, Seen) -> bool>;

/// What the guest exited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub code: u64,
    pub info1: u64,
    pub info2: u64,
    pub valid: u128,
    pub scratch: u64,
}

/// A host with the guest's one GHCB.
pub struct Host {
    /// The GHCB, and shared pages behind it.
    pub memory: SharedRegion,
    pub protection: Protection,
    pub exits: RefCell<Vec<Seen>>,
    pub msrs: RefCell<Vec<u64>>,
    /// Pages that the guest shared, by their numbers.
    pub shared: RefCell<BTreeSet<u64>>,
    /// How many entries of a page state change are done at one exit.
    pub pace: Cell<u16>,
    /// The value that registers and MSRs read as.
    pub value: Cell<u64>,
    registered: Cell<u64>,
    answer: RefCell<Option<Answer>>,
}

/// The message with which a terminated guest's test panics.
pub const TERMINATED: &str = "the guest terminates";

impl Host {
    /// An honest one, whose guest has this memory for its GHCB and others.
    pub fn new(protection: Protection, pages: u64) -> Self {
        let base = shared(pages);
        let range = cvm_core::GpaRange::from_pages(base.as_ptr().expose_provenance() as u64, pages).unwrap();
        #[allow(unsafe_code, reason = "it is leaked memory of the test's own")]
        // SAFETY: the memory is leaked, so it lives long enough, and there is no reference into it.
        let memory = unsafe { SharedRegion::mapped_at(base, range) };
        Self {
            memory,
            protection,
            exits: RefCell::default(),
            msrs: RefCell::default(),
            shared: RefCell::default(),
            pace: Cell::new(u16::MAX),
            value: Cell::new(0),
            registered: Cell::new(0),
            answer: RefCell::default(),
        }
    }

    /// From now on it answers so; what the closure says it did not answer, it answers honestly.
    pub fn answer_by(&self, answer: impl Fn(&Host, Seen) -> bool + 'static) {
        *self.answer.borrow_mut() = Some(Box::new(answer));
    }

    pub fn read(&self, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read(offset, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    pub fn write(&self, offset: usize, value: u64) {
        self.memory.write(offset, &value.to_le_bytes()).unwrap();
    }

    /// Answers with registers.
    pub fn registers(&self, values: &[(usize, u64)]) {
        let mut valid = 0;
        for (offset, value) in values {
            self.write(*offset, *value);
            valid |= valid_bit(*offset);
        }
        self.memory.write(offset::VALID, &valid.to_le_bytes()).unwrap();
    }

    fn take(&self) -> Seen {
        let mut valid = [0; 16];
        self.memory.read(offset::VALID, &mut valid).unwrap();
        let seen = Seen {
            code: self.read(offset::EXIT_CODE),
            info1: self.read(offset::EXIT_INFO_1),
            info2: self.read(offset::EXIT_INFO_2),
            valid: u128::from_le_bytes(valid),
            scratch: self.read(offset::SCRATCH),
        };
        let shown = [offset::EXIT_CODE, offset::EXIT_INFO_1, offset::EXIT_INFO_2];
        assert!(shown.iter().all(|offset| seen.valid & valid_bit(*offset) != 0));
        let mut usage = [0xff; 4];
        self.memory.read(offset::USAGE, &mut usage).unwrap();
        assert_eq!(usage, [0; 4]);
        self.memory.write(offset::VALID, &[0; 16]).unwrap();
        self.write(offset::EXIT_INFO_1, 0);
        self.write(offset::EXIT_INFO_2, 0);
        seen
    }

    fn honest(&self, seen: Seen) {
        let given = |offset| seen.valid & valid_bit(offset) != 0;
        let value = self.value.get();
        match seen.code {
            code::IOIO if seen.info1 & 1 == 0 => assert!(given(offset::RAX)),
            code::IOIO | code::VMMCALL => self.registers(&[(offset::RAX, value)]),
            code::MSR if seen.info1 == 1 => assert!(given(offset::RAX) && given(offset::RCX) && given(offset::RDX)),
            code::MSR => self.registers(&[(offset::RAX, value & 0xffff_ffff), (offset::RDX, value >> 32)]),
            code::CPUID => {
                let registers = [offset::RAX, offset::RBX, offset::RCX, offset::RDX];
                self.registers(&registers.map(|offset| (offset, value)));
            }
            code::PAGE_STATE => self.change_state(seen),
            code::FEATURES => self.write(offset::EXIT_INFO_2, 3),
            code::CREATE_VCPU => assert!(given(offset::RAX)),
            code => panic!("an exit of the unknown kind {code:#x}"),
        }
    }

    fn change_state(&self, seen: Seen) {
        assert!(seen.valid & valid_bit(offset::SCRATCH) != 0);
        assert_eq!(seen.scratch, self.memory.gpa(offset::BUFFER).0);
        let header = self.read(offset::BUFFER);
        let (mut current, last) = (header as u16, (header >> 16) as u16);
        assert!(last < 253 && current <= last);
        for _ in 0..self.pace.get() {
            let entry = self.read(offset::BUFFER + 8 + 8 * usize::from(current));
            let count = if entry >> 56 & 1 == 1 { LARGE_PAGE / PAGE_SIZE } else { 1 };
            let first = (entry & ((1 << 52) - 1)) / PAGE_SIZE;
            let mut shared = self.shared.borrow_mut();
            for page in first..first + count {
                match entry >> 52 & 0xf {
                    1 => assert!(shared.remove(&page)),
                    2 => assert!(shared.insert(page)),
                    operation => panic!("{operation}"),
                }
            }
            current += 1;
            if current > last {
                break;
            }
        }
        self.write(offset::BUFFER, u64::from(last) << 16 | u64::from(current));
    }
}

impl Exit for Host {
    fn exit(&self, value: u64) -> u64 {
        if value & (PAGE_SIZE - 1) == 0 {
            assert_eq!(value, self.memory.gpa(0).0);
            assert!(self.protection != Protection::SevSnp || self.registered.get() == value);
            let seen = self.take();
            self.exits.borrow_mut().push(seen);
            let answer = self.answer.borrow();
            if !answer.as_ref().is_some_and(|answer| answer(self, seen)) {
                self.honest(seen);
            }
            return value;
        }
        self.msrs.borrow_mut().push(value);
        match value & 0xfff {
            0x002 => 2 << 48 | 1 << 32 | 51 << 24 | 1,
            0x012 => {
                self.registered.set(value & !0xfff);
                value + 1
            }
            0x014 => {
                self.shared.borrow_mut().insert(value >> 12 & 0xff_ffff_ffff);
                0x15
            }
            0x100 => panic!("{TERMINATED}: {value:#x}"),
            kind => panic!("a request of the unknown kind {kind:#x}"),
        }
    }
}

/// The boot page of a guest with this memory, whose shared side is where its private one is.
pub fn boot(protection: Protection, doorbell: Doorbell, memory: MemoryRange) -> BootPage {
    let (exits, transport) = match protection {
        Protection::SevSnp => (Exits::Ghcb, Transport::PageState),
        _ => (Exits::Ghcb, Transport::Hypercall),
    };
    let mut boot = BootPage {
        magic: boot::MAGIC,
        doorbell: doorbell as u32,
        exits: exits as u32,
        transport: transport as u32,
        ..BootPage::new_zeroed()
    };
    boot.memory[0] = memory;
    boot
}

/// A vCPU whose GHCB is the first page of the host's memory; it has been loaded, and so has all memory below `accepted`.
pub fn vcpu<'a>(host: &'a Host, pages: &'a Pages, boot: &BootPage) -> Result<GhcbVcpu<&'a Host, &'a Pages>, Error> {
    vcpu_with(host, pages, boot, host.protection == Protection::SevSnp)
}

/// The same with a table of CPUID leaves, or without.
pub fn vcpu_with<'a>(
    host: &'a Host,
    pages: &'a Pages,
    boot: &BootPage,
    has_table: bool,
) -> Result<GhcbVcpu<&'a Host, &'a Pages>, Error> {
    let gpa = host.memory.gpa(0);
    pages.set(gpa.0 / PAGE_SIZE);
    let blocks: &'static [BlockRecord] = (0..64).map(|_| BlockRecord::new()).collect::<Vec<_>>().leak();
    let acceptance = Acceptance::new(boot, host.protection, blocks)?;
    #[repr(align(4096))]
    struct Table([u8; PAGE_SIZE as usize]);
    let table = Box::leak(Box::new(Table([1; PAGE_SIZE as usize])));
    table.0[..4].copy_from_slice(&1u32.to_le_bytes());
    let cpuid = has_table.then(|| CpuidTable::new(&table.0).unwrap());
    #[allow(unsafe_code, reason = "the pages are the test's own")]
    // SAFETY: the page is one that the test keeps for this.
    unsafe {
        GhcbVcpu::new(host, pages, boot, host.protection, Gpa(gpa.0), acceptance, cpuid)
    }
}
