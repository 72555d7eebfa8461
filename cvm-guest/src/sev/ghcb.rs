//! The GHCB page: what a guest shows its host of its registers (AMD publication 56421, section 2.6).

#![allow(unsafe_code, reason = "the page is memory of the guest's that is used as shared, at another address")]

use super::{Exit, Fault};
use crate::SharedRegion;
use core::cell::{Cell, UnsafeCell};
use core::marker::PhantomData;
use cvm_core::{Gpa, PAGE_SIZE};

/// Offsets in the page.
pub(super) mod offset {
    pub const CPL: usize = 0xcb;
    pub const RAX: usize = 0x1f8;
    pub const RCX: usize = 0x308;
    pub const RDX: usize = 0x310;
    pub const RBX: usize = 0x318;
    pub const EXIT_CODE: usize = 0x390;
    pub const EXIT_INFO_1: usize = 0x398;
    pub const EXIT_INFO_2: usize = 0x3a0;
    pub const SCRATCH: usize = 0x3a8;
    pub const XCR0: usize = 0x3e8;
    /// A bit for each eight bytes before it that have a value.
    pub const VALID: usize = 0x3f0;
    /// The shared buffer.
    pub const BUFFER: usize = 0x800;
    pub const VERSION: usize = 0xffa;
    pub const USAGE: usize = 0xffc;
}

/// How many bytes the shared buffer has.
pub(super) const BUFFER_LEN: usize = 0x7f0;

/// The bit of the valid bitmap that stands for the eight bytes that `offset` is among.
pub(super) const fn valid_bit(offset: usize) -> u128 {
    1 << (offset / 8)
}

/// Room for the GHCB of a vCPU: a page in a static of the guest's, used by its address alone.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct GhcbPage(UnsafeCell<[u8; PAGE_SIZE as usize]>);

// SAFETY: there is no reference to what is in it, and only the host and one vCPU access it, by copying.
unsafe impl Sync for GhcbPage {}

impl GhcbPage {
    /// Room for one.
    #[allow(clippy::new_without_default, reason = "it is for statics")]
    pub const fn new() -> Self {
        Self(UnsafeCell::new([0; PAGE_SIZE as usize]))
    }

    /// Where it is, for a guest whose memory is mapped to its own addresses.
    pub fn gpa(&self) -> Gpa {
        Gpa(self.0.get().expose_provenance() as u64)
    }
}

/// What a vCPU exits for: exit code, its two informations, and the registers that the host is shown.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Event {
    pub code: u64,
    pub info1: u64,
    pub info2: u64,
    pub rax: Option<u64>,
    pub rbx: Option<u64>,
    pub rcx: Option<u64>,
    pub rdx: Option<u64>,
    pub xcr0: Option<u64>,
    /// Whether the host is shown that the guest is in ring 0.
    pub cpl: bool,
    /// Whether the host is shown where the shared buffer is.
    pub buffer: bool,
}

/// What the host left in the GHCB, each part read once.
#[derive(Debug)]
pub(super) struct Reply<'a> {
    ghcb: &'a Ghcb,
    code: u64,
    valid: u128,
}

impl Reply<'_> {
    /// SW_EXITINFO2.
    pub fn info2(&self) -> Result<u64, Fault> {
        self.ghcb.read(offset::EXIT_INFO_2)
    }

    /// The register at `offset`, if the host marked it as valid.
    pub fn register(&self, offset: usize) -> Result<u64, Fault> {
        if self.valid & valid_bit(offset) == 0 {
            return Err(Fault::NoValue(self.code));
        }
        self.ghcb.read(offset)
    }
}

/// The GHCB of one vCPU.
#[derive(Debug)]
pub(crate) struct Ghcb {
    page: SharedRegion,
    version: u16,
    /// Two vCPUs, or two exits at once, would write over each other.
    _one: PhantomData<Cell<()>>,
}

impl Ghcb {
    /// A GHCB in `page`, which has to be shared, for the protocol in this version.
    ///
    /// # Errors
    /// [`Fault::NoPage`] if `page` is not one page.
    pub fn new(page: SharedRegion, version: u16) -> Result<Self, Fault> {
        if page.len() != PAGE_SIZE as usize {
            return Err(Fault::NoPage(page.gpa(0).0));
        }
        Ok(Self { page, version, _one: PhantomData })
    }

    /// Where the host finds it.
    pub fn gpa(&self) -> Gpa {
        self.page.gpa(0)
    }

    /// Every offset is a constant within the page, or checked by the caller; so this does not fail in fact.
    pub(super) fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), Fault> {
        self.page.write(offset, bytes).map_err(|_| Fault::NoPage(self.gpa().0))
    }

    pub(super) fn read(&self, offset: usize) -> Result<u64, Fault> {
        let mut bytes = [0; 8];
        self.page.read(offset, &mut bytes).map_err(|_| Fault::NoPage(self.gpa().0))?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Exits for `event`.
    pub(super) fn exit(&self, exit: &impl Exit, event: Event) -> Result<Reply<'_>, Fault> {
        let Event { code, info1, info2, rax, rbx, rcx, rdx, xcr0, cpl, buffer } = event;
        let scratch = buffer.then(|| self.gpa().0 + offset::BUFFER as u64);
        let values = [
            (offset::EXIT_CODE, Some(code)),
            (offset::EXIT_INFO_1, Some(info1)),
            (offset::EXIT_INFO_2, Some(info2)),
            (offset::RAX, rax),
            (offset::RBX, rbx),
            (offset::RCX, rcx),
            (offset::RDX, rdx),
            (offset::XCR0, xcr0),
            (offset::SCRATCH, scratch),
        ];
        let mut valid = 0;
        for (offset, value) in values {
            if let Some(value) = value {
                self.write(offset, &value.to_le_bytes())?;
                valid |= valid_bit(offset);
            }
        }
        if cpl {
            self.write(offset::CPL, &[0])?;
            valid |= valid_bit(offset::CPL);
        }
        self.write(offset::VALID, &valid.to_le_bytes())?;
        self.write(offset::VERSION, &self.version.to_le_bytes())?;
        self.write(offset::USAGE, &0u32.to_le_bytes())?;
        exit.exit(self.gpa().0);

        let info1 = self.read(offset::EXIT_INFO_1)?;
        if info1 as u32 != 0 {
            return Err(Fault::Refused { code, info1, info2: self.read(offset::EXIT_INFO_2)? });
        }
        let (low, high) = (self.read(offset::VALID)?, self.read(offset::VALID + 8)?);
        Ok(Reply { ghcb: self, code, valid: u128::from(high) << 64 | u128::from(low) })
    }
}
