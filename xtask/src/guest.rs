//! The images of guests: committed, and the same bytes wherever they are built.
//!
//! The core library is always built from source together with the guest, so that the image has
//! nothing in it that came with one machine's toolchain.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs};

use clap::Args;

use crate::error::{Context, Error, Result};
use crate::program::print;
use crate::rust_src::Rustc;
use crate::{tools, workspace};

const TARGET: &str = "x86_64-unknown-none";

/// A guest of this workspace.
struct Source {
    package: &'static str,
    linker_script: &'static str,
    image: &'static str,
}

const SOURCES: [Source; 3] = [
    Source { package: "tiny-guest", linker_script: "guests/tiny/link.ld", image: "guests/tiny/tiny-guest.elf" },
    Source { package: "io-guest", linker_script: "guests/tiny/link.ld", image: "guests/io/io-guest.elf" },
    Source {
        package: "loader-stub",
        linker_script: "guests/stub/link.ld",
        // In the crate that has it run, which would be incomplete without.
        image: "cvm-backend-kvm/src/local/loader-stub.elf",
    },
];

/// Build the guests and write their images, the same bytes on every machine.
///
/// The images are guests/tiny/tiny-guest.elf, guests/io/io-guest.elf and
/// cvm-backend-kvm/src/local/loader-stub.elf; files beside them name the compiler that they were built with.
#[derive(Args)]
pub struct Guest {
    /// Compare with the committed image instead of writing it
    #[arg(long)]
    check: bool,
}

impl Guest {
    /// Builds the image and writes or compares it.
    pub fn run(&self) -> Result<ExitCode> {
        let rustc = Rustc::new()?;
        for source in &SOURCES {
            let committed = Committed::new(source);
            if self.check {
                committed.check_rustc(&rustc)?;
            }
            let image = build(source, &rustc)?;
            let image = fs::read(&image).context(|| format!("reading {}", image.display()))?;
            if self.check {
                committed.check_image(&image)?;
                print(format_args!("{} is what its sources give", source.image))?;
            } else {
                committed.write(&rustc, &image)?;
                print(format_args!("wrote {}, {} bytes", source.image, image.len()))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The image and the name of the compiler it was built with, as they are in the repository.
struct Committed {
    image: PathBuf,
    rustc: PathBuf,
}

impl Committed {
    fn new(source: &Source) -> Self {
        let image = workspace::root().join(source.image);
        Self { rustc: image.with_extension("rustc"), image }
    }

    fn check_rustc(&self, rustc: &Rustc) -> Result<()> {
        let committed = fs::read_to_string(&self.rustc).context(|| no_image(&self.rustc))?;
        let (needed, here) = (committed.trim_end(), &rustc.version);
        if needed == here {
            return Ok(());
        }
        let release = needed.split(' ').nth(1).unwrap_or_default();
        Err(Error::new(format!(
            "the committed image was built with {needed}, and another compiler makes another \
             image; here is {here}: use `cargo +{release} xtask guest --check`"
        )))
    }

    fn check_image(&self, built: &[u8]) -> Result<()> {
        let committed = fs::read(&self.image).context(|| no_image(&self.image))?;
        if committed == built {
            return Ok(());
        }
        let same = committed.iter().zip(built).take_while(|(a, b)| a == b);
        Err(Error::new(format!(
            "{} ({} bytes) is not what its sources give ({} bytes; they differ from byte {}): \
             run `cargo xtask guest` and commit the result",
            self.image.display(),
            committed.len(),
            built.len(),
            same.count(),
        )))
    }

    fn write(&self, rustc: &Rustc, image: &[u8]) -> Result<()> {
        fs::write(&self.image, image).context(|| format!("writing {}", self.image.display()))?;
        fs::write(&self.rustc, format!("{}\n", rustc.version)).context(|| format!("writing {}", self.rustc.display()))
    }
}

fn no_image(path: &Path) -> String {
    format!("no committed image, run `cargo xtask guest`: reading {}", path.display())
}

/// Builds the image; the result is where cargo put it.
fn build(source: &Source, rustc: &Rustc) -> Result<PathBuf> {
    let library = rustc.library()?;
    // Whatever CARGO_TARGET_DIR says: it must not make a difference.
    let target = workspace::cache().join("guest");
    let cargo = |subcommand: &str| {
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        for (name, _) in env::vars_os() {
            if changes_the_build(&name.to_string_lossy()) {
                cargo.env_remove(name);
            }
        }
        cargo
            .current_dir(workspace::root())
            .args([subcommand, "--locked", "--package", source.package])
            .args(["--profile", "guest", "--target", TARGET, "--target-dir"])
            .arg(&target);
        cargo
    };

    // Cargo does not see a change of the linker script.
    tools::run(cargo("clean").arg("--quiet"))?;

    let mut build = cargo("rustc");
    let this = env::current_exe().context(|| "finding this program".into())?;
    build
        .env("RUSTC_WRAPPER", this)
        .env(AS_RUSTC, "yes")
        .args(["--bin", source.package])
        .arg("-Zbuild-std=core,compiler_builtins")
        .arg("-Zbuild-std-features=compiler-builtins-mem")
        // The unstable flags of cargo and rustc, with the stable toolchain.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("__CARGO_TESTS_ONLY_SRC_ROOT", &library)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(&library)?)
        // For the guest alone, or the core library would be built anew for each. Relative to the workspace, where cargo
        // runs the compiler for its members.
        .args(["--", &format!("-Clink-arg=-T{}", source.linker_script)]);
    tools::run(&mut build)?;
    Ok(target.join(TARGET).join("guest").join(source.package))
}

/// Set where this program stands in for the compiler.
const AS_RUSTC: &str = "CVM_XTASK_AS_RUSTC";

/// Runs the compiler as cargo asks for it, if this is what the program was started for.
///
/// Cargo tells the compiler a number that tells crates of the same name apart. It comes from the
/// path of the core library's sources, among other things, goes into the names of symbols, and
/// decides about the order of functions. No two crates in a guest have the same name, so the name
/// can stand for it.
pub fn run_as_rustc() -> Option<Result<ExitCode>> {
    env::var_os(AS_RUSTC)?;
    let mut arguments = env::args_os().skip(1);
    let rustc = arguments.next()?;
    let arguments = with_stable_metadata(arguments.collect());
    let status = Command::new(&rustc).args(arguments).status();
    Some(status.context(|| format!("running {}", rustc.display())).map(|status| {
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        code.map_or(ExitCode::FAILURE, ExitCode::from)
    }))
}

/// The arguments of a call of rustc, with the crate's name as its metadata if it is for the guest.
fn with_stable_metadata(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let name = arguments.iter().position(|word| word == "--crate-name").and_then(|at| arguments.get(at + 1)).cloned();
    let for_guest = arguments.iter().any(|word| word == TARGET);
    if let (Some(name), true) = (name, for_guest) {
        for word in &mut arguments {
            if word.to_string_lossy().starts_with("metadata=") {
                *word = OsString::from("metadata=");
                word.push(&name);
            }
        }
    }
    arguments
}

/// The flags for the guest and the core library, in cargo's encoding.
fn rustflags(library: &Path) -> Result<String> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(env::home_dir()?.join(".cargo")));
    let home = home.ok_or_else(|| Error::new("neither $CARGO_HOME nor a home directory"))?;
    // The last one that fits is taken.
    let paths = [(workspace::root(), "cvm"), (&home, "cargo"), (library, "rust")];

    let mut flags = vec![
        "-Crelocation-model=static".into(),
        "-Clink-arg=--build-id=none".into(),
        // A moved line alone is not to make another image.
        "-Zlocation-detail=none".into(),
    ];
    flags.extend(paths.map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display())));
    Ok(flags.join("\x1f"))
}

