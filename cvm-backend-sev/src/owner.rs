//! What a guest's owner does in an SEV or SEV-ES launch: keys that he shares with the firmware, and secrets that only the guest
//! is given.

use crate::sev::{LaunchMeasurement, SevDigest, hmac};
use crate::{Error, SevPolicy};
use aes::Aes128;
use ctr::Ctr128BE;
use ctr::cipher::{KeyIvInit, StreamCipher};
use cvm_core::Gpa;
use hmac::Mac;
use std::fmt;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Length of the header of a packet for the firmware: flags, initialisation vector, MAC (Secure Encrypted Virtualization API,
/// section 6.6, `LAUNCH_SECRET`).
pub const HEADER_BYTES: usize = 4 + 16 + 32;

/// What the length of a packet is a multiple of.
const BLOCK: usize = 16;
/// The most bytes in a secret: the kernel takes no more than what lies in one page for sure.
const MOST: usize = 4096;
/// What the MAC of a launch secret begins with, to tell it from other packets.
const CONTEXT_LAUNCH_SECRET: u8 = 1;

/// The keys between a guest's owner and the firmware of its platform, for one launch. They are zeroed when they are dropped.
#[derive(Clone)]
pub struct TransportKeys {
    encryption: [u8; 16],
    integrity: [u8; 16],
}

impl TransportKeys {
    /// The transport encryption key and the transport integrity key, which have to be random.
    pub fn new(encryption: [u8; 16], integrity: [u8; 16]) -> Self {
        Self { encryption, integrity }
    }

    /// By what a session binds the keys to a policy.
    pub fn policy_mac(&self, policy: SevPolicy) -> [u8; 32] {
        self.mac(&[&policy.bits().to_le_bytes()])
    }

    /// Whether a launch has loaded what `digest` stands for, and nothing else. Nothing that a host says is to be trusted before.
    pub fn approves(&self, launch: &LaunchMeasurement, digest: &SevDigest) -> bool {
        launch.is_of(digest, &self.integrity)
    }

    /// Seals `secret`, filled up with zeros to a multiple of 16 bytes, for the one launch that is measured as this. `iv` must
    /// never be used twice with these keys.
    ///
    /// Nothing binds it to a place: the host decides where in the guest's memory it arrives, so the guest must know it by what
    /// is in it.
    ///
    /// # Errors
    /// [`Error::Secret`] for none, or more than 4096 bytes.
    pub fn seal(&self, launch: &LaunchMeasurement, secret: &[u8], iv: [u8; 16]) -> Result<SealedSecret, Error> {
        let len = secret.len();
        if !(1..=MOST).contains(&len) {
            return Err(Error::Secret { len, problem: "it takes 1 to 4096" });
        }
        // Of the full length from the start: one that grew would leave the plaintext behind.
        let mut data = vec![0; len.next_multiple_of(BLOCK)];
        data[..len].copy_from_slice(secret);
        Ctr128BE::<Aes128>::new((&self.encryption).into(), &iv.into()).apply_keystream(&mut data);
        let (flags, len) = (0u32.to_le_bytes(), (data.len() as u32).to_le_bytes());
        let mac = self.mac(&[&[CONTEXT_LAUNCH_SECRET], &flags, &iv, &len, &len, &data, &launch.measurement]);
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&flags);
        header[4..20].copy_from_slice(&iv);
        header[20..].copy_from_slice(&mac);
        Ok(SealedSecret { header, data })
    }

    fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        let hmac = parts.iter().fold(hmac(&self.integrity), |hmac, part| hmac.chain_update(part));
        hmac.finalize().into_bytes().into()
    }
}

impl Drop for TransportKeys {
    fn drop(&mut self) {
        self.encryption.zeroize();
        self.integrity.zeroize();
    }
}

impl ZeroizeOnDrop for TransportKeys {}

impl fmt::Debug for TransportKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransportKeys").finish_non_exhaustive()
    }
}

/// A secret that only the firmware can open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedSecret {
    /// Flags, initialisation vector and MAC.
    pub header: [u8; HEADER_BYTES],
    /// The encrypted bytes: a multiple of 16.
    pub data: Vec<u8>,
}

impl SealedSecret {
    /// For the guest's memory from `gpa` on.
    pub fn at(self, gpa: Gpa) -> Secret {
        Secret { gpa, sealed: self }
    }
}

/// A secret, and where it goes in the guest's memory: to a multiple of 16, in one page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    /// Where.
    pub gpa: Gpa,
    /// What.
    pub sealed: SealedSecret,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SevFlags;
    use crate::sev::Api;

    fn keys() -> TransportKeys {
        TransportKeys::new([1; 16], [2; 16])
    }

    fn launch(digest: &SevDigest) -> LaunchMeasurement {
        let api = Api { major: 1, minor: 55, build: 31 };
        let policy = SevPolicy { least_api: (0, 0), flags: SevFlags::NO_DEBUG };
        let nonce = [3; 16];
        LaunchMeasurement { measurement: digest.measurement(api, policy, &nonce, &[2; 16]), nonce, api, policy }
    }

    #[test]
    fn a_launch_is_approved_only_if_all_of_it_is_as_measured() {
        let digest = SevDigest([7; 32]);
        let launch = launch(&digest);
        assert!(keys().approves(&launch, &digest));
        let lies = [
            LaunchMeasurement { nonce: [4; 16], ..launch },
            LaunchMeasurement { api: Api { build: 32, ..launch.api }, ..launch },
            LaunchMeasurement { policy: SevPolicy { flags: SevFlags::empty(), ..launch.policy }, ..launch },
            LaunchMeasurement { measurement: [0; 32], ..launch },
        ];
        assert!(lies.iter().all(|lie| !keys().approves(lie, &digest)));
        assert!(!keys().approves(&launch, &SevDigest([8; 32])));
    }

    #[test]
    fn keys_are_zeroed_when_they_are_dropped_and_not_printed() {
        fn are_zeroed<T: ZeroizeOnDrop>() {}
        are_zeroed::<TransportKeys>();
        are_zeroed::<Ctr128BE<Aes128>>();
        let mut kept = std::mem::ManuallyDrop::new(TransportKeys::new([0x5a; 16], [0xa5; 16]));
        assert_eq!(format!("{:?}", *kept), "TransportKeys { .. }");
        #[allow(unsafe_code, reason = "what is left of a dropped value is what this is about")]
        // SAFETY: the value is not used as one again; its fields are arrays of bytes, which any bytes are.
        unsafe {
            std::mem::ManuallyDrop::drop(&mut kept);
        }
        assert_eq!((kept.encryption, kept.integrity), ([0; 16], [0; 16]));
    }

    #[test]
    fn a_secret_is_encrypted_and_bound_to_its_launch_and_length() {
        let launch = launch(&SevDigest([7; 32]));
        let sealed = keys().seal(&launch, b"twenty bytes of text", [9; 16]).unwrap();
        assert_eq!(sealed.data.len(), 32);
        assert!(!sealed.data.windows(6).any(|bytes| bytes == b"twenty"));
        let elsewhere = LaunchMeasurement { measurement: [5; 32], ..launch };
        let other = keys().seal(&elsewhere, b"twenty bytes of text", [9; 16]).unwrap();
        assert!(other.data == sealed.data && other.header[20..] != sealed.header[20..]);
        for secret in [&[][..], &[0; 4097]] {
            assert!(matches!(keys().seal(&launch, secret, [9; 16]), Err(Error::Secret { .. })));
        }
    }
}
