//! The conformance suite with each kind of isolation that this host's KVM has.

use cvm_backend_kvm::KvmVm;
use cvm_backend_kvm::{KvmPlatform, vault};
use cvm_conformance::ShownBy::{Failure, Refusal};
use cvm_conformance::{Departure, Rehearsed, Report, Subject, Suite, TrustedEntity};
use cvm_core::platform::{Asset, Party, Powers};
use cvm_core::{BoxError, Platform, Protection};
use std::path::Path;
use std::process::ExitCode;

/// Plain KVM with one kind of isolation.
struct Plain(Protection);

/// The vault: a process of this host, which measures by itself what it is given.
impl TrustedEntity<KvmPlatform> for Plain {
    fn reported(&self, vm: &KvmVm) -> Result<Report, BoxError> {
        let measured = vm.measured_by_vault().ok_or("no vault holds the vm")?;
        Ok(Report { measurement: measured.to_string(), host_data: None })
    }

    fn predicted(&self, _: &KvmPlatform, launch: &Rehearsed) -> Result<Report, BoxError> {
        Ok(Report { measurement: launch.transcript.measurement().to_string(), host_data: None })
    }
}

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

    fn trusted_entity(&self) -> Option<&dyn TrustedEntity<KvmPlatform>> {
        (self.0 == Protection::Vault).then_some(self as _)
    }

    fn departures(&self, platform: &KvmPlatform) -> Vec<Departure> {
        let mut departures = Vec::new();
        let mut depart = |clauses: &[&'static str], shown_by, reason: &str| {
            let departure = |clause: &&'static str| Departure { clause, reason: reason.into(), shown_by };
            departures.extend(clauses.iter().map(departure));
        };
        if self.0 != Protection::Vault {
            depart(
                &["2.14", "2.15", "2.16", "2.17", "2.18"],
                Refusal,
                "nobody but the library in the VMM's process measures a launch, and no hardware vouches for that",
            );
        }
        depart(&["4.27"], Refusal, "page state changes are SEV-SNP's");
        depart(
            &["4.28", "4.29"],
            Refusal,
            "a guest without a private bit in its page tables reaches both sides of a page at one address",
        );
        depart(
            &["5.18"],
            Refusal,
            "an exit of a guest on plain KVM is the instruction itself, so there is no call to give up by before exits \
             work",
        );
        let traces = platform.trust_model().powers(Party::VmmProcess, Asset::PrivateMemory).contains(Powers::STEER);
        if self.0 != Protection::Vault {
            depart(&["8.5"], Refusal, "whoever holds the vCPUs can debug them, and without a vault that is the VMM");
        } else if traces {
            depart(
                &["8.5"],
                Refusal,
                "a VMM that is root, or has as much, can trace its vault, and so debug the vCPUs",
            );
        }
        // A vault takes guest_memfd where there is one.
        if self.0 != Protection::None && has_guest_memfd() {
            depart(&["3.8"], Refusal, "the kernel does not count what is behind a guest_memfd");
            depart(
                &["5.14", "5.16"],
                Failure("it shut down"),
                "KVM cannot read an instruction that is in a guest_memfd, which it would have to emulate: the guest \
                 shuts down instead, and nobody says at what access",
            );
        }
        if !platform.hypercalls_work().unwrap_or_else(|error| panic!("{error}: {error:?}")) {
            depart(
                &["4.26"],
                Refusal,
                "a guest's hypercall does not arrive on this host's KVM: guests ask by doorbell",
            );
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
    let mut suite = Suite::new();
    for isolation in [Protection::None, Protection::GuestMemfd, Protection::Vault] {
        suite.add(Plain(isolation))?;
    }
    Ok(suite.run())
}
