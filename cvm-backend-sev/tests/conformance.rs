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
            let mut departures = Vec::new();
            if self.0 == Protection::Sev {
                let reason = "SEV leaves registers to the host, so whoever holds the vCPUs can debug them";
                departures.push(Departure::new("8.5", reason));
            }
            if self.0 != Protection::SevSnp && self.is_emulated() {
                let reason = "this processor only passes for one of AMD's, and encrypts nothing";
                departures.push(Departure::new("1.5", reason));
            }
            if self.0 != Protection::SevSnp {
                let reason = "SEV and SEV-ES measure the contents of every page that is loaded";
                departures.push(Departure::new("2.7", reason));
            }
            if self.0 == Protection::Sev && self.is_emulated() {
                let reason = "this secure processor only passes for one, and takes any keys for those of a target";
                departures.push(Departure::new("9.4", reason));
            }
            if self.0 == Protection::SevSnp {
                let by_page_state = "guests of SEV-SNP ask for conversions by page state changes alone";
                departures.extend([
                    Departure::new("3.8", "the kernel does not count what is behind a guest_memfd"),
                    Departure::new("4.25", by_page_state),
                    Departure::new("4.26", by_page_state),
                ]);
                if !self.is_emulated() {
                    let reason = "the host's zeros are not encrypted, so the guest decrypts them to something else: it \
                                  has to write to a page before it reads there";
                    departures.push(Departure::new("4.2", reason));
                }
                return departures;
            }
            let by_tables = "the guest's page tables decide, access by access, which side it touches, and the \
                             processor stops neither";
            departures.extend([
                Departure::new(
                    "4.2",
                    "both sides of a page are one page, which is left as it is: the guest decrypts what was never \
                     encrypted, and has to write to the page before it reads there",
                ),
                Departure::new("4.27", "page state changes are SEV-SNP's"),
                Departure::new("4.28", by_tables),
                Departure::new("4.29", by_tables),
            ]);
            if self.is_emulated() {
                let reason = "both sides of a page are one page, and the processor that stands in for AMD's does not \
                              encrypt it";
                departures.push(Departure::new("3.6", reason));
            }
            departures
        }

        fn is_emulated(&self) -> bool {
            // The faked secure processor comes with a processor that is none of AMD's.
            fs::exists("/proc/fakepsp").unwrap_or(false)
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
