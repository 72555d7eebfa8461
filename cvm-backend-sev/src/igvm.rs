//! Launches that an IGVM file describes: the headers in it are commands to a loader, in their order.
//!
//! Layouts and numbers are those of the IGVM file format, version 1 (crate `igvm_defs`). All numbers are little endian. The
//! checksum of the headers is not looked at: it is for accidents, and the measurement is for more than those.

use crate::digest::{LaunchDigest, pages};
use crate::{Error, PageType, SnpPolicy};
use cvm_core::{Gpa, Measurement, PAGE_SIZE};
use sha2::{Digest, Sha384};
use std::collections::BTreeMap;
use std::fmt;

const FIXED_HEADER: usize = 24;
const HEADER_START: usize = 8;
/// Headers whose kind has this bit can be ignored by who does not know them.
const OPTIONAL: u32 = 1 << 31;
/// `SEV_SNP` among the platforms.
const SEV_SNP: u8 = 2;

/// Kinds of headers that matter to the measurement, and all that are known.
mod kind {
    pub const PLATFORM: u32 = 0x001;
    pub const GUEST_POLICY: u32 = 0x101;
    pub const PARAMETER_AREA: u32 = 0x301;
    pub const PAGE_DATA: u32 = 0x302;
    pub const PARAMETER_INSERT: u32 = 0x303;
    pub const VP_CONTEXT: u32 = 0x304;
    pub const INITIALIZATION: std::ops::RangeInclusive<u32> = 0x101..=0x107;
    pub const DIRECTIVES: std::ops::RangeInclusive<u32> = 0x301..=0x313;
}

/// Flags of a page.
const LARGE: u32 = 1;
const UNMEASURED: u32 = 1 << 1;
const SHARED: u32 = 1 << 2;

/// The most that all areas for parameters have: 64 MiB, where files in use have some pages.
const MAX_PARAMETERS: u64 = 64 << 20;

/// An IGVM file whose headers lie within it.
#[derive(Clone)]
pub struct Igvm<'a> {
    file: &'a [u8],
    /// In their order.
    headers: Vec<Header<'a>>,
    /// The bits that headers for SEV-SNP have.
    mask: u32,
    policy: SnpPolicy,
}

#[derive(Clone)]
struct Header<'a> {
    kind: u32,
    offset: usize,
    data: &'a [u8],
}

fn refuse(offset: usize, problem: impl Into<String>) -> Error {
    Error::Igvm { offset, problem: problem.into() }
}

impl Header<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N], Error> {
        let bytes = self.data.get(at..).and_then(|rest| rest.first_chunk());
        bytes.copied().ok_or_else(|| refuse(self.offset, "the header is too short for its kind"))
    }

    fn u32(&self, at: usize) -> Result<u32, Error> {
        self.bytes(at).map(u32::from_le_bytes)
    }

    fn u64(&self, at: usize) -> Result<u64, Error> {
        self.bytes(at).map(u64::from_le_bytes)
    }
}

impl<'a> Igvm<'a> {
    /// Reads the headers of a file.
    ///
    /// # Errors
    /// [`Error::Igvm`] if it is no IGVM file of version 1, headers lie outside it or are of unknown kinds that may not be
    /// ignored, or it is not for SEV-SNP; [`Error::Policy`].
    pub fn parse(file: &'a [u8]) -> Result<Self, Error> {
        let fixed = file.get(..FIXED_HEADER).ok_or_else(|| refuse(0, "it is too short"))?;
        let fixed = Header { kind: 0, offset: 0, data: fixed };
        if fixed.bytes(0)? != *b"IGVM" || fixed.u32(4)? != 1 {
            return Err(refuse(0, "it is no igvm file of version 1"));
        }
        let (start, len, total) = (fixed.u32(8)? as usize, fixed.u32(12)? as usize, fixed.u32(16)? as usize);
        let end = start.checked_add(len).filter(|end| *end <= file.len() && start >= FIXED_HEADER);
        let end = end.ok_or_else(|| refuse(8, format!("{len:#x} bytes of headers at {start:#x}")))?;
        if total != file.len() {
            return Err(refuse(16, format!("it is to have {total:#x} bytes and has {:#x}", file.len())));
        }
        let headers = headers(&file[..end], start)?;
        let mut mask = None;
        for header in headers.iter().filter(|header| header.kind == kind::PLATFORM) {
            if header.bytes::<1>(5)? == [SEV_SNP] && mask.replace(header.u32(0)?).is_some() {
                return Err(refuse(header.offset, "it has the platform sev-snp twice"));
            }
        }
        let mask = mask.filter(|mask| mask.is_power_of_two());
        let mask = mask.ok_or_else(|| refuse(start, "it is not for the platform sev-snp"))?;
        let mut policy = None;
        for header in headers.iter().filter(|header| header.kind == kind::GUEST_POLICY) {
            if header.u32(8)? & mask != 0 && policy.replace(header.u64(0)?).is_some() {
                return Err(refuse(header.offset, "it has two policies for sev-snp"));
            }
        }
        let policy = policy.ok_or_else(|| refuse(start, "it has no policy for sev-snp"))?;
        Ok(Self { file, headers, mask, policy: SnpPolicy::from_bits(policy)? })
    }

