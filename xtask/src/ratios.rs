//! What the benchmarks measured, as ratios to what the same work costs without protection.
//!
//! A report, not a test: a machine that is busy or emulated may miss any target.

mod targets;

use std::collections::HashMap;
use std::path::Path;
use std::process::ExitCode;
use std::{fmt, fs};

use clap::Args;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::program::print;
use crate::workspace;
use targets::{Measure, TARGETS, Target};

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
            print(rows.context(|| "writing JSON".into())?)?;
        } else {
            print(report)?;
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
mod tests;
