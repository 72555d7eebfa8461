//! What a vCPU is before it runs: the processor that it shows, and the state that it starts from.

use crate::Error;
use cvm_core::doorbell::Transport;
use cvm_core::x86::VcpuState;
use cvm_core::{InterruptController, Policy, VmConfig};
use kvm_bindings::{CpuId, kvm_regs, kvm_segment};
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

/// Shows the processor `cpuid` to the guest, with the vCPU's index as its APIC id.
pub(crate) fn set_cpuid(
    mut cpuid: CpuId,
    vcpu: &VcpuFd,
    index: u32,
    transport: Transport,
    config: &VmConfig,
) -> Result<(), Error> {
    for entry in cpuid.as_mut_slice() {
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
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            KVM_CPUID_FEATURES if transport == Transport::Hypercall => entry.eax |= KVM_FEATURE_HC_MAP_GPA_RANGE,
            0xb | 0x1f => entry.edx = index,
            _ => {}
        }
    }
    vcpu.set_cpuid2(&cpuid).map_err(Error::kvm("set the cpuid leaves"))
}

/// Control-register bits of a vCPU that starts in 64-bit mode (AMD64 APM volume 2, sections 3.1 and 3.1.7).
const CR0_PE_MP_ET_NE_WP_PG: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
/// The second is machine checks: KVM for AMD adds them where the host has them on, and the state is to be the same on all hosts.
const CR4_PAE_MCE: u64 = 1 << 5 | 1 << 6;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

/// Sets the state that a vCPU starts from.
pub(crate) fn set_state(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("read the system registers"))?;
    let code =
        kvm_segment { limit: u32::MAX, selector: 8, type_: 11, present: 1, s: 1, l: 1, g: 1, ..Default::default() };
    let data = kvm_segment { selector: 16, type_: 3, db: 1, l: 0, ..code };
    (sregs.cs, sregs.ss) = (code, data);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4) = (CR0_PE_MP_ET_NE_WP_PG, state.cr3, CR4_PAE_MCE);
    sregs.efer = EFER_LME_LMA;
    vcpu.set_sregs(&sregs).map_err(Error::kvm("set the system registers"))?;
    let regs =
        kvm_regs { rip: state.rip, rsp: state.rsp, rdi: state.rdi, rsi: state.rsi, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(Error::kvm("set the registers"))
}
