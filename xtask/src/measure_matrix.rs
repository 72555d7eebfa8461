//! Measurements of launches, compared with another implementation's on firmware that is in use.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use clap::Args;

use crate::error::{Context, Error, Result};
use crate::program::{note, print};
use crate::{debian, tools, workspace};

/// The other implementation, from Python's package index.
const REFERENCE: &str = "sev-snp-measure==0.0.13";

/// Debian's suites and packages with firmware, and their images. The first checks kernels, the others cannot.
const FIRMWARE: [(&str, &str, &[&str]); 2] = [
    ("sid", "ovmf-amdsev", &["ovmf/OVMF.amdsev.fd"]),
    ("trixie", "ovmf", &["ovmf/OVMF.fd", "OVMF/OVMF_CODE_4M.fd", "OVMF/OVMF_CODE_4M.secboot.fd"]),
];

const VCPUS: [&str; 4] = ["1", "2", "5", "64"];
const MODELS: [&str; 6] = ["EPYC", "EPYC-v4", "EPYC-Rome", "EPYC-Milan-v2", "EPYC-Genoa", "EPYC-Turin"];
const VMMS: [&str; 3] = ["qemu", "ec2", "gce"];
const FEATURES: [&str; 2] = ["0x1", "0x21"];

/// Compare measurements of launches with those of another implementation.
///
/// Fetches the Python package sev-snp-measure and Debian's OVMF images, once, and compares what is computed for each of them,
/// for numbers and models of vCPUs, VMMs and kernels; refusals too.
#[derive(Args)]
pub struct MeasureMatrix {
    /// Compare all cases, which takes minutes, and not each seventh
    #[arg(long)]
    full: bool,
}

/// How many cases are passed over for one that is compared: no number of values of anything is a multiple of this, so all come
/// up with each other.
const STEP: usize = 7;

