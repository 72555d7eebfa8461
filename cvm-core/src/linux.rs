//! Linux kernels, laid out in memory by the 64-bit boot protocol of x86 (Linux, `Documentation/arch/x86/boot.rst`).
//!
//! | where | what |
//! |---|---|
//! | [`BOOT_PARAMS`] | the zero page: the kernel's setup header, where memory is, command line and initial RAM disk |
//! | [`PAGE_TABLES`] | map the first 4 GiB to their own addresses |
//! | [`COMMAND_LINE`] | the command line, with a zero behind it |
//! | from [`KERNEL_MIN`] on | the kernel, where its file says |
//! | as high as the kernel reaches | the initial RAM disk |
//!
//! All of it lies below 4 GiB. `linux-loader` writes it into memory that is thrown away again, and what it has written is
//! what is loaded: whole pages in the order of their addresses, none that nobody wrote. So the measurement depends on the
//! files, the command line and the layout of memory, and on nothing else.
//!
//! The kernel finds no firmware, no ACPI tables, no PCI bus and no timer. One that is to do more than print its first
//! messages has to know where it is.

use crate::image::{self, Image, Pages};
use crate::memory::Slots;
use crate::x86::{self, VcpuState};
use crate::{Error, Gpa, GpaRange, PAGE_SIZE, boot};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, Cmdline, Elf, KernelLoader, load_cmdline};
use std::collections::BTreeMap;
use std::io::Cursor;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Where the zero page is, which RSI points to at the start.
pub const BOOT_PARAMS: Gpa = Gpa(0x7000);

/// Where the page tables are that the kernel starts on: six pages.
pub const PAGE_TABLES: Gpa = Gpa(0x9000);

/// Where the command line is.
pub const COMMAND_LINE: Gpa = Gpa(0x1_0000);

/// The lowest address of a kernel; below are the things that it is given.
pub const KERNEL_MIN: Gpa = Gpa(0x10_0000);

/// Where the data of a BIOS begin and end, below the legacy hole, and where its code begins, as SeaBIOS reports it.
const BIOS_DATA: u64 = 0x9_fc00;
const LEGACY_HOLE: u64 = 0xa_0000;
const BIOS_CODE: u64 = 0xf_0000;

/// The longest command line in bytes, without the zero behind it, whatever the kernel says: 64 KiB.
const COMMAND_LINE_MAX: u32 = 0xffff;

/// Where the memory ends that kernel and initial RAM disk may lie in: what the page tables map.
const TOP: u64 = 4 << 30;

/// Where the setup header is in a bzImage, and in the zero page.
const HEADER: usize = 0x1f1;

/// How far it reaches at least in protocol 2.12, the first with a 64-bit entry point: up to `init_size`.
const HEADER_END: usize = 0x264;

/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;

/// `XLF_KERNEL_64` in `xloadflags`: there is a 64-bit entry point.
const HAS_64BIT_ENTRY: u16 = 1;

/// Where that is, from where the kernel is loaded.
const ENTRY: u64 = 0x200;

