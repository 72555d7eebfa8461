//! From bytes to directives.

use super::{Contents, Context, Directive, Igvm, IgvmError, IgvmPlatform, Parameter, refuse};
use crate::{Gpa, GpaRange, PAGE_SIZE, PageKind};
use std::collections::BTreeMap;

pub(super) const FIXED_HEADER: usize = 24;
/// That of version 2: architecture and page size follow.
const FIXED_HEADER_2: usize = 32;
const X64: u32 = 0;
pub(super) const HEADER_START: usize = 8;
/// Headers whose kind has this bit can be ignored by who does not know them.
pub(super) const OPTIONAL: u32 = 1 << 31;

/// Kinds of headers that matter, and all that are known.
pub(super) mod kind {
    pub const PLATFORM: u32 = 0x001;
    pub const GUEST_POLICY: u32 = 0x101;
    pub const PARAMETER_AREA: u32 = 0x301;
    pub const PAGE_DATA: u32 = 0x302;
    pub const PARAMETER_INSERT: u32 = 0x303;
    pub const VP_CONTEXT: u32 = 0x304;
    pub const REQUIRED_MEMORY: u32 = 0x305;
    pub const VP_COUNT: u32 = 0x307;
    pub const SRAT: u32 = 0x308;
    pub const MADT: u32 = 0x309;
    pub const MMIO_RANGES: u32 = 0x30a;
    pub const ID_BLOCK: u32 = 0x30b;
    pub const MEMORY_MAP: u32 = 0x30c;
    pub const ERROR_RANGE: u32 = 0x30d;
    pub const COMMAND_LINE: u32 = 0x30e;
    pub const SLIT: u32 = 0x30f;
    pub const PPTT: u32 = 0x310;
    pub const DEVICE_TREE: u32 = 0x312;
    pub const ENVIRONMENT: u32 = 0x313;
    pub const INITIALIZATION: std::ops::RangeInclusive<u32> = 0x101..=0x107;
    pub const DIRECTIVES: std::ops::RangeInclusive<u32> = 0x301..=0x313;
}

/// The version of every platform that files are read for.
const PLATFORM_VERSION: u16 = 1;

/// Flags of a page.
pub(super) const LARGE: u32 = 1;
const UNMEASURED: u32 = 1 << 1;
const SHARED: u32 = 1 << 2;

/// The most that all areas for parameters have: 64 MiB, where files in use have some pages.
const MAX_PARAMETERS: u64 = 64 << 20;

impl<'a> Igvm<'a> {
    /// Reads a file for a platform.
    ///
    /// # Errors
    /// [`IgvmError::Header`] if it is no IGVM file of version 1 or 2 for x86-64, or not for the platform; if headers lie outside
    /// of it, are out of order, or are of unknown kinds that may not be ignored; for another version of the platform than 1; for
    /// data outside of it, pages of 2 MiB, unknown types of pages, parameters without an area, and areas that are used twice or have more than 64 MiB.
    pub fn parse(file: &'a [u8], platform: IgvmPlatform) -> Result<Self, IgvmError> {
        let headers = headers(file)?;
        let mut mask = None;
        for header in headers.iter().filter(|header| header.kind == kind::PLATFORM) {
            if header.bytes(5)? != [platform as u8] {
                continue;
            }
            let version = header.u16(6)?;
            if version != PLATFORM_VERSION {
                let problem = format!("version {version} of the platform {}, and not 1", platform.name());
                return Err(refuse(header.offset, problem));
            }
            if mask.replace(header.u32(0)?).is_some() {
                return Err(refuse(header.offset, format!("it has the platform {} twice", platform.name())));
            }
        }
        let mask = mask.filter(|mask| mask.is_power_of_two());
        let mask = mask.ok_or_else(|| refuse(0, format!("it is not for the platform {}", platform.name())))?;
        let mut policy = None;
        for header in headers.iter().filter(|header| header.kind == kind::GUEST_POLICY) {
            if header.u32(8)? & mask != 0 && policy.replace(header.u64(0)?).is_some() {
                return Err(refuse(header.offset, format!("it has two policies for {}", platform.name())));
            }
        }
        let mut reader = Reader { file, mask, areas: BTreeMap::new(), parameters: 0 };
        let mut directives = Vec::new();
        for header in &headers {
            directives.extend(reader.directive(header)?.map(|directive| (header.offset, directive)));
        }
        Ok(Self { platform, policy, directives })
    }
}

