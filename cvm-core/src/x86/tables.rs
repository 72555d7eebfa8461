//! Page tables for guests that have none of their own.

use super::{GIB, TABLE_ENTRIES, entry};
use crate::{Error, Gpa, PAGE_SIZE};

const LARGE_PAGE: u64 = 2 << 20;

/// What a private bit can be: above what an identity map reaches, and among the bits of an entry that hold an address
/// (AMD64 APM volume 2, section 5.3.3).
const FIRST_PRIVATE_BIT: u8 = 39;
const LAST_PRIVATE_BIT: u8 = 51;

/// How far an identity map reaches at least: past where other machines have their devices, so that a guest which tries
/// to reach one is refused as such and does not merely fault.
const LEAST_TOP: u64 = 4 * GIB;

/// Page tables, to be loaded at `tables`, that map `0..top` (at least 4 GiB, and rounded up to 1 GiB) to itself by pages
/// of 2 MiB: not of 1 GiB, which KVM hosts that emulate instructions do not walk.
///
/// Where a `private_bit` in the entries makes private what they lead to, it is set in them; and the same is mapped at
/// [`SHARED_AT`](super::SHARED_AT) once more, with that bit in no entry of the last level.
///
/// # Errors
/// [`Error::Layout`] when `top` is above 512 GiB, which is where one page of second-level tables ends, or the bit is none
/// of those between the addresses of memory and the bits for other things.
pub fn identity_map(tables: Gpa, top: u64, private_bit: Option<u8>) -> Result<Vec<u8>, Error> {
    let gibibytes = top.max(LEAST_TOP).div_ceil(GIB);
    if gibibytes > TABLE_ENTRIES {
        return Err(Error::Layout(format!("an identity map ends at 512 GiB, below {top:#x}")));
    }
    let private = match private_bit {
        None => 0,
        Some(bit @ FIRST_PRIVATE_BIT..=LAST_PRIVATE_BIT) => 1 << bit,
        Some(bit) => return Err(Error::Layout(format!("bit {bit} of a page-table entry cannot make a page private"))),
    };
    // One tree for the private side and one for the shared side: a second-level table, and those that it leads to.
    let tree = 1 + gibibytes;
    let sides: &[u64] = if private == 0 { &[0] } else { &[private, 0] };
    let table = |index: u64| (tables.0 + index * PAGE_SIZE) | entry::PRESENT | entry::WRITABLE | private;
    let root = (0..TABLE_ENTRIES).map(|i| if i < sides.len() as u64 { table(1 + i * tree) } else { 0 });
    let mut entries: Vec<u64> = root.collect();
    for (side, bit) in (0..).zip(sides) {
        let second = (0..TABLE_ENTRIES).map(|i| if i < gibibytes { table(2 + side * tree + i) } else { 0 });
        let page = |i: u64| (i * LARGE_PAGE) | entry::PRESENT | entry::WRITABLE | entry::LARGE | bit;
        entries.extend(second.chain((0..gibibytes * TABLE_ENTRIES).map(page)));
    }
    Ok(entries.into_iter().flat_map(u64::to_le_bytes).collect())
}

#[cfg(test)]
mod tests {
    use super::super::SHARED_AT;
    use super::*;

    /// Walks the tables as the processor does.
    fn walk(tables: &[u8], base: u64, address: u64) -> Option<u64> {
        let read = |table: u64, index: u64| {
            let at = (table - base + index * 8) as usize;
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        let mut table = base;
        for shift in [39, 30, 21] {
            let entry = read(table, address >> shift & 0x1ff);
            if entry & entry::PRESENT == 0 {
                return None;
            }
            table = entry & !0xfff & !(1 << 63);
            if shift == 21 {
                assert_ne!(entry & entry::LARGE, 0);
                return Some(table + address % LARGE_PAGE);
            }
        }
        None
    }

    #[test]
    fn the_identity_map_maps_every_address_to_itself_and_nothing_above() {
        let tables = identity_map(Gpa(0x10_0000), 4 * GIB + 1, None).unwrap();
        assert_eq!(tables.len() as u64, 7 * PAGE_SIZE);
        for address in [0, 0x1234, LARGE_PAGE - 1, GIB + 5, 5 * GIB - 1] {
            assert_eq!(walk(&tables, 0x10_0000, address), Some(address));
        }
        assert_eq!(walk(&tables, 0x10_0000, 5 * GIB), None);
        assert_eq!(identity_map(Gpa(0), 1, None).unwrap().len() as u64, 6 * PAGE_SIZE);
        assert!(identity_map(Gpa(0), 513 * GIB, None).is_err());
    }

    #[test]
    fn with_a_private_bit_both_sides_are_mapped_and_only_the_private_one_has_it_at_the_end() {
        let bit = 1 << 51;
        let tables = identity_map(Gpa(0x10_0000), 4 * GIB + 1, Some(51)).unwrap();
        assert_eq!(tables.len() as u64, 13 * PAGE_SIZE);
        let pointers = tables.chunks(8).map(|entry| u64::from_le_bytes(entry.try_into().unwrap()));
        let tables_alone = pointers.filter(|entry| *entry != 0 && entry & entry::LARGE == 0);
        assert!(tables_alone.clone().count() == 12 && tables_alone.clone().all(|entry| entry & bit != 0));
        let cleared = |entry: u64| if entry & entry::LARGE == 0 { entry & !bit } else { entry };
        let bytes =
            tables.chunks(8).flat_map(|entry| cleared(u64::from_le_bytes(entry.try_into().unwrap())).to_le_bytes());
        let bytes: Vec<u8> = bytes.collect();
        for address in [0, 0x1234, GIB + 5, 5 * GIB - 1] {
            assert_eq!(walk(&bytes, 0x10_0000, address), Some(address | bit));
            assert_eq!(walk(&bytes, 0x10_0000, SHARED_AT + address), Some(address));
        }
        assert_eq!(walk(&bytes, 0x10_0000, SHARED_AT + 5 * GIB), None);
        assert!(identity_map(Gpa(0), 1, Some(38)).is_err() && identity_map(Gpa(0), 1, Some(52)).is_err());
    }
}
