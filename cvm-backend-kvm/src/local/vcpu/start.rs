//! What a vCPU is before it runs: the processor that it shows, and the state that it starts from.

use crate::Error;
use cvm_core::doorbell::Transport;
use cvm_core::x86::{Segment, VcpuState};
use cvm_core::{InterruptController, Policy, VmConfig};
use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

/// Bits of CPUID leaf 1 that speak of a local APIC: in ECX x2APIC and the TSC deadline timer, in EDX the APIC itself
/// (Intel SDM, volume 2, CPUID).
const X2APIC_ECX: u32 = 1 << 21;
const DEADLINE_ECX: u32 = 1 << 24;
const APIC_EDX: u32 = 1 << 9;

/// The leaves that describe performance counters (Intel SDM, volume 2, CPUID; AMD64 APM volume 3, section E.4).
const CPUID_COUNTERS: u32 = 0xa;
const CPUID_AMD_COUNTERS: u32 = 0x8000_0022;

/// The leaf of KVM's features, and the one that says that `KVM_HC_MAP_GPA_RANGE` works
/// (Linux arch/x86/include/uapi/asm/kvm_para.h).
const KVM_CPUID_FEATURES: u32 = 0x4000_0001;
const KVM_FEATURE_HC_MAP_GPA_RANGE: u32 = 1 << 16;

/// The leaves of technologies that no guest has: enclaves, TDX, nested virtualisation by SVM, encryption by several keys, and
/// SEV-SNP's reverse map, which is the host's (Intel SDM, volume 2, CPUID; AMD64 APM volume 3, section E.4).
const OF_TECHNOLOGIES: [u32; 5] = [0x12, 0x21, 0x8000_000a, 0x8000_0023, 0x8000_0025];

/// The leaf of memory encryption (AMD64 APM volume 3, section E.4.17).
const ENCRYPTION_LEAF: u32 = 0x8000_001f;

/// Bits of other leaves for the same: VMX in leaf 1, SVM in leaf 0x80000001, both in ECX; SGX and the control of its launches in
/// leaf 7, in EBX and ECX.
const VMX_ECX: u32 = 1 << 5;
const SVM_ECX: u32 = 1 << 2;
const SGX_EBX: u32 = 1 << 2;
const SGX_LC_ECX: u32 = 1 << 30;

/// Removes the leaf of memory encryption: a guest that believed it would look for encryption that is not there.
pub(crate) fn without_encryption(mut cpuid: CpuId) -> CpuId {
    let leaves = cpuid.as_mut_slice().iter_mut();
    leaves.filter(|entry| entry.function == ENCRYPTION_LEAF).for_each(clear);
    cpuid
}

/// Removes the technologies that no guest has.
fn remove_technologies(entry: &mut kvm_cpuid_entry2) {
    match (entry.function, entry.index) {
        (leaf, _) if OF_TECHNOLOGIES.contains(&leaf) => clear(entry),
        (1, _) => entry.ecx &= !VMX_ECX,
        (0x8000_0001, _) => entry.ecx &= !SVM_ECX,
        (7, 0) => {
            entry.ebx &= !SGX_EBX;
            entry.ecx &= !SGX_LC_ECX;
        }
        _ => {}
    }
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

/// Shows the processor `cpuid` to the guest, with the vCPU's index as its APIC id and without technologies that no guest has.
pub(crate) fn set_cpuid(
    mut cpuid: CpuId,
    vcpu: &VcpuFd,
    index: u32,
    transport: Transport,
    config: &VmConfig,
) -> Result<(), Error> {
    for entry in cpuid.as_mut_slice() {
        remove_technologies(entry);
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0x00ff_ffff | index << 24;
                match config.interrupt_controller {
                    InterruptController::None => {
                        entry.ecx &= !(X2APIC_ECX | DEADLINE_ECX);
                        entry.edx &= !APIC_EDX;
                    }
                    InterruptController::Apic => {
                        entry.ecx |= X2APIC_ECX;
                        entry.edx |= APIC_EDX;
                    }
                }
            }
            CPUID_COUNTERS | CPUID_AMD_COUNTERS if config.policy.contains(Policy::NO_PERFORMANCE_COUNTERS) => {
                clear(entry);
            }
            KVM_CPUID_FEATURES if transport == Transport::Hypercall => entry.eax |= KVM_FEATURE_HC_MAP_GPA_RANGE,
            0xb | 0x1f => entry.edx = index,
            _ => {}
        }
    }
    vcpu.set_cpuid2(&cpuid).map_err(Error::kvm("set the cpuid leaves"))
}

