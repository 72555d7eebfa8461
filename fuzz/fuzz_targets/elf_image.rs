//! A guest's image as a file from anywhere: it is refused, or its pages are sound and come from the file.

#![no_main]

use cvm_core::image::Image;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    let Ok(image) = Image::from_elf(file) else { return };
    let pages = image.pages();
    assert!(pages.windows(2).all(|pair| pair[0].0.end() <= pair[1].0.start()), "{image:?}");
    assert!(pages.iter().any(|(range, contents)| range.contains(image.entry()) && contents.is_some()), "{image:?}");
    let mut bytes = 0;
    for (range, contents) in pages {
        let Some(contents) = contents else { continue };
        assert_eq!(contents.len() as u64, range.len());
        bytes += contents.iter().filter(|byte| **byte != 0).count();
    }
    assert!(bytes <= file.len());
});
