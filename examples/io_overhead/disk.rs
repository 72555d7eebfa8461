//! The file behind a guest's disk, which says what must be where.

use crate::block::BlockDevice;
use crate::files::temporary;
use cvm::BoxError;
use io_guest::{Case, DISK_LEN, MAX_REQUEST, SECTOR, WRITTEN, word};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The file.
pub struct Disk {
    file: File,
    /// What is written to a block, but for the stamp.
    written: Vec<u8>,
}

impl Disk {
    /// A new file whose first half has the words of `nonce`.
    pub fn new(nonce: u64) -> Result<Self, BoxError> {
        let words = |words: std::ops::Range<usize>| -> Vec<u8> {
            words.flat_map(|index| word(nonce, index).to_le_bytes()).collect()
        };
        let (file, ()) = temporary("the disk", |file| {
            file.set_len(DISK_LEN as u64)?;
            (0..WRITTEN)
                .step_by(MAX_REQUEST)
                .try_for_each(|start| file.write_all_at(&words(start / 8..(start + MAX_REQUEST) / 8), start as u64))
        })?;
        Ok(Self { file, written: words(0..MAX_REQUEST / 8) })
    }

    /// The device that serves it.
    pub fn device(&self) -> io::Result<BlockDevice> {
        Ok(BlockDevice::new(self.file.try_clone()?, (DISK_LEN / SECTOR) as u64))
    }

    /// Whether the file has every block that `case` was to write, byte for byte.
    pub fn holds(&self, case: &Case) -> io::Result<bool> {
        let mut block = vec![0; case.size as usize];
        for offset in (0..case.count).map(|index| case.offset(index)) {
            self.file.read_exact_at(&mut block, offset as u64)?;
            if block[..8] != case.stamp(offset).to_le_bytes() || block[8..] != self.written[8..block.len()] {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
