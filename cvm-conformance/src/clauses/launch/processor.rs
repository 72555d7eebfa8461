//! Chapter 2: the processor that guests are shown.

use crate::Bench;
use crate::clause::Verdict;
use cvm_core::Platform;
use cvm_core::boot::Exits;
use cvm_core::x86::Register;

const REGISTERS: [Register; 4] = [Register::Rax, Register::Rbx, Register::Rcx, Register::Rdx];

/// The leaves with the numbers of the last basic and the last extended leaf. Processors of Intel's answer for later ones with
/// another leaf.
const BASIC: u32 = 0;
const EXTENDED: u32 = 0x8000_0000;

/// The leaves of enclaves, TDX, SVM, encryption by several keys and the reverse map (Intel SDM, volume 2, CPUID; AMD64 APM volume
/// 3, section E.4).
const TECHNOLOGIES: [u32; 5] = [0x12, 0x21, 0x8000_000a, 0x8000_0023, 0x8000_0025];

/// Bits of other leaves with the same meaning: VMX, SVM, SGX, and the control of SGX's launches.
const BITS: [(&str, u32, Register, u32); 4] = [
    ("vmx", 1, Register::Rcx, 5),
    ("svm", 0x8000_0001, Register::Rcx, 2),
    ("sgx", 7, Register::Rbx, 2),
    ("sgx launch control", 7, Register::Rcx, 30),
];

/// The leaf of memory encryption, and in its EAX the bits of SME, SEV, SEV-ES and SEV-SNP; its EBX begins with the number of the
/// bit in page tables.
const ENCRYPTION: u32 = 0x8000_001f;
const SME: u32 = 1 << 0;
const SEV: u32 = 1 << 1;
const SEV_ES: u32 = 1 << 3;
const SEV_SNP: u32 = 1 << 4;
const PRIVATE_BIT: u32 = 0x3f;

pub(super) fn technologies<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut interface = None;
    let mut guest = bench.guest(bench.config(1), |a| {
        interface = Some(a.interface());
        for leaf in [BASIC, EXTENDED] {
            a.cpuid_of(leaf, Register::Rax)?;
            a.report()?;
        }
        for leaf in TECHNOLOGIES.into_iter().chain([ENCRYPTION]) {
            for register in REGISTERS {
                a.cpuid_of(leaf, register)?;
                a.report()?;
            }
        }
        for (_, leaf, register, _) in BITS {
            a.cpuid_of(leaf, register)?;
            a.report()?;
        }
        a.end(0)
    });
    let interface = interface.expect("a guest that was assembled");
    let [basic, extended] = [(); 2].map(|()| guest.report());
    assert!(basic >= 7 && extended > EXTENDED, "the last leaves are {basic:#x} and {extended:#x}");
    let mut leaf = |leaf: u32| {
        let registers = REGISTERS.map(|_| guest.report());
        let last = if leaf < EXTENDED { basic } else { extended };
        if leaf <= last { registers } else { [0; 4] }
    };
    for technology in TECHNOLOGIES {
        assert_eq!(leaf(technology), [0; 4], "leaf {technology:#x}");
    }
    let [eax, ebx, ecx, edx] = leaf(ENCRYPTION);
    match interface.private_bit {
        None => assert_eq!([eax, ebx, ecx, edx], [0; 4], "leaf {ENCRYPTION:#x}"),
        Some(bit) => {
            let stronger = [(SME, false), (SEV_ES, interface.exits == Exits::Ghcb), (SEV_SNP, interface.acceptance)];
            let promised = stronger.into_iter().find(|(bit, has)| eax & bit != 0 && !has);
            assert!(promised.is_none(), "leaf {ENCRYPTION:#x}: eax is {eax:#x}");
            assert_ne!(eax & SEV, 0, "leaf {ENCRYPTION:#x}: eax is {eax:#x}");
            assert_eq!(ebx & PRIVATE_BIT, u32::from(bit), "leaf {ENCRYPTION:#x}: ebx is {ebx:#x}");
            assert_eq!([ecx, edx], [0; 2], "leaf {ENCRYPTION:#x} has numbers of the host's guests");
        }
    }
    for (name, _, _, bit) in BITS {
        assert_eq!(guest.report() & 1 << bit, 0, "the processor promises {name}");
    }
    guest.end();
    Verdict::Met
}
