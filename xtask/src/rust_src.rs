//! The sources of Rust's core library, which the guest is built from.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

use crate::error::{Context, Error, Result};
use crate::{debian, tools, workspace};

/// The compiler that cargo uses here.
pub struct Rustc {
    /// What `rustc --version` prints, which names one build of the compiler.
    pub version: String,
    release: String,
    sysroot: PathBuf,
}

impl Rustc {
    /// Asks the compiler about itself.
    pub fn new() -> Result<Self> {
        let ask = |arguments: &[&str]| tools::output(Command::new("rustc").args(arguments));
        let verbose = ask(&["--version", "--verbose"])?;
        let release = verbose.lines().find_map(|line| line.strip_prefix("release: "));
        Ok(Self {
            version: verbose.lines().next().unwrap_or_default().into(),
            release: release.unwrap_or_default().into(),
            sysroot: ask(&["--print", "sysroot"])?.trim_end().into(),
        })
    }

    /// A `library` directory with this compiler's sources, at the same place in every checkout.
    ///
    /// Cargo names crates after the path of their sources, relative to the workspace if they are
    /// in it, and the names decide about the order of things in the image.
    pub fn library(&self) -> Result<PathBuf> {
        let original = self.find_library()?;
        let link = workspace::cache().join("rust-src/library");
        let make = || {
            fs::create_dir_all(workspace::cache().join("rust-src"))?;
            match fs::remove_file(&link) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => symlink(&original, &link),
            }
        };
        make().context(|| format!("linking {} to {}", link.display(), original.display()))?;
        Ok(link)
    }

    /// The sources that the user names, else rustup's, else Debian's.
    fn find_library(&self) -> Result<PathBuf> {
        if let Some(library) = env::var_os("CVM_RUST_SRC").map(PathBuf::from) {
            return fs::canonicalize(&library).ok().filter(|library| is_library(library)).ok_or_else(|| {
                Error::new(format!(
                    "$CVM_RUST_SRC has to name the directory `library` of Rust's sources, \
                         {} is none",
                    library.display()
                ))
            });
        }
        let in_sysroot = self.sysroot.join("lib/rustlib/src/rust/library");
        if is_library(&in_sysroot) {
            return Ok(in_sysroot);
        }
        self.fetched().context(|| {
            "no sources of Rust's core library; get them with `rustup component add rust-src` or \
             name their directory `library` in $CVM_RUST_SRC; Debian's package did not do"
                .into()
        })
    }

    /// The sources as Debian packages them, fetched once.
    fn fetched(&self) -> Result<PathBuf> {
        let release = &self.release;
        let library = workspace::cache().join(format!("rust-src/debian-{release}"));
        if !library.exists() {
            let part = "usr/lib/rustlib/src/rust/library";
            debian::fetch(debian::BACKPORTS, "rust-src", &format!("{release}*"), part, &library)?;
        }
        Ok(library)
    }
}

fn is_library(directory: &Path) -> bool {
    directory.join("core/Cargo.toml").is_file()
}
