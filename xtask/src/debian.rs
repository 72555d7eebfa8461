//! Packages from Debian, without installing them or touching apt's configuration.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::error::{Context, Error, Result};
use crate::program::note;
use crate::{tools, workspace};

/// The suite that has the recent compilers and kernels. No suite need be this machine's: packages
/// are only unpacked, and the ones we take hold nothing but sources and images.
pub const BACKPORTS: &str = "trixie-backports";

/// The key that signs the suite, which apt itself brings.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Puts `part`, a file or directory of a suite's `package`, at the new place `into`; `version` may be a
/// pattern such as `1.2.*`.
pub fn fetch(suite: &str, package: &str, version: &str, part: &str, into: &Path) -> Result<()> {
    let name = into.display();
    let parent = into.parent().unwrap_or(into);
    let make = || {
        fs::create_dir_all(parent)?;
        tempfile::tempdir_in(parent)
    };
    let scratch = make().context(|| format!("making a directory next to {name}"))?;

    note(format_args!("fetching {package} from Debian's {suite}"));
    let archive = Apt::new(suite)?.download(&format!("{package}={version}"), scratch.path())?;
    let unpacked = scratch.path().join("unpacked");
    let mut dpkg = Command::new(tools::find("dpkg-deb", "dpkg")?);
    tools::run(dpkg.arg("-x").arg(archive).arg(&unpacked))?;
    // In one step: an interrupted run leaves no half of it behind.
    fs::rename(unpacked.join(part), into).context(|| format!("moving {part} to {name}"))
}

/// An apt that knows one suite only and keeps everything in a directory of its own.
struct Apt<'a> {
    suite: &'a str,
    directory: TempDir,
}

impl<'a> Apt<'a> {
    fn new(suite: &'a str) -> Result<Self> {
        let mirror = mirror()?;
        let make = || {
            fs::create_dir_all(workspace::cache())?;
            let directory = tempfile::tempdir_in(workspace::cache())?;
            fs::create_dir_all(directory.path().join("lists/partial"))?;
            fs::write(
                directory.path().join("sources.list"),
                format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n"),
            )?;
            Ok::<_, std::io::Error>(directory)
        };
        let directory = make().context(|| "preparing apt's directory".into())?;
        let apt = Self { suite, directory };
        tools::run(apt.command()?.arg("update"))?;
        Ok(apt)
    }

    fn download(&self, package: &str, into: &Path) -> Result<PathBuf> {
        tools::run(self.command()?.args(["download", package]).current_dir(into))
            .context(|| format!("Debian's {} may not have {package} any more, or not yet", self.suite))?;
        let downloaded = fs::read_dir(into).context(|| format!("reading {}", into.display()))?;
        downloaded
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .ok_or_else(|| Error::new(format!("apt-get left no package {package}")))
    }

    fn command(&self) -> Result<Command> {
        let own = |entry: &str| self.directory.path().join(entry).display().to_string();
        let mut command = apt_get()?;
        command.arg("-qq");
        for option in [
            format!("Dir::Etc::sourcelist={}", own("sources.list")),
            "Dir::Etc::sourceparts=-".into(),
            format!("Dir::State::lists={}", own("lists")),
            format!("Dir::Cache={}", own("cache")),
            "Dir::Cache::pkgcache=".into(),
            "Dir::Cache::srcpkgcache=".into(),
            // The unprivileged user of apt may not write where we do.
            "APT::Sandbox::User=root".into(),
        ] {
            command.args(["-o", &option]);
        }
        Ok(command)
    }
}

/// The mirror of the Debian archive that this machine itself is set up to use.
fn mirror() -> Result<String> {
    let mut query = apt_get()?;
    query.args(["indextargets", "--format", "$(REPO_URI)"]);
    let uris = tools::output(&mut query)?;
    let mirror = uris.lines().find(|uri| uri.ends_with("/debian/"));
    mirror.map(Into::into).ok_or_else(|| Error::new("apt's own configuration has no Debian mirror to fetch from"))
}

fn apt_get() -> Result<Command> {
    Ok(Command::new(tools::find("apt-get", "apt")?))
}
