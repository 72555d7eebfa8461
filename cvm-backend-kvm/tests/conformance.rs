//! The conformance suite with each kind of isolation that this host's KVM has.

use cvm_backend_kvm::{KvmPlatform, vault};
use cvm_conformance::{Departure, Subject, Suite};
use cvm_core::{BoxError, Platform, Protection};
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

    fn departures(&self, platform: &KvmPlatform) -> Vec<Departure> {
        let one_address =
            "a guest without a private bit in its page tables reaches both sides of a page at one address";
        let mut departures = vec![
            Departure::new("4.27", "page state changes are SEV-SNP's"),
            Departure::new("4.28", one_address),
            Departure::new("4.29", one_address),
        ];
        // A vault takes guest_memfd where there is one.
        let offers = KvmPlatform::probe();
        let has_gmem =
            offers.iter().any(|offer| offer.protection == Protection::GuestMemfd && offer.missing.is_empty());
        if self.0 != Protection::None && has_gmem {
            departures.push(Departure::new("3.8", "the kernel does not count what is behind a guest_memfd"));
        }
        if !platform.hypercalls_work() {
            let reason = "a guest's hypercall does not arrive on this host's KVM: guests ask by doorbell";
            departures.push(Departure::new("4.26", reason));
        }
        if self.0 != Protection::Vault {
            let reason = "whoever holds the vCPUs can debug them, and without a vault that is the VMM";
            departures.push(Departure::new("8.5", reason));
        }
        departures
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
