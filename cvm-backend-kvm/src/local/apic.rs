//! The local APICs that the kernel emulates, without any chip around them.

use crate::Error;
use crate::host::Host;
use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_IRQ_ROUTING_MSI, KVM_MP_STATE_RUNNABLE,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, KVM_X86_QUIRK_LAPIC_MMIO_HOLE,
    KVM_X86_QUIRK_LINT0_REENABLED, kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_mp_state, kvm_msi,
};
use kvm_ioctls::{Cap, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};

/// `IA32_APIC_BASE`, and its bits for an APIC in x2APIC mode (Intel SDM, volume 3, section 12.12.1).
const APIC_BASE: u32 = 0x1b;
const APIC_BASE_EXTD: u64 = 1 << 10;
const APIC_BASE_EN: u64 = 1 << 11;

/// The second byte of the spurious-interrupt vector register, whose lowest bit enables the APIC (Intel SDM, volume 3,
/// section 12.9).
const SVR_ENABLE: usize = 0xf1;

/// The address of a message to an APIC (Intel SDM, volume 3, section 12.11.1).
const MESSAGE: u32 = 0xfee0_0000;

/// The quirks that guests must be spared: reads as all ones where the APIC's page would be, and a first vCPU that takes
/// interrupts from a PIC that is not there (Linux Documentation/virt/kvm/api.rst, KVM_CAP_DISABLE_QUIRKS2).
const QUIRKS: u32 = KVM_X86_QUIRK_LAPIC_MMIO_HOLE | KVM_X86_QUIRK_LINT0_REENABLED;

/// What this host's KVM lacks for local APICs; nothing if it lacks nothing.
pub(crate) fn lacks(host: &Host) -> Option<&'static str> {
    let has = |cap| host.kvm.check_extension(cap);
    let ids = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    let needs = [
        (has(Cap::SplitIrqchip), "local apics alone (KVM_CAP_SPLIT_IRQCHIP)"),
        (host.capability(KVM_CAP_X2APIC_API) & ids == ids, "32-bit apic ids (KVM_CAP_X2APIC_API)"),
        (host.capability(KVM_CAP_DISABLE_QUIRKS2) & QUIRKS == QUIRKS, "apics without quirks (KVM_CAP_DISABLE_QUIRKS2)"),
        (has(Cap::X86MsrFilter), "protected msrs (KVM_CAP_X86_MSR_FILTER)"),
        (has(Cap::SignalMsi), "interrupt messages (KVM_CAP_SIGNAL_MSI)"),
        (has(Cap::IrqRouting) && has(Cap::Irqfd), "interrupts by eventfd (KVM_CAP_IRQFD, KVM_CAP_IRQ_ROUTING)"),
    ];
    needs.into_iter().find(|(there, _)| !there).map(|(_, what)| what)
}

/// Gives `vm`, which has no vCPU yet, a local APIC in each vCPU.
pub(crate) fn enable(vm: &VmFd) -> Result<(), Error> {
    let ids = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    // No route is reserved for an I/O APIC.
    for (cap, argument) in [(KVM_CAP_SPLIT_IRQCHIP, 0), (KVM_CAP_X2APIC_API, ids), (KVM_CAP_DISABLE_QUIRKS2, QUIRKS)] {
        let mut enable = kvm_enable_cap { cap, ..Default::default() };
        enable.args[0] = argument.into();
        vm.enable_cap(&enable).map_err(Error::kvm("enable local apics"))?;
    }
    // In x2APIC mode nothing is emulated at an address. A guest that leaves it gets a general-protection fault.
    let fixed = MsrFilterRange { flags: MsrFilterRangeFlags::WRITE, base: APIC_BASE, msr_count: 1, bitmap: &[0] };
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[fixed]).map_err(Error::kvm("keep guests in x2apic mode"))
}

/// Sets the state that a vCPU's APIC starts from, and lets the vCPU run without another one's start-up signal.
pub(crate) fn start(vcpu: &VcpuFd) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("read the system registers"))?;
    sregs.apic_base |= APIC_BASE_EN | APIC_BASE_EXTD;
    vcpu.set_sregs(&sregs).map_err(Error::kvm("set the system registers"))?;
    let mut apic = vcpu.get_lapic().map_err(Error::kvm("read a local apic"))?;
    apic.regs[SVR_ENABLE] |= 1;
    vcpu.set_lapic(&apic).map_err(Error::kvm("set a local apic"))?;
    let runnable = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
    vcpu.set_mp_state(runnable).map_err(Error::kvm("make a vcpu runnable"))
}

/// The message that raises `vector` as an edge on the vCPU `vcpu`: its 32-bit id is spread over both halves of the
/// address (Linux Documentation/virt/kvm/api.rst, KVM_CAP_X2APIC_API).
fn message(vcpu: u32, vector: u8) -> (u32, u32, u32) {
    (MESSAGE | (vcpu & 0xff) << 12, vcpu & !0xff, vector.into())
}

pub(crate) fn msi(vcpu: u32, vector: u8) -> kvm_msi {
    let (address_lo, address_hi, data) = message(vcpu, vector);
    kvm_msi { address_lo, address_hi, data, ..Default::default() }
}

/// A route from `gsi` to such a message.
pub(crate) fn route(gsi: u32, vcpu: u32, vector: u8) -> kvm_irq_routing_entry {
    let (address_lo, address_hi, data) = message(vcpu, vector);
    let msi = kvm_irq_routing_msi { address_lo, address_hi, data, ..Default::default() };
    let u = kvm_irq_routing_entry__bindgen_ty_1 { msi };
    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, u, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_a_vcpu_by_all_bits_of_its_index() {
        assert_eq!(message(0, 0x41), (0xfee0_0000, 0, 0x41));
        assert_eq!(message(3, 0xff), (0xfee0_3000, 0, 0xff));
        assert_eq!(message(0x3ff, 0x20), (0xfeef_f000, 0x300, 0x20));
    }
}