impl MeasureMatrix {
    /// Compares the cases; fails if one differs.
    pub fn run(&self) -> Result<ExitCode> {
        let directory = workspace::cache().join("measure-matrix");
        let write = || {
            fs::create_dir_all(&directory)?;
            fs::write(directory.join("kernel"), (0..=255u8).cycle().take(100_003).collect::<Vec<_>>())?;
            fs::write(directory.join("initrd"), b"an initial ram disk")
        };
        write().context(|| format!("writing to {}", directory.display()))?;
        let python = python(&directory)?;
        let mut cases = cases(&firmware(&directory)?, &directory);
        if !self.full {
            cases = cases.into_iter().step_by(STEP).collect();
        }
        let expected = reference(&python, &cases)?;
        let program = program()?;
        let mut different = 0;
        for (index, (case, expected)) in cases.iter().zip(&expected).enumerate() {
            let given = measure(&program, case)?;
            if given.as_deref() != expected.as_deref() {
                different += 1;
                let [given, expected] = [given, expected.clone()].map(|digest| digest.unwrap_or("refused".into()));
                note(format_args!("{}:\n  here   {given}\n  other  {expected}", case.join(" ")));
            }
            if (index + 1) % 100 == 0 {
                note(format_args!("{} of {} compared", index + 1, cases.len()));
            }
        }
        let refused = expected.iter().filter(|digest| digest.is_none()).count();
        print(format_args!("{} cases, {refused} of them refused: {different} are different", cases.len()))?;
        Ok(if different == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// A Python with the other implementation, in an environment of its own.
fn python(directory: &Path) -> Result<PathBuf> {
    let environment = directory.join(REFERENCE);
    let python = environment.join("bin/python");
    if !environment.join("complete").exists() {
        note(format_args!("fetching {REFERENCE} from Python's package index"));
        let make = Command::new(tools::find("python3", "python3")?).args(["-m", "venv"]).arg(&environment).status();
        if !make.is_ok_and(|status| status.success()) {
            return Err(Error::new("python3 -m venv failed; on Debian: apt-get install python3-venv"));
        }
        tools::run(Command::new(&python).args(["-m", "pip", "install", "--quiet", REFERENCE]))?;
        fs::write(environment.join("complete"), []).context(|| format!("writing to {}", environment.display()))?;
    }
    Ok(python)
}

/// The images, fetched once.
fn firmware(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for (suite, package, images) in FIRMWARE {
        let share = directory.join(format!("{package}-{suite}"));
        if !share.exists() {
            debian::fetch(suite, package, "*", "usr/share", &share)?;
        }
        all.extend(images.iter().map(|image| share.join(image)));
    }
    Ok(all)
}

/// The arguments of every case.
fn cases(firmware: &[PathBuf], directory: &Path) -> Vec<Vec<String>> {
    let file = |name: &str| directory.join(name).display().to_string();
    let (kernel, initrd) = (file("kernel"), file("initrd"));
    let kernels: [&[&str]; 4] = [
        &[],
        &["--kernel", &kernel],
        &["--kernel", &kernel, "--initrd", &initrd],
        &["--kernel", &kernel, "--initrd", &initrd, "--append", "console=ttyS0 quiet"],
    ];
    let mut cases = Vec::new();
    let mut add = |parts: &[&[&str]]| cases.push(parts.concat().into_iter().map(str::to_owned).collect());
    for firmware in firmware {
        let firmware = firmware.display().to_string();
        for kernel in kernels {
            let files = [&["--ovmf", &firmware], kernel].concat();
            add(&[&["sev"], &files]);
            for vcpus in VCPUS {
                for model in MODELS {
                    let vcpus = ["--vcpus", vcpus, "--vcpu-type", model];
                    for vmm in VMMS {
                        add(&[&["sev-es", "--vmm", vmm], &files, &vcpus]);
                        for features in FEATURES {
                            add(&[&["snp", "--vmm", vmm, "--features", features], &files, &vcpus]);
                        }
                    }
                }
            }
        }
    }
    cases
}

/// What the other implementation says of each case: a digest, or nothing if it refuses.
fn reference(python: &Path, cases: &[Vec<String>]) -> Result<Vec<Option<String>>> {
    let script = Path::new(workspace::XTASK).join("measure/reference.py");
    let run = || {
        let mut child = Command::new(python).arg(&script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        // It reads all before it writes, and is waited for with its input closed.
        child.stdin.take().map_or(Ok(()), |mut input| input.write_all(&serde_json::to_vec(cases)?))?;
        child.wait_with_output()
    };
    let output = run().context(|| "running the other implementation".into())?;
    let text = String::from_utf8(output.stdout).context(|| "reading what it printed".into())?;
    let digests: Vec<_> = text.lines().map(|line| (!line.starts_with("refused")).then(|| line.to_owned())).collect();
    if !output.status.success() || digests.len() != cases.len() {
        return Err(Error::new(format!(
            "the other implementation ended with {} of {} cases",
            digests.len(),
            cases.len()
        )));
    }
    Ok(digests)
}

/// The example `measure`, built.
fn program() -> Result<PathBuf> {
    let mut build = Command::new("cargo");
    build.args(["build", "--release", "--example", "measure"]).current_dir(workspace::root());
    tools::run(&mut build)?;
    Ok(workspace::cargo_target().join("release/examples/measure"))
}

/// What the example says of a case: a digest, or nothing if it refuses.
fn measure(program: &Path, case: &[String]) -> Result<Option<String>> {
    let output = Command::new(program).args(case).output().context(|| format!("running {}", program.display()))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    match (output.status.code(), errors.contains(": the firmware ")) {
        (Some(0), _) => {}
        (Some(1), true) => return Ok(None),
        _ => return Err(Error::new(format!("{} failed: {errors}", case.join(" ")))),
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().last().map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_case_is_there_twice() {
        let mut cases = cases(&["one".into(), "other".into()], Path::new("/directory"));
        let all = cases.len();
        cases.sort();
        cases.dedup();
        assert_eq!((all, cases.len()), (2 * 4 * (1 + 4 * 6 * 3 * 3), all));
    }
}
