//! What a launch of AMD SEV, SEV-ES or SEV-SNP is measured as, computed from its files.

use clap::{Args, Parser, Subcommand, ValueEnum};
use cvm::doorbell::Doorbell;
use cvm::image::Image;
use cvm::sev::{CpuSignature, Firmware, KernelHashes, SevFeatures, Vcpus, Vmm, igvm, sev, snp};
use cvm::{Gpa, Launch, VmConfig};
use serde_json::{Value, json};
use std::error::Error;
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
    /// Print an object: {mode, digest} and of firmware {firmware, sections}, of an IGVM file {policy}
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Mode {
    /// SEV-SNP: SHA-384 over a chain of pages
    Snp {
        #[command(flatten)]
        files: Files,
        #[command(flatten)]
        vcpus: VcpuOptions,
        #[command(flatten)]
        elf: ElfOptions,
        /// What is active in the guest, as the bits of SEV_FEATURES
        #[arg(long, value_name = "BITS", default_value = "0x1", value_parser = number)]
        features: u64,
    },
    /// SEV-ES: SHA-256 of firmware, hashes of a kernel, and vCPUs
    SevEs {
        #[command(flatten)]
        files: Files,
        #[command(flatten)]
        vcpus: VcpuOptions,
    },
    /// SEV: SHA-256 of firmware and hashes of a kernel
    Sev {
        #[command(flatten)]
        files: Files,
    },
}

#[derive(Debug, Args)]
struct Files {
    /// The firmware; on Debian, the package ovmf-amdsev has one that checks kernels
    #[arg(long, value_name = "FILE", required_unless_present_any = ["igvm", "elf"])]
    ovmf: Option<PathBuf>,
    /// An IGVM file instead, which says all that there is to measure; with snp only
    #[arg(long, value_name = "FILE", conflicts_with_all = ["ovmf", "kernel"])]
    igvm: Option<PathBuf>,
    /// A kernel that the VMM loads beside it
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The kernel's initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    append: Option<String>,
}

#[derive(Debug, Args)]
struct VcpuOptions {
    /// How many vCPUs
    #[arg(long, value_name = "N", required_unless_present = "igvm", conflicts_with = "igvm")]
    vcpus: Option<u32>,
    /// QEMU's name of their model, such as EPYC-v4
    #[arg(long, value_name = "MODEL", required_unless_present_any = ["vcpu_sig", "igvm", "elf"],
          conflicts_with_all = ["vcpu_sig", "igvm", "elf"])]
    vcpu_type: Option<CpuSignature>,
    /// Their signature, CPUID leaf 1 EAX, instead
    #[arg(long, value_name = "NUMBER", value_parser = signature, conflicts_with_all = ["igvm", "elf"])]
    vcpu_sig: Option<CpuSignature>,
    /// Who makes their initial state
    #[arg(long, value_enum, default_value = "qemu")]
    vmm: VmmName,
}

