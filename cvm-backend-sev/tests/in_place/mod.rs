//! Guests of a few instructions for SEV and SEV-ES, and a VMM of a few lines that runs them.

#![allow(dead_code, reason = "each test file uses its own part")]

use cvm_backend_kvm::backend::{LocalVcpu, LocalVm};
use cvm_backend_sev::kvm::{self as sev, Session, SevLoader, SevOptions, SevPlatform};
use cvm_backend_sev::owner::TransportKeys;
use cvm_backend_sev::sev::SevDigest;
use cvm_backend_sev::{SevFlags, SevPolicy};
use cvm_core::doorbell::{PORT_BASE, Transport, control, device_base};
use cvm_core::launch::Transcript;
use cvm_core::{
    Answer, Error, Exit, Gpa, Launch, PAGE_SIZE, PageKind, Platform, Protection, Side, Vcpu, Vm, VmConfig, Watchdog,
    x86,
};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub const MEMORY: u64 = 4 << 20;
pub const BOOT_PAGE: u64 = 0x1000;
pub const TABLES: u64 = 0x10_0000;
pub const CODE: u64 = 0x20_0000;
/// Pages that no launch loads: for a test's own purposes.
pub const DATA: u64 = 0x30_0000;
/// Where guests of several vCPUs have the page by which each talks to its host.
pub const GHCB: u64 = 0x38_0000;
/// The doorbell register by which guests tell a number.
pub const REPORT: u16 = device_base(0);

const LIMIT: Duration = Duration::from_secs(90);

/// What the faked secure processor logs, fails and counts is for all VMs of the machine, so tests take turns.
static TURN: Mutex<()> = Mutex::new(());

/// A platform, for the time of a test.
pub struct Host {
    pub platform: SevPlatform,
    pub protection: Protection,
    _turn: MutexGuard<'static, ()>,
}

/// This host's SEV. Without it a test has nothing to do, unless `CVM_REQUIRE_SEV` is set.
pub fn host(protection: Protection) -> Option<Host> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    match SevPlatform::open(protection) {
        Ok(platform) => Some(Host { platform, protection, _turn: turn }),
        Err(error) if std::env::var_os("CVM_REQUIRE_SEV").is_some() => panic!("{error}"),
        Err(error) => {
            skip(&error.to_string());
            None
        }
    }
}

/// Says that something was not tested, past the test harness, which keeps to itself what a successful test prints.
pub fn skip(why: &str) {
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let line = format!("SKIPPED: {name}: {why}\n");
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

impl Host {
    pub fn with(self, options: SevOptions) -> Self {
        Self { platform: self.platform.with_sev(options), ..self }
    }

    pub fn es(&self) -> bool {
        self.protection == Protection::SevEs
    }
}

/// The secure processor of L1, which is faked.
pub mod processor {
    use super::*;

    /// The lines of its log so far; nothing where it is not faked.
    pub fn log() -> Vec<String> {
        fs::read_to_string("/proc/fakepsp").unwrap_or_default().lines().map(str::to_owned).collect()
    }

    /// What it calls the digest of the last launch.
    pub fn digest() -> Option<String> {
        let log = log();
        let line = log.iter().rev().find(|line| line.starts_with("LAUNCH_MEASURE"))?;
        Some(line.split_once(" ld=")?.1.split_once(' ')?.0.to_owned())
    }

    /// Has the command with this number fail once with this status, after it was successful `after` times.
    pub fn fail(command: u32, status: u32, after: u32) {
        for (name, value) in [("fail_status", status), ("fail_after", after), ("fail_cmd", command)] {
            fs::write(format!("/sys/module/ccp/parameters/{name}"), value.to_string()).unwrap();
        }
    }

    /// Whether a failure that was wished for is still to come.
    pub fn fails() -> bool {
        fs::read_to_string("/sys/module/ccp/parameters/fail_cmd").unwrap().trim() != "0"
    }

    /// How many address space ids are taken, by kind.
    pub fn asids() -> BTreeMap<String, u64> {
        // Only groups that pass the controller on show what is counted.
        fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+misc").unwrap();
        let text = fs::read_to_string("/sys/fs/cgroup/misc.current").unwrap();
        let lines = text.lines().filter_map(|line| line.split_once(' '));
        lines.map(|(kind, count)| (kind.to_owned(), count.trim().parse().unwrap())).collect()
    }

    /// A control group that this process is in, and that allows so many identifiers of a kind. It is over when dropped.
    pub struct Limit;

    const GROUPS: &str = "/sys/fs/cgroup";
    const GROUP: &str = "/sys/fs/cgroup/cvm-test";

    impl Limit {
        pub fn new(protection: Protection, most: u64) -> Self {
            let kind = if protection == Protection::Sev { "sev" } else { "sev_es" };
            fs::write(format!("{GROUPS}/cgroup.subtree_control"), "+misc").unwrap();
            fs::create_dir(GROUP).unwrap();
            fs::write(format!("{GROUP}/misc.max"), format!("{kind} {most}")).unwrap();
            fs::write(format!("{GROUP}/cgroup.procs"), std::process::id().to_string()).unwrap();
            Self
        }
    }

    impl Drop for Limit {
        fn drop(&mut self) {
            fs::write(format!("{GROUPS}/cgroup.procs"), std::process::id().to_string()).unwrap();
            fs::remove_dir(GROUP).unwrap();
        }
    }

    /// Runs `then` on a thread that may pin hardly anything: with a small limit, and without the capability to exceed it.
    pub fn unprivileged<T: Send>(then: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let before = getrlimit(Resource::Memlock);
                setrlimit(Resource::Memlock, Rlimit { current: Some(0x10000), ..before }).unwrap();
                let mut capabilities = capabilities(None).unwrap();
                capabilities.effective.remove(CapabilitySet::IPC_LOCK);
                set_capabilities(None, capabilities).unwrap();
                let result = then();
                setrlimit(Resource::Memlock, before).unwrap();
                result
            });
            thread.join().unwrap()
        })
    }
}

