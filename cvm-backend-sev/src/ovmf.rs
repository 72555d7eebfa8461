//! What an OVMF image says of how it is to be launched.
//!
//! A table at its end, which is read backwards, has entries that GUIDs name (edk2,
//! `OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm`). One of them leads to the sections of memory that have to be prepared
//! besides the image (edk2, `OvmfPkg/ResetVector/X64/OvmfSevMetadata.asm`).

use crate::digest::pages;
use crate::guid::{Guid, guid};
use crate::kernel::TABLE_BYTES;
use crate::{Error, PageType};
use cvm_core::{Gpa, GpaRange, PAGE_SIZE};
use std::fmt;
use zerocopy::{TryFromBytes, try_transmute};

/// The end of an image's place in memory.
const END: u64 = 1 << 32;

/// The largest image: what QEMU and OVMF have below 4 GiB for it (QEMU, `hw/i386/pc_sysfw.c`), with a wide margin.
pub const MAX_BYTES: usize = 64 << 20;

/// Bytes between the table's end and the image's: the reset vector.
const AFTER_TABLE: usize = 32;

/// What each entry ends with: its whole length in 2 bytes, and its GUID.
const ENTRY_END: usize = 18;

const FOOTER: Guid = guid(0x96b5_82de, 0x1fb2, 0x45f7, 0xbaea_a366_c55a_082d);
const RESET_BLOCK: Guid = guid(0x00f7_71de, 0x1a7e, 0x4fcb, 0x890e_68c7_7e2f_b44e);
const HASH_TABLE: Guid = guid(0x7255_371f, 0x3a3b, 0x4b04, 0x927b_1da6_efa8_d454);
const METADATA: Guid = guid(0xdc88_6566, 0x984a, 0x4798, 0xa75e_5585_a7bf_67cc);

/// Header of the metadata: `ASEV`, length with the header, version, number of sections; 4 bytes each.
const METADATA_HEADER: usize = 16;
/// A section: address, length, kind; 4 bytes each.
const SECTION: usize = 12;

/// What a section of memory is for. The numbers are those of the metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, TryFromBytes)]
#[repr(u32)]
pub enum SectionKind {
    /// Memory that the firmware needs before it can accept any itself.
    Memory = 1,
    /// The page of [`PageType::Secrets`].
    Secrets = 2,
    /// The page of [`PageType::Cpuid`].
    Cpuid = 3,
    /// Where an SVSM and the firmware call each other.
    SvsmCallingArea = 4,
    /// The page for the hashes of a kernel.
    KernelHashes = 0x10,
}

/// A section of memory to be prepared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// What for.
    pub kind: SectionKind,
    /// Where it is.
    pub range: GpaRange,
}

/// A firmware image. What its table says is judged where it is needed, so that damage in what only SEV-SNP reads refuses no
/// other launch.
#[derive(Clone)]
pub struct Firmware<'a> {
    image: &'a [u8],
    range: GpaRange,
    table: Result<Vec<Entry<'a>>, Error>,
}

impl<'a> Firmware<'a> {
    /// Finds the table of an image. An image without a table says nothing, which is enough for plain SEV.
    ///
    /// # Errors
    /// [`Error::Pages`] when it is not made of whole pages or longer than [`MAX_BYTES`].
    pub fn parse(image: &'a [u8]) -> Result<Self, Error> {
        let len = image.len() as u64;
        let start = Gpa(END.saturating_sub(len));
        if image.len() > MAX_BYTES {
            return Err(Error::Pages { gpa: start, len, problem: "no firmware is as long" });
        }
        Ok(Self { image, range: pages(start, len)?, table: table(image) })
    }

