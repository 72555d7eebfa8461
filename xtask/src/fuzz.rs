//! Fuzzing, by the compiler of the workspace and no other tools.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs};

use clap::Args;

use crate::error::{Context, Error, Result};
use crate::{tools, workspace};

/// How the compiler is asked for libFuzzer's view of the code: what `cargo fuzz` asks for, without a sanitizer, which
/// would need another compiler.
const RUSTFLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Ccodegen-units=1 \
    -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares";

/// Named for build scripts and macros, which are for the same one, not to be instrumented.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Feed random bytes to what takes bytes from others.
///
/// What an earlier run found interesting is where the next one starts; what makes a target fail is kept as a file, which
/// the target's program takes as an argument.
#[derive(Args)]
pub struct Fuzz {
    /// One of `fuzz/fuzz_targets`; all of them unless it is named
    target: Option<String>,
    /// How long to run each
    #[arg(long, default_value_t = 10)]
    seconds: u32,
}

impl Fuzz {
    /// Builds the targets and runs them, one after the other.
    pub fn run(&self) -> Result<ExitCode> {
        let directory = workspace::root().join("fuzz");
        let targets = choose(targets(&directory.join("fuzz_targets"))?, self.target.as_deref())?;
        if env::var_os("CXX").is_none() {
            // libFuzzer is built from source.
            tools::find("c++", "g++")?;
        }
        let built = workspace::cargo_target().join("fuzz");
        let mut build = Command::new("cargo");
        build.args(["build", "--release", "--bins", "--target", TRIPLE, "--manifest-path"]);
        build.arg(directory.join("Cargo.toml")).arg("--target-dir").arg(&built).env("RUSTFLAGS", RUSTFLAGS);
        tools::run(&mut build)?;
        for target in targets {
            let corpus = built.join("corpus").join(&target);
            fs::create_dir_all(&corpus).context(|| format!("making {}", corpus.display()))?;
            let mut run = Command::new(built.join(TRIPLE).join("release").join(&target));
            run.arg(format!("-max_total_time={}", self.seconds)).args(["-timeout=10", "-print_final_stats=1"]);
            run.arg(format!("-artifact_prefix={}/{target}-", built.display())).arg(corpus);
            run.args(Some(directory.join("seeds").join(&target)).filter(|seeds| seeds.is_dir()));
            tools::run(&mut run)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The targets in a directory, in the order of their names.
fn targets(directory: &Path) -> Result<Vec<String>> {
    let list =
        || -> std::io::Result<Vec<PathBuf>> { fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect() };
    let paths = list().context(|| format!("reading {}", directory.display()))?;
    let sources = paths.iter().filter(|path| path.extension() == Some(OsStr::new("rs")));
    let mut names: Vec<_> = sources.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    Ok(names)
}

/// The one that was named, or all.
fn choose(targets: Vec<String>, named: Option<&str>) -> Result<Vec<String>> {
    match named {
        None => Ok(targets),
        Some(named) if targets.iter().any(|target| target == named) => Ok(vec![named.to_owned()]),
        Some(named) => Err(Error::new(format!("there is no fuzz target {named}; there are {}", targets.join(", ")))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<String> {
        targets(&workspace::root().join("fuzz/fuzz_targets")).unwrap()
    }

    #[test]
    fn every_target_is_one_of_the_crates_programs() {
        let manifest = fs::read_to_string(workspace::root().join("fuzz/Cargo.toml")).unwrap();
        for target in all() {
            assert!(manifest.contains(&format!("path = \"fuzz_targets/{target}.rs\"")), "{target}");
        }
    }

    #[test]
    fn a_target_that_is_not_there_is_answered_with_those_that_are() {
        assert_eq!(choose(all(), None).unwrap(), all());
        assert_eq!(choose(all(), Some("doorbell")).unwrap(), ["doorbell"]);
        let error = choose(all(), Some("nonsense")).unwrap_err().to_string();
        assert!(all().iter().all(|target| error.contains(target)), "{error}");
    }
}
