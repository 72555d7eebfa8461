//! CPUID leaves: that of memory encryption, and the page that the firmware vouches for (AMD publication 56860, section 8.17.2.6,
//! "CPUID Page").

use super::Error;
use cvm_backend_kvm::backend::Host;
use cvm_core::{PAGE_SIZE, Protection};
use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use std::fmt;

/// The leaf of memory encryption (AMD64 APM volume 3, section E.4.17).
pub(super) const ENCRYPTION_LEAF: u32 = 0x8000_001f;

/// What KVM has of that leaf.
pub(super) fn encryption(host: &Host) -> Option<&kvm_cpuid_entry2> {
    host.supported_cpuid().as_slice().iter().find(|leaf| leaf.function == ENCRYPTION_LEAF)
}

/// Bits of its EAX, by technology.
const SEV_EAX: u32 = 1 << 1;
const SEV_ES_EAX: u32 = 1 << 3;
const SEV_SNP_EAX: u32 = 1 << 4;

/// Shows a guest the memory encryption that it has, and nothing of the host's: neither stronger kinds, nor SME, nor ASIDs.
pub(super) fn encrypted(mut cpuid: CpuId, protection: Protection) -> CpuId {
    let shown = match protection {
        Protection::SevSnp => SEV_EAX | SEV_ES_EAX | SEV_SNP_EAX,
        Protection::SevEs => SEV_EAX | SEV_ES_EAX,
        _ => SEV_EAX,
    };
    for entry in cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == ENCRYPTION_LEAF) {
        entry.eax &= shown;
        (entry.ecx, entry.edx) = (0, 0);
    }
    cpuid
}

/// How many leaves the page has room for, and the bytes before them and of each.
const MOST: usize = 64;
const HEADER: usize = 16;
const LEAF: usize = 48;

/// Where a leaf's registers are in it: EAX, EBX, ECX, EDX; before them are what the leaf was asked for.
const REGISTERS: usize = 24;

/// What leaf 0xd has to say of an XSAVE area with nothing but x87 and SSE state: 512 bytes and a header of 64 (AMD64 APM volume
/// 2, section 11.5.2). The guest adds up the rest by itself, as what it enables is not known yet.
const EXTENDED_STATE: u32 = 0xd;
const LEGACY_AREA: u32 = 512 + 64;
const X87: u64 = 1;

/// The bits of leaves that KVM can emulate and SEV-SNP guests cannot have, because the firmware does not vouch for them: the
/// deadline timer, an offset to the time-stamp counter, and MSRs against speculation that the host would have to pass on.
const NOT_VOUCHED: [(u32, u32, Register, u32); 4] = [
    (1, 0, Register::Ecx, 1 << 24),
    (7, 0, Register::Ebx, 1 << 1),
    (7, 0, Register::Edx, 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 31),
    (0x8000_0008, 0, Register::Ebx, 1 << 25),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    Ebx,
    Ecx,
    Edx,
}

/// What the firmware changes about one leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuidCorrection {
    /// The leaf.
    pub leaf: u32,
    /// The subleaf.
    pub subleaf: u32,
    /// EAX, EBX, ECX and EDX as the vCPUs have them.
    pub given: [u32; 4],
    /// The same as the firmware would have them.
    pub corrected: [u32; 4],
}

impl fmt::Display for CpuidCorrection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "leaf {:#x}.{:#x}", self.leaf, self.subleaf)?;
        for (name, (given, corrected)) in
            ["eax", "ebx", "ecx", "edx"].iter().zip(self.given.iter().zip(&self.corrected))
        {
            if given != corrected {
                write!(f, " {name} {given:#x} -> {corrected:#x}")?;
            }
        }
        Ok(())
    }
}

/// Takes from a processor what no SEV-SNP guest can have.
pub(super) fn vouchable(mut cpuid: CpuId) -> CpuId {
    for entry in cpuid.as_mut_slice() {
        for (leaf, subleaf, register, bits) in NOT_VOUCHED {
            if (entry.function, entry.index) == (leaf, subleaf) {
                match register {
                    Register::Ebx => entry.ebx &= !bits,
                    Register::Ecx => entry.ecx &= !bits,
                    Register::Edx => entry.edx &= !bits,
                }
            }
        }
    }
    cpuid
}

