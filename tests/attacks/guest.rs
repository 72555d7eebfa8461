//! A guest that keeps a secret, counts, and would notice if somebody disturbed it.

use crate::common::{self, Assembler, DATA, REPORT, load};
use cvm::doorbell::control;
use cvm::kvm::{KvmPlatform, KvmVcpu, KvmVm};
use cvm::{ConversionRequest, Error, Exit, PAGE_SIZE, Side, Vcpu, Vm, Watchdog};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::time::Duration;

/// Where the secret is, and how long.
pub const SECRET: u64 = DATA;
pub const SECRET_LEN: usize = PAGE_SIZE as usize;
/// Where the guest counts.
pub const COUNT: u64 = DATA + PAGE_SIZE;
/// A page that the guest converts when it is told to.
pub const SIDE_PAGE: u64 = DATA + 2 * PAGE_SIZE;

/// Doorbell registers of the guest's: its checksum, what became of a command, and the next command.
const CHECK: u16 = REPORT + 4;
const ANSWER: u16 = REPORT + 8;
const COMMAND: u16 = REPORT + 12;

/// How long a guest may take for one row.
const LIMIT: Duration = Duration::from_secs(30);

/// What the VMM can tell the guest to do.
#[derive(Debug, Clone, Copy)]
#[repr(u32)]
pub enum Command {
    /// Nothing but count.
    Count = 0,
    /// Ask for [`SIDE_PAGE`] to be shared.
    Share = 1,
    /// Ask for it to be private.
    Unshare = 2,
}

// The secret's words are those of a linear congruential generator (Knuth's MMIX) that starts at the nonce.
const MULTIPLIER: u64 = 6_364_136_223_846_793_005;
const INCREMENT: u64 = 1_442_695_040_888_963_407;

fn words(nonce: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(nonce), |word| Some(word.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT))).skip(1)
}

/// Whether `page` is the secret. It is compared word by word, so that no attacker has a copy of its own to find.
pub fn is_secret(page: &[u8], nonce: u64) -> bool {
    page.len() == SECRET_LEN && page.as_chunks::<8>().0.iter().zip(words(nonce)).all(|(a, b)| *a == b.to_le_bytes())
}

/// The secrets that are not in memory.
pub struct Registers {
    /// R12 to R15.
    pub general: [u64; 4],
    /// The mantissa of the first floating-point register.
    pub float: u64,
    /// The MSR `KERNEL_GS_BASE`, which takes user-space addresses only.
    pub msr: u64,
}

impl Registers {
    pub fn new(nonce: u64) -> Self {
        let mut words = words(nonce).skip(SECRET_LEN / 8);
        let mut next = || words.next().unwrap_or_default();
        Self { general: [(); 4].map(|()| next()), float: next(), msr: next() & 0x7fff_ffff_ffff }
    }
}

/// The number of the MSR that has a secret.
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// What the guest reports when nobody has disturbed it.
fn checksum(nonce: u64) -> u32 {
    let memory = words(nonce).take(SECRET_LEN / 8).fold(0, |sum, word| sum ^ word);
    let sum = Registers::new(nonce).general.iter().fold(memory, |sum, word| sum ^ word);
    (sum ^ sum >> 32) as u32
}

fn keep_secret(a: &mut Assembler, nonce: u64) -> Result<(), IcedError> {
    let step = |a: &mut Assembler| {
        a.imul_2(rax, r8)?;
        a.add(rax, r9)
    };
    let mut fill = a.create_label();
    a.mov(rax, nonce)?;
    a.mov(r8, MULTIPLIER)?;
    a.mov(r9, INCREMENT)?;
    a.mov(rbx, SECRET)?;
    a.mov(ecx, (SECRET_LEN / 8) as u32)?;
    a.set_label(&mut fill)?;
    step(a)?;
    a.mov(qword_ptr(rbx), rax)?;
    a.add(rbx, 8)?;
    a.dec(ecx)?;
    a.jne(fill)?;
    for register in [r12, r13, r14, r15] {
        step(a)?;
        a.mov(register, rax)?;
    }
    step(a)?;
    // From memory, which KVM can emulate.
    a.mov(rbx, SIDE_PAGE)?;
    a.mov(qword_ptr(rbx), rax)?;
    a.movq(mm0, qword_ptr(rbx))?;
    step(a)?;
    a.mov(rdx, rax)?;
    a.shr(rdx, 32)?;
    a.and(edx, 0x7fff)?;
    a.mov(ecx, KERNEL_GS_BASE)?;
    a.wrmsr()
}

fn serve(a: &mut Assembler) -> Result<(), IcedError> {
    let (mut top, mut count, mut sum) = (a.create_label(), a.create_label(), a.create_label());
    // What it reports is found by an address in a register, so that who can set it learns what is elsewhere.
    a.mov(rsi, COUNT)?;
    a.set_label(&mut top)?;
    a.listen(COMMAND)?;
    a.mov(ebp, eax)?;
    for (command, to) in [(Command::Share, Side::Shared), (Command::Unshare, Side::Private)] {
        let mut other = a.create_label();
        a.cmp(ebp, command as u32)?;
        a.jne(other)?;
        a.convert(SIDE_PAGE, 1, to)?;
        a.ring(ANSWER)?;
        a.jmp(count)?;
        a.set_label(&mut other)?;
        a.nop()?;
    }
    a.set_label(&mut count)?;
    a.mov(rbx, COUNT)?;
    a.inc(dword_ptr(rbx))?;
    a.mov(eax, dword_ptr(rsi))?;
    a.report()?;
    a.mov(rax, r12)?;
    for register in [r13, r14, r15] {
        a.xor(rax, register)?;
    }
    a.mov(rbx, SECRET)?;
    a.mov(ecx, (SECRET_LEN / 8) as u32)?;
    a.set_label(&mut sum)?;
    a.xor(rax, qword_ptr(rbx))?;
    a.add(rbx, 8)?;
    a.dec(ecx)?;
    a.jne(sum)?;
    a.mov(rdx, rax)?;
    a.shr(rdx, 32)?;
    a.xor(eax, edx)?;
    a.ring(CHECK)?;
    a.jmp(top)
}

