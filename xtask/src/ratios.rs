//! What the benchmarks measured, as ratios to what the same work costs without protection.
//!
//! A report, not a test: a machine that is busy or emulated may miss any target.

use std::collections::HashMap;
use std::path::Path;
use std::process::ExitCode;
use std::{fmt, fs};

use clap::Args;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::workspace;

/// What one benchmark takes as a multiple of another one, and the most that it is to take.
struct Target {
    name: &'static str,
    /// Criterion's name of a benchmark: `group/function/parameter`.
    numerator: &'static str,
    denominator: &'static str,
    /// Nothing where the ratio is only reported.
    most: Option<f64>,
}

/// Every target there is, in the order of the report.
const TARGETS: &[Target] = &[
    // Mapping, copying and unmapping a buffer of this size, to a plain copy of it.
    target("bounce to device, 64 B", "bounce/to_device/64", "bounce/memcpy/64", 2.0),
    target("bounce to device, 256 B", "bounce/to_device/256", "bounce/memcpy/256", 1.5),
    target("bounce to device, 1500 B", "bounce/to_device/1500", "bounce/memcpy/1500", 1.2),
    target("bounce to device, 4 KiB", "bounce/to_device/4096", "bounce/memcpy/4096", 1.05),
    target("bounce to device, 16 KiB", "bounce/to_device/16384", "bounce/memcpy/16384", 1.05),
    target("bounce to device, 64 KiB", "bounce/to_device/65536", "bounce/memcpy/65536", 1.05),
    target("bounce to device, 256 KiB", "bounce/to_device/262144", "bounce/memcpy/262144", 1.05),
    target("bounce from device, 64 B", "bounce/from_device/64", "bounce/memcpy/64", 2.0),
    target("bounce from device, 256 B", "bounce/from_device/256", "bounce/memcpy/256", 1.5),
    target("bounce from device, 1500 B", "bounce/from_device/1500", "bounce/memcpy/1500", 1.2),
    target("bounce from device, 4 KiB", "bounce/from_device/4096", "bounce/memcpy/4096", 1.05),
    target("bounce from device, 16 KiB", "bounce/from_device/16384", "bounce/memcpy/16384", 1.05),
    target("bounce from device, 64 KiB", "bounce/from_device/65536", "bounce/memcpy/65536", 1.05),
    target("bounce from device, 256 KiB", "bounce/from_device/262144", "bounce/memcpy/262144", 1.05),
    // An access to the shared view, with a pin for many and with one for each, to one by vm-memory alone.
    target("view, read 8 B", "read/view/8", "read/raw/8", 1.15),
    target("view, read 64 B", "read/view/64", "read/raw/64", 1.15),
    target("view, read 4 KiB", "read/view/4096", "read/raw/4096", 1.15),
    target("view, write 8 B", "write/view/8", "write/raw/8", 1.15),
    target("view, write 64 B", "write/view/64", "write/raw/64", 1.15),
    target("view, write 4 KiB", "write/view/4096", "write/raw/4096", 1.15),
    target("view, pin and read 8 B", "read/pinned/8", "read/raw/8", 1.5),
    target("view, pin and read 64 B", "read/pinned/64", "read/raw/64", 1.5),
    target("view, pin and read 4 KiB", "read/pinned/4096", "read/raw/4096", 1.5),
    target("view, pin and write 8 B", "write/pinned/8", "write/raw/8", 1.5),
    target("view, pin and write 64 B", "write/pinned/64", "write/raw/64", 1.5),
    target("view, pin and write 4 KiB", "write/pinned/4096", "write/raw/4096", 1.5),
    // As many conversions on each of two threads as on one: 1.8 times as many in all.
    target("convert on two threads", "convert/two-threads", "convert/one-thread", 1.11),
    // An exit, to one by the bare ioctl; where a process of its own holds the vCPU, to one where this process does.
    report("exit, none", "none/exit", "raw/exit"),
    report("exit, guest-memfd", "guest-memfd/exit", "raw/exit"),
    target("exit, vault to none", "vault/exit", "none/exit", 2.0),
    // An interrupt by descriptor, and the guest's doorbell by descriptor for it: no process but the kernel is in the way.
    target("device i/o, vault to none", "vault/io", "none/io", 1.1),
    // Sharing a range and taking it back, to the system calls and exits that this cannot do without.
    target("convert 4 KiB, none", "none/convert/4KiB", "raw/convert-file/4KiB", 1.3),
    target("convert 4 KiB touched, none", "none/convert-touched/4KiB", "raw/convert-file-touched/4KiB", 1.3),
    target("convert 2 MiB, none", "none/convert/2MiB", "raw/convert-file/2MiB", 1.3),
    target("convert 64 MiB, none", "none/convert/64MiB", "raw/convert-file/64MiB", 1.3),
    target("convert 4 KiB, guest-memfd", "guest-memfd/convert/4KiB", "raw/convert-guest-memfd/4KiB", 1.3),
    target(
        "convert 4 KiB touched, guest-memfd",
        "guest-memfd/convert-touched/4KiB",
        "raw/convert-guest-memfd-touched/4KiB",
        1.3,
    ),
    target("convert 2 MiB, guest-memfd", "guest-memfd/convert/2MiB", "raw/convert-guest-memfd/2MiB", 1.3),
    target("convert 64 MiB, guest-memfd", "guest-memfd/convert/64MiB", "raw/convert-guest-memfd/64MiB", 1.3),
    target("convert 4 KiB, vault", "vault/convert/4KiB", "raw/convert-file/4KiB", 1.3),
    target("convert 4 KiB touched, vault", "vault/convert-touched/4KiB", "raw/convert-file-touched/4KiB", 1.3),
    target("convert 2 MiB, vault", "vault/convert/2MiB", "raw/convert-file/2MiB", 1.3),
    target("convert 64 MiB, vault", "vault/convert/64MiB", "raw/convert-file/64MiB", 1.3),
    // From nothing to a guest's first exit, to the same by bare ioctls.
    report("boot, none", "none/boot", "raw/boot"),
    report("boot, guest-memfd", "guest-memfd/boot", "raw/boot"),
    report("boot, vault", "vault/boot", "raw/boot"),
];

