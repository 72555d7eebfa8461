//! What is particular to the launch of an SEV-SNP guest.

use super::command::{Attribute, attribute};
use super::{CpuidCorrection, Error};
use crate::snp::HostData;
use crate::{IdAuth, IdBlock, SevFeatures, SnpFlags, SnpPolicy};
use cvm_core::Policy;
use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// Decides whether what the firmware would have of CPUID leaves is good enough.
pub(super) type Judge = Arc<dyn Fn(&[CpuidCorrection]) -> bool + Send + Sync>;

/// Changes what vCPUs say of themselves.
pub(super) type Change = Arc<dyn Fn(&mut CpuId) + Send + Sync>;

/// What the launch of an SEV-SNP guest has besides its pages and vCPUs. What is not said is as in a guest without.
#[derive(Clone, Default)]
pub struct SnpOptions {
    policy: Option<SnpPolicy>,
    features: SevFeatures,
    pub(super) gosvw: [u8; 16],
    pub(super) id: Option<(IdBlock, IdAuth)>,
    pub(super) host_data: HostData,
    pub(super) no_vcek: bool,
    pub(super) cpuid: Option<Change>,
    pub(super) judge: Option<Judge>,
    pub(super) certificates: Option<PathBuf>,
}

impl fmt::Debug for SnpOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnpOptions").field("policy", &self.policy).field("id", &self.id).finish_non_exhaustive()
    }
}

impl SnpOptions {
    /// The guest policy. Without one it allows nothing but SMT, and not that if the VM's configuration demands that there
    /// is none.
    pub fn policy(self, policy: SnpPolicy) -> Self {
        Self { policy: Some(policy), ..self }
    }

    /// What is active in the guest besides SEV-SNP.
    pub fn features(self, features: SevFeatures) -> Self {
        Self { features, ..self }
    }

    /// What the host says of workarounds for errata that its kernel has (AMD64 APM volume 2, section 7.8.2,
    /// OS-Visible Workarounds); the guest finds it in its page of secrets.
    pub fn workarounds(self, gosvw: [u8; 16]) -> Self {
        Self { gosvw, ..self }
    }

    /// What the guest's owner says that the launch is to be: else it fails. Signed by the owner, and perhaps by the author of
    /// the owner's key.
    pub fn id_block(self, block: IdBlock, auth: IdAuth) -> Self {
        Self { id: Some((block, auth)), ..self }
    }

    /// What reports of the guest will have in HOST_DATA: the digest of the launch configuration, unless this says otherwise.
    pub fn host_data(self, host_data: HostData) -> Self {
        Self { host_data, ..self }
    }

    /// Reports are not to be signed by the key of the chip (VCEK), so that only one that was loaded (VLEK) will do.
    pub fn without_vcek(self) -> Self {
        Self { no_vcek: true, ..self }
    }

    /// Changes what the vCPUs say of themselves, which is otherwise all that KVM can show to such guests. The firmware does not
    /// vouch for what the host's processor does not have.
    pub fn cpuid(self, change: impl Fn(&mut CpuId) + Send + Sync + 'static) -> Self {
        Self { cpuid: Some(Arc::new(change)), ..self }
    }

    /// Asks `judge` when the firmware vouches for other CPUID leaves than the vCPUs have: if it agrees, the guest gets what the
    /// firmware would have, and else the launch fails, as without this.
    pub fn judge_cpuid(self, judge: impl Fn(&[CpuidCorrection]) -> bool + Send + Sync + 'static) -> Self {
        Self { judge: Some(Arc::new(judge)), ..self }
    }

    /// Gives guests that ask for it the certificates in this file, in the format of AMD publication 56421, section 4.1.8.1,
    /// "SNP Extended Guest Request". Whoever changes it, the firmware or its keys is to lock it exclusively (`F_OFD_SETLK`)
    /// while doing so; guests that ask meanwhile are told to try again.
    pub fn certificates(self, path: impl Into<PathBuf>) -> Self {
        Self { certificates: Some(path.into()), ..self }
    }

