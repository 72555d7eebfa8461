//! The program that the README shows, built as a reader would build it: outside of this workspace, with `cvm` alone.

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use clap::Args;

use crate::error::{Context, Error, Result};
use crate::program::{note, print};
use crate::{tools, workspace};

/// The guest that the program takes as its argument.
const GUEST: &str = "guests/tiny/tiny-guest.elf";

/// Build the program that README.md shows in a package that depends on cvm alone, and run it where there is KVM.
#[derive(Args)]
pub struct Readme {}

impl Readme {
    /// Makes the package in a temporary directory.
    pub fn run(&self) -> Result<ExitCode> {
        let root = workspace::root();
        let read = |name: &str| {
            let path = root.join(name);
            fs::read_to_string(&path).context(|| format!("reading {}", path.display()))
        };
        let text = read("README.md")?;
        let program =
            program(&text).ok_or_else(|| Error::new("README.md has no block of rust with a main function"))?;

        let directory =
            tempfile::tempdir().context(|| format!("making a temporary directory in {}", env::temp_dir().display()))?;
        let write = |name: &str, text: &str| {
            let path = directory.path().join(name);
            let parent = path.parent().map_or(Ok(()), fs::create_dir_all);
            parent.and_then(|()| fs::write(&path, text)).context(|| format!("writing {}", path.display()))
        };
        write("Cargo.toml", &manifest(root))?;
        write("src/main.rs", program)?;
        // The versions that this workspace is tested with, so that a new version of a dependency changes nothing here.
        write("Cargo.lock", &read("Cargo.lock")?)?;

        let has_kvm = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        if !has_kvm {
            note("no /dev/kvm that can be opened: the program is built and not run");
        }
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(directory.path()).arg(if has_kvm { "run" } else { "build" });
        cargo.arg("--target-dir").arg(workspace::cargo_target().join("readme"));
        if has_kvm {
            cargo.arg("--").arg(root.join(GUEST));
        }
        tools::run(&mut cargo)?;
        print("the program in README.md does what it says")?;
        Ok(ExitCode::SUCCESS)
    }
}

/// A package with one dependency.
fn manifest(cvm: &Path) -> String {
    format!(
        "[package]\nname = \"my-vmm\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n\
         [dependencies]\ncvm = {{ path = {:?} }}\n\n[workspace]\n",
        cvm.display().to_string()
    )
}

/// The first block of `text` that is a whole program.
fn program(text: &str) -> Option<&str> {
    let blocks = text.split("```rust\n").skip(1).filter_map(|rest| rest.split_once("```\n"));
    blocks.map(|(block, _)| block).find(|block| block.contains("fn main("))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_the_first_block_with_a_main_function() {
        let text = "a\n```sh\nfn main() {}\n```\n```rust\nfn other() {}\n```\n```rust\nfn main() {}\n```\nb\n";
        assert_eq!(program(text), Some("fn main() {}\n"));
        assert_eq!(program("```rust\nfn other() {}\n```\n"), None);
    }
}