/// What a guest told between two commands.
#[derive(Debug, Default, Clone, Copy)]
pub struct Beat {
    /// Its count.
    pub count: u32,
    /// The checksum of its secrets.
    pub check: u32,
    /// The answer to its last conversion, if it asked for one.
    pub answer: Option<u32>,
}

/// The guest, waiting for a command.
pub struct Keeper {
    // Dropped first: it kicks the others.
    _watchdog: Watchdog,
    pub vcpu: KvmVcpu,
    pub vm: KvmVm,
    pub nonce: u64,
    count: u32,
}

impl Keeper {
    /// A guest that has its secret already.
    pub fn new(platform: &KvmPlatform, nonce: u64) -> Result<Self, Error> {
        Self::with_limit(platform, nonce, LIMIT)
    }

    pub fn with_limit(platform: &KvmPlatform, nonce: u64, limit: Duration) -> Result<Self, Error> {
        let launch = load(platform, common::config(1), |a| {
            keep_secret(a, nonce)?;
            serve(a)
        });
        let mut vm = launch.seal()?;
        let mut vcpu = vm.take_vcpus().remove(0);
        let watchdog = watchdog(limit, &vcpu);
        let exit = vcpu.run()?;
        assert_eq!(exit, Exit::DoorbellRead { register: COMMAND }, "the guest has not begun");
        Ok(Self { _watchdog: watchdog, vcpu, vm, nonce, count: 0 })
    }

    /// Lets the guest carry out a command; what it asks for is converted.
    pub fn command(&mut self, command: Command) -> Result<Beat, Error> {
        self.vcpu.answer_read(command as u64)?;
        self.finish()
    }

    /// Lets the guest ask for a conversion, which waits for an answer then.
    pub fn ask(&mut self, command: Command) -> Result<ConversionRequest, Error> {
        self.vcpu.answer_read(command as u64)?;
        match self.vcpu.run()? {
            Exit::Conversion(request) => Ok(request),
            other => Err(unexpected(&other)),
        }
    }

    /// Lets the guest go on up to where it waits for a command.
    pub fn finish(&mut self) -> Result<Beat, Error> {
        let mut beat = Beat::default();
        loop {
            match self.vcpu.run()? {
                Exit::DoorbellRead { register: COMMAND } => return Ok(beat),
                Exit::DoorbellWrite { register: REPORT, value } => (self.count, beat.count) = (value, value),
                Exit::DoorbellWrite { register: CHECK, value } => beat.check = value,
                Exit::DoorbellWrite { register: ANSWER, value } => beat.answer = Some(value),
                Exit::Conversion(request) => {
                    let conversion = self.vm.convert(&request);
                    self.vcpu.answer_conversion(conversion)?;
                }
                other => return Err(unexpected(&other)),
            }
        }
    }

    /// Whether the guest goes on counting, with its secrets as they were.
    pub fn is_well(&mut self) -> bool {
        let before = self.count;
        let beat = self.command(Command::Count);
        beat.is_ok_and(|beat| beat.count == before + 1 && beat.check == checksum(self.nonce))
    }
}

fn unexpected(exit: &Exit) -> Error {
    Error::Crashed { vcpu: 0, reason: format!("it left by {exit:?}") }
}

/// A guest of a row's own.
pub struct Guest {
    // Dropped first: it kicks the others.
    watchdog: Watchdog,
    pub vcpu: KvmVcpu,
    pub vm: KvmVm,
}

impl Guest {
    pub fn new(
        platform: &KvmPlatform,
        limit: Duration,
        write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
    ) -> Self {
        let mut vm = load(platform, common::config(1), write).seal().unwrap();
        let vcpu = vm.take_vcpus().remove(0);
        Self { watchdog: watchdog(limit, &vcpu), vcpu, vm }
    }

    /// Whether its time was over.
    pub fn overdue(&self) -> bool {
        self.watchdog.fired()
    }

    /// Runs it, carrying out what it asks for, up to an exit of another kind.
    pub fn run(&mut self) -> Result<Exit, Error> {
        loop {
            match self.vcpu.run()? {
                Exit::Conversion(request) => {
                    let conversion = self.vm.convert(&request);
                    self.vcpu.answer_conversion(conversion)?;
                }
                exit => return Ok(exit),
            }
        }
    }
}

fn watchdog(limit: Duration, vcpu: &KvmVcpu) -> Watchdog {
    Watchdog::new(limit, vec![vcpu.kicker()]).unwrap()
}

/// Tells the VMM that a guest has failed in a way that it must not: [`control::END`] with code 1.
pub fn fail_unless_equal(a: &mut Assembler) -> Result<(), IcedError> {
    let mut well = a.create_label();
    a.je(well)?;
    a.mov(eax, 1u32)?;
    a.ring(control::END)?;
    a.set_label(&mut well)?;
    a.nop()
}
