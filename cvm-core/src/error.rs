use crate::doorbell::Access;
use crate::igvm::IgvmError;
use crate::interrupt::Refusal;
use crate::{Event, Gpa, GpaRange, RangeError};
use std::time::Duration;

/// An error of somebody else, kept as the source of ours.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What can go wrong between a VMM and the contract.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The memory layout makes no sense.
    #[error("the memory layout is refused: {0}")]
    Layout(String),
    /// The VM's configuration makes no sense, or this platform does not offer it.
    #[error("the configuration is refused: {0}")]
    Config(String),
    /// An address in no memory slot.
    #[error("{gpa} lies outside the guest's memory")]
    OutsideMemory {
        /// The address.
        gpa: Gpa,
    },
    /// Pages submitted to a launch twice.
    #[error("{range} was loaded already")]
    LoadedTwice {
        /// The pages.
        range: GpaRange,
    },
    /// A vCPU whose state was set twice, or does not exist, or has none at the seal.
    #[error("vcpu {vcpu}: {problem}")]
    VcpuState {
        /// The vCPU.
        vcpu: u32,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A launch that goes on after one of its steps failed.
    #[error("the launch is over: an earlier step failed")]
    LaunchFailed,
    /// A file that is not an image that we can load.
    #[error("the image is refused: {reason}")]
    Image {
        /// What is wrong with it.
        reason: String,
    },
    /// An IGVM file that cannot be loaded.
    #[error(transparent)]
    Igvm(#[from] IgvmError),
    /// A guest asked to convert something that is no range of pages.
    #[error("vcpu {vcpu} asked to convert what is no page range: {reason}")]
    InvalidRequest {
        /// The vCPU that asked.
        vcpu: u32,
        /// What is wrong with the numbers.
        reason: RangeError,
    },
    /// A host tried to convert what no guest has asked for.
    #[error("vcpu {vcpu} has not asked for a conversion at {gpa}")]
    NotAsked {
        /// The vCPU that was said to have asked.
        vcpu: u32,
        /// The first page.
        gpa: Gpa,
    },
    /// A request is carried out in part; the guest has to ask again for the rest.
    #[error("the request is carried out up to {range}, and the guest has to ask again for the rest")]
    Unfinished {
        /// The first pages that are not converted.
        range: GpaRange,
    },
    /// A conversion would leave more runs of pages on one side than the host has mappings for.
    #[error("converting {range} would leave more than {most} runs of private and shared pages")]
    TooFragmented {
        /// The pages.
        range: GpaRange,
        /// How many runs there may be.
        most: u64,
    },
    /// Pages are lost that the guest may still see.
    #[error("the vm must not go on: a guest may see pages that are lost")]
    Lost,
    /// A listener wants a conversion to happen later.
    #[error("{listener} asks to wait with the conversion of {range}: {reason}")]
    ListenerWaits {
        /// Its name.
        listener: String,
        /// The pages.
        range: GpaRange,
        /// Its reason.
        reason: String,
    },
    /// A listener wants a conversion not to happen.
    #[error("{listener} refuses the conversion of {range}: {reason}")]
    ListenerRefuses {
        /// Its name.
        listener: String,
        /// The pages.
        range: GpaRange,
        /// Its reason.
        reason: String,
    },
    /// Somebody held the shared view for too long.
    #[error("the shared view was still pinned by {} when the {waited:?} for making {range} private were over", holders.join(", "))]
    Pinned {
        /// The pages.
        range: GpaRange,
        /// How long the whole conversion was allowed to take.
        waited: Duration,
        /// The names of those who held it up, see [`SharedMemory::named`](crate::SharedMemory::named).
        holders: Vec<String>,
    },
    /// Other conversions held pages of a request for too long.
    #[error("other conversions of pages of {range} were still under way after {waited:?}")]
    Busy {
        /// The pages of the request.
        range: GpaRange,
        /// How long the engine waited.
        waited: Duration,
    },
    /// A request for pages that an earlier conversion has lost.
    #[error("{range} is inaccessible since a conversion failed")]
    Inaccessible {
        /// The pages.
        range: GpaRange,
    },
    /// A conversion failed and could not be undone.
    #[error("{range} is lost{}", if *contained { "" } else { ", and the guest may still see it: stop the vm" })]
    Poisoned {
        /// The pages.
        range: GpaRange,
        /// Whether they are out of the guest's reach.
        contained: bool,
        /// The failure.
        source: Box<Error>,
    },
    /// A guest touched memory that is not there, as device registers are on other machines.
    #[error("vcpu {vcpu} {} {gpa}, where there is no memory: protected guests have no mmio", if *write { "wrote to" } else { "touched" })]
    MmioRefused {
        /// The vCPU.
        vcpu: u32,
        /// The address.
        gpa: Gpa,
        /// Whether it is known to have written: not every platform says.
        write: bool,
    },
    /// A guest touched a page in a way that needs a conversion first, or touched a poisoned page.
    #[error("vcpu {vcpu} touched {gpa} without the conversion that it needs")]
    MissingConversion {
        /// The vCPU.
        vcpu: u32,
        /// The address.
        gpa: Gpa,
    },
    /// A guest rang a doorbell that is not there.
    #[error("vcpu {vcpu} cannot {access} doorbell register {register:#x}")]
    UnknownDoorbell {
        /// The vCPU.
        vcpu: u32,
        /// The register's offset in the doorbell space.
        register: u16,
        /// What it tried.
        access: Access,
    },
    /// A vCPU was run again before the guest's question was answered, or answered without a question.
    #[error("vcpu {vcpu}: {problem}")]
    Protocol {
        /// The vCPU.
        vcpu: u32,
        /// What was out of order.
        problem: &'static str,
    },
    /// There is no descriptor for a notification, see [`Vm::doorbell_fd`](crate::Vm::doorbell_fd) and
    /// [`Vm::interrupt_fd`](crate::Vm::interrupt_fd).
    #[error("there is no descriptor for this: {0}")]
    NoDescriptor(String),
    /// The interrupt guard refuses an injection.
    #[error("vcpu {vcpu}: {event} is refused: {reason}")]
    InjectionRefused {
        /// The vCPU.
        vcpu: u32,
        /// What the host wanted to inject.
        event: Event,
        /// Why not.
        reason: Refusal,
    },
    /// The guest gave up, and told its host so before anything else worked.
    #[error("vcpu {vcpu} asked to be terminated{}", reason.map(|(set, code)| format!(": reason {code:#x} of set {set:#x}")).unwrap_or_default())]
    Terminated {
        /// The vCPU.
        vcpu: u32,
        /// A set of reasons, and the reason's number in it, if the host learns them. Set 0 is that of the specification
        /// (AMD publication 56421, section 2.3.1, "Termination Request"), others are the guest's own.
        reason: Option<(u8, u8)>,
    },
    /// The guest crashed or its vCPU cannot run.
    #[error("vcpu {vcpu} cannot go on: {reason}")]
    Crashed {
        /// The vCPU.
        vcpu: u32,
        /// What the platform says.
        reason: String,
    },
    /// A backend failed.
    #[error("failed to {step}{}", range.map(|range| format!(" for {range}")).unwrap_or_default())]
    Backend {
        /// What it was doing.
        step: &'static str,
        /// To which pages.
        range: Option<GpaRange>,
        /// The backend's own error.
        source: BoxError,
    },
}
