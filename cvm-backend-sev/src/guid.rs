//! Identifiers as UEFI has them in memory.

/// A GUID: the first three fields little endian, the rest as it is written (UEFI specification, appendix A).
pub(crate) type Guid = [u8; 16];

/// `aaaaaaaa-bbbb-cccc-dddd-dddddddddddd`, with the last two parts as one number.
pub(crate) const fn guid(a: u32, b: u16, c: u16, d: u64) -> Guid {
    let (a, b, c, d) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes(), d.to_be_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}
