//! The ID block: what a guest's owner says that a launch is to be, signed (AMD publication 56860, `SNP_LAUNCH_FINISH`).

use crate::{Error, SnpPolicy};
use cvm_core::Measurement;
use p384::ecdsa::signature::{Signer, Verifier};
use p384::ecdsa::{Signature, SigningKey, VerifyingKey};
use sha2::{Digest, Sha384};

/// Length of an [`IdBlock`].
pub const BLOCK_BYTES: usize = 0x60;
/// Length of the signatures beside it.
pub const AUTH_BYTES: usize = 0x1000;
/// Length of a public key (the same, format of a public key for ECDSA P-384).
pub const KEY_BYTES: usize = 0x404;
/// Length of a signature (the same, format of an ECDSA P-384 signature).
pub const SIGNATURE_BYTES: usize = 0x200;

/// Length of a number in keys and signatures: little endian.
pub(crate) const NUMBER_BYTES: usize = 72;
/// Length of the numbers of P-384.
const P384_BYTES: usize = 48;
/// `CURVE` of P-384, and the algorithm ECDSA P-384 with SHA-384.
const P384: u32 = 2;
const ECDSA_P384_SHA384: u32 = 1;
/// `VERSION` of the block.
const VERSION: u32 = 1;

// Offsets in the signatures' page.
pub(crate) const BLOCK_SIGNATURE: usize = 0x40;
pub(crate) const ID_KEY: usize = 0x240;
pub(crate) const KEY_SIGNATURE: usize = 0x680;
pub(crate) const AUTHOR_KEY: usize = 0x880;

fn refuse(problem: &'static str) -> Error {
    Error::IdBlock { problem }
}

/// What a launch is to be, or it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdBlock {
    /// The launch digest.
    pub digest: Measurement,
    /// The owner's name for guests of this kind.
    pub family: [u8; 16],
    /// The owner's name for this image.
    pub image: [u8; 16],
    /// The image's security version number.
    pub svn: u32,
    /// The policy.
    pub policy: SnpPolicy,
}

impl IdBlock {
    /// As the firmware takes it.
    pub fn to_bytes(&self) -> [u8; BLOCK_BYTES] {
        let mut bytes = [0; BLOCK_BYTES];
        bytes[..0x30].copy_from_slice(&self.digest.0);
        bytes[0x30..0x40].copy_from_slice(&self.family);
        bytes[0x40..0x50].copy_from_slice(&self.image);
        bytes[0x50..0x54].copy_from_slice(&VERSION.to_le_bytes());
        bytes[0x54..0x58].copy_from_slice(&self.svn.to_le_bytes());
        bytes[0x58..].copy_from_slice(&self.policy.bits().to_le_bytes());
        bytes
    }

    /// From anywhere.
    ///
    /// # Errors
    /// [`Error::IdBlock`] for another version than 1, [`Error::Policy`].
    pub fn from_bytes(bytes: &[u8; BLOCK_BYTES]) -> Result<Self, Error> {
        if number(bytes, 0x50) != VERSION {
            return Err(refuse("its version is not 1"));
        }
        let policy = u64::from(number(bytes, 0x58)) | u64::from(number(bytes, 0x5c)) << 32;
        Ok(Self {
            digest: Measurement(part(bytes, 0)),
            family: part(bytes, 0x30),
            image: part(bytes, 0x40),
            svn: number(bytes, 0x54),
            policy: SnpPolicy::from_bits(policy)?,
        })
    }
}

/// `N` bytes at a constant offset that lies within.
fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[at..at + N]);
    part
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(part(bytes, at))
}

/// A number of P-384 as the firmware has it.
fn little_endian(big_endian: &[u8]) -> [u8; NUMBER_BYTES] {
    let mut number = [0; NUMBER_BYTES];
    number.iter_mut().zip(big_endian.iter().rev()).for_each(|(to, from)| *to = *from);
    number
}

/// And back; nothing if it is longer than those of P-384.
fn big_endian(number: &[u8; NUMBER_BYTES]) -> Option<[u8; P384_BYTES]> {
    let (low, high) = number.split_first_chunk::<P384_BYTES>()?;
    let mut bytes = *low;
    bytes.reverse();
    high.iter().all(|byte| *byte == 0).then_some(bytes)
}

