use super::*;
use crate::image::tests::{LINKED_HIGHER, elf};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

/// A bzImage as small as they get: fields by their offsets in boot.rst, one setup sector, and a kernel of `contents`
/// which is to be loaded at 1 MiB, runs at 2 MiB, and takes 1 MiB there.
fn bzimage(contents: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 1024];
    file[0x1f1] = 1;
    let mut set = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    set(0x200, &[0xeb, 0x6a]);
    set(0x202, b"HdrS");
    set(0x206, &0x20fu16.to_le_bytes());
    set(0x211, &[1]);
    set(0x214, &0x10_0000u32.to_le_bytes());
    set(0x22c, &0x7fff_ffffu32.to_le_bytes());
    set(0x230, &0x20_0000u32.to_le_bytes());
    set(0x234, &[1]);
    set(0x236, &1u16.to_le_bytes());
    set(0x238, &255u32.to_le_bytes());
    set(0x258, &0x20_0000u64.to_le_bytes());
    set(0x260, &0x10_0000u32.to_le_bytes());
    file.extend(contents);
    file
}

/// The same with other bytes at `at`.
fn changed(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = bzimage(&[1; 0x1000]);
    file[at..at + bytes.len()].copy_from_slice(bytes);
    file
}

fn range(start: u64, len: u64) -> GpaRange {
    GpaRange::new(start, len).unwrap()
}

fn stage(kernel: Kernel<'_>, initrd: Option<&[u8]>, line: &str, bytes: u64) -> Result<LinuxImage, Error> {
    LinuxImage::new(kernel, initrd, line, &[range(0, bytes)])
}

/// Why 16 MiB of memory do not take these.
fn refusal(kernel: Kernel<'_>, initrd: Option<&[u8]>, line: &str) -> String {
    match stage(kernel, initrd, line, 16 * MIB) {
        Err(Error::Image { reason }) => reason,
        other => panic!("not refused: {other:?}"),
    }
}

/// The bytes at `gpa`, of which all must be in one run of pages.
fn bytes(image: &LinuxImage, gpa: u64, len: usize) -> &[u8] {
    let (range, contents) = image.pages().iter().find(|(range, _)| range.contains(Gpa(gpa))).unwrap();
    let at = (gpa - range.start().0) as usize;
    &contents.as_ref().unwrap()[at..at + len]
}

fn word(image: &LinuxImage, gpa: u64) -> u64 {
    u64::from_le_bytes(bytes(image, gpa, 8).try_into().unwrap())
}

fn ranges(image: &LinuxImage) -> Vec<GpaRange> {
    image.pages().iter().map(|(range, _)| *range).collect()
}

#[test]
fn a_bzimage_becomes_the_pages_that_were_written_and_no_others() {
    let contents: Vec<_> = (0..0x1801u32).map(|i| i as u8 | 1).collect();
    let image = stage(Kernel::BzImage(&bzimage(&contents)), Some(&[7; 5000]), "console=ttyS0", 16 * MIB).unwrap();
    let expected =
        [(0x7000, 0x1000), (0x9000, 0x6000), (0x1_0000, 0x1000), (0x10_0000, 0x2000), (16 * MIB - 0x2000, 0x2000)];
    assert_eq!(ranges(&image), expected.map(|(start, len)| range(start, len)));
    assert_eq!(image.entry(), Gpa(0x10_0200));
    assert_eq!(bytes(&image, 0x10_0000, contents.len()), contents);
    assert_eq!(bytes(&image, 0x10_1801, 0x7ff), [0; 0x7ff]);
    assert_eq!(bytes(&image, 0x1_0000, 14), b"console=ttyS0\0");
    assert_eq!(bytes(&image, 16 * MIB - 0x2000, 5000), [7; 5000]);
    let state = image.first_state();
    assert_eq!((state.rip, state.rsi, state.cr3, state.rdi), (0x10_0200, 0x7000, 0x9000, 0));
}

#[test]
fn the_zero_page_has_the_files_header_and_what_the_kernel_is_given() {
    let memory = [range(0, 16 * MIB), range(32 * MIB, 5 << 30)];
    let image = LinuxImage::new(Kernel::BzImage(&bzimage(&[1; 0x1000])), Some(&[7; 5000]), "a b", &memory).unwrap();
    let at = |offset: u64| BOOT_PARAMS.0 + offset;
    assert_eq!(bytes(&image, at(0x202), 4), b"HdrS");
    assert_eq!(bytes(&image, at(0x206), 2), [0x0f, 0x02]);
    assert_eq!(bytes(&image, at(0x210), 1), [0xff]);
    assert_eq!(word(&image, at(0x214)) as u32, 0x10_0000);
    // The initial RAM disk is as high as the kernel reaches, not as memory goes.
    assert_eq!(word(&image, at(0x218)), 5000 << 32 | (0x8000_0000 - 0x2000));
    assert_eq!(word(&image, at(0x228)) as u32, 0x1_0000);
    let low = [(0, 0x9_fc00, 1), (0x9_fc00, 0x400, 2), (0xf_0000, 0x1_0000, 2)];
    assert_eq!(map(&image), [&low[..], &[(MIB, 15 * MIB, 1), (32 * MIB, 5 << 30, 1)]].concat());
}

