//! The measurement of SEV and SEV-ES launches.

use crate::ovmf::Firmware;
use crate::snp::Vcpus;
use crate::{Error, KernelHashes, SevFeatures, SevPolicy, Vmsa};
use cvm_core::launch::{self, Entry, PageKind};
use cvm_core::{Gpa, PAGE_SIZE, Transcript};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use zeroize::Zeroizing;

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
/// [`Error::FirmwareLacks`] when the firmware does not check a kernel, or does not say where vCPUs other than the first start;
/// [`Error::Firmware`] when it is damaged where that is said; [`Error::Vcpus`].
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

/// The digest of a launch through this project's contract: pages in the order in which they were loaded, zeros among them, and
/// with SEV-ES (`es`, what is active in the guest) the vCPUs in that of their indices, as KVM makes their states.
///
/// The launch configuration is in it by the boot page, which has its digest. SEV and SEV-ES have no other place for it: they do
/// not bind a guest without a boot page to its configuration.
///
/// SEV hashes the contents themselves, of which a transcript has just the SHA-384. So `contents` gives those of each page;
/// they are checked.
///
/// # Errors
/// [`Error::Transcript`] when there are no contents for a page, or others than the transcript says, and for pages that are
/// not measured: SEV has none.
pub fn of_transcript<'a>(
    transcript: &Transcript,
    es: Option<SevFeatures>,
    mut contents: impl FnMut(Gpa) -> Option<&'a [u8; PAGE_SIZE as usize]>,
) -> Result<SevDigest, Error> {
    let mut digest = Running::default();
    for entry in transcript.entries() {
        match entry {
            Entry::Page { kind: PageKind::Measured, gpa, contents: expected } => match contents(*gpa) {
                Some(page) if launch::digest(page) == *expected => digest.contents(page),
                Some(_) => return Err(Error::Transcript { gpa: *gpa, problem: "other contents were loaded" }),
                None => return Err(Error::Transcript { gpa: *gpa, problem: "its contents are not known" }),
            },
            Entry::Page { gpa, .. } => return Err(Error::Transcript { gpa: *gpa, problem: NOT_MEASURED }),
            Entry::Zero { range } => digest.zeros(range.pages()),
            // The configuration is in the boot page; vCPUs come last.
            Entry::Config(_) | Entry::Vcpu { .. } => {}
        }
    }
    Ok(digest.finish(transcript, es))
}

/// Why a page cannot be loaded that is not measured.
pub(crate) const NOT_MEASURED: &str = "sev measures the contents of every page that is loaded";

/// The digest of a launch under way.
#[derive(Debug, Clone, Default)]
pub(crate) struct Running(Sha256);

impl Running {
    pub(crate) fn contents(&mut self, contents: &[u8]) {
        self.0.update(contents);
    }

    pub(crate) fn zeros(&mut self, pages: u64) {
        (0..pages).for_each(|_| self.0.update([0; PAGE_SIZE as usize]));
    }

    /// With the vCPUs of `transcript`, if they are measured.
    pub(crate) fn finish(mut self, transcript: &Transcript, es: Option<SevFeatures>) -> SevDigest {
        if let Some(features) = es {
            let vcpus = transcript.entries().iter().filter_map(|entry| match entry {
                Entry::Vcpu { index, state } => Some((index, state)),
                _ => None,
            });
            let vcpus: BTreeMap<_, _> = vcpus.collect();
            vcpus.values().for_each(|state| self.0.update(Vmsa::of(state, features).as_bytes()));
        }
        SevDigest(self.0.finalize().into())
    }
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

/// What the firmware answers when a launch is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaunchMeasurement {
    /// The measurement: [`SevDigest::measurement`].
    pub measurement: [u8; 32],
    /// What makes it different each time.
    pub nonce: [u8; 16],
    /// The firmware's version, as the host says.
    pub api: Api,
    /// The guest policy, as the host says.
    pub policy: SevPolicy,
}

impl LaunchMeasurement {
    /// Whether it says that just this was loaded. Version and policy are part of what is measured, so a host that lies about
    /// them is found out. The time that it takes does not depend on where the measurement differs.
    pub fn is_of(&self, digest: &SevDigest, integrity_key: &[u8; 16]) -> bool {
        let expected = digest.hmac(self.api, self.policy, &self.nonce, integrity_key);
        expected.verify_slice(&self.measurement).is_ok()
    }
}

impl SevDigest {
    /// The launch measurement that a guest's owner compares (AMD publication 55766, `LAUNCH_MEASURE`): an HMAC-SHA-256, by the
    /// transport integrity key, of the byte 4, the version of the firmware, the policy, the digest, and the nonce that the
    /// firmware gives with it.
    pub fn measurement(&self, api: Api, policy: SevPolicy, nonce: &[u8; 16], integrity_key: &[u8; 16]) -> [u8; 32] {
        self.hmac(api, policy, nonce, integrity_key).finalize().into_bytes().into()
    }

    fn hmac(&self, api: Api, policy: SevPolicy, nonce: &[u8; 16], integrity_key: &[u8; 16]) -> Hmac<Sha256> {
        let hmac = hmac(integrity_key).chain_update([4, api.major, api.minor, api.build]);
        hmac.chain_update(policy.bits().to_le_bytes()).chain_update(self.0).chain_update(nonce)
    }
}

/// An HMAC by a key of the owner's.
pub(crate) fn hmac(key: &[u8; 16]) -> Hmac<Sha256> {
    // Shorter keys than a block are filled up with zeros, as HMAC has it.
    let mut block = Zeroizing::new([0; 64]);
    block[..16].copy_from_slice(key);
    Hmac::new((&*block).into())
}

#[cfg(test)]
mod tests;
