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
                let reason = "an exit of a guest of sev is the instruction itself, so there is no call to give up by before \
                              exits work";
                departures.push(Departure::new("5.18", reason));
            }
            // A processor that only passes for one encrypts nothing, and raises no exception for the guest to exit by.
            match self.0 {
                Protection::Sev if !self.is_emulated() => departures.push(Departure::new(
                    "5.14",
                    "kvm cannot read an instruction that is in encrypted memory, which it would have to emulate: the guest \
                     shuts down instead",
                )),
                Protection::SevEs if !self.is_emulated() => departures.push(Departure::new(
                    "5.16",
                    "the processor tells the guest of the access by an exception, and not its host: a guest that does not \
                     pass it on shuts down",
                )),
                _ => {}
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