    /// What a launch with these options is measured with.
    pub fn active_features(&self) -> SevFeatures {
        self.features | SevFeatures::SNP_ACTIVE
    }

    /// The features that KVM is told to activate, which adds SEV-SNP itself.
    pub(super) fn wished_features(&self) -> SevFeatures {
        self.features - SevFeatures::SNP_ACTIVE
    }

    /// The policy for a VM of which `demands` are made.
    pub(super) fn policy_for(&self, demands: Policy) -> Result<SnpPolicy, Error> {
        let refuse = |what: &str| Err(Error::Options(what.to_owned()));
        let smt = if demands.contains(Policy::NO_SMT) { SnpFlags::empty() } else { SnpFlags::SMT };
        let policy = self.policy.unwrap_or(SnpPolicy { least_abi: (0, 0), flags: smt });
        if demands.contains(Policy::NO_SMT) && policy.flags.contains(SnpFlags::SMT) {
            return refuse("the vm demands that there is no smt, and the guest policy allows it");
        }
        if demands.contains(Policy::NO_DEBUG) && policy.flags.contains(SnpFlags::DEBUG) {
            return refuse("the vm demands that nobody debugs it, and the guest policy allows it");
        }
        if self.id.as_ref().is_some_and(|(block, _)| block.policy != policy) {
            return refuse("the guest policy is another one than that of the id block");
        }
        Ok(policy)
    }

    /// Refuses what this host's KVM would refuse, and what the firmware would after the whole launch.
    pub(super) fn check(&self, kvm: &Kvm, policy: SnpPolicy) -> Result<(), Error> {
        if let Some(allowed) = attribute(kvm, Attribute::SnpPolicyBits)
            && policy.bits() & !allowed != 0
        {
            let refused = policy.bits() & !allowed;
            return Err(Error::Options(format!(
                "kvm refuses the bits {refused:#x} of the guest policy {:#x}",
                policy.bits()
            )));
        }
        let features = attribute(kvm, Attribute::VmsaFeatures).unwrap_or_default();
        let refused = self.wished_features() - SevFeatures::from_bits_retain(features);
        if !refused.is_empty() {
            return Err(Error::Options(format!("kvm cannot activate {refused:?} in guests")));
        }
        if self.certificates.is_some() && attribute(kvm, Attribute::SnpReqCerts) != Some(1) {
            return Err(Error::Options("this kvm does not ask for certificates: Linux 7.0 or later does".into()));
        }
        if let Some((block, auth)) = &self.id {
            auth.verify(block).map_err(|error| Error::Options(error.to_string()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demands_of_the_vm_become_bits_of_the_policy_or_are_refused() {
        let smt = SnpPolicy { least_abi: (1, 51), flags: SnpFlags::SMT };
        let debug = SnpPolicy { least_abi: (0, 0), flags: SnpFlags::DEBUG };
        let options = SnpOptions::default();
        assert_eq!(options.policy_for(Policy::empty()).unwrap().bits(), 0x3_0000);
        assert_eq!(options.policy_for(Policy::NO_SMT | Policy::NO_DEBUG).unwrap().bits(), 0x2_0000);
        assert_eq!(options.clone().policy(smt).policy_for(Policy::NO_DEBUG).unwrap(), smt);
        assert!(options.clone().policy(smt).policy_for(Policy::NO_SMT).is_err());
        assert!(options.policy(debug).policy_for(Policy::NO_DEBUG).is_err());
    }

    #[test]
    fn sev_snp_itself_is_always_measured_and_never_wished_for() {
        let options = SnpOptions::default().features(SevFeatures::SNP_ACTIVE | SevFeatures::DEBUG_SWAP);
        assert_eq!(options.wished_features(), SevFeatures::DEBUG_SWAP);
        assert_eq!(SnpOptions::default().active_features(), SevFeatures::SNP_ACTIVE);
    }
}
