//! The conformance suite with each kind of isolation that this host's KVM has, or with `$CVM_ISOLATION` alone.

use cvm_backend_kvm::{KvmPlatform, vault};
use cvm_conformance::{Departure, Subject, Suite};
use cvm_core::{BoxError, Platform, Protection};
use std::path::Path;
use std::process::ExitCode;

/// Plain KVM with one kind of isolation.
struct Plain {
    isolation: Protection,
    required: bool,
}

impl Subject for Plain {
    type Platform = KvmPlatform;

    fn protection(&self) -> Protection {
        self.isolation
    }

    fn open(&self) -> Result<KvmPlatform, BoxError> {
        Ok(KvmPlatform::open(Path::new("/dev/kvm"), Some(self.isolation))?)
    }

    fn required(&self) -> bool {
        self.required
    }

    fn departures(&self, _platform: &KvmPlatform) -> Vec<Departure> {
        let mut departures = vec![Departure::new(
            "5.18",
            "an exit of a guest on plain kvm is the instruction itself, so there is no call to give up by before exits work",
        )];
        // A vault takes what is best.
        if self.isolation != Protection::None && has_guest_memfd() {
            let reason = "kvm cannot read an instruction that is in a guest_memfd, which it would have to emulate: the guest \
                          shuts down instead, and nobody says at what access";
            departures.extend(["5.14", "5.16"].map(|clause| Departure::new(clause, reason)));
        }
        departures
    }
}

fn has_guest_memfd() -> bool {
    let offers = KvmPlatform::probe();
    offers.iter().any(|offer| offer.protection == Protection::GuestMemfd && offer.missing.is_empty())
}

fn main() -> Result<ExitCode, BoxError> {
    vault::use_program(env!("CARGO_BIN_EXE_cvm-vault"));
    let only = std::env::var("CVM_ISOLATION").ok();
    let mut suite = Suite::new();
    for isolation in [Protection::None, Protection::GuestMemfd, Protection::Vault] {
        if only.as_ref().is_none_or(|only| *only == isolation.to_string()) {
            // A machine for tests has some KVM, but not each has guest_memfd.
            let asked = only.is_some() || isolation != Protection::GuestMemfd;
            let required = asked && std::env::var_os("CVM_REQUIRE_KVM").is_some();
            suite.add(Plain { isolation, required })?;
        }
    }
    Ok(suite.run())
}
