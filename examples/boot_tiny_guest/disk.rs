//! The file behind the guest's disk.

use crate::block::BlockDevice;
use crate::files::temporary;
use crate::program::note;
use cvm::BoxError;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use tiny_guest::{DISK_STREAM, Report, SECTOR, WRITTEN_SECTORS, pattern};

/// How much made-up data there is when no file is given: what a KVM host that emulates instructions hashes in a second.
const DEFAULT_LEN: usize = 32 << 10;

/// From this length on the user is told why nothing happens.
const LONG: u64 = 256 << 20;

/// The disk as it was given, and a copy for the guest that is gone at the end.
pub struct Disk {
    original: File,
    copy: File,
    len: u64,
    sha256: [u8; 32],
}

impl Disk {
    /// A copy of `path`, or of made-up data.
    pub fn new(path: Option<&Path>) -> Result<Self, BoxError> {
        let mut original = match path {
            Some(path) => {
                File::open(path).map_err(|error| format!("failed to open the disk {}: {error}", path.display()))?
            }
            None => {
                let data: Vec<u8> = (0..DEFAULT_LEN).map(|index| pattern(0, 0, index)).collect();
                temporary("the disk", |file| file.write_all_at(&data, 0))?.0
            }
        };
        let name = path.map_or("the disk".into(), |path| format!("a copy of {}", path.display()));
        let len = original.metadata().map_err(|error| format!("failed to read the length of {name}: {error}"))?.len();
        if len >= LONG {
            note(format_args!("copying and hashing {} MiB, {name}; the guest will read all of it too", len >> 20));
        }
        let (mut copy, len) = temporary(&name, |copy| io::copy(&mut original, copy))?;
        if len < (WRITTEN_SECTORS * SECTOR) as u64 || !len.is_multiple_of(SECTOR as u64) {
            return Err(format!(
                "a disk of {len} bytes will not do: it takes a multiple of {SECTOR}, and at least {WRITTEN_SECTORS} of them"
            )
            .into());
        }
        let sha256 = hash(&mut copy)?;
        Ok(Self { original, copy, len, sha256 })
    }

    /// The device that serves it.
    pub fn device(&self) -> io::Result<BlockDevice> {
        Ok(BlockDevice::new(self.copy.try_clone()?, self.len / SECTOR as u64))
    }

    /// How many bytes it has.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// What it hashed to before the guest had it.
    pub fn sha256(&self) -> [u8; 32] {
        self.sha256
    }

    /// Whether the file holds what the guest should have written where it says, and is the same everywhere else.
    pub fn holds_what_was_written(&self, report: &Report, nonce: u64) -> io::Result<bool> {
        let written: Vec<u8> = (0..WRITTEN_SECTORS * SECTOR).map(|index| pattern(nonce, DISK_STREAM, index)).collect();
        let Some(offset) = report.written_at.checked_mul(SECTOR as u64) else { return Ok(false) };
        if offset.checked_add(written.len() as u64).is_none_or(|end| end > self.len) {
            return Ok(false);
        }
        let mut found = vec![0; written.len()];
        self.copy.read_exact_at(&mut found, offset)?;
        Ok(found == written)
    }

    /// Whether the file is what it was, but for the sectors that the guest was to write.
    pub fn is_unchanged_elsewhere(&self, report: &Report) -> io::Result<bool> {
        let written = report.written_at..report.written_at.saturating_add(WRITTEN_SECTORS as u64);
        let (mut old, mut new) = ([0; SECTOR], [0; SECTOR]);
        for sector in (0..self.len / SECTOR as u64).filter(|sector| !written.contains(sector)) {
            self.original.read_exact_at(&mut old, sector * SECTOR as u64)?;
            self.copy.read_exact_at(&mut new, sector * SECTOR as u64)?;
            if old != new {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// SHA-256 of a whole file.
fn hash(file: &mut File) -> io::Result<[u8; 32]> {
    file.seek(SeekFrom::Start(0))?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 64 << 10];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hash.finalize().into()),
            len => hash.update(&chunk[..len]),
        }
    }
}
