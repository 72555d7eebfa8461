//! Guests of a few instructions that speak to their host by the GHCB, and a VMM of a few lines that runs them.

#![allow(dead_code, reason = "each test file uses its own part")]

use cvm_backend_kvm::backend::{LocalVcpu, LocalVm};
use cvm_backend_sev::kvm::{SevLoader, SevPlatform, SnpOptions};
use cvm_core::doorbell::{MSR_BASE, PORT_BASE, control, device_base};
use cvm_core::launch::Launch;
use cvm_core::{
    Answer, Error, Exit, Gpa, GpaRange, PageKind, Platform, Protection, Side, Vcpu, Vm, VmConfig, Watchdog,
};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::fs;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How much memory a guest has.
pub const MEMORY: u64 = 8 << 20;
pub const BOOT_PAGE: u64 = 0x1000;
pub const TABLES: u64 = 0x10_0000;
pub const CODE: u64 = 0x20_0000;
/// Where guests have their GHCB, and pages for a test's own purposes. No launch loads any of them.
pub const GHCB: u64 = 0x30_0000;
pub const DATA: u64 = 0x31_0000;
/// The doorbell register by which guests tell a number.
pub const REPORT: u16 = device_base(0);
/// Where the shared side of address 0 is mapped.
pub const SHARED_AT: u64 = 512 << 30;

/// How long a guest may take before its test fails: far longer than the slowest one needs on emulated processors.
const LIMIT: Duration = Duration::from_secs(60);

/// The MSR of the GHCB, and what is asked by it (AMD publication 56421, section 2.3.1).
const GHCB_MSR: u32 = 0xc001_0130;
pub const PAGE_STATE: u64 = 0x14;
pub const REGISTER: u64 = 0x12;
pub const TERMINATE: u64 = 0x100;

/// Fields of the GHCB, and what exits are asked for by it (the same, sections 2.6 and 4.1).
pub mod ghcb {
    pub const RAX: u64 = 0x1f8;
    pub const RCX: u64 = 0x308;
    pub const RDX: u64 = 0x310;
    pub const RBX: u64 = 0x318;
    pub const EXIT_CODE: u64 = 0x390;
    pub const EXIT_INFO_1: u64 = 0x398;
    pub const EXIT_INFO_2: u64 = 0x3a0;
    pub const SCRATCH: u64 = 0x3a8;
    pub const VALID: u64 = 0x3f0;
    pub const BUFFER: u64 = 0x800;
    pub const VERSION: u64 = 0xffa;

    pub const IOIO: u64 = 0x7b;
    pub const MSR: u64 = 0x7c;
    pub const PAGE_STATE_CHANGE: u64 = 0x8000_0010;
    pub const TERMINATE: u64 = 0x8000_fffe;
    pub const EXTENDED_REQUEST: u64 = 0x8000_0012;
}

/// Says that something was not tested, past the test harness, which keeps to itself what a successful test prints.
pub fn skip(why: &str) {
    let name = thread::current().name().unwrap_or_default().to_owned();
    std::io::stderr().write_all(format!("SKIPPED: {name}: {why}\n").as_bytes()).unwrap();
}

/// The firmware and its counts are one for all tests: each has them to itself.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// This host, if it has such guests. Without one a test has nothing to do, unless `CVM_REQUIRE_SEV` is set.
pub fn platform(protection: Protection) -> Option<SevPlatform> {
    match SevPlatform::open(protection) {
        Ok(platform) => Some(platform),
        Err(error) if std::env::var_os("CVM_REQUIRE_SEV").is_some() => panic!("{error}"),
        Err(error) => {
            skip(&error.to_string());
            None
        }
    }
}

pub fn range(start: u64, pages: u64) -> GpaRange {
    GpaRange::from_pages(start, pages).unwrap()
}

pub fn config(vcpus: u32) -> VmConfig {
    VmConfig::new(MEMORY, vcpus).unwrap()
}

/// Machine code for [`CODE`] that starts where `write` does.
pub fn assemble(write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut assembler = Assembler(CodeAssembler::new(64).unwrap());
    write(&mut assembler).unwrap();
    assembler.0.assemble(CODE).unwrap()
}

/// An assembler that knows how such guests reach their host. All it adds clobbers RAX, RBX, RCX and RDX.
pub struct Assembler(pub CodeAssembler);

impl Assembler {
    /// Exits to the host by the GHCB.
    pub fn vmgexit(&mut self) -> Result<(), IcedError> {
        // REP VMMCALL
        self.0.db(&[0xf3, 0x0f, 0x01, 0xd9])
    }

