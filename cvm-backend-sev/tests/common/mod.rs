//! SEV, SEV-ES and SEV-SNP for tests of what is this backend's own, with guests as the conformance suite has them.

#![allow(dead_code, unused_imports, reason = "each test file uses its own part")]

pub mod processor;
pub mod signals;

use cvm_backend_kvm::backend::LocalVm;
use cvm_backend_sev::kvm::{self as sev, Session, SevLoader, SevOptions, SevPlatform, SnpOptions};
use cvm_backend_sev::owner::TransportKeys;
use cvm_backend_sev::sev::SevDigest;
use cvm_backend_sev::{SevFlags, SevPolicy};
use cvm_conformance::Bench;
pub use cvm_conformance::guest::{Assembler, BOOT_PAGE, CODE, DATA, Field, MEMORY, REPORT, TABLES};
use cvm_core::launch::Transcript;
use cvm_core::{Error, Gpa, GpaRange, Launch, PAGE_SIZE, PageKind, Platform, Protection, VmConfig, x86};
use iced_x86::IcedError;
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The generations whose guests have one memory for both sides.
pub const BOTH: [Protection; 2] = [Protection::Sev, Protection::SevEs];

/// A VM under a watchdog.
pub type Guest = cvm_conformance::Guest<LocalVm>;

/// What the secure processor logs, fails and counts is for all VMs of the machine, so tests take turns.
static TURN: Mutex<()> = Mutex::new(());

/// A platform, for the time of a test.
pub struct Host {
    pub platform: SevPlatform,
    pub protection: Protection,
    _turn: MutexGuard<'static, ()>,
}

/// This host, if it has such guests. Without them a test has nothing to do, unless `CVM_REQUIRE_SEV` is set.
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
    pub fn with_sev(self, options: SevOptions) -> Self {
        Self { platform: self.platform.with_sev(options), ..self }
    }

    pub fn with_snp(self, options: SnpOptions) -> Self {
        Self { platform: self.platform.with_snp(options), ..self }
    }

    pub fn es(&self) -> bool {
        self.protection == Protection::SevEs
    }

    /// What makes guests.
    pub fn bench(&self) -> Bench<'_, SevPlatform> {
        Bench::new(&self.platform, self.protection)
    }

    /// The machine code for `gpa` of a guest in the VM of this launch, from a vCPU's first instruction on.
    pub fn assemble(
        &self,
        launch: &Launch<SevLoader>,
        gpa: u64,
        write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
    ) -> Vec<u8> {
        self.bench().assemble(launch, gpa, |a| a.begin().and_then(|()| write(a)))
    }
}

pub fn range(start: u64, pages: u64) -> GpaRange {
    GpaRange::from_pages(start, pages).unwrap()
}

/// A VM with [`MEMORY`], and the defaults for the rest.
pub fn config(vcpus: u32) -> VmConfig {
    VmConfig::new(MEMORY, vcpus).unwrap()
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

/// Loads all that a guest without a boot page needs, and keeps it: each vCPU starts at the code that `write` wrote.
pub fn load(
    host: &Host,
    config: VmConfig,
    write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
) -> (Launch<SevLoader>, Loaded) {
    let mut loaded = Loaded::default();
    let top = config.memory.iter().map(|range| range.end().0).max().unwrap_or(0);
    let mut launch = host.platform.launch(config).unwrap();
    let code = host.assemble(&launch, CODE, write);
    launch.load(Gpa(CODE), &code, PageKind::Measured).unwrap();
    loaded.add(CODE, &code);
    loaded.add(TABLES, &x86::identity_map(Gpa(TABLES), top, launch.interface().private_bit).unwrap());
    launch.start_in_long_mode(Gpa(CODE), Gpa(TABLES), Gpa(BOOT_PAGE)).unwrap();
    (launch, loaded)
}

/// The digest of a launch of SEV or SEV-ES, as the portable code computes it.
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

/// The policy of these tests for SEV and SEV-ES.
pub fn policy(protection: Protection) -> SevPolicy {
    let state = if protection == Protection::SevEs { SevFlags::ES } else { SevFlags::empty() };
    SevPolicy { least_api: (1, 0), flags: SevFlags::NO_DEBUG | state }
}

/// The error of this backend behind one of the contract's.
pub fn cause(error: &Error) -> &sev::Error {
    match error {
        Error::Backend { source, .. } => source.downcast_ref(),
        _ => None,
    }
    .unwrap_or_else(|| panic!("{error:?} is not of this backend"))
}
