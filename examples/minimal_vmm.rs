//! A whole VMM: probe, launch, run, one conversion. Copy it and go on from there.

use cvm::image::Image;
use cvm::kvm::KvmPlatform;
use cvm::{Exit, Gpa, Platform, SharedMemory, Vcpu, Vm, VmConfig, Watchdog};
use std::io::Write;
use std::time::Duration;
use tiny_guest::{BOOT_PAGE, GREETING, IMAGE, PAGE_TABLES, REPORT, Task};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The strongest isolation is a process beside this one, which is this program again. Nothing may come before this.
    cvm::kvm::vault::init();

    // What can this host do, and what lacks for the rest?
    for offer in KvmPlatform::probe() {
        let missing: Vec<_> = offer.missing.iter().map(|missing| missing.what.as_str()).collect();
        println!("{}: {}", offer.protection, if missing.is_empty() { "offered".into() } else { missing.join("; ") });
    }

    // Launch: everything that is loaded is private, and enters the measurement. The guest here is a built image that
    // says hello; yours is any 64-bit ELF file.
    let platform = KvmPlatform::new()?;
    let image = Image::from_elf(IMAGE)?;
    let mut launch = platform.launch(VmConfig::new(16 << 20, 1)?)?;
    launch.load_image(&image)?;
    launch.load_boot_page(Gpa(BOOT_PAGE), [Task::Hello as u64, 0, 0, 0])?;
    launch.start_in_long_mode(image.entry(), Gpa(PAGE_TABLES), Gpa(BOOT_PAGE))?;
    let mut vm = launch.seal()?;
    println!("measurement: {}", vm.transcript().measurement());

    // Run. A VM with several vCPUs gives each a thread.
    let mut vcpu = vm.take_vcpus().remove(0);
    let _watchdog = Watchdog::new(Duration::from_secs(30), vec![vcpu.kicker()])?;
    loop {
        match vcpu.run()? {
            Exit::Console(byte) => std::io::stdout().write_all(&[byte])?,
            Exit::Conversion(request) => {
                let outcome = vm.convert(&request);
                println!("{:?}: {} pages at {} to {}", outcome.answer(), request.pages(), request.gpa(), request.to());
                if let Some(cause) = outcome.cause() {
                    eprintln!("not done: {cause}");
                }
                vcpu.answer_conversion(outcome)?;
            }
            Exit::DoorbellWrite { register: REPORT, value } => greet(vm.memory(), u64::from(value) << 12)?,
            Exit::Ended { code: 0 } => return Ok(()),
            other => return Err(format!("the guest did not end well: {other:?}").into()),
        }
    }
}

/// Reads what the guest has put into a page that it shared. Its private pages are errors here, never bytes.
fn greet(memory: &SharedMemory, gpa: u64) -> Result<(), Box<dyn std::error::Error>> {
    let mut greeting = [0; GREETING.len()];
    memory.memory().read_slice(&mut greeting, GuestAddress(gpa))?;
    println!("shared at {gpa:#x}: {}", String::from_utf8_lossy(&greeting));
    match memory.memory().read_obj::<u8>(GuestAddress(BOOT_PAGE)) {
        Err(error) => println!("private at {BOOT_PAGE:#x}: {error}"),
        Ok(byte) => return Err(format!("a private page gave {byte:#x}").into()),
    }
    Ok(())
}