/// A VM with [`MEMORY`] that asks for conversions by hypercall.
pub fn config(vcpus: u32) -> VmConfig {
    VmConfig { transport: Some(Transport::Hypercall), ..VmConfig::new(MEMORY, vcpus).unwrap() }
}

/// An assembler that knows how guests reach their VMM. All it adds clobbers RAX, RBX, RCX, RDX, R14 and R15.
pub struct Assembler {
    code: CodeAssembler,
    /// Whether the guest has to say what it exits for.
    es: bool,
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

/// Places in the page between an SEV-ES guest and its host (AMD publication 56421, the layout of the GHCB), and their bits in its valid
/// bitmap.
mod ghcb {
    pub const RAX: i32 = 0x1f8;
    pub const RCX: i32 = 0x308;
    pub const RDX: i32 = 0x310;
    pub const RBX: i32 = 0x318;
    pub const CPL: i32 = 0xcb;
    pub const EXIT_CODE: i32 = 0x390;
    pub const EXIT_INFO_1: i32 = 0x398;
    pub const EXIT_INFO_2: i32 = 0x3a0;
    pub const VALID: i32 = 0x3f0;

    pub const fn bit(place: i32) -> u128 {
        1 << (place / 8)
    }

    pub const MSR: u32 = 0xc001_0130;
    pub const IOIO: u64 = 0x7b;
    pub const VMMCALL: u64 = 0x81;
}

impl Assembler {
    /// Makes an exit by the GHCB of the vCPU whose index is in RDI, in which the values that `valid` names are already.
    fn exit(&mut self, code: u64, info: u64, valid: u128) -> Result<(), IcedError> {
        let valid = valid | ghcb::bit(ghcb::EXIT_CODE) | ghcb::bit(ghcb::EXIT_INFO_1) | ghcb::bit(ghcb::EXIT_INFO_2);
        let values = [
            (ghcb::EXIT_CODE, code),
            (ghcb::EXIT_INFO_1, info),
            (ghcb::EXIT_INFO_2, 0),
            (ghcb::VALID, valid as u64),
            (ghcb::VALID + 8, (valid >> 64) as u64),
        ];
        for (place, value) in values {
            self.mov(r14, value)?;
            self.mov(qword_ptr(r15 + place), r14)?;
        }
        self.mov(ecx, ghcb::MSR)?;
        // The page's own address, not that of where its shared side is mapped: the lower half of R15 alone.
        self.mov(eax, r15d)?;
        self.mov(edx, 0u32)?;
        self.wrmsr()?;
        // VMGEXIT: `rep vmmcall`.
        self.db(&[0xf3, 0x0f, 0x01, 0xd9])
    }

    /// Puts the address of the shared side of this vCPU's GHCB into R15.
    fn ghcb(&mut self) -> Result<(), IcedError> {
        self.mov(r15, rdi)?;
        self.shl(r15, 12)?;
        self.mov(r14, x86::SHARED_AT + GHCB)?;
        self.add(r15, r14)
    }

