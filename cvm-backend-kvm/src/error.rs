use cvm_core::{BoxError, Error as CoreError, GpaRange, Protection};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why the kernel refused something, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("{cause}; {remedy}")]
pub struct Remedied {
    /// The kernel's answer.
    pub cause: io::Error,
    /// How to remove the cause.
    pub remedy: &'static str,
}

/// What can go wrong between this backend and the host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file of a device cannot be opened, or is another device's.
    #[error("failed to open {}", path.display())]
    Open {
        /// The device.
        path: PathBuf,
        /// Why not.
        source: Remedied,
    },
    /// The KVM device is one from another time.
    #[error("{} speaks version {version} of the kvm api, not 12", path.display())]
    ApiVersion {
        /// The device.
        path: PathBuf,
        /// What it says.
        version: i32,
    },
    /// The host, or this backend, does not offer a protection.
    #[error("{protection} is not offered here: {what}")]
    NotOffered {
        /// The protection.
        protection: Protection,
        /// What lacks.
        what: String,
    },
    /// The caller named no protection, and the strongest one is not offered.
    #[error(
        "no isolation was named, and the strongest, vault, is not offered: {what}; to launch with less, name {alternatives}"
    )]
    NoDefault {
        /// The feature that is missing for the strongest.
        what: String,
        /// The protections that the host offers by name.
        alternatives: String,
    },
    /// A trial of hypercalls failed, so that nobody knows whether they work.
    #[error("failed to find out whether hypercalls work on this kvm; conversions by doorbell work on every kvm")]
    HypercallUnknown {
        /// Why the trial failed.
        source: BoxError,
    },
    /// A KVM call failed.
    #[error("kvm failed to {step}")]
    Kvm {
        /// What it was to do.
        step: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// KVM refuses a register of a vCPU's initial state.
    #[error("kvm cannot start a vcpu with {value:#x} in {register}")]
    Register {
        /// Which.
        register: &'static str,
        /// Its value in the initial state.
        value: u64,
        /// KVM's answer.
        source: io::Error,
    },
    /// Memory cannot be laid out like this.
    #[error("failed to lay out memory")]
    Layout(#[source] cvm_core::Error),
    /// A call about guest memory failed.
    #[error("failed to {step} {range}")]
    Memory {
        /// What it was to do.
        step: &'static str,
        /// To which pages.
        range: GpaRange,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The memory as a whole cannot be made.
    #[error("failed to {step} of {bytes} bytes")]
    Backing {
        /// What it was to do.
        step: &'static str,
        /// For how much memory.
        bytes: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Memory cannot be pinned: the kernel counts it against a limit of this process.
    #[error("failed to pin {bytes} bytes")]
    Pin {
        /// How much memory the VM has.
        bytes: u64,
        /// Why not.
        source: Remedied,
    },
    /// A vault cannot be started or reached.
    #[error("the vault failed to {step}")]
    Vault {
        /// What it, or this process on its behalf, was to do.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No vault can be had by a socket.
    #[error("failed to get a vault by the socket {}", path.display())]
    VaultSocket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The vault does not do what it was asked to.
    #[error("the vault refuses: {reason}")]
    VaultRefused {
        /// Why not.
        reason: String,
    },
    /// The vault did not answer by the [deadline](crate::KvmPlatform::with_vault_deadline), as if it were stopped; it was
    /// given up, and with it the VM.
    #[error("the vault did not {operation} within {waited:?}")]
    VaultOverdue {
        /// What it was to do.
        operation: &'static str,
        /// How long this process has waited for it.
        waited: Duration,
    },
    /// The vault breaks the protocol, so that it cannot be trusted; it was given up, and with it the VM.
    #[error("the vault is not what it should be: {what}")]
    VaultProtocol {
        /// What it did.
        what: &'static str,
    },
    /// The vault is dead, and with it the VM.
    #[error("the vault is dead: {status}")]
    VaultDied {
        /// How it ended.
        status: String,
    },
}

impl Error {
    /// For `map_err`: why a device could not be opened, with what `remedy` has for that.
    pub(crate) fn open(path: &Path, remedy: impl Fn(ErrorKind) -> &'static str) -> impl FnOnce(io::Error) -> Self {
        move |cause| {
            let source = Remedied { remedy: remedy(cause.kind()), cause };
            Self::Open { path: path.to_owned(), source }
        }
    }

    /// For `map_err`: `step` was what a KVM call was to do.
    pub fn kvm(step: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |error| Self::Kvm { step, source: error.into() }
    }

    /// For `map_err`: `step` was what a vault, or this process on its behalf, was to do.
    pub(crate) fn vault<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::Vault { step, source: error.into() }
    }

    /// For `map_err`: `step` was what a call was to do to `range`.
    pub(crate) fn memory<E: Into<io::Error>>(step: &'static str, range: GpaRange) -> impl FnOnce(E) -> Self {
        move |error| Self::Memory { step, range, source: error.into() }
    }
}

/// For `map_err`, where the contract's error is due: `step` was what the host was to do.
pub fn failed<E: Into<BoxError>>(step: &'static str) -> impl Fn(E) -> CoreError {
    move |error| CoreError::Backend { step, range: None, source: error.into() }
}

/// An error and all its sources, as one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(error.source(), |error| error.source())
        .fold(error.to_string(), |text, source| format!("{text}: {source}"))
}