/// A guest without firmware, loaded as `boot_tiny_guest` loads it.
#[derive(Debug, Args)]
struct ElfOptions {
    /// A guest of these crates instead of firmware: an ELF file, launched as boot_tiny_guest does
    #[arg(long, value_name = "FILE", conflicts_with_all = ["ovmf", "igvm", "kernel"])]
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
    fn measure(&self, path: &Path, vcpus: u32, features: SevFeatures) -> Result<Value, Box<dyn Error>> {
        let image = Image::from_elf(&read(path)?).map_err(|error| format!("{}: {error}", path.display()))?;
        let memory = self.memory.checked_mul(1 << 20).ok_or("there is no such amount of memory")?;
        let mut config = VmConfig::new(memory, vcpus)?;
        config.doorbell = if self.msr { Doorbell::Msr } else { Doorbell::Port };
        let mut launch = Launch::rehearse(config, snp::interface(self.private_bit))?;
        launch.load_image(&image)?;
        let argument = std::array::from_fn(|index| self.arguments.get(index).copied().unwrap_or_default());
        launch.load_boot_page(Gpa(BOOT_PAGE), argument)?;
        launch.start_in_long_mode(image.entry(), Gpa(PAGE_TABLES), Gpa(BOOT_PAGE))?;
        let digest = snp::of_transcript(&launch.transcript()?, features);
        Ok(json!({ "mode": "snp", "digest": digest.to_string() }))
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

impl VcpuOptions {
    fn vcpus(&self, features: SevFeatures) -> Vcpus {
        let vmm = match self.vmm {
            VmmName::Qemu => Vmm::Qemu,
            VmmName::Ec2 => Vmm::Ec2,
            VmmName::Gce => Vmm::Gce,
        };
        let signature = self.vcpu_type.or(self.vcpu_sig).unwrap_or(CpuSignature(0));
        Vcpus { count: self.vcpus.unwrap_or(0), signature, vmm, features }
    }
}

fn features(bits: u64) -> Result<SevFeatures, String> {
    let known = SevFeatures::all().bits();
    SevFeatures::from_bits(bits).ok_or_else(|| format!("the known bits among the features are {known:#x}"))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("reading {}: {error}", path.display()))
}

impl Files {
    fn kernel(&self) -> Result<Option<KernelHashes>, Box<dyn Error>> {
        let Some(kernel) = &self.kernel else { return Ok(None) };
        let initrd = self.initrd.as_deref().map(read).transpose()?.unwrap_or_default();
        let command_line = self.append.as_deref().unwrap_or_default().as_bytes();
        Ok(Some(KernelHashes::new(&read(kernel)?, &initrd, command_line)))
    }
}

fn measure(mode: &Mode) -> Result<Value, Box<dyn Error>> {
    let (Mode::Snp { files, .. } | Mode::SevEs { files, .. } | Mode::Sev { files }) = mode;
    if let Some(path) = &files.igvm {
        let file = read(path)?;
        let Mode::Snp { .. } = mode else {
            return Err("an igvm file is measured for snp only: `measure snp --igvm FILE`".into());
        };
        let file = igvm::parse(&file).map_err(|error| format!("{}: {error}", path.display()))?;
        let (digest, policy) = (igvm::measurement(&file)?.to_string(), igvm::policy(&file)?.bits());
        return Ok(json!({ "mode": "snp", "digest": digest, "policy": format!("{policy:#x}") }));
    }
    if let Mode::Snp { elf: elf @ ElfOptions { elf: Some(path), .. }, vcpus, features: bits, .. } = mode {
        return elf.measure(path, vcpus.vcpus.unwrap_or(0), features(*bits)?);
    }
    let path = files.ovmf.as_deref().ok_or("it takes a firmware, an igvm file or an elf file")?;
    let (image, kernel) = (read(path)?, files.kernel()?);
    let firmware = Firmware::parse(&image).map_err(|error| {
        format!(
            "{}: {error}; it takes an image of OVMF, which Debian's packages ovmf and ovmf-amdsev have",
            path.display()
        )
    })?;
    let (name, digest) = match mode {
        Mode::Snp { vcpus, features: bits, .. } => {
            let vcpus = vcpus.vcpus(features(*bits)?);
            ("snp", snp::of_firmware(&firmware, &vcpus, kernel.as_ref())?.to_string())
        }
        Mode::SevEs { vcpus, .. } => {
            let vcpus = vcpus.vcpus(SevFeatures::empty());
            ("sev-es", sev::of_firmware(&firmware, Some(&vcpus), kernel.as_ref())?.to_string())
        }
        Mode::Sev { .. } => ("sev", sev::of_firmware(&firmware, None, kernel.as_ref())?.to_string()),
    };
    let sections = firmware.sections().iter();
    let sections =
        sections.map(|section| json!({ "kind": format!("{:?}", section.kind), "range": section.range.to_string() }));
    let sections = sections.collect::<Value>();
    Ok(json!({ "mode": name, "digest": digest, "firmware": firmware.range().to_string(), "sections": sections }))
}

fn main() -> ExitCode {
    let options = Options::parse();
    let measured = match measure(&options.mode) {
        Ok(measured) => measured,
        Err(error) => {
            let lacks = matches!(error.downcast_ref(), Some(cvm::sev::Error::FirmwareLacks { .. }));
            let next = if lacks { "; that of Debian's package ovmf-amdsev has all that is asked for here" } else { "" };
            eprintln!("error: {error}{next}");
            return ExitCode::FAILURE;
        }
    };
    if options.json {
        println!("{measured:#}");
        return ExitCode::SUCCESS;
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    for fact in ["firmware", "policy"] {
        if let Some(value) = measured[fact].as_str() {
            println!("{fact:<16}{value}");
        }
    }
    for section in measured["sections"].as_array().into_iter().flatten() {
        println!("{:<16}{}", text(&section["kind"]), text(&section["range"]));
    }
    println!("{}", text(&measured["digest"]));
    ExitCode::SUCCESS
}
