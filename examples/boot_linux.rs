//! Boots a Linux kernel from its file and prints what it writes to its first serial port.
//!
//! The kernel gets far enough to print its first messages: a guest has no timer, no firmware and no devices of other
//! machines, and it does not know here that it is protected. An access where there is no memory ends it. Your own
//! package needs the feature `linux` of `cvm` for this.

#![deny(clippy::print_stdout, clippy::print_stderr, reason = "they panic where the stream is closed or full")]

#[path = "common/files.rs"]
mod files;
#[path = "common/options.rs"]
mod options;
#[path = "common/program.rs"]
mod program;

use clap::Parser;
use cvm::kvm::KvmPlatform;
use cvm::linux::{Kernel, LinuxImage};
use cvm::{BoxError, Exit, Platform, Protection, Vcpu, Vm, VmConfig, Watchdog};
use files::{is_no_elf, named, read};
use options::IsolationChoice;
use program::{print, print_bytes};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// The first serial port: where it takes a byte, and its line status, which says that it can.
const SERIAL: u16 = 0x3f8;
const LINE_STATUS: u16 = SERIAL + 5;
const EMPTY: u64 = 0x60;

/// The counter of a timer that is not there: stands still, as a kernel would wait long for one that reads as ones.
const TIMER: u16 = 0x42;

/// What makes a kernel print from its start, and not wait for a timer to tell it how fast its clock is.
const APPEND: &str = "earlycon=uart8250,io,0x3f8 console=ttyS0 panic=-1 nolapic tsc_early_khz=2000000";

/// Boot a Linux kernel, and print what it says.
#[derive(Debug, Parser)]
#[command(name = "boot_linux")]
struct Options {
    /// A bzImage, or an ELF file as vmlinux is
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,

    /// An initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,

    /// The command line
    #[arg(long, value_name = "TEXT", default_value = APPEND)]
    append: String,

    /// How much memory the guest has, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128, value_parser = clap::value_parser!(u64).range(2..=3328))]
    memory: u64,

    /// What keeps private memory private [default: vault, the strongest]
    #[arg(long, value_enum)]
    isolation: Option<IsolationChoice>,

    /// Stop a guest that runs longer than this
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
}

/// Whether the start of a file is neither that of an ELF file nor of a bzImage, which has its magic number at 0x202.
fn is_no_kernel(start: &[u8]) -> bool {
    is_no_elf(start) && start.get(0x202..0x206) != Some(b"HdrS")
}

fn run(options: Options) -> Result<ExitCode, BoxError> {
    let file = read(&options.kernel, "bzImage or ELF file", is_no_kernel)?;
    let initrd = options.initrd.as_deref().map(|path| read(path, "initrd", |_| false)).transpose()?;
    let kernel = if is_no_elf(&file) { Kernel::BzImage(&file) } else { Kernel::Elf(&file) };
    let config = VmConfig::new(options.memory << 20, 1)?;
    let image = LinuxImage::new(kernel, initrd.as_deref(), &options.append, &config.memory);
    let image = image.map_err(named(&options.kernel))?;
    let mut launch =
        KvmPlatform::open(Path::new("/dev/kvm"), options.isolation.map(Protection::from))?.launch(config)?;
    launch.load_linux(&image)?;
    let mut vm = launch.seal()?;
    print(format_args!("measurement: {}", vm.transcript().measurement()))?;

    let mut vcpu = vm.take_vcpus().remove(0);
    let watchdog = Watchdog::new(Duration::from_secs(options.timeout), vec![vcpu.kicker()])?;
    loop {
        match vcpu.run()? {
            Exit::PortWrite { port: SERIAL, value, .. } => print_bytes(&[value as u8])?,
            Exit::PortRead { port: LINE_STATUS, .. } => vcpu.answer_read(EMPTY)?,
            Exit::PortRead { port: TIMER, .. } => vcpu.answer_read(0)?,
            // No device is there: reads give ones, and writes go nowhere.
            Exit::PortRead { .. } => vcpu.answer_read(u64::MAX)?,
            Exit::MsrRead { .. } => vcpu.answer_read(0)?,
            Exit::PortWrite { .. } | Exit::MsrWrite { .. } => {}
            Exit::Kicked if watchdog.fired() => {
                let seconds = options.timeout;
                let hint = if is_no_elf(&file) {
                    "; a bzImage unpacks itself first, which takes minutes where KVM emulates instructions: a vmlinux \
                     starts at once"
                } else {
                    ""
                };
                return Err(format!("the guest ran longer than {seconds} s; --timeout gives it more{hint}").into());
            }
            Exit::Kicked => {}
            other => return Err(format!("the guest stopped: {other:?}").into()),
        }
    }
}

fn main() -> ExitCode {
    cvm::kvm::vault::init();
    program::run(run)
}
