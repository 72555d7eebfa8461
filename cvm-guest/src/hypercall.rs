//! The hypercall for conversions, `KVM_HC_MAP_GPA_RANGE` (Linux `Documentation/virt/kvm/x86/hypercalls.rst`): its number in
//! RAX, the first address in RBX, how many pages in RCX, attributes in RDX. The answer is in RAX.

use cvm_core::Side;

/// Its number (Linux `include/uapi/linux/kvm_para.h`, as the attribute).
pub(crate) const MAP_GPA_RANGE: u64 = 12;

/// The attributes of pages that shall be on this side: the bit "encrypted".
pub(crate) const fn attributes(to: Side) -> u64 {
    match to {
        Side::Private => 1 << 4,
        Side::Shared => 0,
    }
}

/// Answers other than 0: Linux error numbers. The VMM's are positive, KVM's own are negative.
pub(crate) const EAGAIN: u64 = 11;
pub(crate) const EINVAL: u64 = 22;
pub(crate) const KVM_EINVAL: u64 = 0u64.wrapping_sub(EINVAL);
