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

/// The most that one benchmark is to take, as a multiple of another one.
struct Target {
    name: &'static str,
    /// Criterion's name of a benchmark: `group/function/parameter`.
    numerator: &'static str,
    denominator: &'static str,
    ratio: f64,
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
];

const fn target(name: &'static str, numerator: &'static str, denominator: &'static str, ratio: f64) -> Target {
    Target { name, numerator, denominator, ratio }
}

/// Print the last results of the benchmarks as ratios, next to their targets.
///
/// The results are those of `cargo bench`, as medians. This is a report: it succeeds when targets
/// are missed, too.
#[derive(Args)]
pub struct Ratios {
    /// Print an array of {name, ratio, target, holds}
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

/// The targets that there are results for.
#[derive(Debug)]
struct Report {
    rows: Vec<Row>,
    not_measured: Vec<&'static str>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Row {
    name: &'static str,
    ratio: f64,
    target: f64,
    holds: bool,
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
            rows.push(Row { name: target.name, ratio, target: target.ratio, holds: ratio <= target.ratio });
        }
        if rows.is_empty() {
            return Err(Error::new("no results of the benchmarks; run `cargo bench --bench bounce` first"));
        }
        Ok(Self { rows, not_measured })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
        writeln!(f, "{:width$}  {:>7}  {:>7}", "", "ratio", "target")?;
        for row in &self.rows {
            let verdict = if row.holds { "holds" } else { "misses" };
            let Row { name, ratio, target, .. } = row;
            writeln!(f, "{name:width$}  {ratio:7.2}  {target:7.2}  {verdict}")?;
        }
        let hold = self.rows.iter().filter(|row| row.holds).count();
        write!(f, "{hold} hold, {} miss", self.rows.len() - hold)?;
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
        assert!(error.contains("cargo bench --bench bounce"), "{error}");
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
