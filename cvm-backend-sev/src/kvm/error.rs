use crate::FirmwareError;
use cvm_core::{BoxError, GpaRange, Protection};
use std::io;
use std::path::PathBuf;

/// What can go wrong between this backend and the host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device by which commands reach the firmware cannot be opened.
    #[error("failed to open {}: {remedy}", path.display())]
    Open {
        /// The device.
        path: PathBuf,
        /// What to do about it.
        remedy: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The host does not offer a protection.
    #[error("{protection} is not offered here: {what}")]
    NotOffered {
        /// The protection.
        protection: Protection,
        /// What lacks.
        what: String,
    },
    /// A command of the launch failed.
    #[error("failed to {step}{}{}", range.map(|range| format!(" at {range}")).unwrap_or_default(),
        firmware.map(|firmware| format!(": the firmware says {firmware}")).unwrap_or_default())]
    Command {
        /// What it was to do.
        step: &'static str,
        /// To which pages: those that are left.
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
    /// What plain KVM has too failed.
    #[error(transparent)]
    Kvm(#[from] cvm_backend_kvm::Error),
}

impl Error {
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
