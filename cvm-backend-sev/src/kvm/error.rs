use super::{Asids, CpuidCorrection, Resources};
use crate::FirmwareError;
use cvm_core::{BoxError, GpaRange, Protection};
use std::io::{self, ErrorKind};

/// What can go wrong between this backend and the host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The options of a launch make no sense, or this host cannot fulfil them.
    #[error("the options are refused: {0}")]
    Options(String),
    /// A command of the launch failed.
    #[error("failed to {step}{}{}", range.map(|range| format!(" at {range}")).unwrap_or_default(),
        firmware.map(|firmware| format!(": the firmware says {firmware}")).unwrap_or_default())]
    Command {
        /// What it was to do.
        step: &'static str,
        /// To which pages: the first is the one that it failed at.
        range: Option<GpaRange>,
        /// What the firmware says, if it was asked.
        firmware: Option<FirmwareError>,
        /// What the kernel says.
        source: io::Error,
    },
    /// The guest's owner gives the launch up.
    #[error("the guest's owner refuses the launch")]
    Owner(#[source] BoxError),
    /// Bytes that the firmware is to be handed are none or too many.
    #[error("{what} has {len} bytes; it takes 1 to {}", super::sev::MOST_BLOB)]
    Blob {
        /// What they are.
        what: &'static str,
        /// How many there are.
        len: usize,
    },
    /// A guest that arrives is not what it should be.
    #[error("the guest cannot be received: {0}")]
    Origin(&'static str),
    /// Every address space identifier is taken, so that the host can have no more guests of this kind.
    #[error("no more guests of {protection}: {asids}")]
    Exhausted {
        /// The kind.
        protection: Protection,
        /// How many identifiers there are for it, and how many are free.
        asids: Asids,
        /// What the kernel says.
        source: io::Error,
    },
    /// The firmware does not vouch for what the vCPUs are said to be, and nobody agreed to what it does vouch for.
    #[error("the firmware corrects the page of cpuid leaves: {}", list(corrections))]
    CpuidCorrected {
        /// What it would have instead.
        corrections: Vec<CpuidCorrection>,
    },
    /// What plain KVM can say too: a device cannot be opened, a protection is not offered, a call failed.
    #[error(transparent)]
    Kvm(#[from] cvm_backend_kvm::Error),
}

fn list(corrections: &[CpuidCorrection]) -> String {
    corrections.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

impl Error {
    /// That of the first command, which fails as busy when no identifier is free.
    pub(super) fn or_exhausted(self, protection: Protection) -> Self {
        match (self, Resources::of_host().of(protection)) {
            (Self::Command { source, .. }, Some(asids)) if source.kind() == ErrorKind::ResourceBusy => {
                Self::Exhausted { protection, asids, source }
            }
            (error, _) => error,
        }
    }

    /// A command's error with the pages that it was about.
    pub(super) fn at(self, pages: GpaRange) -> Self {
        match self {
            Self::Command { step, firmware, source, .. } => {
                Self::Command { step, range: Some(pages), firmware, source }
            }
            other => other,
        }
    }
}
