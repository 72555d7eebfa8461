//! The conformance suite with each generation of SEV that this host has.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod subject {
    use cvm_backend_sev::kvm::SevPlatform;
    use cvm_backend_sev::kvm::SevVm;
    use cvm_backend_sev::{HostData, sev, snp};
    use cvm_conformance::ShownBy::{Failure, Refusal};
    use cvm_conformance::{Departure, Rehearsed, Report, Subject, Suite, TrustedEntity};
    use cvm_core::{BoxError, Protection};
    use std::fs;
    use std::process::ExitCode;

    /// AMD's hardware with one kind of protection.
    struct Sev(Protection);

    /// The faked secure processor's log.
    const LOG: &str = "/proc/fakepsp";

    /// What follows `name=` in a line of the log.
    fn field(line: &str, name: &str) -> Option<String> {
        let words = &mut line.split([' ', ',']);
        words.find_map(|word| word.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned)
    }

    /// The secure processor, by its log: where it is faked it can be asked from outside the guest.
    impl TrustedEntity<SevPlatform> for Sev {
        fn reported(&self, _: &SevVm) -> Result<Report, BoxError> {
            let log = fs::read_to_string(LOG)?;
            let is_snp = self.0 == Protection::SevSnp;
            let is_last = |line: &&str| match is_snp {
                true => line.contains("host_data="),
                false => line.starts_with("LAUNCH_MEASURE"),
            };
            let line = log.lines().rfind(is_last).ok_or("it has not ended a launch")?;
            let measurement = field(line, "ld").ok_or("it has not told the digest")?;
            let host_data = match is_snp {
                true => Some(field(line, "host_data").ok_or("it has not told the host data")?),
                false => None,
            };
            Ok(Report { measurement, host_data })
        }

        fn predicted(&self, platform: &SevPlatform, launch: &Rehearsed) -> Result<Report, BoxError> {
            let (transcript, features) = (&launch.transcript, platform.features());
            if self.0 != Protection::SevSnp {
                let es = (self.0 == Protection::SevEs).then_some(features);
                let digest = sev::of_transcript(transcript, es, |gpa| launch.page(gpa))?;
                return Ok(Report { measurement: digest.to_string(), host_data: None });
            }
            let config = transcript.config().ok_or("the transcript has no configuration")?;
            let host_data = HostData::default().bytes(&config).iter().map(|byte| format!("{byte:02x}")).collect();
            Ok(Report { measurement: snp::of_transcript(transcript, features).to_string(), host_data: Some(host_data) })
        }
    }

    impl Subject for Sev {
        type Platform = SevPlatform;

        fn protection(&self) -> Protection {
            self.0
        }

        fn open(&self) -> Result<SevPlatform, BoxError> {
            Ok(SevPlatform::open(self.0)?)
        }

        fn required(&self) -> bool {
            std::env::var_os("CVM_REQUIRE_SEV").is_some()
        }

        fn departures(&self, _platform: &SevPlatform) -> Vec<Departure> {
            let (sev, es, snp) = (Protection::Sev, Protection::SevEs, Protection::SevSnp);
            let mut departures = Vec::new();
            let mut depart = |who: &[Protection], clauses: &[&'static str], shown_by, reason: &str| {
                let departure = |clause: &&'static str| Departure { clause, reason: reason.into(), shown_by };
                departures.extend(clauses.iter().filter(|_| who.contains(&self.0)).map(departure));
            };
            depart(&[sev, es], &["2.7"], Refusal, "SEV and SEV-ES measure the contents of every page that is loaded");
            depart(&[snp], &["3.8"], Refusal, "the kernel does not count what is behind a guest_memfd");
            depart(
                &[sev, es, snp],
                &["2.19", "4.2"],
                Refusal,
                "the guest decrypts what nobody has encrypted, and has to write to a page before it reads there, as its boot \
                 page says",
            );
            depart(
                &[snp],
                &["4.25", "4.26"],
                Refusal,
                "guests of SEV-SNP ask for conversions by page state changes alone",
            );
            depart(&[sev, es], &["4.27"], Refusal, "page state changes are SEV-SNP's");
            depart(
                &[sev, es],
                &["4.28", "4.29"],
                Failure(" side: Ok(Ended { code: 0 })"),
                "the guest's page tables decide, access by access, which side it touches, and the processor stops neither",
            );
            depart(
                &[sev],
                &["5.18"],
                Refusal,
                "an exit of a guest of SEV is the instruction itself, so there is no call to give up by before exits work",
            );
            depart(
                &[sev],
                &["8.5"],
                Refusal,
                "SEV leaves registers to the host, so whoever holds the vCPUs can debug them",
            );
            depart(
                &[es],
                &["5.16"],
                Failure("it shut down"),
                "the processor tells the guest of the access by an exception, and not its host: a guest that does not pass \
                 it on shuts down",
            );
            if is_model() {
                let encrypts_nothing = "the processor that stands in for AMD's encrypts nothing";
                let in_process = "private memory is in the process that cannot read it";
                depart(&[sev, es], &["1.5"], Failure(in_process), encrypts_nothing);
                depart(&[sev, es], &["3.6"], Failure(" can be read"), encrypts_nothing);
                let takes_any = "the secure processor that stands in for AMD's takes any keys for those of a target";
                depart(&[sev], &["9.4"], Failure("an export for nobody"), takes_any);
                let by_order = "SEV and SEV-ES measure contents in the order of loading, and not where they are";
                depart(&[sev, es], &["2.16"], Refusal, by_order);
                depart(&[sev], &["2.17"], Refusal, "SEV does not measure the initial state of vCPUs");
            } else {
                depart(
                    &[sev, es, snp],
                    &["2.14", "2.15", "2.16", "2.17", "2.18"],
                    Refusal,
                    "the suite cannot ask the secure processor: its guests are too small to have it report, which the guest \
                     of the example boot_tiny_guest does",
                );
                depart(
                    &[sev],
                    &["5.14"],
                    Failure("it shut down"),
                    "KVM cannot read an instruction that is in encrypted memory, which it would have to emulate: the \
                     guest shuts down instead",
                );
            }
            departures
        }

        fn trusted_entity(&self) -> Option<&dyn TrustedEntity<SevPlatform>> {
            is_model().then_some(self as _)
        }

        /// Identifiers of address spaces in use, by kind, where control groups count them.
        fn held(&self) -> Vec<(String, u64)> {
            // The root has counts only where its children have.
            let _ = fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+misc");
            let text = fs::read_to_string("/sys/fs/cgroup/misc.current").unwrap_or_default();
            let lines = text.lines().filter_map(|line| line.split_once(' '));
            lines.filter_map(|(kind, count)| Some((kind.to_owned(), count.trim().parse().ok()?))).collect()
        }
    }

    /// Whether L1's models stand for AMD's secure processor and for an SEV processor, where memory is plain text.
    fn is_model() -> bool {
        fs::exists(LOG).unwrap_or(false)
    }

    pub fn run() -> Result<ExitCode, BoxError> {
        let mut suite = Suite::new();
        for protection in [Protection::Sev, Protection::SevEs, Protection::SevSnp] {
            suite.add(Sev(protection))?;
        }
        Ok(suite.run())
    }
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn main() -> Result<std::process::ExitCode, cvm_core::BoxError> {
    subject::run()
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn main() {
    eprintln!("SKIPPED: there is no SEV but on Linux on x86-64");
}
