//! What a launch of AMD SEV, SEV-ES or SEV-SNP is measured as, computed from its files.

#![deny(clippy::print_stdout, clippy::print_stderr, reason = "they panic where the stream is closed or full")]

#[path = "common/program.rs"]
mod program;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use cvm::doorbell::Doorbell;
use cvm::image::Image;
use cvm::sev::{CpuSignature, Firmware, HostData, KernelHashes, SevFeatures, Vcpus, Vmm, igvm, sev, snp};
use cvm::{BoxError, Gpa, Launch, VmConfig};
use program::print;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tiny_guest::{BOOT_PAGE, PAGE_TABLES};

/// Compute what a launch of AMD SEV, SEV-ES or SEV-SNP is measured as.
///
/// The digest is alone on the last line. It is that of the launch digest field of an SEV-SNP report, or what the launch
/// measurement of SEV and SEV-ES is an HMAC of.
#[derive(Debug, Parser)]
#[command(name = "measure")]
struct Options {
    #[command(subcommand)]
    mode: Mode,
    /// Print an object: {mode, digest} and of firmware {firmware, sections}, of an IGVM file {policy}, with --elf {config, host_data}
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Mode {
    /// SEV-SNP: SHA-384 over a chain of pages
    Snp(Snp),
    /// SEV-ES: SHA-256 of firmware, hashes of a kernel, and vCPUs
    SevEs {
        #[command(flatten)]
        files: Files,
        /// How many vCPUs
        #[arg(long, value_name = "N")]
        vcpus: u32,
        #[command(flatten)]
        states: States,
        /// What is active in the guest, as the bits of SEV_FEATURES
        #[arg(long, value_name = "BITS", default_value = "0", value_parser = number)]
        features: u64,
    },
    /// SEV: SHA-256 of firmware and hashes of a kernel
    Sev {
        #[command(flatten)]
        files: Files,
    },
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("subject").args(["ovmf", "igvm", "elf"]).required(true)))]
struct Snp {
    /// The firmware; on Debian, the package ovmf-amdsev has one that checks kernels
    #[arg(long, value_name = "FILE", requires = "vcpus")]
    ovmf: Option<PathBuf>,
    /// An IGVM file instead, which says all that there is to measure
    #[arg(long, value_name = "FILE", conflicts_with_all = ["vcpus", "vmm", "features", "kernel", "model"])]
    igvm: Option<PathBuf>,
    #[command(flatten)]
    kernel: KernelOptions,
    /// How many vCPUs, with --ovmf and --elf
    #[arg(long, value_name = "N")]
    vcpus: Option<u32>,
    #[command(flatten)]
    states: States,
    #[command(flatten)]
    elf: ElfOptions,
    /// What is active in the guest, as the bits of SEV_FEATURES
    #[arg(long, value_name = "BITS", default_value = "0x1", value_parser = number)]
    features: u64,
}

/// Firmware, and a kernel beside it.
#[derive(Debug, Args)]
struct Files {
    /// The firmware; on Debian, the package ovmf-amdsev has one that checks kernels
    #[arg(long, value_name = "FILE")]
    ovmf: PathBuf,
    #[command(flatten)]
    kernel: KernelOptions,
}

#[derive(Debug, Args)]
struct KernelOptions {
    /// A kernel that the VMM loads beside the firmware
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The kernel's initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    append: Option<String>,
}

/// Which processor the vCPUs are, and who makes their initial states. QEMU's states have the processor's signature.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("model").args(["vcpu_type", "vcpu_sig", "vcpu_family"])))]
struct States {
    /// QEMU's name of the vCPUs' model, such as EPYC-v4
    #[arg(long, value_name = "MODEL")]
    vcpu_type: Option<CpuSignature>,
    /// The model's signature instead: CPUID leaf 1 EAX
    #[arg(long, value_name = "NUMBER", value_parser = signature)]
    vcpu_sig: Option<CpuSignature>,
    /// The model's family instead, with its extended part added
    #[arg(long, value_name = "NUMBER", value_parser = byte, requires = "vcpu_model")]
    vcpu_family: Option<u8>,
    /// With --vcpu-family: the model in it, with its extended part
    #[arg(long, value_name = "NUMBER", value_parser = byte, requires = "vcpu_family")]
    vcpu_model: Option<u8>,
    /// With --vcpu-family: the stepping
    #[arg(long, value_name = "NUMBER", value_parser = stepping, default_value = "0", requires = "vcpu_family")]
    vcpu_stepping: u8,
    /// Who makes the vCPUs' initial states
    #[arg(long, value_enum, default_value = "qemu")]
    vmm: VmmName,
}