/// A public key of an image's or of its author's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublicKey(VerifyingKey);

impl PublicKey {
    /// As the firmware takes it.
    pub fn to_bytes(&self) -> [u8; KEY_BYTES] {
        let point = self.0.to_sec1_point(false);
        let [x, y] = [point.x(), point.y()].map(|part| part.map_or([0; NUMBER_BYTES], |part| little_endian(part)));
        let mut bytes = [0; KEY_BYTES];
        bytes[..4].copy_from_slice(&P384.to_le_bytes());
        bytes[4..4 + NUMBER_BYTES].copy_from_slice(&x);
        bytes[4 + NUMBER_BYTES..4 + 2 * NUMBER_BYTES].copy_from_slice(&y);
        bytes
    }

    /// From anywhere.
    ///
    /// # Errors
    /// [`Error::IdBlock`] for another curve than P-384, a point that is not on it, and reserved bytes that are not zero.
    pub fn from_bytes(bytes: &[u8; KEY_BYTES]) -> Result<Self, Error> {
        if number(bytes, 0) != P384 || bytes[4 + 2 * NUMBER_BYTES..].iter().any(|byte| *byte != 0) {
            return Err(refuse("a public key is not one of P-384, and zeros after it"));
        }
        let mut point = [4; 1 + 2 * P384_BYTES];
        for (to, at) in [(1, 4), (1 + P384_BYTES, 4 + NUMBER_BYTES)] {
            let number = big_endian(&part(bytes, at)).ok_or_else(|| refuse("a public key has too long numbers"))?;
            point[to..to + P384_BYTES].copy_from_slice(&number);
        }
        let key = VerifyingKey::from_sec1_bytes(&point);
        key.map(Self).map_err(|_| refuse("a public key is no point of P-384"))
    }

    /// What evidence names the key by: SHA-384 of its bytes.
    pub fn digest(&self) -> [u8; 48] {
        Sha384::digest(self.to_bytes()).into()
    }

    fn verify(&self, message: &[u8], signature: &[u8; SIGNATURE_BYTES]) -> Result<(), Error> {
        let unsound = || refuse("a signature is not one of P-384, and zeros after it");
        if signature[2 * NUMBER_BYTES..].iter().any(|byte| *byte != 0) {
            return Err(unsound());
        }
        let number = |at| big_endian(&part(signature, at)).ok_or_else(unsound);
        let signature = Signature::from_scalars(number(0)?, number(NUMBER_BYTES)?).map_err(|_| unsound())?;
        self.0.verify(message, &signature).map_err(|_| refuse("a signature is not by its key over what it is for"))
    }
}

/// A private key of an image's or of its author's. It is zeroed when it is dropped.
#[derive(Clone)]
pub struct PrivateKey(SigningKey);

/// The labels of private keys in PEM: those of PKCS #8 and of SEC 1.
const KEY_LABELS: [&str; 2] = ["PRIVATE KEY", "EC PRIVATE KEY"];

/// The block of PEM that holds a private key; text and blocks of other things, such as the parameters of its curve, may come
/// before and after it.
fn key_block(pem: &str) -> Result<&str, Error> {
    let begin = |label: &str| pem.find(&format!("-----BEGIN {label}-----"));
    let found = KEY_LABELS.into_iter().filter_map(|label| Some((begin(label)?, label))).min();
    let Some((start, label)) = found else {
        return Err(refuse(match begin("ENCRYPTED PRIVATE KEY") {
            Some(_) => "the private key is encrypted: decrypt it by openssl pkcs8",
            None => "there is no private key in pem",
        }));
    };
    let end = format!("-----END {label}-----");
    let len = pem[start..].find(&end).ok_or_else(|| refuse("the private key in pem has no end"))?;
    Ok(&pem[start..start + len + end.len()])
}

impl PrivateKey {
    /// A key of P-384 in PEM, as PKCS #8 or SEC 1 have it: the first private key among the blocks.
    ///
    /// # Errors
    /// [`Error::IdBlock`] if there is none, it is encrypted, or not one of P-384.
    pub fn from_pem(pem: &str) -> Result<Self, Error> {
        let key = p384::SecretKey::from_pem(key_block(pem)?);
        key.map(|key| Self(key.into())).map_err(|_| refuse("the private key in pem is not one of P-384"))
    }