/// What is to start.
#[derive(Debug, Clone, Copy)]
pub enum Kernel<'a> {
    /// A compressed kernel with its setup header, of boot protocol 2.12 or later.
    BzImage(&'a [u8]),
    /// A statically linked 64-bit ELF file whose entry point is a physical address, as `vmlinux` is.
    Elf(&'a [u8]),
    /// Code that starts with its first byte.
    Raw {
        /// The code.
        contents: &'a [u8],
        /// Where it is loaded; not below [`KERNEL_MIN`].
        gpa: Gpa,
    },
}

/// A kernel and all that it is given, as whole pages.
#[derive(Debug, Clone)]
pub struct LinuxImage {
    image: Image,
    memory: Slots,
}

impl LinuxImage {
    /// Lays out `kernel` in `memory`, with a command line (printable ASCII; spaces around it are left out) and an initial
    /// RAM disk if there is one.
    ///
    /// # Errors
    /// [`Error::Image`] if the kernel is damaged or has no 64-bit entry point, does not fit below 4 GiB, or reaches below
    /// [`KERNEL_MIN`]; if the command line is longer than the kernel takes or has other characters; if there is no room
    /// for the initial RAM disk. [`Error::Layout`] if the memory makes no sense or has none below [`KERNEL_MIN`],
    /// [`Error::Backend`] if the host has no memory to lay it out in.
    pub fn new(
        kernel: Kernel<'_>,
        initrd: Option<&[u8]>,
        command_line: &str,
        memory: &[GpaRange],
    ) -> Result<Self, Error> {
        if memory.len() > boot::MAX_RANGES {
            return Err(Error::Layout(format!("more than {} ranges of memory", boot::MAX_RANGES)));
        }
        let slots = Slots::new(memory)?;
        let staging = Staging::new(&slots)?;
        let loaded = match kernel {
            Kernel::BzImage(file) => staging.bzimage(file)?,
            Kernel::Elf(file) => staging.elf(file)?,
            Kernel::Raw { contents, gpa } => staging.raw(contents, gpa)?,
        };
        let mut header = loaded.header;
        staging.command_line(command_line, header.cmdline_size)?;
        header.cmd_line_ptr = COMMAND_LINE.0 as u32;
        // No list of further data, whatever the file says.
        header.setup_data = 0;
        // "Undefined", of those that boot.rst numbers.
        header.type_of_loader = 0xff;
        (header.ramdisk_image, header.ramdisk_size) = (0, 0);
        if let Some(initrd) = initrd.filter(|initrd| !initrd.is_empty()) {
            let gpa = staging.initrd(initrd, loaded.span, header.initrd_addr_max)?;
            (header.ramdisk_image, header.ramdisk_size) = (gpa.0 as u32, initrd.len() as u32);
        }
        staging.write(PAGE_TABLES, &x86::identity_map(PAGE_TABLES, TOP, None)?)?;
        staging.write(BOOT_PARAMS, zero_page(header, slots.ranges()).as_slice())?;
        Ok(Self { image: Image { entry: loaded.entry, pages: staging.pages(&loaded.zeros)? }, memory: slots })
    }

    /// Where it starts.
    pub fn entry(&self) -> Gpa {
        self.image.entry()
    }

    /// Its pages in the order of their addresses, with their contents, as long as their range, or nothing where they are
    /// zero.
    pub fn pages(&self) -> &[(GpaRange, Option<Vec<u8>>)] {
        self.image.pages()
    }

    /// The state that it starts in: RSI is the zero page.
    pub(crate) fn first_state(&self) -> VcpuState {
        VcpuState::long_mode(self.entry(), PAGE_TABLES, 0, BOOT_PARAMS)
    }

    pub(crate) fn image(&self) -> &Image {
        &self.image
    }

    pub(crate) fn memory(&self) -> &Slots {
        &self.memory
    }
}

fn refuse(reason: String) -> Error {
    Error::Image { reason }
}

/// What a loader does not say unless the file is damaged in a way that was not looked for.
fn by_loader(error: linux_loader::loader::Error) -> Error {
    refuse(error.to_string())
}

/// A kernel in memory.
struct Loaded {
    entry: Gpa,
    header: setup_header,
    /// From the first to the last page that it has, or takes before it knows where memory is.
    span: (Gpa, Gpa),
    /// What it counts on to be zero where nothing was written.
    zeros: Vec<GpaRange>,
}

/// The memory below 4 GiB, which takes up room only where something is written, and knows where that is.
struct Staging {
    memory: GuestMemoryMmap<AtomicBitmap>,
    slots: Slots,
}

impl Staging {
    fn new(slots: &Slots) -> Result<Self, Error> {
        let low = GpaRange::new(0, TOP).map_err(|error| Error::Layout(error.to_string()))?;
        let ranges: Vec<_> = slots.ranges().iter().filter_map(|slot| slot.intersection(&low)).collect();
        let given = GpaRange::new(0, KERNEL_MIN.0).map_err(|error| Error::Layout(error.to_string()))?;
        let slots = Slots::new(&ranges)?;
        if let Err(error) = slots.check(given) {
            return Err(Error::Layout(format!("linux starts from the first mib of memory: {error}")));
        }
        let ranges: Vec<_> = ranges.iter().map(|range| (GuestAddress(range.start().0), range.len() as usize)).collect();
        let memory = GuestMemoryMmap::from_ranges(&ranges);
        let memory = memory.map_err(|source| Error::Backend {
            step: "map staging memory",
            range: None,
            source: source.into(),
        })?;
        Ok(Self { memory, slots })
    }

    /// The pages that hold `len` bytes at `start`, if that is memory where a kernel may lie.
    fn room(&self, start: u64, len: u64) -> Option<GpaRange> {
        let range = GpaRange::covering(start, len).filter(|range| range.start() >= KERNEL_MIN)?;
        self.slots.check(range).is_ok().then_some(range)
    }

    /// The same, or the reason why `what` is refused.
    fn area(&self, what: &str, start: u64, len: u64) -> Result<GpaRange, Error> {
        let reason =
            || format!("{what} of {len:#x} bytes at {start:#x} is not in memory from {KERNEL_MIN} up to 4 GiB");
        self.room(start, len).ok_or_else(|| refuse(reason()))
    }

    fn write(&self, gpa: Gpa, contents: &[u8]) -> Result<(), Error> {
        let written = self.memory.write_slice(contents, GuestAddress(gpa.0));
        written.map_err(|source| Error::Backend { step: "write to staging memory", range: None, source: source.into() })
    }

    fn bzimage(&self, file: &[u8]) -> Result<Loaded, Error> {
        let mut header = read_header(file)?;
        let setup = (if header.setup_sects == 0 { 4 } else { usize::from(header.setup_sects) } + 1) * 512;
        let load = u64::from(header.code32_start);
        let len = file.len().saturating_sub(setup) as u64;
        if len <= ENTRY {
            return Err(refuse("it ends before the kernel's entry point".into()));
        }
        let contents = self.area("the kernel", load, len)?;
        // boot.rst, "init_size": what it needs from where it runs, which is not below where it prefers to.
        let runtime = match header.relocatable_kernel {
            0 => Some(header.pref_address),
            _ => {
                load.checked_next_multiple_of(header.kernel_alignment.into()).map(|load| load.max(header.pref_address))
            }
        };
        let runtime = runtime.ok_or_else(|| refuse("it has no alignment".into()))?;
        let runs = self.area("the running kernel", runtime, header.init_size.max(1).into())?;
        let loaded = BzImage::load(&self.memory, None, &mut Cursor::new(file), Some(GuestAddress(KERNEL_MIN.0)));
        let loaded = loaded.map_err(by_loader)?;
        header.code32_start = loaded.kernel_load.0 as u32;
        Ok(Loaded {
            entry: Gpa(loaded.kernel_load.0 + ENTRY),
            header,
            span: (contents.start().min(runs.start()), contents.end().max(runs.end())),
            zeros: Vec::new(),
        })
    }

    fn elf(&self, file: &[u8]) -> Result<Loaded, Error> {
        // The loader itself looks for neither overlaps nor bytes that are named over and over.
        let (entry, segments) = image::segments(file)?;
        let inside = |start: u64, len: usize| (start..start + len as u64).contains(&entry);
        if !segments.iter().any(|segment| inside(segment.start, segment.contents.len())) {
            return Err(refuse(format!("its entry point {entry:#x} is no physical address in one of its segments")));
        }
        let zeros = segments.iter().map(|segment| self.area("a segment", segment.start, segment.len));
        let zeros = zeros.collect::<Result<Vec<_>, _>>()?;
        // There is a segment, as the entry point is in one, and they are in order.
        let span = (zeros[0].start(), zeros[zeros.len() - 1].end());
        // With an offset it does not follow notes, which name an entry point of another protocol.
        let loaded = Elf::load(&self.memory, Some(GuestAddress(0)), &mut Cursor::new(file), None).map_err(by_loader)?;
        Ok(Loaded { entry: Gpa(loaded.kernel_load.0), header: made_up_header(), span, zeros })
    }

    fn raw(&self, contents: &[u8], gpa: Gpa) -> Result<Loaded, Error> {
        let range = self.area("the code", gpa.0, contents.len() as u64)?;
        self.write(gpa, contents)?;
        let span = (range.start(), range.end());
        Ok(Loaded { entry: gpa, header: made_up_header(), span, zeros: Vec::new() })
    }

    /// Writes the command line, of which the kernel takes `most` bytes.
    fn command_line(&self, text: &str, most: u32) -> Result<(), Error> {
        let most = most.min(COMMAND_LINE_MAX);
        let line = Cmdline::new(most as usize + 1).and_then(|mut line| line.insert_str(text).map(|()| line));
        let line =
            line.map_err(|error| refuse(format!("the command line will not do: {error}; it takes {most} bytes")))?;
        load_cmdline(&self.memory, GuestAddress(COMMAND_LINE.0), &line).map_err(by_loader)
    }

    /// Writes the initial RAM disk as high as memory and the kernel, which has `span` and reaches `last`, let it.
    fn initrd(&self, initrd: &[u8], span: (Gpa, Gpa), last: u32) -> Result<Gpa, Error> {
        let limit = (u64::from(last) + 1) & !(PAGE_SIZE - 1);
        let len = (initrd.len() as u64).next_multiple_of(PAGE_SIZE);
        let ends = self.slots.ranges().iter().map(GpaRange::end).chain([span.0]);
        let places = ends.filter_map(|end| self.room(end.0.min(limit).checked_sub(len)?, len));
        let place = places.filter(|place| place.end() <= span.0 || span.1 <= place.start()).max();
        let place = place.ok_or_else(|| {
            let bytes = initrd.len();
            refuse(format!("there is no room for an initial ram disk of {bytes} bytes up to {last:#x}"))
        })?;
        self.write(place.start(), initrd)?;
        Ok(place.start())
    }

    /// All that was written, and what the kernel counts on to be zero.
    fn pages(&self, zeros: &[GpaRange]) -> Result<Pages, Error> {
        let mut pages = BTreeMap::new();
        for region in self.memory.iter() {
            let written = (0..region.len()).step_by(PAGE_SIZE as usize);
            let written = written.filter(|offset| region.bitmap().dirty_at(*offset as usize));
            pages.extend(written.map(|offset| (region.start_addr().0 + offset, true)));
        }
        for range in zeros {
            for page in (range.start().0..range.end().0).step_by(PAGE_SIZE as usize) {
                pages.entry(page).or_insert(false);
            }
        }
        let pages: Vec<_> = pages.into_iter().collect();
        let runs = pages.chunk_by(|one, next| (one.0 + PAGE_SIZE, one.1) == *next);
        let run = |run: &[(u64, bool)]| {
            let range = GpaRange::from_pages(run[0].0, run.len() as u64);
            let range = range.map_err(|error| Error::Layout(error.to_string()))?;
            if !run[0].1 {
                return Ok((range, None));
            }
            let mut contents = vec![0; range.len() as usize];
            let read = self.memory.read_slice(&mut contents, GuestAddress(range.start().0));
            read.map_err(|source| Error::Backend {
                step: "read staging memory",
                range: Some(range),
                source: source.into(),
            })?;
            Ok((range, Some(contents)))
        };
        runs.map(run).collect()
    }
}

/// The setup header of a bzImage, as far as it says that it reaches.
fn read_header(file: &[u8]) -> Result<setup_header, Error> {
    // The byte at 0x201 is how far the jump over the header goes that begins there, and so where the header ends.
    let end = file.get(0x201).map_or(0, |jump| 0x202 + usize::from(*jump));
    let mut header = setup_header::default();
    let len = end.saturating_sub(HEADER).min(size_of::<setup_header>());
    let Some(contents) = file.get(HEADER..HEADER + len) else {
        return Err(refuse("it ends within its setup header".into()));
    };
    header.as_mut_slice()[..len].copy_from_slice(contents);
    let (magic, version) = (header.header, header.version);
    if magic != HEADER_MAGIC {
        return Err(refuse("it is no bzimage: its setup header has no magic".into()));
    }
    if header.loadflags & 1 == 0 || end < HEADER_END || version < 0x20c || header.xloadflags & HAS_64BIT_ENTRY == 0 {
        return Err(refuse(format!("a kernel of boot protocol {version:#x} without a 64-bit entry point")));
    }
    Ok(header)
}

/// What a kernel that comes without a setup header finds in its zero page.
fn made_up_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: HEADER_MAGIC,
        version: 0x20c,
        loadflags: 1,
        xloadflags: HAS_64BIT_ENTRY,
        // What x86 kernels have there.
        initrd_addr_max: 0x7fff_ffff,
        cmdline_size: 2047,
        ..Default::default()
    }
}

/// The zero page, with memory as RAM but for the hole below [`KERNEL_MIN`]. Kernels ignore a map of fewer than two entries
/// (Linux, `arch/x86/kernel/e820.c`, `append_e820_table`) and look for what a BIOS would have left, so the map is what firmware
/// reports: the RAM of the first machines, the areas of their BIOS, and what lies above.
fn zero_page(header: setup_header, memory: &[GpaRange]) -> boot_params {
    const RAM: u32 = 1;
    const RESERVED: u32 = 2;
    let mut params = boot_params { hdr: header, ..Default::default() };
    let low = [(0, BIOS_DATA, RAM), (BIOS_DATA, LEGACY_HOLE, RESERVED), (BIOS_CODE, KERNEL_MIN.0, RESERVED)];
    let high = memory.iter().map(|range| (range.start().0.max(KERNEL_MIN.0), range.end().0, RAM));
    let map = low.into_iter().chain(high).filter(|(start, end, _)| start < end);
    for (entry, (start, end, kind)) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr: start, size: end - start, r#type: kind };
        params.e820_entries += 1;
    }
    params
}

#[cfg(test)]
mod tests;
