//! What the processor says of itself, as the secure processor vouches for it (AMD publication 56860, section 8.14.2.6).

use cvm_core::PAGE_SIZE;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The most leaves that the page has.
const MOST_LEAVES: usize = 64;

/// A leaf of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CpuidLeaf {
    /// EAX on input: the leaf.
    pub leaf: u32,
    /// ECX on input: the subleaf; 0 where there are none.
    pub subleaf: u32,
    /// XCR0 that the answer is for, where it depends on it.
    pub xcr0: u64,
    /// The MSR XSS that the answer is for, where it depends on it.
    pub xss: u64,
    /// EAX, EBX, ECX and EDX.
    pub registers: [u32; 4],
    /// Zero.
    pub reserved: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Page {
    count: u32,
    reserved: [u32; 3],
    leaves: [CpuidLeaf; MOST_LEAVES],
    rest: [u8; PAGE_SIZE as usize - 16 - MOST_LEAVES * size_of::<CpuidLeaf>()],
}

/// The leaf about extended states. Its first two subleaves depend on what is switched on of them.
const XSAVE_LEAF: u32 = 0xd;

/// Leaves whose answer depends on the subleaf (AMD publication 24594, appendix E; Intel SDM, volume 2, CPUID).
fn has_subleaves(leaf: u32) -> bool {
    const LEAVES: [u32; 21] = [
        0x4,
        0x7,
        0xb,
        XSAVE_LEAF,
        0xf,
        0x10,
        0x12,
        0x14,
        0x17,
        0x18,
        0x1d,
        0x1e,
        0x1f,
        0x24,
        0x8000_001d,
        0x8000_0020,
        0x8000_0026,
        0x1a,
        0x1b,
        0x20,
        0x23,
    ];
    LEAVES.contains(&leaf)
}

/// The leaves that the secure processor has checked: a private page that the launch filled, and nobody changes.
#[derive(Debug, Clone, Copy)]
pub struct CpuidTable(&'static [CpuidLeaf]);

impl CpuidTable {
    /// The table in `page`; nothing if the page is none, or counts more leaves than it has.
    pub fn new(page: &'static [u8; PAGE_SIZE as usize]) -> Option<Self> {
        let page = Page::ref_from_bytes(page).ok()?;
        let count = usize::try_from(page.count).ok().filter(|count| *count > 0)?;
        Some(Self(page.leaves.get(..count)?))
    }

    /// Its leaves.
    pub fn leaves(&self) -> &'static [CpuidLeaf] {
        self.0
    }

    /// EAX, EBX, ECX and EDX of a leaf; zeros where the table has none, as the processor answers in the ranges that it has.
    ///
    /// What depends on XCR0 is answered for the x87 state with or without SSE, which is what a guest of this library
    /// runs with.
    pub fn get(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let is_it = |entry: &&CpuidLeaf| {
            let legacy = matches!(entry.xcr0, 1 | 3) && entry.xss == 0;
            entry.leaf == leaf
                && (!has_subleaves(leaf) || entry.subleaf == subleaf)
                && (leaf != XSAVE_LEAF || subleaf > 1 || legacy)
        };
        self.0.iter().find(is_it).map_or([0; 4], |entry| entry.registers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(count: u32, leaves: &[CpuidLeaf]) -> &'static [u8; PAGE_SIZE as usize] {
        #[repr(align(4096))]
        struct Aligned([u8; PAGE_SIZE as usize]);
        let page = Box::leak(Box::new(Aligned([0; PAGE_SIZE as usize])));
        page.0[..4].copy_from_slice(&count.to_le_bytes());
        page.0[16..16 + size_of_val(leaves)].copy_from_slice(leaves.as_bytes());
        &page.0
    }

    fn leaf(leaf: u32, subleaf: u32, xcr0: u64, eax: u32) -> CpuidLeaf {
        CpuidLeaf { leaf, subleaf, xcr0, xss: 0, registers: [eax, 2, 3, 4], reserved: 0 }
    }

    #[test]
    fn leaves_are_found_by_what_they_depend_on() {
        let leaves = [
            leaf(0, 0, 0, 10),
            leaf(7, 0, 0, 11),
            leaf(7, 1, 0, 12),
            leaf(XSAVE_LEAF, 0, 7, 13),
            leaf(XSAVE_LEAF, 0, 1, 14),
            leaf(XSAVE_LEAF, 2, 0, 15),
        ];
        let table = CpuidTable::new(page(6, &leaves)).unwrap();
        let eax = |leaf, subleaf| table.get(leaf, subleaf)[0];
        assert_eq!([eax(0, 0), eax(0, 9), eax(7, 0), eax(7, 1), eax(7, 2)], [10, 10, 11, 12, 0]);
        assert_eq!([eax(XSAVE_LEAF, 0), eax(XSAVE_LEAF, 2), eax(XSAVE_LEAF, 1)], [14, 15, 0]);
        assert_eq!(table.get(1, 0), [0; 4]);
    }

    #[test]
    fn a_page_that_counts_more_leaves_than_it_has_is_none() {
        assert!(CpuidTable::new(page(0, &[])).is_none());
        assert!(CpuidTable::new(page(64, &[])).is_some());
        assert!(CpuidTable::new(page(65, &[])).is_none());
        assert!(CpuidTable::new(page(u32::MAX, &[])).is_none());
    }

    proptest! {
        #[test]
        fn whatever_the_page_has_an_answer_is_of_the_leaf_that_was_asked_for(
            count in 1u32..65, leaves in prop::collection::vec((0u32..16, 0u32..3, 0u64..4), 64), asked in 0u32..16,
        ) {
            let leaves: Vec<_> = leaves.iter().map(|(number, subleaf, xcr0)| leaf(*number, *subleaf, *xcr0, number + 1)).collect();
            let eax = CpuidTable::new(page(count, &leaves)).unwrap().get(asked, 1)[0];
            prop_assert!(eax == 0 || eax == asked + 1);
        }
    }
}
