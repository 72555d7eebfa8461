//! Demands of a guest's policy, enforced or refused.

use crate::Error;
use crate::host::setting;
use cvm_core::Policy;
use kvm_bindings::{KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, kvm_enable_cap};
use kvm_ioctls::{Kvm, VmFd};

/// What decides about a policy on this host.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    /// `/sys/devices/system/cpu/smt/active`.
    smt_active: Option<String>,
    /// `/sys/devices/system/cpu/vulnerabilities/l1tf`.
    l1tf: Option<String>,
    /// `/sys/module/kvm_intel/parameters/vmentry_l1d_flush`.
    l1d_flush: Option<String>,
    /// `/sys/module/kvm/parameters/enable_pmu`.
    counters: Option<String>,
    /// Whether KVM can leave performance counters out of a VM.
    can_disable_counters: bool,
}

/// Whether KVM can leave performance counters out of a VM; it does not say so where it has none for any.
fn can_disable_counters(kvm: &Kvm) -> bool {
    let counters = kvm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    counters > 0 && counters as u32 & KVM_PMU_CAP_DISABLE != 0
}

impl Facts {
    pub(crate) fn of(kvm: &Kvm) -> Self {
        Self {
            smt_active: setting("/sys/devices/system/cpu/smt/active"),
            l1tf: setting("/sys/devices/system/cpu/vulnerabilities/l1tf"),
            l1d_flush: setting("/sys/module/kvm_intel/parameters/vmentry_l1d_flush"),
            counters: setting("/sys/module/kvm/parameters/enable_pmu"),
            can_disable_counters: can_disable_counters(kvm),
        }
    }

    /// Why this host cannot fulfil `policy`: a reason for each demand that it cannot.
    pub(crate) fn refusals(&self, policy: Policy) -> Vec<String> {
        policy.iter().filter_map(|demand| self.refusal(demand)).collect()
    }

    fn refusal(&self, demand: Policy) -> Option<String> {
        match demand {
            Policy::NO_SMT => match self.smt_active.as_deref() {
                Some("0") => None,
                Some(_) => Some("smt is on: write off to /sys/devices/system/cpu/smt/control".into()),
                None => Some("the kernel does not say whether smt is on".into()),
            },
            Policy::NO_PERFORMANCE_COUNTERS if self.can_disable_counters => None,
            Policy::NO_PERFORMANCE_COUNTERS => match self.counters.as_deref() {
                Some("N" | "0") => None,
                _ => Some("kvm cannot leave out performance counters: it has no KVM_PMU_CAP_DISABLE".into()),
            },
            Policy::FLUSH_L1D => match (self.l1tf.as_deref(), self.l1d_flush.as_deref()) {
                (Some("Not affected"), _) | (_, Some("always")) => None,
                (_, Some(mode)) => Some(format!("kvm_intel.vmentry_l1d_flush is {mode}: it must be always")),
                (_, None) => Some("the kernel does not say whether the l1d cache needs to be flushed".into()),
            },
            Policy::NO_DEBUG => Some("whoever holds the vcpus can debug them, and that is the vmm".into()),
            unknown => Some(format!("the demand {:#x} is not known here", unknown.bits())),
        }
    }
}

/// Makes `vm`, which has no vCPU yet, as `policy` demands, which this host was found to be able to.
pub(crate) fn enforce(facts: &Facts, vm: &VmFd, policy: Policy) -> Result<(), Error> {
    if policy.contains(Policy::NO_PERFORMANCE_COUNTERS) && facts.can_disable_counters {
        let mut counters = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
        counters.args[0] = KVM_PMU_CAP_DISABLE.into();
        vm.enable_cap(&counters).map_err(Error::kvm("leave out performance counters"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strict() -> Facts {
        Facts {
            smt_active: Some("0".into()),
            l1tf: Some("Mitigation: PTE Inversion".into()),
            l1d_flush: Some("always".into()),
            counters: Some("Y".into()),
            can_disable_counters: true,
        }
    }

    #[test]
    fn a_host_that_fulfils_every_demand_refuses_only_what_the_vmm_could_undo() {
        assert!(strict().refusals(Policy::empty()).is_empty());
        assert!(strict().refusals(Policy::all() - Policy::NO_DEBUG).is_empty());
        assert_eq!(strict().refusals(Policy::NO_DEBUG).len(), 1);
        let without = Facts { counters: Some("N".into()), can_disable_counters: false, ..strict() };
        assert!(without.refusals(Policy::NO_PERFORMANCE_COUNTERS).is_empty());
        let unaffected = Facts { l1tf: Some("Not affected".into()), l1d_flush: None, ..strict() };
        assert!(unaffected.refusals(Policy::FLUSH_L1D).is_empty());
    }

    #[test]
    fn each_demand_that_a_host_cannot_fulfil_has_a_reason_of_its_own() {
        let lax = Facts {
            smt_active: Some("1".into()),
            l1tf: Some("Mitigation: PTE Inversion".into()),
            l1d_flush: Some("cond".into()),
            counters: Some("Y".into()),
            can_disable_counters: false,
        };
        let reasons = lax.refusals(Policy::all());
        assert_eq!(reasons.len(), 4, "{reasons:?}");
        assert!(reasons[0].contains("smt") && reasons[2].contains("cond"), "{reasons:?}");
    }

    #[test]
    fn what_a_host_does_not_say_is_refused() {
        let silent = Facts { can_disable_counters: true, ..Facts::default() };
        assert_eq!(silent.refusals(Policy::NO_SMT | Policy::FLUSH_L1D).len(), 2);
        let unknown = Policy::from_bits_retain(1 << 40);
        assert_eq!(strict().refusals(unknown | Policy::NO_SMT).len(), 1, "an unknown demand was ignored");
    }
}