/// The map of memory in the zero page: start, length and type of each entry.
fn map(image: &LinuxImage) -> Vec<(u64, u64, u32)> {
    let word = |entry: u64, offset: u64| word(image, BOOT_PARAMS.0 + 0x2d0 + 20 * entry + offset);
    let entries = bytes(image, BOOT_PARAMS.0 + 0x1e8, 1)[0].into();
    (0..entries).map(|entry| (word(entry, 0), word(entry, 8), word(entry, 16) as u32)).collect()
}

#[test]
fn the_map_of_one_range_of_memory_has_the_two_entries_that_kernels_want() {
    for mib in [2, 512] {
        let image = stage(Kernel::Raw { contents: &[0xf4], gpa: KERNEL_MIN }, None, "q", mib * MIB).unwrap();
        let map = map(&image);
        assert!(map.len() >= 2 && map.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{map:x?}");
        assert_eq!(map.last(), Some(&(MIB, (mib - 1) * MIB, 1)));
        // All that the kernel is given lies in RAM.
        let given = image.pages().iter().map(|(range, _)| (range.start().0, range.end().0));
        let is_ram = |(start, end)| map.iter().any(|(at, len, kind)| *kind == 1 && *at <= start && end <= at + len);
        assert!(given.into_iter().all(is_ram), "{:x?}", image.pages());
    }
    // Memory that ends where the hole does.
    let slots = [range(0, MIB), range(2 * MIB, MIB)];
    let image = LinuxImage::new(Kernel::Raw { contents: &[0xf4], gpa: Gpa(2 * MIB) }, None, "q", &slots).unwrap();
    assert_eq!(map(&image)[3..], [(2 * MIB, MIB, 1)]);
}

#[test]
fn what_a_header_does_not_reach_is_not_taken_from_the_code_behind_it() {
    let image = stage(Kernel::BzImage(&changed(0x201, &[0x62])), None, "", 16 * MIB).unwrap();
    assert_eq!(bytes(&image, BOOT_PARAMS.0 + 0x264, 8), [0; 8]);
    let mut file = changed(0x201, &[0x62]);
    file[0x264..0x26c].fill(0xaa);
    let other = stage(Kernel::BzImage(&file), None, "", 16 * MIB).unwrap();
    assert_eq!(image.pages(), other.pages());
    // Nor is a list of data that the file claims to be in memory.
    let list = stage(Kernel::BzImage(&changed(0x250, &[0xaa; 8])), None, "", 16 * MIB).unwrap();
    assert_eq!(word(&list, BOOT_PARAMS.0 + 0x250), 0);
}

#[test]
fn a_file_that_is_no_64_bit_bzimage_is_refused_with_the_reason() {
    let refused = |file: &[u8]| refusal(Kernel::BzImage(file), None, "");
    for len in [0, 0x201, 0x202, 0x263] {
        assert!(refused(&bzimage(&[1; 0x1000])[..len]).contains("setup header"), "{len:#x}");
    }
    assert!(refused(&changed(0x202, b"Hdrs")).contains("no bzimage"));
    for (at, bytes) in [(0x201, &[0x60][..]), (0x206, &[0x0b]), (0x211, &[0]), (0x236, &[0])] {
        assert!(refused(&changed(at, bytes)).contains("64-bit entry point"), "{at:#x}");
    }
    assert!(refused(&bzimage(&[1; 0x200])).contains("ends before the kernel's entry point"));
    assert!(refused(&changed(0x1f1, &[255])).contains("ends before the kernel's entry point"));
    assert!(refused(&changed(0x230, &[0; 4])).contains("no alignment"));
}

#[test]
fn a_kernel_that_lies_or_runs_outside_of_memory_is_refused_with_the_place() {
    let refused = |file: &[u8]| refusal(Kernel::BzImage(file), None, "");
    assert!(refused(&changed(0x214, &0xf_f000u32.to_le_bytes())).contains("the kernel of 0x1000 bytes at 0xff000"));
    assert!(refused(&changed(0x214, &u32::MAX.to_le_bytes())).contains("the kernel of 0x1000 bytes at 0xffffffff"));
    assert!(refused(&changed(0x260, &u32::MAX.to_le_bytes())).contains("the running kernel of 0xffffffff bytes"));
    assert!(refused(&changed(0x258, &[0xff; 8])).contains("at 0xffffffffffffffff"));
    assert!(refused(&bzimage(&vec![1; 15 << 20 | 1])).contains("the kernel of 0xf00001 bytes"));
    let small = [range(0, 0x8000), range(MIB, 15 * MIB)];
    let first = LinuxImage::new(Kernel::BzImage(&bzimage(&[1; 0x1000])), None, "", &small);
    assert!(matches!(first, Err(Error::Layout(reason)) if reason.contains("the first mib")));
    let high = LinuxImage::new(Kernel::BzImage(&bzimage(&[1; 0x1000])), None, "", &[range(4 << 30, MIB)]);
    assert!(matches!(high, Err(Error::Layout(_))));
}

#[test]
fn a_kernel_may_lie_across_the_border_of_two_slots() {
    let contents = vec![3; 2 << 20];
    let memory = [range(2 * MIB, 14 * MIB), range(0, 2 * MIB)];
    let image = LinuxImage::new(Kernel::BzImage(&bzimage(&contents)), None, "", &memory).unwrap();
    let one = stage(Kernel::BzImage(&bzimage(&contents)), None, "", 16 * MIB).unwrap();
    assert_eq!(bytes(&image, MIB, 2 << 20), contents);
    assert_eq!(ranges(&image), ranges(&one));
}

#[test]
fn a_command_line_that_the_kernel_does_not_take_is_refused() {
    let file = bzimage(&[1; 0x1000]);
    assert!(stage(Kernel::BzImage(&file), None, &"x".repeat(255), 16 * MIB).is_ok());
    assert!(refusal(Kernel::BzImage(&file), None, &"x".repeat(256)).contains("it takes 255 bytes"));
    for line in ["a\0b", "a\nb", "\u{e9}"] {
        assert!(refusal(Kernel::BzImage(&file), None, line).contains("the command line will not do"), "{line:?}");
    }
    let greedy = changed(0x238, &u32::MAX.to_le_bytes());
    assert!(stage(Kernel::BzImage(&greedy), None, &"x".repeat(0xffff), 16 * MIB).is_ok());
    assert!(refusal(Kernel::BzImage(&greedy), None, &"x".repeat(0x1_0000)).contains("it takes 65535 bytes"));
}

#[test]
fn an_initial_ram_disk_never_meets_the_kernel_or_its_limit() {
    let place = |initrd: usize, last: u32| {
        let file = changed(0x22c, &last.to_le_bytes());
        let image = stage(Kernel::BzImage(&file), Some(&vec![7; initrd]), "", 16 * MIB)?;
        Ok::<_, Error>(word(&image, BOOT_PARAMS.0 + 0x218) & 0xffff_ffff)
    };
    assert_eq!(place(1, u32::MAX).unwrap(), 16 * MIB - 0x1000);
    assert_eq!(place(0x1001, 0x7f_ffff).unwrap(), 8 * MIB - 0x2000);
    assert_eq!(place(0x1000, 0x7f_fffe).unwrap(), 8 * MIB - 0x2000);
    // The kernel needs what is between 1 and 3 MiB.
    assert_eq!(place(13 << 20, u32::MAX).unwrap(), 3 * MIB);
    for (initrd, last) in [(13 << 20 | 1, u32::MAX), (1, 3 * MIB as u32), (64 << 20, u32::MAX), (1, 0)] {
        let Err(Error::Image { reason }) = place(initrd, last) else { panic!("not refused") };
        assert!(reason.contains("no room for an initial ram disk"), "{reason}");
    }
    // And below a kernel that lies high.
    let file = elf((15 * MIB).wrapping_sub(LINKED_HIGHER), &[(15 * MIB, &[1; 16], MIB)]);
    let image = stage(Kernel::Elf(&file), Some(&[7; 16]), "", 16 * MIB).unwrap();
    assert_eq!(u64::from(word(&image, BOOT_PARAMS.0 + 0x218) as u32), 15 * MIB - 0x1000);
}

#[test]
fn an_elf_file_starts_at_its_physical_entry_point_with_zeros_behind_its_segments() {
    let file = elf((2 * MIB + 0x10).wrapping_sub(LINKED_HIGHER), &[(2 * MIB, &[1; 0x20], 0x3000)]);
    let image = stage(Kernel::Elf(&file), None, "", 16 * MIB).unwrap();
    assert_eq!(image.entry(), Gpa(2 * MIB + 0x10));
    assert_eq!(bytes(&image, 2 * MIB, 0x20), [1; 0x20]);
    assert_eq!(image.pages().last().unwrap(), &(range(2 * MIB + 0x1000, 0x2000), None));
    assert_eq!(bytes(&image, BOOT_PARAMS.0 + 0x202, 4), b"HdrS");

    let linked = elf(2 * MIB, &[(2 * MIB, &[1; 0x20], 0x3000)]);
    assert!(refusal(Kernel::Elf(&linked), None, "").contains("no physical address"));
    let low = elf(0x8000u64.wrapping_sub(LINKED_HIGHER), &[(0x8000, &[1; 0x20], 0x20)]);
    assert!(refusal(Kernel::Elf(&low), None, "").contains("a segment of 0x20 bytes at 0x8000"));
    let long = elf((2 * MIB).wrapping_sub(LINKED_HIGHER), &[(2 * MIB, &[1; 0x20], 1 << 40)]);
    assert!(refusal(Kernel::Elf(&long), None, "").contains("a segment of 0x10000000000 bytes"));
    let segments = [(2 * MIB, &[1; 0x20][..], 0x20), (2 * MIB + 8, &[1; 8], 8)];
    let overlapping = elf((2 * MIB).wrapping_sub(LINKED_HIGHER), &segments);
    assert!(refusal(Kernel::Elf(&overlapping), None, "").contains("overlap"));
}

#[test]
fn raw_code_is_loaded_where_it_is_told() {
    let image = stage(Kernel::Raw { contents: &[1; 0x10], gpa: Gpa(2 * MIB + 8) }, None, "", 16 * MIB).unwrap();
    assert_eq!(image.entry(), Gpa(2 * MIB + 8));
    assert_eq!(bytes(&image, 2 * MIB, 8), [0; 8]);
    assert_eq!(bytes(&image, 2 * MIB + 8, 0x10), [1; 0x10]);
    for (len, gpa) in [(0, 2 * MIB), (1, 16 * MIB), (2, 16 * MIB - 1), (1, 0), (1, u64::MAX)] {
        let reason = refusal(Kernel::Raw { contents: &vec![1; len], gpa: Gpa(gpa) }, None, "");
        assert!(reason.contains("the code of"), "{reason}");
    }
}

#[test]
fn memory_above_what_is_loaded_changes_nothing_but_the_zero_page() {
    let file = bzimage(&[1; 0x1000]);
    let [small, large] = [16 * MIB, 1 << 40].map(|bytes| stage(Kernel::BzImage(&file), None, "a", bytes).unwrap());
    assert_eq!(ranges(&small), ranges(&large));
    for (one, other) in small.pages().iter().zip(large.pages()) {
        assert_eq!(one.1 == other.1, one.0.start() != BOOT_PARAMS, "{}", one.0);
    }
}

/// Stages `file` as whatever kernel it may be, and checks what comes of it.
fn stage_any(file: &[u8], initrd: &[u8], line: &str) {
    let memory = [range(0, 4 * MIB), range(6 * MIB, 4 * MIB)];
    let raw = Kernel::Raw { contents: file, gpa: Gpa(2 * MIB + 1) };
    for kernel in [Kernel::BzImage(file), Kernel::Elf(file), raw] {
        let Ok(image) = LinuxImage::new(kernel, Some(initrd), line, &memory) else { continue };
        assert!(image.pages().windows(2).all(|pair| pair[0].0.end() <= pair[1].0.start()));
        assert!(image.pages().iter().all(|(page, _)| memory.iter().any(|slot| slot.contains_range(page))));
        let sizes = image.pages().iter().filter_map(|(page, contents)| Some((page.len(), contents.as_ref()?.len())));
        assert!(sizes.into_iter().all(|(page, contents)| page == contents as u64));
        assert!(image.pages().iter().any(|(page, contents)| page.contains(image.entry()) && contents.is_some()));
    }
}

proptest! {
    #[test]
    fn garbage_is_refused_or_gives_sound_pages(file: Vec<u8>, initrd: Vec<u8>, line: String) {
        stage_any(&file, &initrd, &line);
    }

    #[test]
    fn a_damaged_bzimage_is_refused_or_gives_sound_pages(
        damage in prop::collection::vec((0x1f1usize..0x26c, any::<u8>()), 1..6), len in 0usize..0x1500
    ) {
        let mut file = bzimage(&[1; 0x1000]);
        damage.iter().for_each(|(at, byte)| file[*at] = *byte);
        file.truncate(len.max(0x200));
        stage_any(&file, &[7; 100], "console=ttyS0");
    }

    #[test]
    fn a_damaged_elf_file_is_refused_or_gives_sound_pages(
        damage in prop::collection::vec((0usize..64 + 2 * 56, any::<u8>()), 1..6)
    ) {
        let segments = [(2 * MIB, &[1; 0x20][..], 0x3000), (7 * MIB, &[2; 0x1800], 0x1800)];
        let mut file = elf((2 * MIB).wrapping_sub(LINKED_HIGHER), &segments);
        damage.iter().for_each(|(at, byte)| file[*at] = *byte);
        stage_any(&file, &[7; 100], "");
    }
}
