//! The files behind guest memory.

use crate::Error;
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create,
};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

/// One side of a VM's memory: an anonymous file of fixed size, sparse at first.
#[derive(Debug)]
pub(crate) struct Backing {
    file: File,
}

impl Backing {
    /// A file of `bytes` zeros, called `name` where the kernel lists open files.
    pub(crate) fn new(name: &str, bytes: u64) -> Result<Self, Error> {
        let make = || {
            let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
            ftruncate(&file, bytes)?;
            // Nobody who gets hold of the file can make a mapping of it fault by shrinking it.
            fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            Ok(Self { file: File::from(file) })
        };
        make().map_err(|error: rustix::io::Errno| Error::Backing { step: "create a file", bytes, source: error.into() })
    }

    /// A file that somebody else has made, if it has `bytes` bytes and keeps them: so that nobody can make a mapping of it
    /// fault.
    pub(crate) fn adopt(file: OwnedFd, bytes: u64) -> Result<Self, Error> {
        let fail = |source| Error::Backing { step: "take over a file", bytes, source };
        let seals = fcntl_get_seals(&file).map_err(|error| fail(error.into()))?;
        let file = File::from(file);
        let len = fstat(&file).map_err(|error| fail(error.into()))?.st_size;
        if u64::try_from(len) != Ok(bytes) || !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(fail(io::Error::other("it has another size, or its size is not fixed")));
        }
        Ok(Self { file })
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()? })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Frees the memory behind `len` bytes at `offset`, which then read as zero.
    pub(crate) fn free(&self, offset: u64, len: u64) -> io::Result<()> {
        Ok(fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)?)
    }

    /// How many bytes of memory are behind the file now.
    pub(crate) fn allocated(&self) -> io::Result<u64> {
        // The unit of st_blocks is 512 bytes, whatever the block size (stat(2)).
        Ok(fstat(&self.file)?.st_blocks as u64 * 512)
    }
}
