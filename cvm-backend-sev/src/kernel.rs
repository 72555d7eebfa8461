//! The hashes of a kernel that is loaded beside the firmware, which finds them in measured memory and checks the kernel.
//!
//! The table and its GUIDs: edk2, `OvmfPkg/AmdSev/BlobVerifierLibSevHashes`; QEMU, `target/i386/sev.c`.

use crate::guid::{Guid, guid};
use cvm_core::PAGE_SIZE;
use sha2::{Digest, Sha256};

const HEADER: Guid = guid(0x9438_d606, 0x4f22, 0x4cc9, 0xb479_a793_d411_fd21);
const COMMAND_LINE: Guid = guid(0x97d0_2dd8, 0xbd20, 0x4c94, 0xaa78_e771_4d36_ab2a);
const INITRD: Guid = guid(0x44ba_f731, 0x3a2f, 0x4bd7, 0x9af1_41e2_9169_781d);
const KERNEL: Guid = guid(0x4de7_9437, 0xabd2, 0x427f, 0xb835_d5b1_72d2_045b);

/// A GUID, a length in 2 bytes, and SHA-256.
const ENTRY_BYTES: usize = 16 + 2 + 32;
/// A GUID, a length in 2 bytes, and three entries.
const USED_BYTES: usize = 16 + 2 + 3 * ENTRY_BYTES;
/// The whole table: what SEV encrypts comes in pieces of 16 bytes.
pub const TABLE_BYTES: usize = USED_BYTES.next_multiple_of(16);

/// Hashes of a kernel, its initial RAM disk and its command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelHashes {
    kernel: [u8; 32],
    initrd: [u8; 32],
    command_line: [u8; 32],
}

impl KernelHashes {
    /// Those of files and of a command line. No RAM disk is an empty one. The command line is hashed with a zero byte at its
    /// end, which is how QEMU hands it over.
    pub fn new(kernel: &[u8], initrd: &[u8], command_line: &[u8]) -> Self {
        let command_line = Sha256::new_with_prefix(command_line).chain_update([0]).finalize();
        Self {
            kernel: Sha256::digest(kernel).into(),
            initrd: Sha256::digest(initrd).into(),
            command_line: command_line.into(),
        }
    }

    /// The table as the firmware reads it.
    pub fn table(&self) -> [u8; TABLE_BYTES] {
        let mut table = [0; TABLE_BYTES];
        let mut rest = &mut table[..];
        let mut put = |bytes: &[u8]| {
            let (place, after) = std::mem::take(&mut rest).split_at_mut(bytes.len());
            place.copy_from_slice(bytes);
            rest = after;
        };
        put(&HEADER);
        put(&(USED_BYTES as u16).to_le_bytes());
        for (guid, hash) in [(COMMAND_LINE, self.command_line), (INITRD, self.initrd), (KERNEL, self.kernel)] {
            put(&guid);
            put(&(ENTRY_BYTES as u16).to_le_bytes());
            put(&hash);
        }
        table
    }

    /// A page of zeros with the table at an offset; nothing if it does not fit.
    pub(crate) fn page(&self, offset: usize) -> Option<[u8; PAGE_SIZE as usize]> {
        let mut page = [0; PAGE_SIZE as usize];
        page.get_mut(offset..)?.first_chunk_mut().map(|place| *place = self.table())?;
        Some(page)
    }
}