    /// All of the image.
    pub fn image(&self) -> &'a [u8] {
        self.image
    }

    /// Where it is in memory: it ends at 4 GiB.
    pub fn range(&self) -> GpaRange {
        self.range
    }

    /// The one entry of the table with this name.
    fn entry(&self, guid: Guid) -> Result<Option<&Entry<'a>>, Error> {
        let mut found = self.table.as_ref().map_err(Clone::clone)?.iter().filter(|entry| entry.guid == guid);
        match (found.next(), found.next()) {
            (entry, None) => Ok(entry),
            (_, Some(twice)) => Err(damaged(twice.offset, "an entry of the table is there twice")),
        }
    }

    /// The sections of memory to be prepared, in the order in which they are measured. No two have a page in common, nor
    /// one with the image. Sections of memory without a page are left out, as the VMMs load nothing for them.
    ///
    /// # Errors
    /// [`Error::Firmware`] when table or metadata are damaged: lengths and offsets that lead outside, an entry that is there
    /// twice, sections that overlap; another version of the metadata than 1, a section of an unknown kind, and one that has to
    /// have one page and does not.
    pub fn sections(&self) -> Result<Vec<Section>, Error> {
        let metadata = self.entry(METADATA)?;
        metadata.map_or(Ok(Vec::new()), |entry| sections(self.image, entry.number(0)?, self.range))
    }

    /// Where vCPUs other than the first start.
    ///
    /// # Errors
    /// [`Error::FirmwareLacks`] if it does not say; [`Error::Firmware`] for a damaged table.
    pub fn reset_vector(&self) -> Result<u32, Error> {
        let vector = self.entry(RESET_BLOCK)?.map(|entry| entry.number(0)).transpose()?;
        let vector = vector.filter(|vector| *vector != 0);
        vector.ok_or(Error::FirmwareLacks { lacks: "does not say where vcpus other than the first start" })
    }

    /// Where it expects the hashes of a kernel.
    ///
    /// # Errors
    /// [`Error::FirmwareLacks`] if nowhere; [`Error::Firmware`] for a damaged table, and one that has no room for them.
    pub fn hash_table(&self) -> Result<Gpa, Error> {
        let table = self.entry(HASH_TABLE)?.map(Entry::hash_table).transpose()?;
        let table = table.filter(|gpa| gpa.0 != 0);
        table.ok_or(Error::FirmwareLacks { lacks: "has no place for the hashes of a kernel: it would not check them" })
    }
}

impl fmt::Debug for Firmware<'_> {
    /// All but the image.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Firmware");
        debug.field("range", &self.range).field("reset_vector", &self.reset_vector());
        debug.field("hash_table", &self.hash_table()).field("sections", &self.sections()).finish_non_exhaustive()
    }
}

impl SectionKind {
    /// What its pages are to the measurement, where no VMM or kernel decides otherwise.
    pub fn page_type(self) -> PageType {
        match self {
            Self::Memory | Self::SvsmCallingArea | Self::KernelHashes => PageType::Zero,
            Self::Secrets => PageType::Secrets,
            Self::Cpuid => PageType::Cpuid,
        }
    }
}

fn damaged(offset: usize, problem: impl Into<String>) -> Error {
    Error::Firmware { offset, problem: problem.into() }
}

/// An entry of the table.
#[derive(Clone)]
struct Entry<'a> {
    guid: Guid,
    /// Where its data are.
    offset: usize,
    data: &'a [u8],
}

impl Entry<'_> {
    /// The 4 bytes at `at` of its data.
    fn number(&self, at: usize) -> Result<u32, Error> {
        let bytes = self.data.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map(|bytes| u32::from_le_bytes(*bytes)).ok_or_else(|| damaged(self.offset, "the entry is too short"))
    }

    /// Its data as the place of the hash table, which is address and length.
    fn hash_table(&self) -> Result<Gpa, Error> {
        let (gpa, len) = (self.number(0)?, self.number(4)?);
        if gpa != 0 && (len as usize) < TABLE_BYTES {
            return Err(damaged(
                self.offset,
                format!("{len:#x} bytes for the hashes of a kernel; it takes {TABLE_BYTES:#x}"),
            ));
        }
        Ok(Gpa(gpa.into()))
    }
}

