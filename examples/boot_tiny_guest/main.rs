//! Boots the tiny guest, serves it a virtio disk over shared memory, and then tries to reach its secret.
//!
//! What the guest prints counts for nothing: every check looks at facts that the VMM can see itself. The exit status is
//! 0 only if all of them are as they should be.

#![deny(clippy::print_stdout, clippy::print_stderr, reason = "they panic where the stream is closed or full")]

mod attempts;
#[path = "../common/block.rs"]
mod block;
mod disk;
#[path = "../common/files.rs"]
mod files;
mod machine;
#[path = "../common/options.rs"]
mod options;
mod outcome;
#[path = "../common/program.rs"]
mod program;
#[path = "../common/virtio.rs"]
#[allow(dead_code, reason = "a device without a thread of its own needs less")]
mod virtio;

use attempts::Observer;
use clap::{Parser, ValueEnum};
use cvm::doorbell::{Doorbell, Transport};
use cvm::image::Image;
use cvm::kvm::KvmPlatform;
use cvm::sev::kvm::SevPlatform;
use cvm::{BoxError, Gpa, Launch, Platform, Policy, Protection, Vm, VmConfig};
use disk::Disk;
use machine::Machine;
use options::IsolationChoice;
use outcome::{Outcome, Run};
use program::{chain, conclude};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tiny_guest::{BOOT_PAGE, MAX_VCPUS, MIN_MEMORY, MMIO, PAGE_TABLES, Task};

const MIB: u64 = 1 << 20;

/// Boot a tiny protected guest, give it a virtio disk, and check from outside what it did.
#[derive(Debug, Parser)]
#[command(name = "boot_tiny_guest")]
struct Options {
    /// How many vCPUs the guest has; those after the first share pages and take them back meanwhile
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_VCPUS)))]
    vcpus: u32,

    /// How much memory the guest has, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64,
          value_parser = clap::value_parser!(u64).range(MIN_MEMORY / MIB..=MMIO / MIB))]
    memory: u64,

    /// The guest's disk; a copy is used, and the file is not changed [default: 32 KiB of made-up data]
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,

    /// What keeps private memory private [default: vault, the strongest]
    #[arg(long, value_enum)]
    isolation: Option<IsolationChoice>,

    /// AMD hardware that keeps private memory private, instead of software
    #[arg(long, value_enum, conflicts_with = "isolation")]
    platform: Option<PlatformChoice>,

    /// What the guest demands of the host besides isolation; a demand that cannot be enforced refuses the launch
    #[arg(long, value_enum, value_name = "DEMAND", value_delimiter = ',')]
    policy: Vec<Demand>,

    /// How the guest rings for its VMM
    #[arg(long, value_enum, default_value_t = DoorbellChoice::Port)]
    doorbell: DoorbellChoice,

    /// How the guest asks for conversions
    #[arg(long, value_enum, default_value_t = TransportChoice::Default)]
    transport: TransportChoice,

    /// An ELF file to boot instead of the built image of the tiny guest
    #[arg(long, value_name = "FILE")]
    guest: Option<PathBuf>,

    /// Tell the guest to misbehave instead of doing its work; the exit status is then not 0
    #[arg(long, value_enum)]
    misbehave: Option<Misbehaviour>,

    /// Stop a guest that runs longer than this
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,

    /// The KVM device
    #[arg(long, value_name = "FILE", default_value = "/dev/kvm")]
    kvm: PathBuf,

    /// Print the result as JSON, and nothing else, on the standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PlatformChoice {
    /// SEV-SNP: memory and registers are encrypted, and the host cannot replace pages
    Snp,
    /// SEV-ES: memory and registers are encrypted
    SevEs,
    /// SEV: memory is encrypted
    Sev,
}