    fn port(&mut self, register: u16, read: bool) -> Result<(), IcedError> {
        let port = PORT_BASE + register;
        if !self.es {
            self.mov(edx, u32::from(port))?;
            return if read { self.in_(eax, dx) } else { self.out(dx, eax) };
        }
        self.ghcb()?;
        self.mov(qword_ptr(r15 + ghcb::RAX), rax)?;
        // 32-bit operand, 64-bit address (AMD64 APM volume 2, section 15.10.2).
        self.exit(ghcb::IOIO, u64::from(port) << 16 | 1 << 9 | 1 << 6 | u64::from(read), ghcb::bit(ghcb::RAX))?;
        self.ghcb()?;
        self.mov(rax, qword_ptr(r15 + ghcb::RAX))
    }

    /// Writes EAX to a doorbell register.
    pub fn ring(&mut self, register: u16) -> Result<(), IcedError> {
        self.port(register, false)
    }

    /// Reads a doorbell register into EAX.
    pub fn listen(&mut self, register: u16) -> Result<(), IcedError> {
        self.port(register, true)
    }

    /// Tells the VMM what is in EAX.
    pub fn report(&mut self) -> Result<(), IcedError> {
        self.ring(REPORT)
    }

    pub fn end(&mut self, code: u32) -> Result<(), IcedError> {
        self.mov(eax, code)?;
        self.ring(control::END)
    }

    /// Writes to the private side.
    pub fn store(&mut self, gpa: u64, value: u32) -> Result<(), IcedError> {
        self.mov(rbx, gpa)?;
        self.mov(dword_ptr(rbx), value)
    }

    /// Writes to the shared side.
    pub fn store_shared(&mut self, gpa: u64, value: u32) -> Result<(), IcedError> {
        self.store(x86::SHARED_AT + gpa, value)
    }

    /// Loads EAX from the private side.
    pub fn load(&mut self, gpa: u64) -> Result<(), IcedError> {
        self.mov(rbx, gpa)?;
        self.mov(eax, dword_ptr(rbx))
    }

    /// Loads EAX from the shared side.
    pub fn load_shared(&mut self, gpa: u64) -> Result<(), IcedError> {
        self.load(x86::SHARED_AT + gpa)
    }

    /// Asks the host, by the MSR alone, to end this guest for a reason of a set (AMD publication 56421, section 2.3.1).
    pub fn terminate(&mut self, set: u32, reason: u32) -> Result<(), IcedError> {
        self.mov(ecx, ghcb::MSR)?;
        self.mov(eax, reason << 16 | set << 12 | 0x100)?;
        self.mov(edx, 0u32)?;
        self.wrmsr()?;
        self.db(&[0xf3, 0x0f, 0x01, 0xd9])
    }

    /// Asks for a conversion by hypercall; the answer is in RAX.
    pub fn convert(&mut self, gpa: u64, pages: u64, to: Side) -> Result<(), IcedError> {
        // Bit 4 of the attributes is "encrypted".
        let attributes = if to == Side::Private { 1u64 << 4 } else { 0 };
        let operands = [(ghcb::RAX, 12), (ghcb::RBX, gpa), (ghcb::RCX, pages), (ghcb::RDX, attributes)];
        if !self.es {
            for (register, (_, value)) in [rax, rbx, rcx, rdx].into_iter().zip(operands) {
                self.mov(register, value)?;
            }
            return self.vmmcall();
        }
        self.ghcb()?;
        for (place, value) in operands {
            self.mov(r14, value)?;
            self.mov(qword_ptr(r15 + place), r14)?;
        }
        self.mov(byte_ptr(r15 + ghcb::CPL), 0u32)?;
        let valid = operands.iter().fold(ghcb::bit(ghcb::CPL), |valid, (place, _)| valid | ghcb::bit(*place));
        self.exit(ghcb::VMMCALL, 0, valid)?;
        self.ghcb()?;
        self.mov(rax, qword_ptr(r15 + ghcb::RAX))
    }
}

/// The machine code of a guest.
pub fn assemble(by_ghcb: bool, write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut assembler = Assembler { code: CodeAssembler::new(64).unwrap(), es: by_ghcb };
    write(&mut assembler).unwrap();
    assembler.assemble(CODE).unwrap()
}

/// What a launch has loaded, page by page, for those who compute its digest.
#[derive(Default)]
pub struct Loaded(BTreeMap<Gpa, Box<[u8; PAGE_SIZE as usize]>>);

impl Loaded {
    pub fn add(&mut self, gpa: u64, contents: &[u8]) {
        for (page, bytes) in (0..).zip(contents.chunks(PAGE_SIZE as usize)) {
            let mut contents = Box::new([0; PAGE_SIZE as usize]);
            contents[..bytes.len()].copy_from_slice(bytes);
            self.0.insert(Gpa(gpa + page * PAGE_SIZE), contents);
        }
    }

