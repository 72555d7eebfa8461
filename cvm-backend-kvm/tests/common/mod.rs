//! Guests of a few instructions, and a VMM of a few lines that runs them.

#![allow(dead_code, reason = "each test file uses its own part")]

use cvm_backend_kvm::{KvmLoader, KvmPlatform, KvmVcpu, KvmVm, vault};
use cvm_core::doorbell::{Doorbell, MSR_BASE, PORT_BASE, Transport, control, device_base};
use cvm_core::{
    Answer, Error, Exit, Gpa, GpaRange, Launch, PAGE_SIZE, PageKind, Platform, Protection, Side, Vcpu, Vm, VmConfig,
    Watchdog,
};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::fs;
use std::io::Write;
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::time::Duration;

/// How much memory a guest has unless a test says otherwise.
pub const MEMORY: u64 = 4 << 20;
pub const BOOT_PAGE: u64 = 0x1000;
pub const TABLES: u64 = 0x10_0000;
pub const CODE: u64 = 0x20_0000;
/// Pages that no launch loads: for a test's own purposes.
pub const DATA: u64 = 0x30_0000;
/// The doorbell register by which guests tell a number.
pub const REPORT: u16 = device_base(0);

/// How long a guest may take before its test fails: far longer than the slowest one needs where processors are
/// emulated.
const LIMIT: Duration = Duration::from_secs(90);

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

/// An assembler that knows how guests reach their VMM. All it adds clobbers RAX, RBX, RCX and RDX.
pub struct Assembler {
    code: CodeAssembler,
    doorbell: Doorbell,
    transport: Transport,
}

impl Deref for Assembler {
    type Target = CodeAssembler;

    fn deref(&self) -> &CodeAssembler {
        &self.code
    }
}

impl DerefMut for Assembler {
    fn deref_mut(&mut self) -> &mut CodeAssembler {
        &mut self.code
    }
}

impl Assembler {
    /// Whether the doorbell is a port, so that it has no upper half.
    pub fn is_by_port(&self) -> bool {
        self.doorbell == Doorbell::Port
    }

    /// Writes EAX to a doorbell register.
    pub fn ring(&mut self, register: u16) -> Result<(), IcedError> {
        match self.doorbell {
            Doorbell::Port => {
                self.mov(edx, u32::from(PORT_BASE + register))?;
                self.out(dx, eax)
            }
            Doorbell::Msr => {
                self.mov(ecx, MSR_BASE + u32::from(register))?;
                self.xor(edx, edx)?;
                self.wrmsr()
            }
        }
    }

    /// Reads a doorbell register into EAX.
    pub fn listen(&mut self, register: u16) -> Result<(), IcedError> {
        match self.doorbell {
            Doorbell::Port => {
                self.mov(edx, u32::from(PORT_BASE + register))?;
                self.in_(eax, dx)
            }
            Doorbell::Msr => {
                self.mov(ecx, MSR_BASE + u32::from(register))?;
                self.rdmsr()
            }
        }
    }

    /// Tells the VMM what is in EAX.
    pub fn report(&mut self) -> Result<(), IcedError> {
        self.ring(REPORT)
    }

    pub fn end(&mut self, code: u32) -> Result<(), IcedError> {
        self.mov(eax, code)?;
        self.ring(control::END)
    }

    pub fn store(&mut self, gpa: u64, value: u32) -> Result<(), IcedError> {
        self.mov(rbx, gpa)?;
        self.mov(dword_ptr(rbx), value)
    }

    /// Loads EAX.
    pub fn load(&mut self, gpa: u64) -> Result<(), IcedError> {
        self.mov(rbx, gpa)?;
        self.mov(eax, dword_ptr(rbx))
    }

    /// Asks for a conversion of `pages` pages from the page frame in EBX on; the answer is in RAX.
    pub fn convert_frame(&mut self, pages: u32, to: Side) -> Result<(), IcedError> {
        self.mov(eax, ebx)?;
        self.ring(control::CONVERT_FRAME)?;
        self.mov(eax, pages)?;
        self.ring(control::CONVERT_PAGES)?;
        self.mov(eax, to as u32)?;
        self.ring(control::CONVERT)?;
        self.listen(control::CONVERT)
    }

    /// Asks for a conversion; the answer is in RAX.
    pub fn convert(&mut self, gpa: u64, pages: u64, to: Side) -> Result<(), IcedError> {
        match self.transport {
            Transport::Doorbell => {
                self.mov(ebx, (gpa / PAGE_SIZE) as u32)?;
                self.convert_frame(pages as u32, to)
            }
            Transport::Hypercall | Transport::PageState => {
                // Bit 4 of the attributes is "encrypted".
                self.map_gpa_range(gpa, pages, if to == Side::Private { 1 << 4 } else { 0 })
            }
        }
    }

