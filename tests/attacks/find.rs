//! Searching files, mappings and processes for a secret.

use crate::guest::{SECRET_LEN, is_secret};
use crate::sys;
use std::fs::{self, File};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// One mapping of a process.
#[derive(Debug, Clone)]
pub struct Mapping {
    pub start: u64,
    pub end: u64,
    pub offset: u64,
    pub name: String,
}

/// More than any mapping that could hold a guest has.
const MOST: u64 = 1 << 30;

/// The mappings of the process whose directory in /proc this is.
pub fn mappings(process: &Path) -> io::Result<Vec<Mapping>> {
    Ok(fs::read_to_string(process.join("maps"))?.lines().filter_map(parse).collect())
}

/// "start-end permissions offset device inode name", the numbers in hexadecimal (proc_pid_maps(5)).
fn parse(line: &str) -> Option<Mapping> {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let offset = hex(words.nth(1)?)?;
    let name = words.skip(2).collect::<Vec<_>>().join(" ");
    Some(Mapping { start: hex(start)?, end: hex(end)?, offset, name })
}

/// The name of the mapping that shows the secret, reading by `read`.
pub fn in_mappings(
    mappings: &[Mapping],
    nonce: u64,
    read: impl Fn(&mut [u8], u64) -> io::Result<usize>,
) -> Option<String> {
    let found = |mapping: &&Mapping| {
        let mut page = [0; SECRET_LEN];
        mapping.end - mapping.start <= MOST
            && (mapping.start..mapping.end)
                .step_by(SECRET_LEN)
                .any(|at| read(&mut page, at).is_ok_and(|len| len == SECRET_LEN) && is_secret(&page, nonce))
    };
    mappings.iter().find(found).map(|mapping| mapping.name.clone())
}

/// Whether a file, read or mapped, has the secret.
pub fn in_file(file: &File, nonce: u64) -> bool {
    let Ok(len) = file.metadata().map(|metadata| metadata.len().min(MOST)) else { return false };
    let mut page = [0; SECRET_LEN];
    let read =
        (0..len).step_by(SECRET_LEN).any(|at| file.read_exact_at(&mut page, at).is_ok() && is_secret(&page, nonce));
    read || in_mapped(file, len, nonce).unwrap_or(false)
}

fn in_mapped(file: &File, len: u64, nonce: u64) -> Option<bool> {
    let file = FileOffset::new(file.try_clone().ok()?, 0);
    let region = MmapRegion::<()>::from_file(file, usize::try_from(len).ok().filter(|len| *len > 0)?).ok()?;
    let mut page = [0; SECRET_LEN];
    Some((0..region.size()).step_by(SECRET_LEN).any(|at| {
        let slice = region.get_slice(at, SECRET_LEN);
        slice.is_ok_and(|slice| slice.copy_to(&mut page[..]) == SECRET_LEN) && is_secret(&page, nonce)
    }))
}

/// What a process has open, by number, with the names that the kernel gives.
pub fn descriptors(process: &Path) -> io::Result<Vec<(RawFd, String)>> {
    let entries = fs::read_dir(process.join("fd"))?.collect::<io::Result<Vec<_>>>()?;
    let named = entries.iter().filter_map(|entry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        Some((number, fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned()))
    });
    Ok(named.collect())
}

/// Whether a descriptor may lead to memory: reading the others could hold up the attacker.
pub fn is_memory(name: &str) -> bool {
    !["pipe:", "socket:", "/dev/", "/proc/"].iter().any(|other| name.starts_with(other))
}

/// Copies of the descriptors of this process whose names have `name` in them.
pub fn all_own(name: &str) -> Vec<OwnedFd> {
    let all = descriptors(Path::new("/proc/self")).unwrap_or_default();
    all.iter().filter(|(_, own)| own.contains(name)).filter_map(|(fd, _)| sys::duplicate(*fd).ok()).collect()
}

/// A second descriptor for the first of this process's that has such a name.
pub fn own(name: &str) -> Option<OwnedFd> {
    let all = descriptors(Path::new("/proc/self")).ok()?;
    let (fd, _) = all.iter().find(|(_, own)| own.contains(name))?;
    sys::duplicate(*fd).ok()
}
