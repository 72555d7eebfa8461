//! Plain KVM for tests of what is this backend's own, with guests as the conformance suite has them.

#![allow(dead_code, unused_imports, reason = "each test file uses its own part")]

use cvm_backend_kvm::{KvmLoader, KvmPlatform, KvmVm, vault};
use cvm_conformance::Bench;
pub use cvm_conformance::guest::{Assembler, BOOT_PAGE, CODE, DATA, MEMORY, REPORT, TABLES};
use cvm_core::doorbell::Transport;
use cvm_core::{GpaRange, Launch, Protection, VmConfig};
use iced_x86::IcedError;
use std::io::Write;
use std::path::Path;

/// A VM on plain KVM under a watchdog.
pub type Guest = cvm_conformance::Guest<KvmVm>;

/// Says that something was not tested, past the test harness, which keeps to itself what a successful test prints.
pub fn skip(why: &str) {
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let line = format!("SKIPPED: {name}: {why}\n");
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

/// The isolation that guests are tested with: `$CVM_ISOLATION`, or none.
pub fn isolation() -> Protection {
    match std::env::var("CVM_ISOLATION").as_deref() {
        Err(_) | Ok("none") => Protection::None,
        Ok("guest-memfd") => Protection::GuestMemfd,
        Ok("vault") => Protection::Vault,
        Ok(other) => panic!("$CVM_ISOLATION is {other}: it takes none, guest-memfd or vault"),
    }
}

/// This host's KVM. Without one a test has nothing to do, unless `CVM_REQUIRE_KVM` is set.
pub fn kvm() -> Option<KvmPlatform> {
    // The main of a test is not its own, where this is defined.
    if let Some(program) = option_env!("CARGO_BIN_EXE_cvm-vault") {
        vault::use_program(program);
    }
    match KvmPlatform::open(Path::new("/dev/kvm"), Some(isolation())) {
        Ok(platform) => Some(platform),
        Err(error) if std::env::var_os("CVM_REQUIRE_KVM").is_some() => panic!("{error}"),
        Err(error) => {
            skip(&error.to_string());
            None
        }
    }
}

pub fn range(start: u64, pages: u64) -> GpaRange {
    GpaRange::from_pages(start, pages).unwrap()
}

/// A VM with [`MEMORY`] that asks for conversions by doorbell, which works everywhere.
pub fn config(vcpus: u32) -> VmConfig {
    VmConfig { transport: Some(Transport::Doorbell), ..VmConfig::new(MEMORY, vcpus).unwrap() }
}

/// The machine code for `gpa` of a guest in a VM of this configuration.
pub fn assemble(config: &VmConfig, gpa: u64, write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>) -> Vec<u8> {
    let transport = config.transport.expect("a test chooses its transport");
    let mut assembler = Assembler::new(config.doorbell, transport.into());
    write(&mut assembler).unwrap();
    assembler.assemble(gpa).unwrap()
}

/// Loads all that a guest needs: each vCPU starts at the code that `write` has written.
pub fn load(
    platform: &KvmPlatform,
    config: VmConfig,
    write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
) -> Launch<KvmLoader> {
    Bench::new(platform, isolation()).load(config, write).unwrap()
}
