//! The conformance suite with each generation of SEV that this host has.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod subject {
    use cvm_backend_sev::kvm::SevPlatform;
    use cvm_conformance::{Departure, Subject, Suite};
    use cvm_core::{BoxError, Protection};
    use std::fs;
    use std::process::ExitCode;

    /// AMD's hardware with one kind of protection.
    struct Sev(Protection);

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
            let mut depart = |who: &[Protection], clauses: &[&'static str], reason: &str| {
                let clauses = clauses.iter().filter(|_| who.contains(&self.0));
                departures.extend(clauses.map(|clause| Departure::new(clause, reason)));
            };
            depart(&[sev, es], &["2.7"], "SEV and SEV-ES measure the contents of every page that is loaded");
            depart(&[snp], &["3.8"], "the kernel does not count what is behind a guest_memfd");
            depart(
                &[sev, es],
                &["4.2"],
                "both sides of a page are one page, which is left as it is: the guest decrypts what was never encrypted, \
                 and has to write to the page before it reads there",
            );
            depart(&[snp], &["4.25", "4.26"], "guests of SEV-SNP ask for conversions by page state changes alone");
            depart(&[sev, es], &["4.27"], "page state changes are SEV-SNP's");
            depart(
                &[sev, es],
                &["4.28", "4.29"],
                "the guest's page tables decide, access by access, which side it touches, and the processor stops neither",
            );
            depart(
                &[sev],
                &["5.18"],
                "an exit of a guest of SEV is the instruction itself, so there is no call to give up by before exits work",
            );
            depart(&[sev], &["8.5"], "SEV leaves registers to the host, so whoever holds the vCPUs can debug them");
            depart(
                &[es],
                &["5.16"],
                "the processor tells the guest of the access by an exception, and not its host: a guest that does not pass \
                 it on shuts down",
            );
            if is_model() {
                let encrypts_nothing = "the processor that stands in for AMD's encrypts nothing";
                depart(&[sev, es], &["1.5", "3.6"], encrypts_nothing);
                let takes_any = "the secure processor that stands in for AMD's takes any keys for those of a target";
                depart(&[sev], &["9.4"], takes_any);
            } else {
                depart(
                    &[snp],
                    &["4.2"],
                    "the host's zeros are not encrypted, so the guest decrypts them to something else: it has to write \
                     to a page before it reads there",
                );
                depart(
                    &[sev],
                    &["5.14"],
                    "KVM cannot read an instruction that is in encrypted memory, which it would have to emulate: the \
                     guest shuts down instead",
                );
            }
            departures
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
        fs::exists("/proc/fakepsp").unwrap_or(false)
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
