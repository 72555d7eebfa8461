//! Archives in cpio's "newc" format, which Linux unpacks as its first root file system.

const DIRECTORY: u32 = 0o040755;
const PROGRAM: u32 = 0o100755;

/// An archive in the making; everything in it belongs to root.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds an empty directory. Its parent has to be there already.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY, &[]);
    }

    /// Adds an executable file.
    pub fn program(&mut self, path: &str, contents: &[u8]) {
        self.entry(path, PROGRAM, contents);
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, contents: &[u8]) {
        self.entries += 1;
        let (inode, size, name_size) = (self.entries, contents.len(), path.len() + 1);
        self.bytes.extend_from_slice(b"070701");
        // inode, mode, uid, gid, links, mtime, size, four device numbers, name's size, checksum
        let fields = [inode, mode, 0, 0, 1, 0, size as u32, 0, 0, 0, 0, name_size as u32, 0];
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_every_entry_on_a_multiple_of_four_bytes_and_ends_with_the_trailer() {
        let mut archive = Archive::default();
        archive.directory("bin");
        archive.program("bin/sh", b"12345");
        let bytes = archive.finish();

        assert_eq!(bytes.len() % 4, 0);
        let headers: Vec<usize> = (0..bytes.len()).filter(|&at| bytes[at..].starts_with(b"070701")).collect();
        assert_eq!(headers, [0, 116, 116 + 120 + 8]);
        assert_eq!(&bytes[110..114], b"bin\0");
        assert_eq!(&bytes[14..22], b"000041ed");
        assert_eq!(&bytes[236..244], b"12345\0\0\0");
        assert_eq!(&bytes[354..365], b"TRAILER!!!\0");
    }
}