/// Splits what ends with an entry into what is before it, and the entry.
fn last_entry(image: &[u8], end: usize) -> Option<(usize, Guid)> {
    let bytes = image.get(end.checked_sub(ENTRY_END)?..end)?;
    let (len, guid) = bytes.split_first_chunk()?;
    Some((u16::from_le_bytes(*len).into(), guid.try_into().ok()?))
}

/// The entries of the table at the image's end, the last one first; none if there is no table.
fn table(image: &[u8]) -> Result<Vec<Entry<'_>>, Error> {
    let mut end = image.len().saturating_sub(AFTER_TABLE);
    let Some((len, FOOTER)) = last_entry(image, end) else { return Ok(Vec::new()) };
    // The footer's length is that of the whole table.
    let start = end.checked_sub(len).filter(|_| len >= ENTRY_END);
    let start = start.ok_or_else(|| damaged(end - ENTRY_END, format!("a table of {len:#x} bytes")))?;
    end -= ENTRY_END;
    let mut entries = Vec::new();
    while end > start {
        let entry = last_entry(image, end).filter(|(len, _)| (ENTRY_END..=end - start).contains(len));
        let (len, guid) = entry.ok_or_else(|| damaged(end, "what ends here is no entry of the table"))?;
        let offset = end - len;
        entries.push(Entry { guid, offset, data: &image[offset..end - ENTRY_END] });
        end = offset;
    }
    Ok(entries)
}

/// The sections that the metadata list, which start so many bytes before the image's end.
fn sections(image: &[u8], from_end: u32, firmware: GpaRange) -> Result<Vec<Section>, Error> {
    let start = image.len().checked_sub(from_end as usize);
    let start = start.ok_or_else(|| damaged(0, format!("metadata {from_end:#x} bytes before the end")))?;
    let number = |at: usize| {
        let bytes = image.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map(|bytes| u32::from_le_bytes(*bytes)).ok_or_else(|| damaged(at, "the metadata end outside the file"))
    };
    if image.get(start..).and_then(|rest| rest.first_chunk()) != Some(b"ASEV") {
        return Err(damaged(start, "the metadata do not start with ASEV"));
    }
    let (len, version, count) = (number(start + 4)? as usize, number(start + 8)?, number(start + 12)? as usize);
    if version != 1 {
        return Err(damaged(start + 8, format!("version {version} of the metadata; 1 is known")));
    }
    let room = len.checked_sub(METADATA_HEADER).map_or(0, |len| len / SECTION);
    if count > room || len > image.len() - start {
        return Err(damaged(start + 12, format!("{count} sections in metadata of {len:#x} bytes")));
    }
    let mut sections = Vec::with_capacity(count);
    for at in (start + METADATA_HEADER..).step_by(SECTION).take(count) {
        let (gpa, len, kind) = (number(at)?, number(at + 4)?, number(at + 8)?);
        let kind = try_transmute!(kind).map_err(|_| damaged(at + 8, format!("a section of kind {kind:#x}")))?;
        let one = !matches!(kind, SectionKind::Memory | SectionKind::SvsmCallingArea);
        if one && u64::from(len) != PAGE_SIZE {
            return Err(damaged(at + 4, format!("the section {kind:?} is one page, not {len:#x} bytes at {gpa:#x}")));
        }
        // Images that are made for another technology have them.
        if len == 0 {
            continue;
        }
        let range = pages(Gpa(gpa.into()), len.into()).map_err(|error| damaged(at, error.to_string()))?;
        sections.push(Section { kind, range });
    }
    // The firmware takes each page once.
    let mut ranges: Vec<_> = sections.iter().map(|section| section.range).chain([firmware]).collect();
    ranges.sort();
    if let Some(pair) = ranges.windows(2).find(|pair| pair[0].end() > pair[1].start()) {
        return Err(damaged(start, format!("{} and {} overlap", pair[0], pair[1])));
    }
    Ok(sections)
}

#[cfg(test)]
pub(crate) mod tests;
