//! The kernel of L1: Debian's sources, patches and a configuration, see `l1/README.md`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;

use clap::Args;

use crate::error::{Context, Error, Result};
use crate::program::{note, print};
use crate::{debian, tools, workspace};

/// The version the patches are made for, as Debian's package has it in its name.
const VERSION: &str = "7.3";

const CONFIG: &str = "kernel.config";

/// In the order in which they are applied.
const PATCHES: [&str; 5] = [
    "kernel-1-nrip.patch",
    "kernel-2-fakepsp.patch",
    "kernel-3-faketdx.patch",
    "kernel-4-snpguest.patch",
    "kernel-5-fakesign.patch",
];

/// What a build of the kernel takes: something to look for and Debian's package that has it.
const NEEDED: &[(&str, &str)] = &[
    ("bc", "bc"),
    ("bison", "bison"),
    ("flex", "flex"),
    ("gcc", "gcc"),
    ("make", "make"),
    ("patch", "patch"),
    ("rsync", "rsync"),
    ("xz", "xz-utils"),
    ("/usr/include/gelf.h", "libelf-dev"),
    ("/usr/include/openssl/ssl.h", "libssl-dev"),
];

/// Build the kernel for `cargo xtask l1`, once: about fifteen minutes of CPU time.
///
/// One image serves for AMD's and for Intel's processors. It is for tests only: the secure processor and the TDX module in it
/// are models.
#[derive(Args)]
pub struct L1Kernel {}

impl L1Kernel {
    /// Builds the kernel unless there is one of the same version, patches and configuration.
    pub fn run(&self) -> Result<ExitCode> {
        let (kernel, recipe) = (path(), Recipe::read()?);
        if kernel.exists() && recipe.made(&kernel) {
            print(format_args!("{} is up to date", kernel.display()))?;
            return Ok(ExitCode::SUCCESS);
        }
        check_needed()?;
        let directory = directory();
        let make = || {
            fs::create_dir_all(&directory)?;
            tempfile::tempdir_in(&directory)
        };
        let source = make().context(|| format!("making a directory in {}", directory.display()))?;
        unpack(source.path())?;
        patch(source.path())?;
        let built = build(source.path())?;
        fs::rename(&built, &kernel).context(|| format!("moving the kernel to {}", kernel.display()))?;
        recipe.write(&kernel)?;
        print(format_args!("built {}", kernel.display()))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Where the kernel is once it was built.
pub fn path() -> PathBuf {
    directory().join("bzImage")
}

fn directory() -> PathBuf {
    workspace::cache().join("l1")
}

/// A file of this crate's `l1`.
fn input(name: &str) -> PathBuf {
    Path::new(workspace::XTASK).join("l1").join(name)
}

/// All that makes one kernel different from another.
struct Recipe(Vec<u8>);

impl Recipe {
    fn read() -> Result<Self> {
        let mut recipe = VERSION.as_bytes().to_vec();
        for name in PATCHES.into_iter().chain([CONFIG]) {
            let input = input(name);
            recipe.extend(fs::read(&input).context(|| format!("reading {}", input.display()))?);
        }
        Ok(Self(recipe))
    }

    fn made(&self, kernel: &Path) -> bool {
        fs::read(Self::beside(kernel)).is_ok_and(|recipe| recipe == self.0)
    }

    fn write(&self, kernel: &Path) -> Result<()> {
        fs::write(Self::beside(kernel), &self.0).context(|| "writing down the kernel's recipe".into())
    }

    fn beside(kernel: &Path) -> PathBuf {
        kernel.with_extension("recipe")
    }
}

fn check_needed() -> Result<()> {
    let there = |needed: &str| Path::new(needed).is_file() || tools::on_path(needed).is_some();
    let missing: Vec<_> = NEEDED.iter().filter(|(needed, _)| !there(needed)).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::new(format!(
        "a kernel build needs more than there is; on Debian: apt-get install {}",
        missing.join(" ")
    )))
}

/// Unpacks the kernel's sources into an empty directory.
fn unpack(source: &Path) -> Result<()> {
    let archive = directory().join(format!("linux-source-{VERSION}.tar.xz"));
    if !archive.exists() {
        let package = format!("linux-source-{VERSION}");
        let part = format!("usr/src/{package}.tar.xz");
        debian::fetch(debian::BACKPORTS, &package, &format!("{VERSION}*"), &part, &archive).context(|| {
            format!(
                "no sources of Linux {VERSION}; when Debian has a later version only, set VERSION in \
                 xtask/src/l1_kernel.rs to it and bring the patches in xtask/l1 up to date"
            )
        })?;
    }
    note(format_args!("unpacking {}", archive.display()));
    tools::run(Command::new("tar").arg("-xf").arg(archive).arg("--strip-components=1").current_dir(source))
}

fn patch(source: &Path) -> Result<()> {
    for name in PATCHES {
        let patch = input(name);
        let mut command = Command::new("patch");
        command.args(["--quiet", "--forward", "-p1", "-i"]).arg(&patch).current_dir(source);
        tools::run(&mut command)
            .context(|| format!("{} does not fit the sources and has to be brought up to date", patch.display()))?;
    }
    Ok(())
}

/// Configures and builds the patched sources; the result is where the kernel is.
fn build(source: &Path) -> Result<PathBuf> {
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    let make = |target: &str| {
        let mut make = Command::new("make");
        make.args(["--silent", &format!("--jobs={jobs}"), target]);
        make
    };
    let mut merge = Command::new("scripts/kconfig/merge_config.sh");
    merge.arg(".config").arg(input(CONFIG));
    note(format_args!("building the kernel: about fifteen minutes of CPU time, {jobs} jobs"));
    for mut step in [make("tinyconfig"), merge, make("bzImage")] {
        tools::run(step.current_dir(source).stdout(Stdio::null()))?;
    }
    Ok(source.join("arch/x86/boot/bzImage"))
}
