//! The measurement of SEV and SEV-ES launches.

use crate::ovmf::Firmware;
use crate::snp::Vcpus;
use crate::{Error, KernelHashes, SevPolicy};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

/// What a launch has loaded, as SHA-256 over all of it in the order of loading (AMD publication 55766,
/// section 6.3, `LAUNCH_UPDATE_DATA`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SevDigest(pub [u8; 32]);

impl std::fmt::Display for SevDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The digest of a launch of OVMF by QEMU: the image, the hashes of a kernel if there is one, and with SEV-ES the vCPUs.
///
/// # Errors
/// [`Error::FirmwareLacks`] when the firmware does not check a kernel, or does not say where vCPUs start; [`Error::Vcpus`].
pub fn of_firmware(
    firmware: &Firmware<'_>,
    es: Option<&Vcpus>,
    kernel: Option<&KernelHashes>,
) -> Result<SevDigest, Error> {
    let mut digest = Sha256::new_with_prefix(firmware.image());
    if let Some(kernel) = kernel {
        firmware.hash_table()?;
        digest.update(kernel.table());
    }
    if let Some(vcpus) = es {
        vcpus.with_states(firmware, |states| states.for_each(|state| digest.update(state.as_bytes())))?;
    }
    Ok(SevDigest(digest.finalize().into()))
}

/// What the firmware of the platform says of itself, which enters the measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Api {
    /// Version of its API.
    pub major: u8,
    /// Version of its API.
    pub minor: u8,
    /// Its build.
    pub build: u8,
}

impl SevDigest {
    /// The launch measurement that a guest's owner compares (AMD publication 55766, `LAUNCH_MEASURE`): an HMAC-SHA-256, by the transport integrity key, of the byte 4, the version of the firmware, the
    /// policy, the digest, and the nonce that the firmware gives with it.
    pub fn measurement(&self, api: Api, policy: SevPolicy, nonce: &[u8; 16], integrity_key: &[u8; 16]) -> [u8; 32] {
        self.hmac(api, policy, nonce, integrity_key).finalize().into_bytes().into()
    }

    /// Whether a measurement is the expected one, in a time that does not depend on where it differs.
    pub fn is_measured_as(
        &self,
        measurement: &[u8; 32],
        (api, policy): (Api, SevPolicy),
        nonce: &[u8; 16],
        integrity_key: &[u8; 16],
    ) -> bool {
        self.hmac(api, policy, nonce, integrity_key).verify_slice(measurement).is_ok()
    }

    fn hmac(&self, api: Api, policy: SevPolicy, nonce: &[u8; 16], integrity_key: &[u8; 16]) -> Hmac<Sha256> {
        // Shorter keys than a block are filled up with zeros, as HMAC has it.
        let mut block = [0; 64];
        block[..16].copy_from_slice(integrity_key);
        let hmac = Hmac::<Sha256>::new(&block.into()).chain_update([4, api.major, api.minor, api.build]);
        hmac.chain_update(policy.bits().to_le_bytes()).chain_update(self.0).chain_update(nonce)
    }
}

#[cfg(test)]
mod tests;