/// A segment register as KVM has it.
fn segment(segment: Segment) -> kvm_segment {
    let bits = |from: u16, count: u16| (segment.attributes >> from & ((1 << count) - 1)) as u8;
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: bits(0, 4),
        s: bits(4, 1),
        dpl: bits(5, 2),
        present: bits(7, 1),
        avl: bits(12, 1),
        l: bits(13, 1),
        db: bits(14, 1),
        g: bits(15, 1),
        ..Default::default()
    }
}

/// Gives a vCPU its initial state.
pub(crate) fn set_state(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("read the system registers"))?;
    let data = segment(state.data);
    (sregs.cs, sregs.ss) = (segment(state.code), data);
    (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
    sregs.gs = kvm_segment { base: state.gs_base, ..data };
    (sregs.gdt.base, sregs.gdt.limit) = (state.gdt_base, state.gdt_limit);
    (sregs.idt.base, sregs.idt.limit) = (state.idt_base, state.idt_limit);
    (sregs.cr0, sregs.cr3, sregs.cr4) = (state.cr0, state.cr3, state.cr4);
    sregs.efer = state.efer;
    if let Err(error) = vcpu.set_sregs(&sregs) {
        return Err(match refused_register(vcpu, &sregs, error) {
            Some((register, value)) => Error::Register { register, value, source: error.into() },
            None => Error::kvm("set the system registers")(error),
        });
    }
    let [rax, rcx, rdx, rbx] = state.rax_to_rbx;
    let [r8, r9, r10, r11, r12, r13, r14, r15] = state.r8_to_r15;
    let VcpuState { rip, rsp, rbp, rsi, rdi, rflags, .. } = *state;
    let regs = kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags };
    vcpu.set_regs(&regs).map_err(Error::kvm("set the registers"))
}

/// The one control register that KVM refuses: KVM takes the others with a usual value in its place. KVM answers EINVAL to a
/// value, so that any other error, and one of a state with nothing but usual values, has another cause.
fn refused_register(vcpu: &VcpuFd, refused: &kvm_sregs, error: kvm_ioctls::Error) -> Option<(&'static str, u64)> {
    let usual = VcpuState::LONG_MODE;
    let replaced = [
        ("cr0", refused.cr0, usual.cr0, kvm_sregs { cr0: usual.cr0, ..*refused }),
        ("cr3", refused.cr3, usual.cr3, kvm_sregs { cr3: usual.cr3, ..*refused }),
        ("cr4", refused.cr4, usual.cr4, kvm_sregs { cr4: usual.cr4, ..*refused }),
        ("efer", refused.efer, usual.efer, kvm_sregs { efer: usual.efer, ..*refused }),
    ];
    let is_refused = |(_, value, usual, sregs): &(_, u64, u64, _)| value != usual && vcpu.set_sregs(sregs).is_ok();
    let found = replaced.into_iter().filter(|_| error.errno() == libc::EINVAL).find(is_refused);
    found.map(|(register, value, ..)| (register, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_guest_is_promised_no_technology() {
        let all = u32::MAX;
        let entry = |(function, index)| kvm_cpuid_entry2 {
            function,
            index,
            eax: all,
            ebx: all,
            ecx: all,
            edx: all,
            ..Default::default()
        };
        let leaves = [
            (0, 0),
            (1, 0),
            (7, 0),
            (7, 1),
            (0x12, 1),
            (0x21, 0),
            (0x8000_0001, 0),
            (0x8000_000a, 0),
            (0x8000_001f, 0),
        ];
        let mut shown = without_encryption(CpuId::from_entries(&leaves.map(entry)).unwrap());
        shown.as_mut_slice().iter_mut().for_each(remove_technologies);
        let registers: Vec<_> = shown.as_slice().iter().map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]).collect();
        let expected = [
            [all; 4],
            [all, all, !VMX_ECX, all],
            [all, !SGX_EBX, !SGX_LC_ECX, all],
            [all; 4],
            [0; 4],
            [0; 4],
            [all, all, !SVM_ECX, all],
            [0; 4],
            [0; 4],
        ];
        assert_eq!(registers, expected);
    }
}