pub(super) struct Header<'a> {
    pub(super) kind: u32,
    pub(super) offset: usize,
    data: &'a [u8],
}

impl Header<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N], IgvmError> {
        let bytes = self.data.get(at..).and_then(|rest| rest.first_chunk());
        bytes.copied().ok_or_else(|| refuse(self.offset, "the header is too short for its kind"))
    }

    fn u16(&self, at: usize) -> Result<u16, IgvmError> {
        self.bytes(at).map(u16::from_le_bytes)
    }

    fn u32(&self, at: usize) -> Result<u32, IgvmError> {
        self.bytes(at).map(u32::from_le_bytes)
    }

    fn u64(&self, at: usize) -> Result<u64, IgvmError> {
        self.bytes(at).map(u64::from_le_bytes)
    }

    fn range(&self, start: u64, len: u64) -> Result<GpaRange, IgvmError> {
        GpaRange::new(start, len).map_err(|error| refuse(self.offset, error.to_string()))
    }
}

/// All headers, in their order.
pub(super) fn headers(file: &[u8]) -> Result<Vec<Header<'_>>, IgvmError> {
    let fixed = Header { kind: 0, offset: 0, data: file.get(..FIXED_HEADER).unwrap_or_default() };
    let least = match (fixed.bytes(0)?, fixed.u32(4)?) {
        ([b'I', b'G', b'V', b'M'], 1) => FIXED_HEADER,
        ([b'I', b'G', b'V', b'M'], 2) => FIXED_HEADER_2,
        _ => return Err(refuse(0, "it is no igvm file of version 1 or 2")),
    };
    let (start, len, total) = (fixed.u32(8)? as usize, fixed.u32(12)? as usize, fixed.u32(16)? as usize);
    let all = start.checked_add(len).filter(|_| start >= least).and_then(|end| file.get(..end));
    let all = all.ok_or_else(|| refuse(8, format!("{len:#x} bytes of headers at {start:#x}")))?;
    if total != file.len() {
        return Err(refuse(16, format!("it is to have {total:#x} bytes and has {:#x}", file.len())));
    }
    if least == FIXED_HEADER_2 {
        let fixed = Header { data: &all[..FIXED_HEADER_2], ..fixed };
        if (fixed.u32(24)?, u64::from(fixed.u32(28)?)) != (X64, PAGE_SIZE) {
            return Err(refuse(24, "it is not for x86-64 with pages of 4 KiB"));
        }
    }
    let mut headers = Vec::new();
    let mut offset = start;
    let mut section = 0;
    while offset < all.len() {
        let before = Header { kind: 0, offset, data: &all[offset..] };
        let (kind, len) = (before.u32(0)?, before.u32(4)? as usize);
        let data = before.data[HEADER_START..].get(..len);
        let data =
            data.ok_or_else(|| refuse(offset, format!("a header of {len:#x} bytes, longer than all headers")))?;
        let known = [kind == kind::PLATFORM, kind::INITIALIZATION.contains(&kind), kind::DIRECTIVES.contains(&kind)];
        match known.iter().position(|known| *known) {
            Some(earlier) if earlier < section => {
                return Err(refuse(offset, format!("a header of kind {kind:#x} behind those of later sections")));
            }
            Some(later) => section = later,
            None if kind & OPTIONAL == 0 => {
                return Err(refuse(offset, format!("a header of the unknown kind {kind:#x}")));
            }
            None => {}
        }
        headers.push(Header { kind, offset, data });
        // Each starts at a multiple of 8 bytes.
        offset += HEADER_START + len.next_multiple_of(8);
    }
    Ok(headers)
}

/// An area for parameters that is not inserted yet.
struct Area<'a> {
    len: u64,
    initial: &'a [u8],
    parameters: Vec<(Parameter, u32)>,
}

struct Reader<'a> {
    file: &'a [u8],
    /// The bits that headers for the platform have.
    mask: u32,
    areas: BTreeMap<u32, Area<'a>>,
    /// The sum of their lengths.
    parameters: u64,
}