/// Whether an environment variable tells cargo or rustc to build differently.
fn changes_the_build(name: &str) -> bool {
    const PREFIXES: [&str; 5] = ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_", "CARGO_UNSTABLE_", "RUSTC_"];
    ["CARGO_INCREMENTAL", "RUSTC", "RUSTFLAGS"].contains(&name)
        || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn committed(directory: &Path) -> Committed {
        Committed { image: directory.join("image"), rustc: directory.join("rustc") }
    }

    #[test]
    fn an_image_that_differs_is_reported_with_the_first_byte_that_does() {
        let directory = tempfile::tempdir().unwrap();
        let committed = committed(directory.path());
        fs::write(&committed.image, b"abc").unwrap();

        committed.check_image(b"abc").unwrap();
        let error = committed.check_image(b"abd").unwrap_err().to_string();
        assert!(error.contains("differ from byte 2"), "{error}");
    }

    #[test]
    fn a_missing_image_says_how_to_make_one() {
        let directory = tempfile::tempdir().unwrap();
        let error = committed(directory.path()).check_image(b"").unwrap_err();
        assert!(error.to_string().contains("run `cargo xtask guest`"));
    }

    #[test]
    fn another_compiler_is_told_which_one_is_needed() {
        let directory = tempfile::tempdir().unwrap();
        let committed = committed(directory.path());
        fs::write(&committed.rustc, "rustc 1.2.3 (abc 2000-01-01)\n").unwrap();
        let error = committed.check_rustc(&Rustc::new().unwrap()).unwrap_err();
        assert!(error.to_string().contains("cargo +1.2.3 xtask guest --check"));
    }

    #[test]
    fn crates_of_the_guest_are_told_apart_by_their_names_alone() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let call = words("--crate-name core -C metadata=0123 --target x86_64-unknown-none");
        let stable = words("--crate-name core -C metadata=core --target x86_64-unknown-none");
        assert_eq!(with_stable_metadata(call), stable);
        let host = words("--crate-name syn -C metadata=0123");
        assert_eq!(with_stable_metadata(host.clone()), host);
    }

    #[test]
    fn the_flags_do_not_say_where_the_workspace_is_except_to_hide_it() {
        let flags = rustflags(Path::new("/lib")).unwrap();
        let root = workspace::root().display().to_string();
        for flag in flags.split('\x1f') {
            assert!(flag.starts_with("--remap-path-prefix=") || !flag.contains(&root));
        }
    }
}
