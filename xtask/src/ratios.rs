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

/// Something that was measured, and the most that it is to be.
struct Target {
    name: &'static str,
    measure: Measure,
    /// Nothing where it is only reported.
    most: Option<f64>,
}

/// Names are criterion's: `group/function/parameter`.
#[derive(Clone, Copy)]
enum Measure {
    /// What one benchmark takes as a multiple of another one.
    Ratio(&'static str, &'static str),
    /// What a benchmark takes as a multiple of the floor that took turns with it.
    ToFloor(&'static str),
    /// What a benchmark takes, in nanoseconds.
    Nanoseconds(&'static str),
    /// What a benchmark takes more than its floor, in nanoseconds.
    AboveFloor(&'static str),
}

/// Every target there is, in the order of the report.
const TARGETS: &[Target] = &[
    // Taking a buffer, copying and giving it back, to a plain copy.
    to_floor("bounce to device, 64 B", "bounce/to_device/64", 2.0),
    to_floor("bounce to device, 256 B", "bounce/to_device/256", 1.5),
    to_floor("bounce to device, 1500 B", "bounce/to_device/1500", 1.2),
    to_floor("bounce to device, 4 KiB", "bounce/to_device/4096", 1.05),
    to_floor("bounce to device, 16 KiB", "bounce/to_device/16384", 1.05),
    to_floor("bounce to device, 64 KiB", "bounce/to_device/65536", 1.05),
    to_floor("bounce to device, 256 KiB", "bounce/to_device/262144", 1.05),
    to_floor("bounce from device, 64 B", "bounce/from_device/64", 2.0),
    to_floor("bounce from device, 256 B", "bounce/from_device/256", 1.5),
    to_floor("bounce from device, 1500 B", "bounce/from_device/1500", 1.2),
    to_floor("bounce from device, 4 KiB", "bounce/from_device/4096", 1.05),
    to_floor("bounce from device, 16 KiB", "bounce/from_device/16384", 1.05),
    to_floor("bounce from device, 64 KiB", "bounce/from_device/65536", 1.05),
    to_floor("bounce from device, 256 KiB", "bounce/from_device/262144", 1.05),
    to_floor("bounce by ring, 64 B", "bounce/ring/64", 2.0),
    to_floor("bounce by ring, 256 B", "bounce/ring/256", 1.5),
    // The same without a copy.
    nanoseconds("map and release, 64 B", "bounce/map/64", 10.0),
    nanoseconds("map and release, 256 B", "bounce/map/256", 10.0),
    nanoseconds("map and release, 1500 B", "bounce/map/1500", 10.0),
    nanoseconds("map and release, 4 KiB", "bounce/map/4096", 10.0),
    nanoseconds("map and release, 16 KiB", "bounce/map/16384", 10.0),
    nanoseconds("map and release, 64 KiB", "bounce/map/65536", 10.0),
    nanoseconds("map and release, 256 KiB", "bounce/map/262144", 10.0),
    nanoseconds("map and release, 1500 B, 50% full", "bounce/map-full-50/1500", 10.0),
    nanoseconds("map and release, 4 KiB, 50% full", "bounce/map-full-50/4096", 10.0),
    nanoseconds("map and release, 64 KiB, 50% full", "bounce/map-full-50/65536", 10.0),
    nanoseconds("map and release, 256 KiB, 50% full", "bounce/map-full-50/262144", 10.0),
    nanoseconds("map and release, 1500 B, 90% full", "bounce/map-full-90/1500", 10.0),
    nanoseconds("map and release, 4 KiB, 90% full", "bounce/map-full-90/4096", 10.0),
    nanoseconds("map and release, 64 KiB, 90% full", "bounce/map-full-90/65536", 10.0),
    nanoseconds("map and release, 256 KiB, 90% full", "bounce/map-full-90/262144", 10.0),
    // Lending a buffer, of which a header of 64 bytes is read.
    nanoseconds("lend, 64 B", "bounce/lend/64", 15.0),
    nanoseconds("lend, 256 B", "bounce/lend/256", 15.0),
    nanoseconds("lend, 1500 B", "bounce/lend/1500", 15.0),
    nanoseconds("lend, 4 KiB", "bounce/lend/4096", 15.0),
    nanoseconds("lend, 16 KiB", "bounce/lend/16384", 15.0),
    nanoseconds("lend, 64 KiB", "bounce/lend/65536", 15.0),
    nanoseconds("lend, 256 KiB", "bounce/lend/262144", 15.0),
    // In and out of other circumstances: how full the pool is, how many are in flight, where payloads come from.
    to_floor("bounce to device, 1500 B, 50% full", "bounce/to_device-full-50/1500", 1.2),
    to_floor("bounce to device, 4 KiB, 50% full", "bounce/to_device-full-50/4096", 1.05),
    to_floor("bounce to device, 64 KiB, 50% full", "bounce/to_device-full-50/65536", 1.05),
    to_floor("bounce to device, 256 KiB, 50% full", "bounce/to_device-full-50/262144", 1.05),
    to_floor("bounce to device, 1500 B, 90% full", "bounce/to_device-full-90/1500", 1.2),
    to_floor("bounce to device, 4 KiB, 90% full", "bounce/to_device-full-90/4096", 1.05),
    to_floor("bounce to device, 64 KiB, 90% full", "bounce/to_device-full-90/65536", 1.05),
    to_floor("bounce to device, 256 KiB, 90% full", "bounce/to_device-full-90/262144", 1.05),
    to_floor("bounce to device, 1500 B, 1 in flight", "bounce/to_device-depth-1/1500", 1.2),
    to_floor("bounce to device, 4 KiB, 1 in flight", "bounce/to_device-depth-1/4096", 1.05),
    to_floor("bounce to device, 1500 B, 8 in flight", "bounce/to_device-depth-8/1500", 1.2),
    to_floor("bounce to device, 4 KiB, 8 in flight", "bounce/to_device-depth-8/4096", 1.05),
    to_floor("bounce to device, 1500 B, 32 in flight", "bounce/to_device-depth-32/1500", 1.2),
    to_floor("bounce to device, 4 KiB, 32 in flight", "bounce/to_device-depth-32/4096", 1.05),
    to_floor("bounce to device, 4 KiB, from DRAM", "bounce/to_device-dram/4096", 1.05),
    to_floor("bounce to device, 64 KiB, from DRAM", "bounce/to_device-dram/65536", 1.05),
    // While another core reads or writes all that is shared.
    to_floor("bounce to device, 4 KiB, watched", "bounce/to_device-watched/4096", 1.05),
    to_floor("bounce from device, 4 KiB, watched", "bounce/from_device-watched/4096", 1.05),
    nanoseconds("lend, 4 KiB, watched", "bounce/lend-watched/4096", 150.0),
    // As many on each of two threads as on one: 1.9 times as many in all. Taken on one CPU and released on another.
    to_floor("map and release on two threads", "bounce/threads/two", 1.05),
    nanoseconds("release on another cpu, 4 KiB", "bounce/across/4096", 80.0),
    above_floor("gather 16 x 4 KiB, above the copy", "bounce/gather/65536", 80.0),
    // What options cost.
    to_floor_reported("bounce to device, 1500 B, zero on release", "bounce/to_device-zeroed/1500"),
    to_floor_reported("bounce to device, 4 KiB, zero on release", "bounce/to_device-zeroed/4096"),
    to_floor_reported("bounce to device, 64 KiB, zero on release", "bounce/to_device-zeroed/65536"),
    to_floor_reported("bounce to device, 1500 B, random slots", "bounce/to_device-random/1500"),
    to_floor_reported("bounce to device, 4 KiB, random slots", "bounce/to_device-random/4096"),
    to_floor_reported("bounce to device, 64 KiB, random slots", "bounce/to_device-random/65536"),
    // An access to the shared view, with a pin for many and with one for each, to one by vm-memory alone.
    to_floor("view, read 8 B", "read/view/8", 1.15),
    to_floor("view, read 64 B", "read/view/64", 1.15),
    to_floor("view, read 4 KiB", "read/view/4096", 1.15),
    to_floor("view, write 8 B", "write/view/8", 1.15),
    to_floor("view, write 64 B", "write/view/64", 1.15),
    to_floor("view, write 4 KiB", "write/view/4096", 1.15),
    to_floor("view, pin and read 8 B", "read/pinned/8", 1.5),
    to_floor("view, pin and read 64 B", "read/pinned/64", 1.5),
    to_floor("view, pin and read 4 KiB", "read/pinned/4096", 1.5),
    to_floor("view, pin and write 8 B", "write/pinned/8", 1.5),
    to_floor("view, pin and write 64 B", "write/pinned/64", 1.5),
    to_floor("view, pin and write 4 KiB", "write/pinned/4096", 1.5),
    // Without a backend; an iteration is two conversions. On two threads, as many on each as on one: 1.8 times as many.
    nanoseconds("states of 512 pages", "map/lookup/512", 1024.0),
    nanoseconds("convert 4 KiB, there and back", "convert/4KiB", 600.0),
    nanoseconds("convert 2 MiB, there and back", "convert/2MiB", 600.0),
    to_floor("convert on two threads", "convert/two/threads", 1.11),
    // The launch digest of SEV-SNP, to SHA-384 of the same bytes on as many threads.
    to_floor("measure snp, one thread", "measure/snp/1", 1.1),
    to_floor("measure snp, two threads", "measure/snp/2", 1.1),
    to_floor_reported("launch by pages, above their hashes", "measure/launch/pages"),
    to_floor_reported("launch at once, above their hashes", "measure/launch/image"),
    to_floor_reported("convert on two threads, an engine each", "convert/apart/threads"),
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
    Target { name, measure: Measure::Ratio(numerator, denominator), most: Some(most) }
}

const fn report(name: &'static str, numerator: &'static str, denominator: &'static str) -> Target {
    Target { name, measure: Measure::Ratio(numerator, denominator), most: None }
}

const fn to_floor(name: &'static str, benchmark: &'static str, most: f64) -> Target {
    Target { name, measure: Measure::ToFloor(benchmark), most: Some(most) }
}

const fn to_floor_reported(name: &'static str, benchmark: &'static str) -> Target {
    Target { name, measure: Measure::ToFloor(benchmark), most: None }
}

const fn nanoseconds(name: &'static str, benchmark: &'static str, most: f64) -> Target {
    Target { name, measure: Measure::Nanoseconds(benchmark), most: Some(most) }
}

const fn above_floor(name: &'static str, benchmark: &'static str, most: f64) -> Target {
    Target { name, measure: Measure::AboveFloor(benchmark), most: Some(most) }
}

/// Print the last results of the benchmarks next to their targets, mostly as ratios.
///
/// The results are those of `cargo bench`, as medians. This is a report: it succeeds when targets
/// are missed, too.
#[derive(Args)]
pub struct Ratios {
    /// Print an array of {name, value, unit, target, holds}; the last two are null where there is no target
    #[arg(long)]
    json: bool,
}

impl Ratios {
    /// Prints the report.
    pub fn run(&self) -> Result<ExitCode> {
        let results = Results::read(&workspace::cargo_target().join("criterion"))?;
        let report = Report::new(TARGETS, &results)?;
        if self.json {
            let rows = serde_json::to_string_pretty(&report.rows);
            println!("{}", rows.context(|| "writing JSON".into())?);
        } else {
            println!("{report}");
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The targets that there are results for.
#[derive(Debug)]
struct Report {
    rows: Vec<Row>,
    not_measured: Vec<&'static str>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Row {
    name: &'static str,
    value: f64,
    unit: Unit,
    target: Option<f64>,
    holds: Option<bool>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Unit {
    Ratio,
    Ns,
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Self::Ratio => format!("{value:7.2}   "),
            Self::Ns => format!("{value:7.1} ns"),
        }
    }
}

impl Report {
    fn new(targets: &[Target], results: &Results) -> Result<Self> {
        let (mut rows, mut not_measured) = (Vec::new(), Vec::new());
        for Target { name, measure, most } in targets {
            let Some((value, unit)) = results.get(*measure) else {
                not_measured.push(*name);
                continue;
            };
            rows.push(Row { name, value, unit, target: *most, holds: most.map(|most| value <= most) });
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
        writeln!(f, "{:width$}  {:>7}     {:>7}", "", "", "target")?;
        for row in &self.rows {
            let line = format!("{:width$}  {}", row.name, row.unit.show(row.value));
            match row.target.zip(row.holds) {
                Some((target, holds)) => {
                    writeln!(f, "{line}  {}  {}", row.unit.show(target), if holds { "holds" } else { "misses" })?;
                }
                None => writeln!(f, "{}", line.trim_end())?,
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

/// What was measured last, by the benchmarks' names.
#[derive(Debug, Default)]
struct Results {
    /// In nanoseconds.
    medians: HashMap<String, f64>,
    /// Where a floor took turns.
    paired: HashMap<String, Paired>,
}

/// What `benches/paired` writes.
#[derive(Debug, Deserialize)]
struct Paired {
    nanoseconds: f64,
    floor: f64,
    ratio: f64,
}

impl Results {
    fn get(&self, measure: Measure) -> Option<(f64, Unit)> {
        Some(match measure {
            Measure::Ratio(above, below) => (self.medians.get(above)? / self.medians.get(below)?, Unit::Ratio),
            Measure::ToFloor(name) => (self.paired.get(name)?.ratio, Unit::Ratio),
            Measure::Nanoseconds(name) => (*self.medians.get(name)?, Unit::Ns),
            Measure::AboveFloor(name) => {
                let paired = self.paired.get(name)?;
                (paired.nanoseconds - paired.floor, Unit::Ns)
            }
        })
    }

    /// The results below criterion's directory.
    fn read(criterion: &Path) -> Result<Self> {
        let mut results = Self::default();
        let paired = criterion.join("paired");
        let mut unread = vec![criterion.to_owned()];
        while let Some(directory) = unread.pop() {
            let benchmark = directory.join("benchmark.json");
            if directory.ends_with("new") && benchmark.is_file() {
                let Benchmark { group_id, function_id, value_str } = read(&benchmark)?;
                let estimates: Estimates = read(&directory.join("estimates.json"))?;
                let parts = [Some(group_id), function_id, value_str];
                let name = parts.into_iter().flatten().collect::<Vec<_>>().join("/");
                results.medians.insert(name, estimates.median.point_estimate);
            }
            // What is no directory has no entries.
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                let path = entry.path();
                if let Some(name) = path.strip_prefix(&paired).ok().filter(|_| path.is_file()) {
                    results.paired.insert(name.with_extension("").display().to_string(), read(&path)?);
                }
                unread.push(path);
            }
        }
        Ok(results)
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

        let report = Report::new(TWO, &Results::read(directory.path()).unwrap()).unwrap();
        assert_eq!(
            report.to_string(),
            "                    target\n\
             small     1.50        2.00     holds\n\
             large     1.10        1.05     misses\n\
             1 hold, 1 miss"
        );
        assert_eq!(
            serde_json::to_value(&report.rows).unwrap()[0],
            serde_json::json!({"name": "small", "value": 1.5, "unit": "ratio", "target": 2.0, "holds": true})
        );
    }

    #[test]
    fn a_ratio_without_a_target_has_no_verdict() {
        let directory = tempfile::tempdir().unwrap();
        measured(directory.path(), "plain", "64", 10.0);
        measured(directory.path(), "safe", "64", 30.0);

        let report = Report::new(WITHOUT, &Results::read(directory.path()).unwrap()).unwrap();
        assert_eq!(report.to_string(), "                     target\neither     3.00\n0 hold, 0 miss");
        assert_eq!(
            serde_json::to_value(&report.rows).unwrap()[0],
            serde_json::json!({"name": "either", "value": 3.0, "unit": "ratio", "target": null, "holds": null})
        );
    }

    #[test]
    fn a_floor_that_took_turns_is_what_counts() {
        const PAIRED: &[Target] = &[
            to_floor("send", "copy/safe/64", 1.2),
            nanoseconds("time", "copy/safe/64", 10.0),
            above_floor("more", "copy/safe/64", 4.0),
        ];
        let directory = tempfile::tempdir().unwrap();
        measured(directory.path(), "safe", "64", 12.0);
        let paired = directory.path().join("paired/copy/safe");
        fs::create_dir_all(&paired).unwrap();
        fs::write(paired.join("64.json"), r#"{"nanoseconds":13.0,"floor":10.0,"ratio":1.25}"#).unwrap();
        let report = Report::new(PAIRED, &Results::read(directory.path()).unwrap()).unwrap();
        assert_eq!(
            report.to_string(),
            "                   target\n\
             send     1.25        1.20     misses\n\
             time     12.0 ns     10.0 ns  misses\n\
             more      3.0 ns      4.0 ns  holds\n\
             1 hold, 2 miss"
        );
    }

    #[test]
    fn a_target_without_results_is_named() {
        let directory = tempfile::tempdir().unwrap();
        measured(directory.path(), "plain", "64", 10.0);
        measured(directory.path(), "safe", "64", 15.0);
        measured(directory.path(), "safe", "4096", 110.0);

        let report = Report::new(TWO, &Results::read(directory.path()).unwrap()).unwrap();
        assert!(report.to_string().ends_with("1 hold, 0 miss; not measured: large"));
    }

    #[test]
    fn no_results_at_all_say_what_to_run() {
        let directory = tempfile::tempdir().unwrap();
        let none = Results::read(&directory.path().join("missing")).unwrap();
        let error = Report::new(TWO, &none).unwrap_err().to_string();
        assert!(error.contains("cargo bench"), "{error}");
    }

    #[test]
    fn a_damaged_result_names_its_file() {
        let directory = tempfile::tempdir().unwrap();
        measured(directory.path(), "plain", "64", 10.0);
        let damaged = directory.path().join("copy/plain/64/new/estimates.json");
        fs::write(&damaged, "{").unwrap();
        let error = Results::read(directory.path()).unwrap_err().to_string();
        assert!(error.contains("estimates.json"), "{error}");
    }
}