    pub fn page(&self, gpa: Gpa) -> Option<&[u8; PAGE_SIZE as usize]> {
        self.0.get(&gpa).map(|page| &**page)
    }
}

/// Loads all that a guest needs: each vCPU starts at the code that `write` has written.
pub fn load(
    host: &Host,
    config: VmConfig,
    write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
) -> Result<(Launch<SevLoader>, Loaded), Error> {
    let mut loaded = Loaded::default();
    let code = assemble(host.es(), write);
    let top = config.memory.iter().map(|range| range.end().0).max().unwrap_or(0);
    let mut launch = host.platform.launch(config)?;
    let private_bit = launch.interface().private_bit;
    launch.load(Gpa(CODE), &code, PageKind::Measured)?;
    loaded.add(CODE, &code);
    loaded.add(TABLES, &x86::identity_map(Gpa(TABLES), top, private_bit)?);
    launch.start_in_long_mode(Gpa(CODE), Gpa(TABLES), Gpa(BOOT_PAGE))?;
    Ok((launch, loaded))
}

/// A VM under a watchdog.
pub struct Guest {
    pub vcpus: Vec<LocalVcpu>,
    pub vm: LocalVm,
    _watchdog: Watchdog,
}

impl Guest {
    pub fn new(host: &Host, write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>) -> Self {
        Self::from_launch(load(host, config(1), write).unwrap().0)
    }

    pub fn from_launch(launch: Launch<SevLoader>) -> Self {
        Self::from_vm(launch.seal().unwrap())
    }

    pub fn from_vm(mut vm: LocalVm) -> Self {
        let vcpus = vm.take_vcpus();
        let watchdog = Watchdog::new(LIMIT, vcpus.iter().map(Vcpu::kicker).collect()).unwrap();
        Self { vcpus, vm, _watchdog: watchdog }
    }

    /// Runs the first vCPU up to its next exit.
    pub fn run(&mut self) -> Exit {
        self.vcpus[0].run().unwrap()
    }

    /// Runs the first vCPU up to its next request, and carries that out.
    pub fn convert(&mut self) -> Answer {
        let Exit::Conversion(request) = self.run() else { panic!("no conversion") };
        let conversion = self.vm.convert(&request);
        let answer = conversion.answer();
        self.vcpus[0].answer_conversion(conversion).unwrap();
        answer
    }

    /// Runs the first vCPU up to its next report.
    pub fn report(&mut self) -> u32 {
        self.report_of(0)
    }

    /// Runs vCPU `index` up to its next report.
    pub fn report_of(&mut self, index: usize) -> u32 {
        match self.vcpus[index].run().unwrap() {
            Exit::DoorbellWrite { register: REPORT, value } => value,
            other => panic!("{other:?} where a report should be"),
        }
    }

    /// Runs the first vCPU to its end.
    pub fn end(&mut self) {
        assert_eq!(self.run(), Exit::Ended { code: 0 });
    }
}

/// The digest of a launch, as the portable code computes it.
pub fn expected(host: &Host, transcript: &Transcript, loaded: &Loaded) -> SevDigest {
    let features = host.es().then(|| host.platform.features());
    cvm_backend_sev::sev::of_transcript(transcript, features, |gpa| loaded.page(gpa)).unwrap()
}

/// Keys between owner and firmware in these tests.
pub fn keys() -> TransportKeys {
    TransportKeys::new(ENCRYPTION_KEY, INTEGRITY_KEY)
}

const ENCRYPTION_KEY: [u8; 16] = [0x11; 16];
const INTEGRITY_KEY: [u8; 16] = [0x22; 16];

/// A session with [`keys`] as the faked secure processor takes it: the keys are not wrapped.
pub fn session(policy: SevPolicy) -> Session {
    let (nonce, iv, wrap_mac) = ([0; 16], [0; 16], [0; 32]);
    let parts: [&[u8]; 6] = [&nonce, &ENCRYPTION_KEY, &INTEGRITY_KEY, &iv, &wrap_mac, &keys().policy_mac(policy)];
    Session { certificate: vec![0xce; 2084], session: parts.concat() }
}

/// The policy of these tests.
pub fn policy(protection: Protection) -> SevPolicy {
    let state = if protection == Protection::SevEs { SevFlags::ES } else { SevFlags::empty() };
    SevPolicy { least_api: (1, 0), flags: SevFlags::NO_DEBUG | state }
}

/// The error of this backend in what a launch failed with.
pub fn cause(error: &Error) -> &sev::Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref::<sev::Error>() {
            return found;
        }
        cause = error.source();
    }
    panic!("{error:?} is not of this backend");
}
