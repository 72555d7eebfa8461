//! Launches that an IGVM file describes, on SEV-SNP: what they are measured as, and what of a file can be launched.
//!
//! A VMM reads the file with [`parse`], gives the platform its [`policy()`], [`features()`] and, if there is one, [`id_block()`],
//! and has the launch load what [`image()`] makes of it. Then the launch digest is [`measurement()`].

use crate::digest::{LaunchDigest, VMSA_GPA, pages};
use crate::id_block::{self, AUTH_BYTES, KEY_BYTES, SIGNATURE_BYTES};
use crate::snp::page_type;
use crate::{Error, IdAuth, IdBlock, PageType, SevFeatures, SnpPolicy, Vmsa, vmsa};
use cvm_core::igvm::{Context, Directive, Igvm, IgvmError, IgvmImage, IgvmPlatform, difference, possible};
use cvm_core::x86::save_area::{self, at};
use cvm_core::{Measurement, PAGE_SIZE, PageKind};
use sha2::{Digest, Sha384};

fn refuse(offset: usize, problem: impl Into<String>) -> Error {
    IgvmError::Header { offset, problem: problem.into() }.into()
}

/// Reads a file for SEV-SNP.
///
/// # Errors
/// As [`Igvm::parse`].
pub fn parse(file: &[u8]) -> Result<Igvm<'_>, Error> {
    Ok(Igvm::parse(file, IgvmPlatform::SevSnp)?)
}

/// The guest policy that it asks for. A launch needs it, and its measurement does not.
///
/// # Errors
/// [`Error::Igvm`] if it has none, [`Error::Policy`].
pub fn policy(igvm: &Igvm<'_>) -> Result<SnpPolicy, Error> {
    SnpPolicy::from_bits(igvm.policy().ok_or_else(|| refuse(0, "it has no policy for sev-snp"))?)
}

/// The expected measurement: pages and vCPUs in the order of their headers, where these say.
///
/// # Errors
/// [`Error::Pages`].
pub fn measurement(igvm: &Igvm<'_>) -> Result<Measurement, Error> {
    let mut digest = LaunchDigest::new();
    let zeros = Sha384::digest([0; PAGE_SIZE as usize]).into();
    for (_, directive) in igvm.directives() {
        match directive {
            Directive::Page { gpa, kind: kind @ PageKind::Measured, contents } => {
                let contents = contents.map_or(zeros, |contents| Sha384::digest(contents).into());
                digest.extend(page_type(*kind), *gpa, &contents);
            }
            Directive::Page { gpa, kind, .. } => digest.without_contents(page_type(*kind), pages(*gpa, PAGE_SIZE)?),
            Directive::Parameters { range, .. } => digest.without_contents(PageType::Unmeasured, *range),
            Directive::Vcpu(context) => {
                digest.extend(PageType::Vmsa, context.gpa, &Sha384::digest(context.contents).into());
            }
            Directive::Shared { .. } | Directive::Required { .. } | Directive::IdBlock(_) => {}
        }
    }
    Ok(digest.measurement())
}

/// What it wants to be active in the guest: what its first vCPU has. KVM refuses features that it does not have.
///
/// # Errors
/// [`Error::Igvm`] for a file without vCPUs.
pub fn features(igvm: &Igvm<'_>) -> Result<SevFeatures, Error> {
    let (_, first) = igvm.contexts().next().ok_or_else(|| refuse(0, "it has no vcpus"))?;
    Ok(SevFeatures::from_bits_retain(vmsa::features(first.contents)))
}

