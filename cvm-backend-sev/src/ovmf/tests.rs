use super::*;
use proptest::prelude::*;

/// Where the metadata of [`image`] are.
const METADATA_AT: usize = 0x1000;
const LEN: usize = 0x3000;

/// Address, length and kind of the sections of [`image`].
const SECTIONS: [(u32, u32, u32); 6] = [
    (0x80_0000, 0x9000, 1),
    (0x80_d000, 0x1000, 2),
    (0x80_e000, 0x1000, 3),
    (0x80_f000, 0x1000, 4),
    (0x81_1000, 0x2000, 1),
    (0x81_0000, 0x1000, 0x10),
];

fn entry(guid: Guid, data: &[u32]) -> Vec<u8> {
    let mut bytes: Vec<_> = data.iter().flat_map(|number| number.to_le_bytes()).collect();
    bytes.extend((bytes.len() as u16 + 18).to_le_bytes());
    bytes.extend(guid);
    bytes
}

/// Three pages with these sections and these entries of the table, and otherwise the remainders of their places by 251.
fn made_of(sections: &[(u32, u32, u32)], entries: &[Vec<u8>]) -> Vec<u8> {
    let mut image: Vec<_> = (0..LEN).map(|place| (place % 251) as u8).collect();
    let header = [METADATA_HEADER as u32 + SECTION as u32 * sections.len() as u32, 1, sections.len() as u32];
    let numbers = header.into_iter().chain(sections.iter().flat_map(|(gpa, len, kind)| [*gpa, *len, *kind]));
    let metadata: Vec<_> = b"ASEV".iter().copied().chain(numbers.flat_map(u32::to_le_bytes)).collect();
    image[METADATA_AT..METADATA_AT + metadata.len()].copy_from_slice(&metadata);
    let mut table = entries.concat();
    table.extend((table.len() as u16 + 18).to_le_bytes());
    table.extend(FOOTER);
    let end = LEN - AFTER_TABLE;
    image[end - table.len()..end].copy_from_slice(&table);
    image
}

fn entries() -> Vec<Vec<u8>> {
    vec![
        entry(RESET_BLOCK, &[0x80_b004]),
        entry(HASH_TABLE, &[0x81_0c00, 0x400]),
        entry(METADATA, &[(LEN - METADATA_AT) as u32]),
    ]
}

/// A small image that has all that there can be.
pub(crate) fn image() -> Vec<u8> {
    made_of(&SECTIONS, &entries())
}

/// The same without a page for the hashes of a kernel.
pub(crate) fn image_without_kernel_hashes() -> Vec<u8> {
    made_of(&SECTIONS[..5], &entries())
}

#[test]
fn an_image_says_how_it_is_launched() {
    let image = image();
    let firmware = Firmware::parse(&image).unwrap();
    assert_eq!(firmware.range().to_string(), "0xffffd000..0x100000000");
    assert_eq!((firmware.reset_vector(), firmware.hash_table()), (Ok(0x80_b004), Ok(Gpa(0x81_0c00))));
    let sections: Vec<_> =
        firmware.sections().unwrap().iter().map(|section| (section.range.start().0, section.kind)).collect();
    assert_eq!(sections[4..], [(0x81_1000, SectionKind::Memory), (0x81_0000, SectionKind::KernelHashes)]);
}

#[test]
fn an_image_without_a_table_says_nothing() {
    let firmware = Firmware::parse(&[0; 0x1000]).unwrap();
    assert!(
        firmware.sections().unwrap().is_empty() && firmware.reset_vector().is_err() && firmware.hash_table().is_err()
    );
}

#[test]
fn what_is_no_image_is_refused() {
    for image in [vec![], vec![0; 0x1001], vec![0; MAX_BYTES + 0x1000]] {
        assert!(matches!(Firmware::parse(&image), Err(Error::Pages { .. })), "{:#x} bytes", image.len());
    }
}

