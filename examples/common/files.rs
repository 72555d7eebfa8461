//! Files that the user names, and temporary ones. Every error names the file.

#![allow(dead_code, reason = "each program uses a part")]

use crate::program::chain;
use cvm::BoxError;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// The start of a file, which says what it is.
const START: u64 = 4096;

/// The most bytes of a file that are read: more do not fit into a guest.
const MOST: u64 = 3328 << 20;

/// For `map_err`: adds the file that an error is about.
pub fn named<E: Into<BoxError>>(path: &Path) -> impl Fn(E) -> BoxError {
    move |error| format!("{}: {}", path.display(), chain(&*error.into())).into()
}

/// Reads a file that must be `kind`. If its start `is_no` such file, the rest is not read.
pub fn read(path: &Path, kind: &str, is_no: impl Fn(&[u8]) -> bool) -> Result<Vec<u8>, BoxError> {
    let failed = |error: io::Error| format!("failed to read {}: {error}", path.display());
    let mut contents = Vec::new();
    let mut file = File::open(path).map_err(failed)?;
    let is_long = file.by_ref().take(START).read_to_end(&mut contents).map_err(failed)? as u64 == START;
    if is_long && is_no(&contents) {
        return Err(format!("{} is no {kind}", path.display()).into());
    }
    if is_long && file.take(MOST).read_to_end(&mut contents).map_err(failed)? as u64 == MOST {
        return Err(
            format!("{} is larger than {MOST:#x} bytes, the most memory that a guest has", path.display()).into()
        );
    }
    Ok(contents)
}

/// Whether the start of a file is not that of an ELF file.
pub fn is_no_elf(start: &[u8]) -> bool {
    !start.starts_with(b"\x7fELF")
}

/// A temporary file that `fill` writes, for `what`.
pub fn temporary<T>(what: &str, fill: impl FnOnce(&mut File) -> io::Result<T>) -> Result<(File, T), BoxError> {
    let written = tempfile::tempfile().and_then(|mut file| {
        let filled = fill(&mut file)?;
        Ok((file, filled))
    });
    written.map_err(|error| {
        let directory = std::env::temp_dir();
        format!(
            "failed to write {what} to a temporary file in {}: {error}; TMPDIR names another directory",
            directory.display()
        )
        .into()
    })
}
