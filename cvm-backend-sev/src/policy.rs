//! What a guest's owner allows the host: the guest policies of SEV and of SEV-SNP, which the firmware enforces.

use crate::Error;

bitflags::bitflags! {
    /// The bits of an SEV-SNP guest policy (AMD publication 56860, section 4.3).
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
    pub struct SnpFlags: u64 {
        /// Simultaneous multithreading may be on.
        const SMT = 1 << 16;
        /// A migration agent may be associated with the guest.
        const MIGRATE_MA = 1 << 18;
        /// The host may decrypt and change the guest's memory for debugging.
        const DEBUG = 1 << 19;
        /// The guest may run on one socket only.
        const SINGLE_SOCKET = 1 << 20;
        /// Devices and memory may be attached by CXL.
        const CXL_ALLOW = 1 << 21;
        /// Memory must be encrypted by AES-256 XTS.
        const MEM_AES_256_XTS = 1 << 22;
        /// Running average power limits must be off.
        const RAPL_DIS = 1 << 23;
        /// Ciphertext in memory must be hidden from the host.
        const CIPHERTEXT_HIDING_DRAM = 1 << 24;
        /// The host may not move or swap the guest's pages.
        const PAGE_SWAP_DISABLE = 1 << 25;
    }
}

/// Bit 17, which is reserved and has to be one.
const SNP_ONE: u64 = 1 << 17;

/// An SEV-SNP guest policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SnpPolicy {
    /// The least version of the firmware's ABI, major and minor.
    pub least_abi: (u8, u8),
    /// What is allowed or demanded.
    pub flags: SnpFlags,
}

impl SnpPolicy {
    /// The policy in the 64 bits that firmware and reports have it in.
    pub fn bits(self) -> u64 {
        let (major, minor) = self.least_abi;
        u64::from(minor) | u64::from(major) << 8 | SNP_ONE | self.flags.bits()
    }

    /// The policy of 64 bits from anywhere.
    ///
    /// # Errors
    /// [`Error::Policy`] for reserved bits that are not as they have to be.
    pub fn from_bits(policy: u64) -> Result<Self, Error> {
        let refuse = |problem| Err(Error::Policy { kind: "sev-snp", policy, problem });
        if policy & SNP_ONE == 0 {
            return refuse("bit 17 has to be one");
        }
        let [minor, major, ..] = policy.to_le_bytes();
        match SnpFlags::from_bits(policy & !SNP_ONE & !0xffff) {
            Some(flags) => Ok(Self { least_abi: (major, minor), flags }),
            None => refuse("bits 26 to 63 have to be zero"),
        }
    }
}

bitflags::bitflags! {
    /// The bits of an SEV guest policy (AMD publication 55766, guest policy).
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
    pub struct SevFlags: u32 {
        /// The host must not debug the guest.
        const NO_DEBUG = 1;
        /// The guest's key must not be shared with other guests.
        const NO_KEY_SHARING = 1 << 1;
        /// The guest's registers must be encrypted too: SEV-ES.
        const ES = 1 << 2;
        /// The guest must not be sent to another platform.
        const NO_SEND = 1 << 3;
        /// The guest must not be sent to a platform outside of its owner's domain.
        const DOMAIN = 1 << 4;
        /// The guest must not be sent to a platform that does not support SEV.
        const SEV = 1 << 5;
    }
}

/// An SEV or SEV-ES guest policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SevPolicy {
    /// The least version of the firmware's API, major and minor.
    pub least_api: (u8, u8),
    /// What is demanded.
    pub flags: SevFlags,
}

impl SevPolicy {
    /// The policy in the 32 bits that firmware has it in.
    pub fn bits(self) -> u32 {
        let (major, minor) = self.least_api;
        self.flags.bits() | u32::from(major) << 16 | u32::from(minor) << 24
    }

    /// The policy of 32 bits from anywhere.
    ///
    /// # Errors
    /// [`Error::Policy`] for reserved bits that are not zero.
    pub fn from_bits(policy: u32) -> Result<Self, Error> {
        let [.., major, minor] = policy.to_le_bytes();
        let flags = SevFlags::from_bits(policy & 0xffff).ok_or(Error::Policy {
            kind: "sev",
            policy: policy.into(),
            problem: "bits 6 to 15 have to be zero",
        })?;
        Ok(Self { least_api: (major, minor), flags })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_of_an_snp_policy_is_known_or_refused() {
        for bit in 0..64 {
            let policy = SNP_ONE | 1 << bit;
            match SnpPolicy::from_bits(policy) {
                Ok(parsed) => assert!(bit < 26 && parsed.bits() == policy, "bit {bit}"),
                Err(error) => assert!(bit >= 26 && error.to_string().contains("26 to 63"), "bit {bit}: {error}"),
            }
            assert!(SnpPolicy::from_bits(policy & !SNP_ONE).is_err(), "bit {bit}");
        }
        let policy = SnpPolicy::from_bits(0xb_0137).unwrap();
        assert_eq!((policy.least_abi, policy.flags), ((1, 0x37), SnpFlags::SMT | SnpFlags::DEBUG));
    }

    #[test]
    fn every_bit_of_a_sev_policy_is_known_or_refused() {
        for bit in 0..32 {
            match SevPolicy::from_bits(1 << bit) {
                Ok(parsed) => assert!(!(6..16).contains(&bit) && parsed.bits() == 1 << bit, "bit {bit}"),
                Err(_) => assert!((6..16).contains(&bit), "bit {bit}"),
            }
        }
        assert_eq!(SevPolicy::from_bits(0x3301_0005).unwrap().least_api, (1, 0x33));
    }
}