/// A guest without firmware, loaded as `boot_tiny_guest` loads it.
#[derive(Debug, Args)]
struct ElfOptions {
    /// A guest of these crates instead of firmware: an ELF file, launched as boot_tiny_guest does
    #[arg(long, value_name = "FILE", requires = "vcpus", conflicts_with_all = ["kernel", "vmm", "model"])]
    elf: Option<PathBuf>,
    /// With --elf: how much memory the guest has, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 64, requires = "elf")]
    memory: u64,
    /// With --elf: the up to four numbers that the guest is started with
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', value_parser = number, num_args = 0..=4, requires = "elf")]
    arguments: Vec<u64>,
    /// With --elf: the guest rings by model-specific registers, not by ports
    #[arg(long, requires = "elf")]
    msr: bool,
    /// With --elf: the bit of page-table entries that makes memory private, which is the processor's (51, or 47 before Milan)
    #[arg(long, value_name = "BIT", default_value_t = 51, requires = "elf")]
    private_bit: u8,
}

impl ElfOptions {
    /// Rehearses the launch.
    fn measure(&self, path: &Path, vcpus: u32, features: SevFeatures) -> Result<Value, BoxError> {
        let image = Image::from_elf(&read(path)?).map_err(|error| format!("{}: {error}", path.display()))?;
        let memory = self.memory.checked_mul(1 << 20);
        let memory = memory.ok_or_else(|| format!("--memory {}: the guest has at most 2^44 MiB", self.memory))?;
        let mut config = VmConfig::new(memory, vcpus)?;
        config.doorbell = if self.msr { Doorbell::Msr } else { Doorbell::Port };
        let mut launch = Launch::rehearse(config, snp::interface(self.private_bit))?;
        launch.load_image(&image)?;
        let argument = std::array::from_fn(|index| self.arguments.get(index).copied().unwrap_or_default());
        launch.load_boot_page(Gpa(BOOT_PAGE), argument)?;
        launch.start_in_long_mode(image.entry(), Gpa(PAGE_TABLES), Gpa(BOOT_PAGE))?;
        let config = launch.config_digest();
        let host_data: String =
            HostData::ConfigDigest.bytes(&config).iter().map(|byte| format!("{byte:02x}")).collect();
        let digest = snp::of_transcript(&launch.transcript()?, features).to_string();
        Ok(json!({ "mode": "snp", "digest": digest, "config": config.to_string(), "host_data": host_data }))
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum VmmName {
    Qemu,
    Ec2,
    Gce,
}

/// A number, hexadecimal after 0x.
fn number(text: &str) -> Result<u64, std::num::ParseIntError> {
    text.strip_prefix("0x").map_or_else(|| text.parse(), |digits| u64::from_str_radix(digits, 16))
}

fn signature(text: &str) -> Result<CpuSignature, String> {
    let number = number(text).map_err(|error| error.to_string())?;
    u32::try_from(number).map(CpuSignature).map_err(|error| error.to_string())
}

fn byte(text: &str) -> Result<u8, String> {
    let number = number(text).map_err(|error| error.to_string())?;
    u8::try_from(number).map_err(|error| error.to_string())
}

fn stepping(text: &str) -> Result<u8, String> {
    byte(text).and_then(|stepping| if stepping > 15 { Err("a stepping is 0 to 15".into()) } else { Ok(stepping) })
}

impl States {
    fn signature(&self) -> Option<CpuSignature> {
        let numbers = self.vcpu_family.zip(self.vcpu_model);
        let of_numbers = numbers.map(|(family, model)| CpuSignature::new(family, model, self.vcpu_stepping));
        self.vcpu_type.or(self.vcpu_sig).or(of_numbers)
    }

    fn of(&self, count: u32, features: u64) -> Result<Vcpus, String> {
        let vmm = match self.vmm {
            VmmName::Qemu => Vmm::Qemu,
            VmmName::Ec2 => Vmm::Ec2,
            VmmName::Gce => Vmm::Gce,
        };
        let signature = match (vmm, self.signature()) {
            (_, Some(signature)) => signature,
            (Vmm::Qemu, None) => {
                return Err("the states that QEMU makes depend on the vcpus' model: \
                            add --vcpu-type, --vcpu-sig, or --vcpu-family and --vcpu-model"
                    .into());
            }
            (Vmm::Ec2 | Vmm::Gce, None) => CpuSignature(0),
        };
        Ok(Vcpus { count, signature, vmm, features: SevFeatures::from_bits_retain(features) })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("failed to read {}: {error}", path.display()))
}

impl KernelOptions {
    fn hashes(&self) -> Result<Option<KernelHashes>, BoxError> {
        let Some(kernel) = &self.kernel else { return Ok(None) };
        let initrd = self.initrd.as_deref().map(read).transpose()?.unwrap_or_default();
        let command_line = self.append.as_deref().unwrap_or_default().as_bytes();
        Ok(Some(KernelHashes::new(&read(kernel)?, &initrd, command_line)))
    }
}

/// What all of firmware has to say, and `digest` computes of it and of a kernel.
fn of_firmware(
    path: &Path,
    kernel: &KernelOptions,
    mode: &str,
    digest: impl FnOnce(&Firmware<'_>, Option<&KernelHashes>) -> Result<String, cvm::sev::Error>,
) -> Result<Value, BoxError> {
    let (image, kernel) = (read(path)?, kernel.hashes()?);
    let name = path.display();
    let no_image = "an image of OVMF is in each of Debian's packages ovmf and ovmf-amdsev";
    let firmware = Firmware::parse(&image).map_err(|error| format!("{name}: {error}; {no_image}"))?;
    let digest = digest(&firmware, kernel.as_ref()).map_err(|error| match error {
        cvm::sev::Error::FirmwareLacks { .. } => format!("{name}: {error}; that of Debian's package ovmf-amdsev does"),
        error => format!("{name}: {error}"),
    })?;
    // What only SEV-SNP reads can be damaged or missing in the others.
    let sections = firmware.sections().unwrap_or_default().into_iter();
    let sections =
        sections.map(|section| json!({ "kind": format!("{:?}", section.kind), "range": section.range.to_string() }));
    let sections = sections.collect::<Value>();
    Ok(json!({ "mode": mode, "digest": digest, "firmware": firmware.range().to_string(), "sections": sections }))
}

impl Snp {
    fn measure(&self) -> Result<Value, BoxError> {
        // The parser sees to it that there are vCPUs where they are needed.
        let vcpus = self.vcpus.unwrap_or_default();
        if let Some(path) = &self.igvm {
            return of_igvm(path);
        }
        if let Some(path) = &self.elf.elf {
            return self.elf.measure(path, vcpus, SevFeatures::from_bits_retain(self.features));
        }
        let path = self.ovmf.as_deref().ok_or("there is nothing to measure: add --ovmf, --igvm or --elf")?;
        let vcpus = self.states.of(vcpus, self.features)?;
        of_firmware(path, &self.kernel, "snp", |firmware, kernel| {
            Ok(snp::of_firmware(firmware, &vcpus, kernel)?.to_string())
        })
    }
}

fn of_igvm(path: &Path) -> Result<Value, BoxError> {
    let file = read(path)?;
    let measured = || {
        let file = igvm::parse(&file)?;
        Ok((igvm::measurement(&file)?, file.policy()))
    };
    let (digest, policy) = measured().map_err(|error: cvm::sev::Error| format!("{}: {error}", path.display()))?;
    Ok(json!({ "mode": "snp", "digest": digest.to_string(), "policy": policy.map(|policy| format!("{policy:#x}")) }))
}

fn measure(mode: &Mode) -> Result<Value, BoxError> {
    match mode {
        Mode::Snp(snp) => snp.measure(),
        Mode::SevEs { files, vcpus, states, features } => {
            let vcpus = states.of(*vcpus, *features)?;
            of_firmware(&files.ovmf, &files.kernel, "sev-es", |firmware, kernel| {
                Ok(sev::of_firmware(firmware, Some(&vcpus), kernel)?.to_string())
            })
        }
        Mode::Sev { files } => of_firmware(&files.ovmf, &files.kernel, "sev", |firmware, kernel| {
            Ok(sev::of_firmware(firmware, None, kernel)?.to_string())
        }),
    }
}

fn main() -> ExitCode {
    program::run(run)
}

fn run(options: Options) -> Result<ExitCode, BoxError> {
    let measured = measure(&options.mode)?;
    if options.json {
        print(format_args!("{measured:#}"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    for fact in ["firmware", "policy", "config", "host_data"] {
        if let Some(value) = measured[fact].as_str() {
            print(format_args!("{fact:<16}{value}"))?;
        }
    }
    for section in measured["sections"].as_array().into_iter().flatten() {
        print(format_args!("{:<16}{}", text(&section["kind"]), text(&section["range"])))?;
    }
    print(text(&measured["digest"]))?;
    Ok(ExitCode::SUCCESS)
}