/// The page for a vCPU that has `cpuid`. Leaves that say nothing are left out: one that is not in the page is zero to a guest.
pub(super) fn page(cpuid: &CpuId) -> Result<[u8; PAGE_SIZE as usize], Error> {
    let says = |entry: &&kvm_cpuid_entry2| (entry.eax | entry.ebx | entry.ecx | entry.edx) != 0;
    let leaves: Vec<_> = cpuid.as_slice().iter().filter(says).collect();
    if leaves.len() > MOST {
        return Err(Error::Options(format!(
            "the vcpus have {} cpuid leaves; the page has room for {MOST}",
            leaves.len()
        )));
    }
    let mut page = [0; PAGE_SIZE as usize];
    page[..4].copy_from_slice(&(leaves.len() as u32).to_le_bytes());
    for (entry, slot) in leaves.into_iter().zip(page[HEADER..].chunks_exact_mut(LEAF)) {
        let whole_area = entry.function == EXTENDED_STATE && entry.index < 2;
        let (state, ebx) = if whole_area { (X87, LEGACY_AREA) } else { (0, entry.ebx) };
        slot[..4].copy_from_slice(&entry.function.to_le_bytes());
        slot[4..8].copy_from_slice(&entry.index.to_le_bytes());
        slot[8..16].copy_from_slice(&state.to_le_bytes());
        for (value, place) in [entry.eax, ebx, entry.ecx, entry.edx].iter().zip(slot[REGISTERS..].chunks_exact_mut(4)) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    }
    Ok(page)
}

/// What differs between a page as it was given and as it came back.
pub(super) fn corrections(given: &[u8], corrected: &[u8]) -> Vec<CpuidCorrection> {
    let number = |leaf: &[u8], at: usize| leaf[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let registers = |leaf: &[u8]| std::array::from_fn(|register| number(leaf, REGISTERS + 4 * register));
    let [given, corrected] = [given, corrected].map(|page| page.get(HEADER..).unwrap_or_default().chunks_exact(LEAF));
    let pairs = given.zip(corrected).take(MOST);
    pairs
        .filter(|(given, corrected)| given != corrected)
        .map(|(given, corrected)| CpuidCorrection {
            leaf: number(given, 0),
            subleaf: number(given, 4),
            given: registers(given),
            corrected: registers(corrected),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_cpuid_entry2;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn the_page_has_the_leaves_that_say_something_where_the_firmware_looks_for_them() {
        let leaves = [entry(0, 0, [0x10, 1, 2, 3]), entry(3, 0, [0; 4]), entry(0xd, 1, [9, 0x9999, 0, 0])];
        let page = page(&CpuId::from_entries(&leaves).unwrap()).unwrap();
        let number = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
        assert_eq!((number(0), number(4), number(8)), (2, 0, 0));
        assert_eq!(
            [16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60].map(number),
            [0, 0, 0, 0, 0, 0, 0x10, 1, 2, 3, 0, 0]
        );
        assert_eq!([64, 68, 72, 76].map(number), [0xd, 1, 1, 0], "an area is asked for with x87 state alone");
        assert_eq!([88, 92].map(number), [9, 0x240]);
        assert!(page[16 + 2 * 48..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn more_leaves_than_fit_are_refused() {
        let leaves: Vec<_> = (0..65).map(|leaf| entry(leaf, 0, [1; 4])).collect();
        assert!(matches!(page(&CpuId::from_entries(&leaves).unwrap()), Err(Error::Options(_))));
        assert!(page(&CpuId::from_entries(&leaves[1..]).unwrap()).is_ok());
    }

    #[test]
    fn a_correction_names_the_registers_that_change() {
        let leaves = [entry(1, 0, [1, 2, 3, 4]), entry(7, 0, [5, 0xf, 7, 8])];
        let given = page(&CpuId::from_entries(&leaves).unwrap()).unwrap();
        let mut corrected = given;
        corrected[16 + 48 + 28] = 0xd;
        let found = corrections(&given, &corrected);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].leaf, found[0].given[1], found[0].corrected[1]), (7, 0xf, 0xd));
        assert_eq!(found[0].to_string(), "leaf 0x7.0x0 ebx 0xf -> 0xd");
        assert!(corrections(&given, &given).is_empty());
    }

    #[test]
    fn a_guest_is_shown_its_own_memory_encryption_alone() {
        let all = u32::MAX;
        for (protection, eax) in [(Protection::Sev, 0x2), (Protection::SevEs, 0xa), (Protection::SevSnp, 0x1a)] {
            let leaves = [entry(1, 0, [all; 4]), entry(ENCRYPTION_LEAF, 0, [all; 4])];
            let cpuid = encrypted(CpuId::from_entries(&leaves).unwrap(), protection);
            let [other, leaf] = cpuid.as_slice() else { panic!("{cpuid:?}") };
            assert_eq!([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx], [eax, all, 0, 0], "{protection}");
            assert_eq!([other.eax, other.ebx, other.ecx, other.edx], [all; 4], "{protection}");
        }
    }

    #[test]
    fn what_no_guest_can_have_is_taken_from_the_processor() {
        let leaves =
            [entry(1, 0, [0, 0, u32::MAX, 0]), entry(7, 1, [0, u32::MAX, 0, 0]), entry(7, 0, [0, 3, 0, u32::MAX])];
        let cpuid = vouchable(CpuId::from_entries(&leaves).unwrap());
        let entries = cpuid.as_slice();
        assert_eq!((entries[0].ecx, entries[1].ebx), (!(1 << 24), u32::MAX));
        assert_eq!((entries[2].ebx, entries[2].edx), (1, 0x03ff_ffff));
    }
}
