//! Executable images that a launch can load.

use crate::{Error, Gpa, GpaRange, PAGE_SIZE};
use object::LittleEndian;
use object::elf::{ELFMAG, EM_X86_64, ET_EXEC, FileHeader64, PT_LOAD, ProgramHeader64};
use object::read::elf::{FileHeader, ProgramHeader};
use std::collections::BTreeMap;

/// Page ranges with their contents, or nothing where they are zero.
pub(crate) type Pages = Vec<(GpaRange, Option<Vec<u8>>)>;

/// An image as whole pages, in the order of their addresses.
#[derive(Debug, Clone)]
pub struct Image {
    pub(crate) entry: Gpa,
    pub(crate) pages: Pages,
}

/// A loadable segment of an ELF file.
pub(crate) struct Segment<'a> {
    /// Where the linker placed it.
    link: u64,
    /// Where it is in memory.
    pub(crate) start: u64,
    pub(crate) contents: &'a [u8],
    pub(crate) len: u64,
}

impl Image {
    /// The pages of a statically linked 64-bit ELF executable for x86-64, placed at their physical addresses.
    ///
    /// # Errors
    /// [`Error::Image`] if it is something else, is damaged, or its segments overlap or end too high.
    pub fn from_elf(file: &[u8]) -> Result<Self, Error> {
        let (entry, segments) = segments(file)?;
        let entry = segments.iter().find_map(|segment| {
            let offset = entry.checked_sub(segment.link).filter(|offset| *offset < segment.contents.len() as u64)?;
            Some(Gpa(segment.start + offset))
        });
        let entry = entry.ok_or_else(|| refuse("its entry point lies in none of its segments"))?;
        Ok(Self { entry, pages: pages(&segments)? })
    }

    /// Where it starts, in physical memory.
    pub fn entry(&self) -> Gpa {
        self.entry
    }

    /// Its pages with their contents, as long as their range, or nothing where they are zero.
    pub fn pages(&self) -> &[(GpaRange, Option<Vec<u8>>)] {
        &self.pages
    }
}

fn refuse(reason: &str) -> Error {
    Error::Image { reason: reason.to_owned() }
}

/// The entry point of an ELF file as it stands there, and its segments in the order of their addresses: they do not
/// overlap, and have no more contents than the file.
pub(crate) fn segments(file: &[u8]) -> Result<(u64, Vec<Segment<'_>>), Error> {
    if !file.starts_with(&ELFMAG) {
        return Err(refuse("it is not an ELF file"));
    }
    let parse = |error: object::read::Error| refuse(&error.to_string());
    let header = FileHeader64::<LittleEndian>::parse(file).map_err(parse)?;
    let endian = header.endian().map_err(parse)?;
    if header.e_machine(endian) != EM_X86_64 || header.e_type(endian) != ET_EXEC {
        return Err(refuse("it is not a statically linked x86-64 executable"));
    }
    let mut segments = Vec::new();
    for program in header.program_headers(endian, file).map_err(parse)? {
        if program.p_type(endian) == PT_LOAD && program.p_memsz(endian) > 0 {
            segments.push(segment(program, endian, file)?);
        }
    }
    segments.sort_by_key(|segment| segment.start);
    // Headers may name the same bytes more than once, and so make much of little.
    let len = segments.iter().try_fold(0u64, |len, segment| len.checked_add(segment.contents.len() as u64));
    if len.is_none_or(|len| len > file.len() as u64) {
        return Err(refuse("its segments are longer than the file"));
    }
    if let Some(pair) = segments.windows(2).find(|pair| pair[0].start + pair[0].len > pair[1].start) {
        return Err(refuse(&format!("its segments at {:#x} and {:#x} overlap", pair[0].start, pair[1].start)));
    }
    Ok((header.e_entry(endian), segments))
}

fn segment<'a>(
    program: &ProgramHeader64<LittleEndian>,
    endian: LittleEndian,
    file: &'a [u8],
) -> Result<Segment<'a>, Error> {
    let (start, len) = (program.p_paddr(endian), program.p_memsz(endian));
    let refuse = |reason| Err(Error::Image { reason: format!("its segment at {start:#x} {reason}") });
    let Ok(contents) = program.data(endian, file) else {
        return refuse("lies outside the file");
    };
    if contents.len() as u64 > len {
        return refuse("is longer in the file than in memory");
    }
    if GpaRange::covering(start, len).is_none() {
        return refuse("ends beyond the 52 bits of a guest physical address");
    }
    Ok(Segment { link: program.p_vaddr(endian), start, contents, len })
}

/// Cuts sorted segments into pages; segments that share a page are put into it together.
fn pages(segments: &[Segment<'_>]) -> Result<Pages, Error> {
    const PAGE: usize = PAGE_SIZE as usize;
    // Runs of pages with contents by their start, each contiguous and apart from the next.
    let mut runs: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    for segment in segments {
        if segment.contents.is_empty() {
            continue;
        }
        let first = segment.start & !(PAGE_SIZE - 1);
        let (start, mut run) = match runs.last_entry() {
            Some(last) if *last.key() + last.get().len() as u64 >= first => last.remove_entry(),
            _ => (first, Vec::new()),
        };
        let at = (segment.start - start) as usize;
        let end = at + segment.contents.len();
        run.resize(run.len().max(end.next_multiple_of(PAGE)), 0);
        run[at..end].copy_from_slice(segment.contents);
        runs.insert(start, run);
    }
    let mut zeros = Vec::new();
    let mut next = 0;
    for segment in segments {
        let end = (segment.start + segment.len).next_multiple_of(PAGE_SIZE);
        next = next.max(segment.start & !(PAGE_SIZE - 1));
        while next < end {
            let run = runs.range(..=next).next_back().map(|(start, run)| start + run.len() as u64);
            if let Some(run_end) = run.filter(|run_end| *run_end > next) {
                next = run_end;
                continue;
            }
            let stop = runs.range(next..).next().map_or(end, |(start, _)| end.min(*start));
            zeros.push((next, stop));
            next = stop;
        }
    }
    let range =
        |start: u64, len: u64| GpaRange::new(start, len).map_err(|error| Error::Image { reason: error.to_string() });
    let mut pages = Vec::new();
    for (start, end) in zeros {
        pages.push((range(start, end - start)?, None));
    }
    for (start, run) in runs {
        pages.push((range(start, run.len() as u64)?, Some(run)));
    }
    pages.sort_by_key(|(range, _)| *range);
    Ok(pages)
}

#[cfg(test)]
pub(crate) mod tests;