    /// Makes the hypercall KVM_HC_MAP_GPA_RANGE; the answer is in RAX.
    pub fn map_gpa_range(&mut self, gpa: u64, pages: u64, attributes: u64) -> Result<(), IcedError> {
        self.mov(eax, 12u32)?;
        self.mov(rbx, gpa)?;
        self.mov(rcx, pages)?;
        self.mov(rdx, attributes)?;
        if has_vmmcall() { self.vmmcall() } else { self.vmcall() }
    }
}

/// Whether this processor's hypercall instruction is AMD's.
fn has_vmmcall() -> bool {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap();
    ["AuthenticAMD", "HygonGenuine"].iter().any(|vendor| processor.contains(vendor))
}

/// The machine code for `gpa` of a guest in a VM of this configuration.
pub fn assemble(config: &VmConfig, gpa: u64, write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut assembler = Assembler {
        code: CodeAssembler::new(64).unwrap(),
        doorbell: config.doorbell,
        transport: config.transport.expect("a test chooses its transport"),
    };
    write(&mut assembler).unwrap();
    assembler.assemble(gpa).unwrap()
}

/// Loads all that a guest needs: each vCPU starts at the code that `write` has written.
pub fn load(
    platform: &KvmPlatform,
    config: VmConfig,
    write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
) -> Launch<KvmLoader> {
    let code = assemble(&config, CODE, write);
    let mut launch = platform.launch(config).unwrap();
    launch.load(Gpa(CODE), &code, PageKind::Measured).unwrap();
    launch.load_boot_page(Gpa(BOOT_PAGE), [0; 4]).unwrap();
    launch.start_in_long_mode(Gpa(CODE), Gpa(TABLES), Gpa(BOOT_PAGE)).unwrap();
    launch
}

/// A VM under a watchdog.
pub struct Guest {
    pub vcpus: Vec<KvmVcpu>,
    pub vm: KvmVm,
    watchdog: Watchdog,
}

impl Guest {
    pub fn new(
        platform: &KvmPlatform,
        config: VmConfig,
        write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
    ) -> Self {
        Self::from_launch(load(platform, config, write))
    }

    pub fn from_launch(launch: Launch<KvmLoader>) -> Self {
        let mut vm = launch.seal().unwrap();
        let vcpus = vm.take_vcpus();
        let watchdog = Watchdog::new(LIMIT, vcpus.iter().map(Vcpu::kicker).collect()).unwrap();
        Self { vcpus, vm, watchdog }
    }

    /// Whether the guest took too long.
    pub fn overdue(&self) -> bool {
        self.watchdog.fired()
    }

    /// Runs the first vCPU up to its next exit.
    pub fn run(&mut self) -> Exit {
        self.vcpus[0].run().unwrap()
    }

    /// Runs the first vCPU up to its next request, and carries that out.
    pub fn convert(&mut self) -> Converted {
        let Exit::Conversion(request) = self.run() else { panic!("no conversion") };
        let conversion = self.vm.convert(&request);
        let cause = conversion.cause().map(ToString::to_string).unwrap_or_default();
        let converted = Converted { answer: conversion.answer(), pages: conversion.pages(), cause };
        self.vcpus[0].answer_conversion(conversion).unwrap();
        converted
    }

    /// Runs the first vCPU up to its next report.
    pub fn report(&mut self) -> u32 {
        match self.run() {
            Exit::DoorbellWrite { register: REPORT, value } => value,
            other => panic!("{other:?} where a report should be"),
        }
    }

    /// Runs the first vCPU to its end.
    pub fn end(&mut self) {
        assert_eq!(self.run(), Exit::Ended { code: 0 });
    }
}

/// What is left of a conversion when the guest has its answer.
#[derive(Debug)]
pub struct Converted {
    pub answer: Answer,
    pub pages: u64,
    /// Why it was not done, or nothing.
    pub cause: String,
}

/// Runs a vCPU, carries out what it asks for, and returns what it stops for otherwise.
pub fn drive(vm: &KvmVm, vcpu: &mut KvmVcpu) -> Result<Exit, Error> {
    loop {
        match vcpu.run()? {
            Exit::Conversion(request) => {
                let conversion = vm.convert(&request);
                assert_eq!(conversion.answer(), Answer::Done, "{:?}", conversion.cause());
                vcpu.answer_conversion(conversion)?;
            }
            exit => return Ok(exit),
        }
    }
}