    /// A key of P-384 in DER, as PKCS #8 or SEC 1 have it.
    ///
    /// # Errors
    /// [`Error::IdBlock`] if it is something else.
    pub fn from_der(der: &[u8]) -> Result<Self, Error> {
        let key = p384::SecretKey::from_der(der);
        key.map(|key| Self(key.into())).map_err(|_| refuse("a private key is not one of P-384 in DER"))
    }

    /// Its public key.
    pub fn public(&self) -> PublicKey {
        PublicKey(*self.0.verifying_key())
    }

    fn sign(&self, message: &[u8]) -> [u8; SIGNATURE_BYTES] {
        let signature: Signature = self.0.sign(message);
        let (r, s) = signature.split_bytes();
        let mut bytes = [0; SIGNATURE_BYTES];
        bytes[..NUMBER_BYTES].copy_from_slice(&little_endian(&r));
        bytes[NUMBER_BYTES..2 * NUMBER_BYTES].copy_from_slice(&little_endian(&s));
        bytes
    }
}

impl std::fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PrivateKey").finish_non_exhaustive()
    }
}

/// The signatures that go with an ID block.
#[derive(Clone, PartialEq, Eq)]
pub struct IdAuth(Box<[u8; AUTH_BYTES]>);

impl IdAuth {
    /// Signs `block` by the image's key, and that key by its author's, if there is one.
    pub fn sign(block: &IdBlock, id: &PrivateKey, author: Option<&PrivateKey>) -> Self {
        let mut auth = Self(Box::new([0; AUTH_BYTES]));
        let id_key = id.public().to_bytes();
        auth.put(0, &ECDSA_P384_SHA384.to_le_bytes());
        auth.put(BLOCK_SIGNATURE, &id.sign(&block.to_bytes()));
        auth.put(ID_KEY, &id_key);
        if let Some(author) = author {
            auth.put(4, &ECDSA_P384_SHA384.to_le_bytes());
            auth.put(KEY_SIGNATURE, &author.sign(&id_key));
            auth.put(AUTHOR_KEY, &author.public().to_bytes());
        }
        auth
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// From anywhere; [`IdAuth::verify`] says whether it is sound.
    pub fn from_bytes(bytes: &[u8; AUTH_BYTES]) -> Self {
        Self(Box::new(*bytes))
    }

    /// Whether it has a signature of the author of the image's key.
    pub fn has_author(&self) -> bool {
        number(&self.0[..], 4) != 0
    }

    /// As the firmware takes it.
    pub fn as_bytes(&self) -> &[u8; AUTH_BYTES] {
        &self.0
    }

    /// Whether the signatures are right, as the firmware checks them; if they are, the image's key, and its author's if there
    /// is one.
    ///
    /// # Errors
    /// [`Error::IdBlock`] for wrong signatures, unsound keys and unknown algorithms.
    pub fn verify(&self, block: &IdBlock) -> Result<(PublicKey, Option<PublicKey>), Error> {
        let bytes = &self.0[..];
        let (algorithm, author_algorithm) = (number(bytes, 0), number(bytes, 4));
        if algorithm != ECDSA_P384_SHA384 || ![0, ECDSA_P384_SHA384].contains(&author_algorithm) {
            return Err(refuse("an algorithm is not ecdsa of p-384 with sha-384"));
        }
        let id_key: [u8; KEY_BYTES] = part(bytes, ID_KEY);
        let id = PublicKey::from_bytes(&id_key)?;
        id.verify(&block.to_bytes(), &part(bytes, BLOCK_SIGNATURE))?;
        if author_algorithm == 0 {
            return Ok((id, None));
        }
        let author = PublicKey::from_bytes(&part(bytes, AUTHOR_KEY))?;
        author.verify(&id_key, &part(bytes, KEY_SIGNATURE))?;
        Ok((id, Some(author)))
    }
}

impl std::fmt::Debug for IdAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IdAuth").finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(crate) mod tests;
