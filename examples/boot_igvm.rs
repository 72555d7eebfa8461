//! Boots what an IGVM file describes, on plain KVM: what there is without a protecting processor.

#![deny(clippy::print_stdout, clippy::print_stderr, reason = "they panic where the stream is closed or full")]

#[path = "common/files.rs"]
mod files;
#[path = "common/options.rs"]
mod options;
#[path = "common/program.rs"]
mod program;

use clap::Parser;
use cvm::boot::{ALL_ACCEPTED, BootPage, Exits, MAGIC, MemoryRange};
use cvm::doorbell::{Doorbell, Transport};
use cvm::igvm::{IgvmImage, native_page};
use cvm::image::Image;
use cvm::kvm::KvmPlatform;
use cvm::x86::{VcpuState, identity_map};
use cvm::{BoxError, Exit, Gpa, PAGE_SIZE, Platform, Protection, Vcpu, Vm, VmConfig, Watchdog};
use files::{named, read};
use igvm::{Arch, IgvmDirectiveHeader, IgvmFile, IgvmPlatformHeader, IgvmRevision};
use igvm_defs::{
    IGVM_VHS_SUPPORTED_PLATFORM, IgvmNativeVpContextX64, IgvmPageDataFlags, IgvmPageDataType, IgvmPlatformType,
};
use options::IsolationChoice;
use program::{chain, note, print, print_bytes};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tiny_guest::{BOOT_PAGE, IMAGE, MIN_MEMORY, PAGE_TABLES, Task};
use zerocopy::{FromBytes, FromZeros};

/// Boot what an IGVM file describes, and print what it says.
///
/// The file is one for the platform native. Its vCPUs start in flat 64-bit mode. Memory is private at first, and there are no
/// tables of ACPI.
#[derive(Debug, Parser)]
#[command(name = "boot_igvm")]
struct Options {
    /// The file; without one, it is made of the tiny guest, which says hello
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,

    /// Write the tiny guest's file there, and end
    #[arg(long, value_name = "FILE", conflicts_with = "file")]
    save: Option<PathBuf>,

    /// How much memory the guest has, in MiB
    #[arg(long, value_name = "MIB", default_value_t = MIN_MEMORY >> 20, value_parser = clap::value_parser!(u64).range(1..=3328))]
    memory: u64,

    /// How many vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,

    /// The command line, for a guest that asks for one
    #[arg(long, value_name = "TEXT", default_value = "")]
    append: String,

    /// What keeps private memory private [default: vault, the strongest]
    #[arg(long, value_enum)]
    isolation: Option<IsolationChoice>,

    /// Stop a guest that runs longer than this
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
}

/// The tiny guest as an IGVM file: its image, a boot page, page tables, and the state of a vCPU.
fn tiny_guest() -> Result<Vec<u8>, BoxError> {
    let image = Image::from_elf(IMAGE)?;
    let mut boot_page = BootPage {
        magic: MAGIC,
        vcpus: 1,
        doorbell: Doorbell::Port as u32,
        transport: Transport::Doorbell as u32,
        exits: Exits::Direct as u32,
        accepted: ALL_ACCEPTED,
        argument: [Task::Hello as u64, 0, 0, 0],
        ..BootPage::new_zeroed()
    };
    boot_page.memory[0] = MemoryRange { start: 0, len: MIN_MEMORY };
    let tables = identity_map(Gpa(PAGE_TABLES), MIN_MEMORY, None)?;
    let mut directives = Vec::new();
    let mut add = |start: u64, contents: &[u8]| {
        for (gpa, page) in (start..).step_by(PAGE_SIZE as usize).zip(contents.chunks(PAGE_SIZE as usize)) {
            directives.push(IgvmDirectiveHeader::PageData {
                gpa,
                compatibility_mask: 1,
                flags: IgvmPageDataFlags::new(),
                data_type: IgvmPageDataType::NORMAL,
                data: page.to_vec(),
            });
        }
    };
    for (range, contents) in image.pages() {
        match contents {
            Some(contents) => add(range.start().0, contents),
            None => add(range.start().0, &vec![0; range.len() as usize]),
        }
    }
    add(BOOT_PAGE, &boot_page.to_bytes());
    add(PAGE_TABLES, &tables);
    let state = VcpuState::long_mode(image.entry(), Gpa(PAGE_TABLES), 0, Gpa(BOOT_PAGE));
    let page = native_page(&state);
    let (context, _) = IgvmNativeVpContextX64::read_from_prefix(&page).map_err(|error| error.to_string())?;
    directives.push(IgvmDirectiveHeader::X64NativeVpContext {
        compatibility_mask: 1,
        vp_index: 0,
        context: Box::new(context),
    });
    let platform = IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: 1,
        highest_vtl: 0,
        platform_type: IgvmPlatformType::NATIVE,
        platform_version: 1,
        shared_gpa_boundary: 0,
    });
    // Version 1 has no states for this platform.
    let revision = IgvmRevision::V2 { arch: Arch::X64, page_size: PAGE_SIZE as u32 };
    let mut file = Vec::new();
    IgvmFile::new(revision, vec![platform], Vec::new(), directives)?.serialize(&mut file)?;
    Ok(file)
}