    /// The guest policy that it asks for.
    pub fn policy(&self) -> SnpPolicy {
        self.policy
    }

    /// The expected measurement: pages and vCPUs in the order of their headers, where these say.
    ///
    /// # Errors
    /// [`Error::Igvm`] for data outside the file, pages of 2 MiB, unknown types of pages, parameters without an area, more
    /// than once, or of more than 64 MiB; [`Error::Pages`].
    pub fn measurement(&self) -> Result<Measurement, Error> {
        let mut digest = LaunchDigest::new();
        // Areas that are not inserted yet, and their lengths.
        let mut areas = BTreeMap::new();
        let mut parameters = 0u64;
        let zeros = Sha384::digest([0; PAGE_SIZE as usize]).into();
        for header in &self.headers {
            match header.kind {
                kind::PARAMETER_AREA => {
                    let (len, index) = (header.u64(0)?, header.u32(8)?);
                    parameters = parameters.saturating_add(len);
                    if parameters > MAX_PARAMETERS || areas.insert(index, len).is_some() {
                        return Err(refuse(
                            header.offset,
                            format!("area {index} for parameters is there twice, or too long"),
                        ));
                    }
                }
                kind::PARAMETER_INSERT if self.applies(header, 8)? => {
                    let (gpa, index) = (Gpa(header.u64(0)?), header.u32(12)?);
                    let len = areas.remove(&index);
                    let len =
                        len.ok_or_else(|| refuse(header.offset, format!("there is no area {index} to insert")))?;
                    digest.without_contents(PageType::Unmeasured, pages(gpa, len)?);
                }
                kind::PAGE_DATA if self.applies(header, 8)? => {
                    let (gpa, at, flags) = (Gpa(header.u64(0)?), header.u32(12)?, header.u32(16)?);
                    pages(gpa, PAGE_SIZE)?;
                    let data = u16::from_le_bytes(header.bytes(20)?);
                    let page = match data {
                        0 if flags & UNMEASURED != 0 => PageType::Unmeasured,
                        0 => PageType::Normal,
                        1 => PageType::Secrets,
                        2 | 3 => PageType::Cpuid,
                        _ => return Err(refuse(header.offset, format!("a page of type {data}"))),
                    };
                    if flags & !(UNMEASURED | SHARED) != 0 {
                        let what = if flags & LARGE != 0 { "a page of 2 MiB" } else { "unknown flags of a page" };
                        return Err(refuse(header.offset, what));
                    }
                    let contents = match page {
                        PageType::Normal if at == 0 => zeros,
                        PageType::Normal => Sha384::digest(self.page(header, at)?).into(),
                        _ => [0; 48],
                    };
                    if flags & SHARED == 0 {
                        digest.extend(page, gpa, &contents);
                    }
                }
                kind::VP_CONTEXT if self.applies(header, 8)? => {
                    let (gpa, at) = (Gpa(header.u64(0)?), header.u32(12)?);
                    pages(gpa, PAGE_SIZE)?;
                    digest.extend(PageType::Vmsa, gpa, &Sha384::digest(self.page(header, at)?).into());
                }
                _ => {}
            }
        }
        Ok(digest.measurement())
    }

    /// Whether a header, which has the bits of its platforms at `at`, is for SEV-SNP.
    fn applies(&self, header: &Header<'_>, at: usize) -> Result<bool, Error> {
        Ok(header.u32(at)? & self.mask != 0)
    }

    /// The page of the file at `at`.
    fn page(&self, header: &Header<'_>, at: u32) -> Result<&'a [u8; PAGE_SIZE as usize], Error> {
        let page = self.file.get(at as usize..).and_then(|rest| rest.first_chunk());
        page.ok_or_else(|| refuse(header.offset, format!("a page at offset {at:#x}, outside the file")))
    }
}

impl fmt::Debug for Igvm<'_> {
    /// What is said of the whole.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Igvm");
        debug.field("headers", &self.headers.len()).field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// The headers from `start` to the end of `file`.
fn headers(file: &[u8], start: usize) -> Result<Vec<Header<'_>>, Error> {
    let mut headers = Vec::new();
    let mut offset = start;
    while offset < file.len() {
        let before = Header { kind: 0, offset, data: &file[offset..] };
        let (kind, len) = (before.u32(0)?, before.u32(4)? as usize);
        let data = before.data[HEADER_START..].get(..len);
        let data =
            data.ok_or_else(|| refuse(offset, format!("a header of {len:#x} bytes, longer than all headers")))?;
        let known = kind == kind::PLATFORM || kind::INITIALIZATION.contains(&kind) || kind::DIRECTIVES.contains(&kind);
        if !known && kind & OPTIONAL == 0 {
            return Err(refuse(offset, format!("a header of the unknown kind {kind:#x}")));
        }
        headers.push(Header { kind, offset, data });
        // Each starts at a multiple of 8 bytes.
        offset += HEADER_START + len.next_multiple_of(8);
    }
    Ok(headers)
}

#[cfg(test)]
mod tests;
