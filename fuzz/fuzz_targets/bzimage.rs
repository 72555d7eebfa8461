//! A kernel as a file from anywhere: it is refused, or laid out in memory, which it does not leave.

#![no_main]

use cvm_core::GpaRange;
use cvm_core::linux::{Kernel, LinuxImage};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    let memory = [(0, 4 << 20), (4 << 20, 8 << 20), (24 << 20, 8 << 20)];
    let memory = memory.map(|(start, len)| GpaRange::new(start, len).expect("it is sound"));
    for kernel in [Kernel::BzImage(file), Kernel::Elf(file)] {
        let Ok(image) = LinuxImage::new(kernel, Some(&file[..file.len() / 2]), "console=ttyS0", &memory) else {
            continue;
        };
        let pages = image.pages();
        assert!(pages.windows(2).all(|pair| pair[0].0.end() <= pair[1].0.start()), "{pages:x?}");
        assert!(
            pages.iter().any(|(range, contents)| range.contains(image.entry()) && contents.is_some()),
            "{pages:x?}"
        );
        let mut bytes = 0;
        for (range, contents) in pages {
            let slots = memory.iter().filter_map(|slot| slot.intersection(range)).map(|part| part.len());
            assert_eq!(slots.sum::<u64>(), range.len());
            let Some(contents) = contents else { continue };
            assert_eq!(contents.len() as u64, range.len());
            bytes += contents.iter().filter(|byte| **byte != 0).count();
        }
        // The kernel, the RAM disk, the zero page, page tables and command line.
        assert!(bytes <= 2 * file.len() + 8 * 4096);
    }
});