/// What a launch through KVM can start of it: there vCPUs are measured last, in the order of their indices, all at one address,
/// with the same features, and as KVM makes their states.
///
/// # Errors
/// [`Error::Igvm`] if that is not how it has them, or one is to start from a state that KVM makes none of; as [`IgvmImage::new`]
/// and [`features`].
pub fn image(igvm: Igvm<'_>) -> Result<IgvmImage<'_>, Error> {
    let features = features(&igvm)?;
    let mut vcpus = 0;
    for (offset, directive) in igvm.directives() {
        match directive {
            Directive::Vcpu(context) if context.gpa != VMSA_GPA => {
                let problem = format!("it measures vcpu {} at {}, and kvm at {VMSA_GPA}", context.vcpu, context.gpa);
                return Err(refuse(offset, problem));
            }
            Directive::Vcpu(context) if context.vcpu != vcpus => {
                return Err(refuse(offset, format!("it has vcpu {} where vcpu {vcpus} is due", context.vcpu)));
            }
            Directive::Vcpu(_) => vcpus += 1,
            Directive::Page { .. } | Directive::Parameters { .. } if vcpus > 0 => {
                return Err(refuse(offset, "it has pages behind vcpus, which kvm measures last"));
            }
            _ => {}
        }
    }
    IgvmImage::new(igvm, |context: &Context<'_>| {
        let state = save_area::state(context.contents);
        difference(context, Vmsa::of(&state, features).as_bytes(), &vmsa::FIELDS)?;
        let attributes = [(at::CS, "code attributes"), (at::DS, "data attributes")];
        possible(context, &state, attributes.into_iter().chain(vmsa::FIELDS))?;
        Ok(state)
    })
}

/// The ID block and its signatures, if it has them. [`IdAuth::verify`] says whether they are sound.
///
/// # Errors
/// [`Error::Igvm`] for two of them or one that is too short, [`Error::IdBlock`], and as [`policy`].
pub fn id_block(igvm: &Igvm<'_>) -> Result<Option<(IdBlock, IdAuth)>, Error> {
    let mut blocks = igvm.directives().filter_map(|(offset, directive)| match directive {
        Directive::IdBlock(block) => Some((offset, block)),
        _ => None,
    });
    let Some((offset, block)) = blocks.next() else { return Ok(None) };
    if let Some((offset, _)) = blocks.next() {
        return Err(refuse(offset, "it has two id blocks for sev-snp"));
    }
    let block: &[u8; ID_BLOCK_BYTES] =
        block.first_chunk().ok_or_else(|| refuse(offset, "the header is too short for its kind"))?;
    // Mask, whether there is an author's key, the block without its policy, algorithms, signatures and keys.
    let mut bytes = [0; id_block::BLOCK_BYTES];
    bytes[..0x58].copy_from_slice(&block[0x08..0x60]);
    bytes[0x58..].copy_from_slice(&policy(igvm)?.bits().to_le_bytes());
    let mut auth = [0; AUTH_BYTES];
    let mut copy = |to: usize, from: usize, len: usize| auth[to..to + len].copy_from_slice(&block[from..from + len]);
    copy(0, 0x60, 4);
    copy(id_block::BLOCK_SIGNATURE, 0x68, NUMBERS);
    copy(id_block::ID_KEY, 0xf8, 4);
    copy(id_block::ID_KEY + 4, 0x100, NUMBERS);
    if block[4] != 0 {
        copy(4, 0x64, 4);
        copy(id_block::KEY_SIGNATURE, 0x190, NUMBERS);
        copy(id_block::AUTHOR_KEY, 0x220, 4);
        copy(id_block::AUTHOR_KEY + 4, 0x228, NUMBERS);
    }
    Ok(Some((IdBlock::from_bytes(&bytes)?, IdAuth::from_bytes(&auth))))
}

/// Length of an `IGVM_VHS_SNP_ID_BLOCK`.
const ID_BLOCK_BYTES: usize = 0x2b8;
/// Length of the two numbers that a signature and a key have.
const NUMBERS: usize = 2 * id_block::NUMBER_BYTES;
const _: () = assert!(NUMBERS < SIGNATURE_BYTES && 4 + NUMBERS < KEY_BYTES);

// The crate `igvm`, which writes the files of these tests, has the byte order of the machine in them.
#[cfg(all(test, target_endian = "little"))]
mod tests;