    /// Asks by the MSR; the answer is in RAX.
    pub fn ask(&mut self, request: u64) -> Result<(), IcedError> {
        self.0.mov(ecx, GHCB_MSR)?;
        self.0.mov(eax, request as u32)?;
        self.0.mov(edx, (request >> 32) as u32)?;
        self.0.wrmsr()?;
        self.vmgexit()?;
        self.0.mov(ecx, GHCB_MSR)?;
        self.0.rdmsr()?;
        self.0.shl(rdx, 32)?;
        self.0.or(rax, rdx)
    }

    /// Asks for a conversion of one page by the MSR; the upper half of the answer, which is 0 for success, is in RAX.
    pub fn convert(&mut self, gpa: u64, to: Side) -> Result<(), IcedError> {
        let operation = if to == Side::Private { 1u64 } else { 2 };
        self.ask(operation << 52 | gpa | PAGE_STATE)?;
        self.0.shr(rax, 32)
    }

    /// Stores RAX at `gpa`, on its shared or its private side.
    pub fn store(&mut self, gpa: u64, side: Side) -> Result<(), IcedError> {
        self.0.mov(rbx, gpa + if side == Side::Shared { SHARED_AT } else { 0 })?;
        self.0.mov(qword_ptr(rbx), rax)
    }

    /// Loads RAX.
    pub fn load(&mut self, gpa: u64, side: Side) -> Result<(), IcedError> {
        self.0.mov(rbx, gpa + if side == Side::Shared { SHARED_AT } else { 0 })?;
        self.0.mov(rax, qword_ptr(rbx))
    }

    /// Sets a field of the GHCB.
    pub fn set(&mut self, field: u64, value: u64) -> Result<(), IcedError> {
        self.0.mov(rax, value)?;
        self.store(GHCB + field, Side::Shared)
    }

    /// Shares and registers the page of the GHCB.
    pub fn make_ghcb(&mut self) -> Result<(), IcedError> {
        self.convert(GHCB, Side::Shared)?;
        self.ask(GHCB | REGISTER)?;
        self.set(0xff8, 2 << 16)
    }

    /// Exits for `code` with what is set in `fields` besides; of the fields `valid` the guest has taken care before.
    pub fn exit(&mut self, code: u64, info_1: u64, fields: &[(u64, u64)], valid: &[u64]) -> Result<(), IcedError> {
        let all = [(ghcb::EXIT_CODE, code), (ghcb::EXIT_INFO_1, info_1), (ghcb::EXIT_INFO_2, 0)];
        let mut bits = [0u64; 2];
        for field in all.iter().chain(fields).map(|(field, _)| field).chain(valid) {
            bits[(field / 8 / 64) as usize] |= 1 << (field / 8 % 64);
        }
        for (field, value) in all.iter().chain(fields) {
            self.set(*field, *value)?;
        }
        self.set(ghcb::VALID, bits[0])?;
        self.set(ghcb::VALID + 8, bits[1])?;
        self.0.mov(ecx, GHCB_MSR)?;
        self.0.mov(eax, GHCB as u32)?;
        self.0.xor(edx, edx)?;
        self.0.wrmsr()?;
        self.vmgexit()
    }

    /// Writes EAX to a port.
    pub fn port_out(&mut self, port: u16) -> Result<(), IcedError> {
        self.0.mov(eax, eax)?;
        self.store(GHCB + ghcb::RAX, Side::Shared)?;
        self.exit(ghcb::IOIO, u64::from(port) << 16 | 1 << 6, &[], &[ghcb::RAX])
    }

    /// Reads 32 bits from a port into RAX.
    pub fn port_in(&mut self, port: u16) -> Result<(), IcedError> {
        self.exit(ghcb::IOIO, u64::from(port) << 16 | 1 << 6 | 1, &[(ghcb::RAX, 0)], &[])?;
        self.load(GHCB + ghcb::RAX, Side::Shared)
    }

    /// Writes a doorbell register where the doorbell is MSRs.
    pub fn msr_out(&mut self, register: u16, value: u32) -> Result<(), IcedError> {
        let index = u64::from(MSR_BASE + u32::from(register));
        let fields = [(ghcb::RCX, index), (ghcb::RAX, value.into()), (ghcb::RDX, 0)];
        self.exit(ghcb::MSR, 1, &fields, &[])
    }