#[test]
fn a_table_that_cannot_be_is_refused_with_the_place() {
    let footer = LEN - AFTER_TABLE - ENTRY_END;
    for (at, bytes, problem) in [
        (footer, 17u16.to_le_bytes(), "table of 0x11"),
        (footer, 0xffffu16.to_le_bytes(), "table of 0xffff"),
        (footer, 0x53u16.to_le_bytes(), "no entry"),
        (footer - ENTRY_END, 17u16.to_le_bytes(), "no entry"),
        (footer - ENTRY_END, 0x7fffu16.to_le_bytes(), "no entry"),
    ] {
        let mut image = image();
        image[at..at + 2].copy_from_slice(&bytes);
        let firmware = Firmware::parse(&image).unwrap();
        let errors = [firmware.reset_vector().err(), firmware.hash_table().err(), firmware.sections().err()];
        for error in errors.map(Option::unwrap) {
            assert!(error.to_string().contains(problem), "{error}");
        }
    }
    let [reset, hashes, metadata] = entries().try_into().unwrap();
    type Read = fn(&Firmware<'_>) -> Option<Error>;
    let (vector, table): (Read, Read) = (|image| image.reset_vector().err(), |image| image.hash_table().err());
    let sections: Read = |image| image.sections().err();
    for (entries, reader, problem) in [
        (vec![reset.clone(), metadata.clone(), reset.clone()], vector, "twice"),
        (vec![metadata.clone(), hashes.clone(), metadata], sections, "twice"),
        (vec![hashes.clone(), hashes], table, "twice"),
        (vec![entry(RESET_BLOCK, &[])], vector, "too short"),
        (vec![entry(HASH_TABLE, &[0x81_0c00])], table, "too short"),
        (vec![entry(HASH_TABLE, &[0x81_0c00, 0xaf])], table, "0xaf bytes"),
        (vec![entry(METADATA, &[])], sections, "too short"),
        (vec![entry(METADATA, &[LEN as u32 + 1])], sections, "before the end"),
        (vec![entry(METADATA, &[LEN as u32])], sections, "ASEV"),
        (vec![entry(METADATA, &[3])], sections, "ASEV"),
    ] {
        let image = made_of(&SECTIONS, &entries);
        let firmware = Firmware::parse(&image).unwrap();
        let error = reader(&firmware).unwrap();
        assert!(error.to_string().contains(problem), "{error}");
        // What the damaged entry does not concern is read all the same.
        for other in [vector, table, sections].into_iter().filter(|other| !std::ptr::fn_addr_eq(*other, reader)) {
            assert!(!matches!(other(&firmware), Some(Error::Firmware { .. })), "{problem}");
        }
    }
}

#[test]
fn sections_that_cannot_be_are_refused() {
    for (section, problem) in [
        ((0x82_0000, 0x1000, 5), "kind 0x5"),
        ((0x82_0000, 0, 5), "kind 0x5"),
        ((0, 0, 2), "Secrets is one page, not 0x0 bytes"),
        ((0, 0, 3), "Cpuid is one page, not 0x0 bytes"),
        ((0, 0, 0x10), "KernelHashes is one page, not 0x0 bytes"),
        ((0x82_0000, 0x1001, 1), "whole pages"),
        ((0x82_0001, 0x1000, 1), "whole pages"),
        ((0x82_0000, 0x2000, 2), "Secrets is one page, not 0x2000 bytes"),
        ((0x80_8000, 0x1000, 1), "overlap"),
        ((0xffff_e000, 0x1000, 1), "overlap"),
        ((0xffff_c000, 0xffff_f000, 1), "overlap"),
    ] {
        let mut sections = SECTIONS.to_vec();
        sections.push(section);
        let image = made_of(&sections, &entries());
        let firmware = Firmware::parse(&image).unwrap();
        let error = firmware.sections().unwrap_err();
        assert!(error.to_string().contains(problem), "{section:x?}: {error}");
        assert_eq!((firmware.reset_vector(), firmware.hash_table()), (Ok(0x80_b004), Ok(Gpa(0x81_0c00))));
    }
    // Length, version and number of sections.
    for (at, value, problem) in [(4, 0x57u32, "6 sections"), (4, 0x7000, "6 sections"), (8, 2, "version 2")] {
        let mut image = image();
        image[METADATA_AT + at..][..4].copy_from_slice(&value.to_le_bytes());
        let error = Firmware::parse(&image).unwrap().sections().unwrap_err();
        assert!(error.to_string().contains(problem), "{error}");
    }
}

#[test]
fn memory_sections_without_a_page_are_left_out() {
    let empty = [(0, 0, 4), (0, 0, 1), (0x80_0001, 0, 1)];
    let [all, empty] = [&SECTIONS[..], &[&empty, &SECTIONS[..]].concat()].map(|list| made_of(list, &entries()));
    assert_eq!(Firmware::parse(&empty).unwrap().sections(), Firmware::parse(&all).unwrap().sections());
}

proptest! {
    #[test]
    fn changed_bytes_make_an_error_or_sound_sections(
        changes in proptest::collection::vec((0..0x100usize, any::<u8>()), 1..4),
        in_table in any::<bool>(),
    ) {
        let mut image = image();
        for (at, byte) in changes {
            image[if in_table { LEN - 0x100 } else { METADATA_AT } + at] = byte;
        }
        let firmware = Firmware::parse(&image).unwrap();
        if let Ok(sections) = firmware.sections() {
            let mut ranges: Vec<_> = sections.iter().map(|section| section.range).collect();
            ranges.push(firmware.range());
            ranges.sort();
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end() <= pair[1].start()));
        }
    }
}
