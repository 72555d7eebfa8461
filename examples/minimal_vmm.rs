//! A whole VMM: probe, launch, run, one conversion. Copy it and go on from there.

use cvm::doorbell::{MAX_DEVICES, device_base};
use cvm::image::Image;
use cvm::kvm::KvmPlatform;
use cvm::vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use cvm::{BoxError, Exit, Gpa, Platform, SharedMemory, Vcpu, Vm, VmConfig, Watchdog};
use std::error::Error;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;
use std::time::Duration;

// What this VMM and its guest agree on. These are the values of guests/tiny/tiny-guest.elf in the repository of cvm.
const BOOT_PAGE: Gpa = Gpa(0x1000);
const PAGE_TABLES: Gpa = Gpa(0x10000);
/// The first argument that the boot page passes to the guest: say hello.
const HELLO: u64 = 6;
/// The doorbell register that takes the frame number of the page with the greeting.
const REPORT: u16 = device_base(MAX_DEVICES - 1);
const GREETING_LEN: usize = 27;

fn main() -> ExitCode {
    // The strongest isolation is a process beside this one, which runs this program again: this call comes first.
    cvm::kvm::vault::init();

    let error = match run(&mut io::stdout()) {
        Ok(()) => return ExitCode::SUCCESS,
        // The reader of this program's output has seen enough, as `head` does.
        Err(error) if error.downcast_ref().is_some_and(|e: &io::Error| e.kind() == ErrorKind::BrokenPipe) => {
            return ExitCode::SUCCESS;
        }
        Err(error) => error,
    };
    // An error of cvm names the operation that failed, and its sources say why.
    let causes = std::iter::successors(Some(&*error as &dyn Error), |error| (*error).source());
    let causes: Vec<_> = causes.map(ToString::to_string).collect();
    let _ = writeln!(io::stderr(), "error: {}", causes.join(": "));
    ExitCode::FAILURE
}

fn run(out: &mut impl Write) -> Result<(), BoxError> {
    // What can this host do, and what is missing for the rest?
    for offer in KvmPlatform::probe() {
        let missing: Vec<_> = offer.missing.iter().map(|missing| missing.what.as_str()).collect();
        writeln!(
            out,
            "{}: {}",
            offer.protection,
            if missing.is_empty() { "offered".into() } else { missing.join("; ") }
        )?;
    }

    // Launch: everything that is loaded is private, and enters the measurement. The guest is a 64-bit ELF file.
    let path = std::env::args().nth(1).ok_or("usage: minimal_vmm guests/tiny/tiny-guest.elf")?;
    let image = Image::from_elf(&std::fs::read(&path).map_err(|error| format!("failed to read {path}: {error}"))?)?;
    let platform = KvmPlatform::new()?;
    let mut launch = platform.launch(VmConfig::new(16 << 20, 1)?)?;
    launch.load_image(&image)?;
    launch.load_boot_page(BOOT_PAGE, [HELLO, 0, 0, 0])?;
    launch.start_in_long_mode(image.entry(), PAGE_TABLES, BOOT_PAGE)?;
    let mut vm = launch.seal()?;
    writeln!(out, "measurement: {}", vm.transcript().measurement())?;

    // Run. A VM with several vCPUs gives each a thread.
    let mut vcpu = vm.take_vcpus().remove(0);
    let _watchdog = Watchdog::new(Duration::from_secs(30), vec![vcpu.kicker()])?;
    loop {
        match vcpu.run()? {
            Exit::Console(byte) => out.write_all(&[byte])?,
            Exit::Conversion(request) => {
                let outcome = vm.convert(&request);
                let (answer, pages, gpa) = (outcome.answer(), request.pages(), request.gpa());
                writeln!(out, "{answer:?}: {pages} pages at {gpa} to {}", request.to())?;
                if let Some(cause) = outcome.cause() {
                    writeln!(out, "not done: {cause}")?;
                }
                vcpu.answer_conversion(outcome)?;
            }
            Exit::DoorbellWrite { register: REPORT, value } => greet(vm.memory(), u64::from(value) << 12, out)?,
            Exit::Ended { code: 0 } => return Ok(()),
            other => return Err(format!("the guest did not end well: {other:?}").into()),
        }
    }
}

/// Reads what the guest has put into a page that it shared. Reading a private page is an error and gives no bytes.
fn greet(memory: &SharedMemory, gpa: u64, out: &mut impl Write) -> Result<(), BoxError> {
    let mut greeting = [0; GREETING_LEN];
    memory.memory().read_slice(&mut greeting, GuestAddress(gpa))?;
    writeln!(out, "shared at {gpa:#x}: {}", String::from_utf8_lossy(&greeting))?;
    match memory.memory().read_obj::<u8>(GuestAddress(BOOT_PAGE.0)) {
        Err(error) => writeln!(out, "private at {BOOT_PAGE}: {error}")?,
        Ok(byte) => return Err(format!("a private page gave {byte:#x}").into()),
    }
    Ok(())
}
