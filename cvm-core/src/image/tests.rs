use super::*;
use proptest::prelude::*;

/// By how much virtual addresses are above physical ones in these files.
pub(crate) const LINKED_HIGHER: u64 = 0xffff_8000_0000_0000;

/// An ELF file with these segments: start, contents, length in memory. The entry point is a physical address too.
pub(crate) fn elf(entry: u64, segments: &[(u64, &[u8], u64)]) -> Vec<u8> {
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
    let word = |file: &mut Vec<u8>, value: u32| file.extend(value.to_le_bytes());
    let long = |file: &mut Vec<u8>, value: u64| file.extend(value.to_le_bytes());
    half(&mut file, 2);
    half(&mut file, 62);
    word(&mut file, 1);
    long(&mut file, entry.wrapping_add(LINKED_HIGHER));
    long(&mut file, 64);
    long(&mut file, 0);
    word(&mut file, 0);
    for value in [64, 56, segments.len() as u16, 64, 0, 0] {
        half(&mut file, value);
    }
    let mut offset = 64 + 56 * segments.len() as u64;
    for (start, contents, len) in segments {
        word(&mut file, 1);
        word(&mut file, 7);
        for value in [offset, *start + LINKED_HIGHER, *start, contents.len() as u64, *len, 0x1000] {
            long(&mut file, value);
        }
        offset += contents.len() as u64;
    }
    segments.iter().for_each(|(_, contents, _)| file.extend(*contents));
    file
}

fn refusal(file: &[u8]) -> String {
    match Image::from_elf(file) {
        Err(Error::Image { reason }) => reason,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn segments_become_pages_with_zeros_around_them() {
    let file = elf(0x1010, &[(0x1010, &[1; 0x20], 0x3000), (0x6000, &[2; 0x1000], 0x1000)]);
    let image = Image::from_elf(&file).unwrap();
    assert_eq!(image.entry(), Gpa(0x1010));
    let pages = image.pages();
    assert_eq!(pages.len(), 3);
    let first = pages[0].1.as_ref().unwrap();
    assert_eq!((pages[0].0.start(), first.len()), (Gpa(0x1000), 0x1000));
    assert!(first[..0x10].iter().all(|b| *b == 0) && first[0x10..0x30] == [1; 0x20] && first[0x30..] == [0; 0xfd0]);
    assert_eq!((pages[1].0, &pages[1].1), (GpaRange::new(0x2000, 0x3000).unwrap(), &None));
    assert_eq!(pages[2].1.as_deref(), Some(&[2; 0x1000][..]));
}

#[test]
fn segments_that_share_a_page_are_put_into_it_together() {
    let image = Image::from_elf(&elf(0x1000, &[(0x1000, &[1; 16], 16), (0x1800, &[2; 16], 0x900)])).unwrap();
    let page = image.pages()[0].1.as_ref().unwrap();
    assert_eq!((page[0], page[16], page[0x800], page[0x810]), (1, 0, 2, 0));
    assert_eq!((image.pages()[1].0, image.pages().len()), (GpaRange::new(0x2000, 0x1000).unwrap(), 2));
}

#[test]
fn what_is_no_sound_executable_is_refused_with_a_reason() {
    refusal(b"");
    refusal(b"#!/bin/sh\n");
    refusal(&[0; 4096]);
    assert!(refusal(&elf(0x1000, &[(0x1000, &[1; 16], 16), (0x1008, &[2; 16], 16)])).contains("overlap"));
    assert!(refusal(&elf(0x1000, &[(0x1000, &[1; 16], 0x2000), (0x2000, &[2; 16], 16)])).contains("overlap"));
    assert!(refusal(&elf(0x1000, &[(0x1000, &[1; 16], 8)])).contains("longer in the file"));
    assert!(refusal(&elf(0x1000, &[(0x1000, &[1; 16], u64::MAX)])).contains("52 bits"));
    assert!(refusal(&elf(0x9000, &[(0x1000, &[1; 16], 16)])).contains("entry point"));
    assert!(refusal(&elf(0, &[])).contains("entry point"));
    let mut twice = elf(0x1000, &[(0x1000, &[1; 900], 900), (0x8000, &[2; 900], 900)]);
    // The second segment's offset in the file is that of the first.
    twice.copy_within(64 + 8..64 + 16, 64 + 56 + 8);
    twice.truncate(64 + 2 * 56 + 900);
    assert!(refusal(&twice).contains("longer than the file"));
    let mut short = elf(0x1000, &[(0x1000, &[1; 16], 16)]);
    short.pop();
    assert!(refusal(&short).contains("outside the file"));
    let mut arm = elf(0x1000, &[(0x1000, &[1; 16], 16)]);
    arm[18] = 183;
    assert!(refusal(&arm).contains("x86-64"));
}

proptest! {
    #[test]
    fn garbage_behind_a_header_never_panics(bytes: Vec<u8>, count in 0u16..10) {
        let mut file = elf(0x1000, &[]);
        file[56..58].copy_from_slice(&count.to_le_bytes());
        file.extend(bytes);
        let _ = Image::from_elf(&file);
    }

    #[test]
    fn pages_hold_the_segments_and_nothing_else(
        segments in prop::collection::vec((0u64..0x9000, 1usize..0x1800, 0u64..0x2000), 1..6),
    ) {
        let contents = [7u8; 0x1800];
        let mut sorted: Vec<_> =
            segments.iter().map(|(start, len, more)| (*start, &contents[..*len], *len as u64 + more)).collect();
        sorted.sort_by_key(|(start, ..)| *start);
        let apart = sorted.windows(2).all(|pair| pair[0].0 + pair[0].2 <= pair[1].0);
        let image = Image::from_elf(&elf(sorted[0].0, &sorted));
        prop_assert_eq!(image.is_ok(), apart);
        let Ok(image) = image else { return Ok(()) };
        let mut memory = vec![0u8; 0x20000];
        let mut covered = vec![false; 0x20];
        for (range, contents) in image.pages() {
            for page in range.start().0 / PAGE_SIZE..range.end().0 / PAGE_SIZE {
                prop_assert!(!std::mem::replace(&mut covered[page as usize], true), "page {} comes twice", page);
            }
            if let Some(contents) = contents {
                prop_assert_eq!(contents.len() as u64, range.len());
                memory[range.start().0 as usize..range.end().0 as usize].copy_from_slice(contents);
            }
        }
        let mut expected = vec![0u8; 0x20000];
        let mut needed = vec![false; 0x20];
        for (start, contents, len) in &sorted {
            expected[*start as usize..][..contents.len()].copy_from_slice(contents);
            needed[(start / PAGE_SIZE) as usize..(start + len).div_ceil(PAGE_SIZE) as usize].fill(true);
        }
        prop_assert!(memory == expected);
        prop_assert_eq!(covered, needed);
    }
}
