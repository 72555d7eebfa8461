use cvm_core::Gpa;
use cvm_core::igvm::IgvmError;

/// What can be wrong with what a launch is to be made of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A firmware image is damaged.
    #[error("the firmware at offset {offset:#x}: {problem}")]
    Firmware {
        /// Where in the file.
        offset: usize,
        /// What is wrong there.
        problem: String,
    },
    /// A firmware image is sound, and does not have what the launch needs.
    #[error("the firmware {lacks}")]
    FirmwareLacks {
        /// What it does not have.
        lacks: &'static str,
    },
    /// Pages cannot be loaded where they shall be.
    #[error("{len:#x} bytes at {gpa}: {problem}")]
    Pages {
        /// Where they start.
        gpa: Gpa,
        /// How many bytes there are.
        len: u64,
        /// Why not.
        problem: &'static str,
    },
    /// There are no vCPUs, or more than a launch can have.
    #[error("{vcpus} vcpus; it takes 1 to {}", cvm_core::launch::MAX_VCPUS)]
    Vcpus {
        /// How many were asked for.
        vcpus: u32,
    },
    /// No such vCPU model is known.
    #[error("no vcpu model is called {name:?}; known are {}, and their versions, as in EPYC-v4", crate::vcpu::names())]
    VcpuModel {
        /// What was asked for.
        name: String,
    },
    /// A guest policy has bits that no firmware accepts.
    #[error("the {kind} guest policy {policy:#x}: {problem}")]
    Policy {
        /// Of which kind.
        kind: &'static str,
        /// All of it.
        policy: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// An ID block, its signatures or a key is not what it should be.
    #[error("the id block: {problem}")]
    IdBlock {
        /// What is wrong.
        problem: &'static str,
    },
    /// A page cannot be measured as the transcript has it.
    #[error("the page at {gpa}: {problem}")]
    Transcript {
        /// Where it is.
        gpa: Gpa,
        /// Why not.
        problem: &'static str,
    },
    /// A secret cannot be given to a guest.
    #[error("a secret of {len} bytes: {problem}")]
    Secret {
        /// How long it is.
        len: usize,
        /// Why not.
        problem: &'static str,
    },
    /// An IGVM file is damaged, or cannot be launched on SEV-SNP.
    #[error(transparent)]
    Igvm(#[from] IgvmError),
}
