//! The conformance suite with each kind of isolation that this host's KVM has.

use cvm_backend_kvm::{KvmPlatform, vault};
use cvm_conformance::{Departure, Subject, Suite};
use cvm_core::{BoxError, Protection};
use std::path::Path;
use std::process::ExitCode;

/// Plain KVM with one kind of isolation.
struct Plain(Protection);

impl Subject for Plain {
    type Platform = KvmPlatform;

    fn protection(&self) -> Protection {
        self.0
    }

    fn open(&self) -> Result<KvmPlatform, BoxError> {
        Ok(KvmPlatform::open(Path::new("/dev/kvm"), Some(self.0))?)
    }

    fn required(&self) -> bool {
        // A machine for tests has some KVM, but not each has guest_memfd.
        self.0 != Protection::GuestMemfd && std::env::var_os("CVM_REQUIRE_KVM").is_some()
    }

    fn departures(&self, _platform: &KvmPlatform) -> Vec<Departure> {
        Vec::new()
    }
}

fn main() -> Result<ExitCode, BoxError> {
    vault::use_program(env!("CARGO_BIN_EXE_cvm-vault"));
    let mut suite = Suite::new();
    for isolation in [Protection::None, Protection::GuestMemfd, Protection::Vault] {
        suite.add(Plain(isolation))?;
    }
    Ok(suite.run())
}