const fn target(name: &'static str, numerator: &'static str, denominator: &'static str, most: f64) -> Target {
    Target { name, numerator, denominator, most: Some(most) }
}

const fn report(name: &'static str, numerator: &'static str, denominator: &'static str) -> Target {
    Target { name, numerator, denominator, most: None }
}

/// Print the last results of the benchmarks as ratios, next to their targets.
///
/// The results are those of `cargo bench`, as medians. This is a report: it succeeds when targets
/// are missed, too.
#[derive(Args)]
pub struct Ratios {
    /// Print an array of {name, ratio, target, holds}; the last two are null where there is no target
    #[arg(long)]
    json: bool,
}

impl Ratios {
    /// Prints the report.
    pub fn run(&self) -> Result<ExitCode> {
        let medians = medians(&workspace::cargo_target().join("criterion"))?;
        let report = Report::new(TARGETS, &medians)?;
        if self.json {
            let rows = serde_json::to_string_pretty(&report.rows);
            println!("{}", rows.context(|| "writing JSON".into())?);
        } else {
            println!("{report}");
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The ratios that there are results for.
#[derive(Debug)]
struct Report {
    rows: Vec<Row>,
    not_measured: Vec<&'static str>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Row {
    name: &'static str,
    ratio: f64,
    target: Option<f64>,
    holds: Option<bool>,
}

impl Report {
    fn new(targets: &[Target], medians: &HashMap<String, f64>) -> Result<Self> {
        let (mut rows, mut not_measured) = (Vec::new(), Vec::new());
        for target in targets {
            let (above, below) = (medians.get(target.numerator), medians.get(target.denominator));
            let Some((above, below)) = above.zip(below) else {
                not_measured.push(target.name);
                continue;
            };
            let ratio = above / below;
            let holds = target.most.map(|most| ratio <= most);
            rows.push(Row { name: target.name, ratio, target: target.most, holds });
        }
        if rows.is_empty() {
            return Err(Error::new("no results of the benchmarks; run `cargo bench` first"));
        }
        Ok(Self { rows, not_measured })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
        writeln!(f, "{:width$}  {:>7}  {:>7}", "", "ratio", "target")?;
        for row in &self.rows {
            let Row { name, ratio, target, holds } = row;
            write!(f, "{name:width$}  {ratio:7.2}")?;
            match target.zip(*holds) {
                Some((target, holds)) => writeln!(f, "  {target:7.2}  {}", if holds { "holds" } else { "misses" })?,
                None => writeln!(f)?,
            }
        }
        let count = |verdict| self.rows.iter().filter(|row| row.holds == Some(verdict)).count();
        write!(f, "{} hold, {} miss", count(true), count(false))?;
        if !self.not_measured.is_empty() {
            write!(f, "; not measured: {}", self.not_measured.join("; "))?;
        }
        Ok(())
    }
}

/// What criterion writes about a benchmark.
#[derive(Deserialize)]
struct Benchmark {
    group_id: String,
    function_id: Option<String>,
    value_str: Option<String>,
}

/// What criterion writes about a measurement, in nanoseconds.
#[derive(Deserialize)]
struct Estimates {
    median: Estimate,
}

#[derive(Deserialize)]
struct Estimate {
    point_estimate: f64,
}

/// The last results below criterion's directory: nanoseconds by the benchmark's name.
fn medians(directory: &Path) -> Result<HashMap<String, f64>> {
    let mut medians = HashMap::new();
    let mut unread = vec![directory.to_owned()];
    while let Some(directory) = unread.pop() {
        let benchmark = directory.join("benchmark.json");
        if directory.ends_with("new") && benchmark.is_file() {
            let Benchmark { group_id, function_id, value_str } = read(&benchmark)?;
            let estimates: Estimates = read(&directory.join("estimates.json"))?;
            let parts = [Some(group_id), function_id, value_str];
            let name = parts.into_iter().flatten().collect::<Vec<_>>().join("/");
            medians.insert(name, estimates.median.point_estimate);
        }
        // What is no directory has no entries.
        let entries = fs::read_dir(&directory).into_iter().flatten();
        unread.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    Ok(medians)
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).context(|| format!("reading {}", path.display()))?;
    serde_json::from_slice(&text).context(|| format!("reading {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &[Target] = &[
        target("small", "copy/safe/64", "copy/plain/64", 2.0),
        target("large", "copy/safe/4096", "copy/plain/4096", 1.05),
    ];
    const WITHOUT: &[Target] = &[report("either", "copy/safe/64", "copy/plain/64")];

    fn measured(directory: &Path, function: &str, size: &str, median: f64) {
        let directory = directory.join("copy").join(function).join(size).join("new");
        fs::create_dir_all(&directory).unwrap();
        fs::write(
            directory.join("benchmark.json"),
            format!(
                r#"{{"group_id":"copy","function_id":"{function}","value_str":"{size}",
                     "throughput":null,"full_id":"copy/{function}/{size}"}}"#
            ),
        )
        .unwrap();
        fs::write(
            directory.join("estimates.json"),
            format!(r#"{{"mean":{{"point_estimate":1.0}},"median":{{"point_estimate":{median:?}}}}}"#),
        )
        .unwrap();
    }

    #[test]
    fn medians_become_ratios_with_a_verdict() {
        let directory = tempfile::tempdir().unwrap();
        measured(directory.path(), "plain", "64", 10.0);
        measured(directory.path(), "safe", "64", 15.0);
        measured(directory.path(), "plain", "4096", 100.0);
        measured(directory.path(), "safe", "4096", 110.0);

        let report = Report::new(TWO, &medians(directory.path()).unwrap()).unwrap();
        assert_eq!(
            report.to_string(),
            "         ratio   target\n\
             small     1.50     2.00  holds\n\
             large     1.10     1.05  misses\n\
             1 hold, 1 miss"
        );
        assert_eq!(
            serde_json::to_value(&report.rows).unwrap()[0],
            serde_json::json!({"name": "small", "ratio": 1.5, "target": 2.0, "holds": true})
        );
    }

    #[test]
    fn a_ratio_without_a_target_has_no_verdict() {
        let directory = tempfile::tempdir().unwrap();
        measured(directory.path(), "plain", "64", 10.0);
        measured(directory.path(), "safe", "64", 30.0);

        let report = Report::new(WITHOUT, &medians(directory.path()).unwrap()).unwrap();
        assert_eq!(report.to_string(), "          ratio   target\neither     3.00\n0 hold, 0 miss");
        assert_eq!(
            serde_json::to_value(&report.rows).unwrap()[0],
            serde_json::json!({"name": "either", "ratio": 3.0, "target": null, "holds": null})
        );
    }

    #[test]
    fn a_target_without_results_is_named() {
        let directory = tempfile::tempdir().unwrap();
        measured(directory.path(), "plain", "64", 10.0);
        measured(directory.path(), "safe", "64", 15.0);
        measured(directory.path(), "safe", "4096", 110.0);

        let report = Report::new(TWO, &medians(directory.path()).unwrap()).unwrap();
        assert!(report.to_string().ends_with("1 hold, 0 miss; not measured: large"));
    }

    #[test]
    fn no_results_at_all_say_what_to_run() {
        let directory = tempfile::tempdir().unwrap();
        let none = medians(&directory.path().join("missing")).unwrap();
        let error = Report::new(TWO, &none).unwrap_err().to_string();
        assert!(error.contains("cargo bench"), "{error}");
    }

    #[test]
    fn a_damaged_result_names_its_file() {
        let directory = tempfile::tempdir().unwrap();
        measured(directory.path(), "plain", "64", 10.0);
        let damaged = directory.path().join("copy/plain/64/new/estimates.json");
        fs::write(&damaged, "{").unwrap();
        let error = medians(directory.path()).unwrap_err().to_string();
        assert!(error.contains("estimates.json"), "{error}");
    }
}