fn run(options: Options) -> Result<ExitCode, BoxError> {
    if let Some(path) = &options.save {
        let written = std::fs::write(path, tiny_guest()?);
        written.map_err(|error| format!("failed to write {}: {error}", path.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let file = match &options.file {
        None => tiny_guest()?,
        Some(path) => read(path, "igvm file", |start| !start.starts_with(b"IGVM"))?,
    };
    let name = options.file.as_deref().unwrap_or(Path::new("the built igvm file"));
    let image = IgvmImage::native(&file).map_err(named(name))?;
    // The boot page of the tiny guest says so, and other files know nothing of it.
    let config =
        VmConfig { transport: Some(Transport::Doorbell), ..VmConfig::new(options.memory << 20, options.vcpus)? };
    let mut launch =
        KvmPlatform::open(Path::new("/dev/kvm"), options.isolation.map(Protection::from))?.launch(config)?;
    launch.load_igvm(&image, &options.append).map_err(named(name))?;
    let mut vm = launch.seal()?;
    print(format_args!("measurement: {}", vm.transcript().measurement()))?;

    let mut vcpus = vm.take_vcpus();
    let watchdog = Watchdog::new(Duration::from_secs(options.timeout), vcpus.iter().map(Vcpu::kicker).collect())?;
    // A guest with more of them has to do with one at a time: each runs until it halts.
    for vcpu in &mut vcpus {
        loop {
            match vcpu.run()? {
                Exit::Console(byte) => print_bytes(&[byte])?,
                Exit::Conversion(request) => {
                    let outcome = vm.convert(&request);
                    if let Some(cause) = outcome.cause() {
                        note(format_args!("not done: {}", chain(cause)));
                    }
                    vcpu.answer_conversion(outcome)?;
                }
                // No device is there: reads give ones, and writes go nowhere.
                Exit::DoorbellRead { .. } | Exit::PortRead { .. } | Exit::MsrRead { .. } => {
                    vcpu.answer_read(u64::MAX)?
                }
                Exit::DoorbellWrite { .. } | Exit::PortWrite { .. } | Exit::MsrWrite { .. } => {}
                Exit::Ended { code: 0 } => return Ok(ExitCode::SUCCESS),
                Exit::Ended { code } => return Err(format!("the guest ended with {code}").into()),
                Exit::Halted => break,
                Exit::Kicked if watchdog.fired() => {
                    let seconds = options.timeout;
                    return Err(format!("the guest ran longer than {seconds} s; --timeout gives it more").into());
                }
                Exit::Kicked => {}
                other => return Err(format!("the guest stopped: {other:?}").into()),
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn main() -> ExitCode {
    cvm::kvm::vault::init();
    program::run(run)
}