impl From<PlatformChoice> for Protection {
    fn from(platform: PlatformChoice) -> Self {
        match platform {
            PlatformChoice::Snp => Self::SevSnp,
            PlatformChoice::SevEs => Self::SevEs,
            PlatformChoice::Sev => Self::Sev,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Demand {
    /// Simultaneous multithreading is off
    NoSmt,
    /// There are no performance counters
    NoPerformanceCounters,
    /// The first-level data cache is flushed on every entry, or need not be
    FlushL1d,
    /// Nobody can single-step the guest
    NoDebug,
}

impl From<Demand> for Policy {
    fn from(demand: Demand) -> Self {
        match demand {
            Demand::NoSmt => Self::NO_SMT,
            Demand::NoPerformanceCounters => Self::NO_PERFORMANCE_COUNTERS,
            Demand::FlushL1d => Self::FLUSH_L1D,
            Demand::NoDebug => Self::NO_DEBUG,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DoorbellChoice {
    /// By port I/O
    Port,
    /// By model-specific registers
    Msr,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum TransportChoice {
    /// As the platform has it, the same on every host
    Default,
    /// By the KVM hypercall MAP_GPA_RANGE
    Hypercall,
    /// By the doorbell
    Doorbell,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Misbehaviour {
    /// Spin until the watchdog stops it
    Spin,
    /// Crash by a triple fault
    TripleFault,
    /// Ring a doorbell that does not exist
    UnknownDoorbell,
    /// Ask for conversions that make no sense
    BadConversions,
    /// Panic
    Panic,
}

impl From<Misbehaviour> for Task {
    fn from(misbehaviour: Misbehaviour) -> Self {
        match misbehaviour {
            Misbehaviour::Spin => Self::Spin,
            Misbehaviour::TripleFault => Self::TripleFault,
            Misbehaviour::UnknownDoorbell => Self::UnknownDoorbell,
            Misbehaviour::BadConversions => Self::BadConversions,
            Misbehaviour::Panic => Self::Panic,
        }
    }
}

/// Loads the image, the boot page, and the state that every vCPU starts from.
fn load<L: cvm::launch::Loader>(
    mut launch: Launch<L>,
    image: &Image,
    task: Task,
    nonce: u64,
    name: &Path,
) -> Result<L::Vm, BoxError> {
    launch.load_image(image).map_err(files::named(name))?;
    launch.load_boot_page(Gpa(BOOT_PAGE), [task as u64, nonce, 0, 0])?;
    launch.start_in_long_mode(image.entry(), Gpa(PAGE_TABLES), Gpa(BOOT_PAGE))?;
    Ok(launch.seal()?)
}

fn run(options: &Options) -> Result<Outcome, BoxError> {
    let Some(choice) = options.platform else {
        let platform = KvmPlatform::open(&options.kvm, options.isolation.map(Protection::from))?;
        return boot(options, &platform, platform.protection());
    };
    let protection = choice.into();
    let platform = SevPlatform::open(protection).map_err(|error| {
        let name = choice.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        format!(
            "{}\nto see it on emulated hardware: cargo xtask l1 -- target/debug/examples/boot_tiny_guest --platform {name}",
            chain(&error)
        )
    })?;
    boot(options, &platform, protection)
}

fn boot<P: Platform>(options: &Options, platform: &P, protection: Protection) -> Result<Outcome, BoxError> {
    let file = match &options.guest {
        Some(path) => files::read(path, "ELF file", files::is_no_elf)?,
        None => tiny_guest::IMAGE.to_vec(),
    };
    let disk = Disk::new(options.disk.as_deref())?;
    let task = options.misbehave.map_or(Task::Work, Task::from);
    // The secret must differ from run to run, so that no leftover of an earlier one is taken for it.
    let nonce = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), std::process::id());

    let begin = Instant::now();
    let mut config = VmConfig::new(options.memory * MIB, options.vcpus)?;
    config.doorbell = match options.doorbell {
        DoorbellChoice::Port => Doorbell::Port,
        DoorbellChoice::Msr => Doorbell::Msr,
    };
    config.transport = match options.transport {
        TransportChoice::Default => None,
        TransportChoice::Hypercall => Some(Transport::Hypercall),
        TransportChoice::Doorbell => Some(Transport::Doorbell),
    };
    config.policy = options.policy.iter().copied().map(Policy::from).collect();
    let launch = platform.launch(config)?;
    let transport = launch.transport();
    let name = options.guest.as_deref().unwrap_or(Path::new("the built image"));
    let image = Image::from_elf(&file).map_err(files::named(name))?;
    let mut vm = load(launch, &image, task, nonce, name)?;
    let launched = begin.elapsed();

    let vcpus = vm.take_vcpus();
    let observer = Observer { trust: platform.trust_model(), nonce };
    let machine = Machine::new(&vm, disk.device()?, observer, !options.json);
    let begin = Instant::now();
    let ends = machine.run(vcpus, Duration::from_secs(options.timeout))?;
    let ran = begin.elapsed();
    Outcome::new(&machine, &disk, Run { task, protection, transport, ends, launched, ran })
}

fn main() -> ExitCode {
    cvm::kvm::vault::init();
    program::run(|options: Options| {
        let outcome = run(&options)?;
        let found = if options.json { serde_json::to_string_pretty(&outcome)? } else { outcome.to_string() };
        Ok(conclude(found, outcome.ok)?)
    })
}
