//! IGVM files: what a launch consists of, as commands to a loader in their order.
//!
//! [`Igvm::parse`] reads a file as one platform is to see it, [`IgvmImage`] is what of it a launch can start, and
//! [`Launch::load_igvm`](crate::Launch::load_igvm) loads that.
//!
//! Layouts and numbers are those of the IGVM file format (crate `igvm_defs`), versions 1 and 2, for x86-64 and pages of 4 KiB.
//! All numbers are little endian, on hosts of either order. What is read borrows from the file, and takes up no more than some
//! times the bytes of its headers. The checksum of the headers is not looked at: it is for accidents, and the measurement is for
//! more than those.

mod image;
mod native;
mod reader;

pub use image::{IgvmImage, difference, possible};
pub use native::native_page;

use crate::{Gpa, GpaRange, PAGE_SIZE, PageKind};
use reader::kind;

/// A page of a file.
pub type Contents<'a> = &'a [u8; PAGE_SIZE as usize];

/// What can be wrong with an IGVM file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IgvmError {
    /// It is damaged, or asks for what no launch here can do.
    #[error("the igvm file at offset {offset:#x}: {problem}")]
    Header {
        /// Where in the file.
        offset: usize,
        /// What is wrong there.
        problem: String,
    },
    /// A vCPU cannot start on this platform from the state that the file has for it.
    #[error(
        "the igvm file's state of vcpu {vcpu} has a value of {field}, at {at:#x}, that no vcpu can start with here"
    )]
    State {
        /// The vCPU.
        vcpu: u32,
        /// Which register cannot have its value.
        field: &'static str,
        /// Where it is, or its first byte that cannot be so, in the page with the state.
        at: usize,
    },
}

fn refuse(offset: usize, problem: impl Into<String>) -> IgvmError {
    IgvmError::Header { offset, problem: problem.into() }
}

/// The platforms that files are read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum IgvmPlatform {
    /// None that protects the guest: plain KVM.
    Native = 0,
    /// AMD SEV-SNP.
    SevSnp = 2,
}

impl IgvmPlatform {
    /// Its name, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::SevSnp => "sev-snp",
        }
    }
}

/// What a loader is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Directive<'a> {
    /// Load a page.
    Page {
        /// Where.
        gpa: Gpa,
        /// As what; never [`PageKind::Zero`].
        kind: PageKind,
        /// With what contents; nothing for zeros, and what the platform fills.
        contents: Option<Contents<'a>>,
    },
    /// Give the guest memory that is shared with the host from the start; it is not measured.
    Shared {
        /// Where.
        range: GpaRange,
    },
    /// Load what the loader knows, as pages that are not measured.
    Parameters {
        /// Where.
        range: GpaRange,
        /// What the pages have before; zeros follow.
        initial: &'a [u8],
        /// What is to be written there, by its offset.
        parameters: Vec<(Parameter, u32)>,
    },
    /// Give a vCPU a state to start from.
    Vcpu(Context<'a>),
    /// Refuse a guest that does not have this memory.
    Required {
        /// The memory.
        range: GpaRange,
    },
    /// What the owner has signed for AMD SEV-SNP: an `IGVM_VHS_SNP_ID_BLOCK`.
    IdBlock(&'a [u8]),
}

/// What a guest asks its loader for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Parameter {
    /// How many vCPUs there are.
    VcpuCount = kind::VP_COUNT,
    /// The ACPI table of that name.
    Srat = kind::SRAT,
    /// The ACPI table of that name.
    Madt = kind::MADT,
    /// Two ranges for devices.
    MmioRanges = kind::MMIO_RANGES,
    /// Where memory is.
    MemoryMap = kind::MEMORY_MAP,
    /// A command line, with a zero behind it.
    CommandLine = kind::COMMAND_LINE,
    /// The ACPI table of that name.
    Slit = kind::SLIT,
    /// The ACPI table of that name.
    Pptt = kind::PPTT,
    /// A device tree.
    DeviceTree = kind::DEVICE_TREE,
    /// Flags, of which one says that memory is shared at the start.
    Environment = kind::ENVIRONMENT,
}

impl Parameter {
    const ALL: [Self; 10] = [
        Self::VcpuCount,
        Self::Srat,
        Self::Madt,
        Self::MmioRanges,
        Self::MemoryMap,
        Self::CommandLine,
        Self::Slit,
        Self::Pptt,
        Self::DeviceTree,
        Self::Environment,
    ];
}

/// A vCPU's first state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context<'a> {
    /// The vCPU.
    pub vcpu: u16,
    /// Where the page is to the measurement, where it is measured.
    pub gpa: Gpa,
    /// The state as the platform has it: for [`IgvmPlatform::Native`] an `IgvmNativeVpContextX64`, for SEV-SNP a VM save area.
    pub contents: Contents<'a>,
}

/// An IGVM file as one platform sees it.
#[derive(Debug, Clone)]
pub struct Igvm<'a> {
    platform: IgvmPlatform,
    policy: Option<u64>,
    directives: Vec<(usize, Directive<'a>)>,
}

impl<'a> Igvm<'a> {
    /// The platform that it was read for.
    pub fn platform(&self) -> IgvmPlatform {
        self.platform
    }

    /// The guest policy that it asks the platform for, as the platform has it, if it has one.
    pub fn policy(&self) -> Option<u64> {
        self.policy
    }

    /// What a loader is to do, in this order, each with the offset of its header in the file.
    pub fn directives(&self) -> impl Iterator<Item = (usize, &Directive<'a>)> {
        self.directives.iter().map(|(offset, directive)| (*offset, directive))
    }

    /// The first states of vCPUs, in the order of their headers.
    pub fn contexts(&self) -> impl Iterator<Item = (usize, &Context<'a>)> {
        self.directives().filter_map(|(offset, directive)| match directive {
            Directive::Vcpu(context) => Some((offset, context)),
            _ => None,
        })
    }
}

#[cfg(test)]
mod golden;
// The crate `igvm`, which writes the files of these tests, has the byte order of the machine in them.
#[cfg(all(test, target_endian = "little"))]
mod tests;