    /// Tells the host what is in EAX.
    pub fn report(&mut self) -> Result<(), IcedError> {
        self.port_out(PORT_BASE + REPORT)
    }

    /// Ends the guest well.
    pub fn end(&mut self) -> Result<(), IcedError> {
        self.0.xor(eax, eax)?;
        self.port_out(PORT_BASE + control::END)
    }

    /// Ends the guest by its own request.
    pub fn terminate(&mut self, set: u8, code: u8) -> Result<(), IcedError> {
        self.ask(TERMINATE | u64::from(set) << 12 | u64::from(code) << 16)
    }
}

/// Loads all that a guest needs: each vCPU starts at the code that `write` has written.
pub fn load(
    platform: &SevPlatform,
    config: VmConfig,
    write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
) -> Result<Launch<SevLoader>, Error> {
    let code = assemble(write);
    let mut launch = platform.launch(config)?;
    launch.load(Gpa(CODE), &code, PageKind::Measured)?;
    launch.start_in_long_mode(Gpa(CODE), Gpa(TABLES), Gpa(BOOT_PAGE))?;
    launch.load_boot_page(Gpa(BOOT_PAGE), [0; 4])?;
    Ok(launch)
}

/// A VM under a watchdog.
pub struct Guest {
    pub vcpus: Vec<LocalVcpu>,
    pub vm: LocalVm,
    watchdog: Watchdog,
}

impl Guest {
    pub fn new(
        platform: &SevPlatform,
        config: VmConfig,
        write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
    ) -> Self {
        Self::from_launch(load(platform, config, write).unwrap())
    }

    pub fn from_launch(launch: Launch<SevLoader>) -> Self {
        let mut vm = launch.seal().unwrap();
        let vcpus = vm.take_vcpus();
        let watchdog = Watchdog::new(LIMIT, vcpus.iter().map(Vcpu::kicker).collect()).unwrap();
        Self { vcpus, vm, watchdog }
    }

    /// Runs the first vCPU up to its next exit.
    pub fn run(&mut self) -> Exit {
        self.vcpus[0].run().unwrap()
    }

    /// Runs the first vCPU up to its next request, and carries that out.
    pub fn convert(&mut self) -> (GpaRange, Side, Answer) {
        let exit = self.run();
        let Exit::Conversion(request) = exit else { panic!("{exit:?} where a request should be") };
        let conversion = self.vm.convert(&request);
        let answer = conversion.answer();
        self.vcpus[0].answer_conversion(conversion).unwrap();
        (range(request.gpa().0, request.pages()), request.to(), answer)
    }

    /// Runs the first vCPU until it has its GHCB.
    pub fn make_ghcb(&mut self) {
        assert_eq!(self.convert(), (range(GHCB, 1), Side::Shared, Answer::Done));
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

/// How many identifiers for SEV-ES and SEV-SNP are in use.
pub fn asids() -> u64 {
    // The root has counts only where its children have.
    let _ = fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+misc");
    let text = fs::read_to_string("/sys/fs/cgroup/misc.current").expect("control groups that count");
    let line = text.lines().find_map(|line| line.strip_prefix("sev_es ")).expect("a count of identifiers");
    line.trim().parse().unwrap()
}

/// Waits until as many identifiers are in use again: the kernel takes a VM down after the last descriptor is closed.
pub fn assert_asids(expected: u64) {
    let start = Instant::now();
    while asids() != expected {
        assert!(start.elapsed() < Duration::from_secs(20), "{} identifiers are in use, not {expected}", asids());
        thread::sleep(Duration::from_millis(10));
    }
}

/// Sets a parameter of the faked secure processor.
pub fn set_parameter(name: &str, value: u64) {
    fs::write(format!("/sys/module/ccp/parameters/{name}"), value.to_string()).unwrap();
}

/// What the faked secure processor says it has done.
pub fn firmware_log() -> String {
    fs::read_to_string("/proc/fakepsp").unwrap_or_default()
}

/// Whether the secure processor is the faked one, which tests can look into.
pub fn is_faked() -> bool {
    fs::exists("/proc/fakepsp").unwrap_or(false)
}

/// Options with the default of everything.
pub fn options() -> SnpOptions {
    SnpOptions::default()
}

/// The backend's own error behind one of the contract's.
pub fn of_backend(error: &Error) -> Option<&cvm_backend_sev::kvm::Error> {
    match error {
        Error::Backend { source, .. } => source.downcast_ref(),
        _ => None,
    }
}