impl<'a> Reader<'a> {
    /// What a header says, if it is a directive to the platform; parameters when they are inserted.
    fn directive(&mut self, header: &Header<'a>) -> Result<Option<Directive<'a>>, IgvmError> {
        if let Some(parameter) = Parameter::ALL.into_iter().find(|parameter| *parameter as u32 == header.kind) {
            let (index, offset) = (header.u32(0)?, header.u32(4)?);
            let area = self.areas.get_mut(&index).ok_or_else(|| no_area(header, index))?;
            area.parameters.push((parameter, offset));
            return Ok(None);
        }
        let place = match header.kind {
            kind::PARAMETER_AREA => {
                self.area(header)?;
                return Ok(None);
            }
            kind::PAGE_DATA | kind::PARAMETER_INSERT | kind::VP_CONTEXT | kind::REQUIRED_MEMORY | kind::ERROR_RANGE => {
                8
            }
            kind::ID_BLOCK => 0,
            _ => return Ok(None),
        };
        if header.u32(place)? & self.mask == 0 {
            return Ok(None);
        }
        Ok(Some(match header.kind {
            kind::PAGE_DATA => self.page(header)?,
            kind::PARAMETER_INSERT => {
                let index = header.u32(12)?;
                let area = self.areas.remove(&index).ok_or_else(|| no_area(header, index))?;
                let range = header.range(header.u64(0)?, area.len)?;
                Directive::Parameters { range, initial: area.initial, parameters: area.parameters }
            }
            kind::VP_CONTEXT => {
                let (gpa, contents) = (header.u64(0)?, self.contents(header, header.u32(12)?)?);
                header.range(gpa, PAGE_SIZE)?;
                Directive::Vcpu(Context { vcpu: header.u16(16)?, gpa: Gpa(gpa), contents })
            }
            kind::REQUIRED_MEMORY => {
                Directive::Required { range: header.range(header.u64(0)?, header.u32(12)?.into())? }
            }
            kind::ERROR_RANGE => Directive::Shared { range: header.range(header.u64(0)?, header.u32(12)?.into())? },
            _ => Directive::IdBlock(header.data),
        }))
    }

    fn area(&mut self, header: &Header<'a>) -> Result<(), IgvmError> {
        let (len, index, at) = (header.u64(0)?, header.u32(8)?, header.u32(12)? as usize);
        self.parameters = self.parameters.saturating_add(len);
        if self.parameters > MAX_PARAMETERS {
            return Err(refuse(header.offset, "its areas for parameters are too long"));
        }
        let initial = match at {
            0 => &[][..],
            _ => self.file.get(at..).and_then(|rest| rest.get(..len as usize)).ok_or_else(|| {
                refuse(header.offset, format!("an area for parameters at offset {at:#x}, outside the file"))
            })?,
        };
        match self.areas.insert(index, Area { len, initial, parameters: Vec::new() }) {
            None => Ok(()),
            Some(_) => Err(refuse(header.offset, format!("the area {index} for parameters is there twice"))),
        }
    }

    fn page(&self, header: &Header<'a>) -> Result<Directive<'a>, IgvmError> {
        let (gpa, at, flags) = (header.u64(0)?, header.u32(12)?, header.u32(16)?);
        let range = header.range(gpa, PAGE_SIZE)?;
        let kind = match header.u16(20)? {
            0 if flags & UNMEASURED != 0 => PageKind::Unmeasured,
            0 => PageKind::Measured,
            1 => PageKind::Secrets,
            2 | 3 => PageKind::Cpuid,
            data => return Err(refuse(header.offset, format!("a page of type {data}"))),
        };
        if flags & !(UNMEASURED | SHARED) != 0 {
            let what = if flags & LARGE != 0 { "a page of 2 MiB" } else { "unknown flags of a page" };
            return Err(refuse(header.offset, what));
        }
        if flags & SHARED != 0 {
            return Ok(Directive::Shared { range });
        }
        // Of what the platform fills, the file may say what was there when it was made; nobody trusts that.
        let filled = matches!(kind, PageKind::Secrets | PageKind::Cpuid);
        let contents = if at == 0 || filled { None } else { Some(self.contents(header, at)?) };
        Ok(Directive::Page { gpa: Gpa(gpa), kind, contents })
    }

    /// The page of the file at `at`.
    fn contents(&self, header: &Header<'_>, at: u32) -> Result<Contents<'a>, IgvmError> {
        let page = self.file.get(at as usize..).and_then(|rest| rest.first_chunk());
        page.ok_or_else(|| refuse(header.offset, format!("a page at offset {at:#x}, outside the file")))
    }
}

fn no_area(header: &Header<'_>, index: u32) -> IgvmError {
    refuse(header.offset, format!("there is no area {index} for parameters"))
}
