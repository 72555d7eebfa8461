//! Who plays: this program again, as another process and as another user.

use crate::hostile_guest::Effort;
use crate::outcome::Finding;
use rustix::fs::{FileType, Mode, mknodat};
use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;
use tempfile::TempDir;

/// Nobody, who owns nothing.
pub const UNPRIVILEGED: u32 = 65534;

/// The user of vaults that something else than their VMM starts.
const OF_VAULTS: u32 = 65533;

/// When a role counts as one that hangs: far later than the slowest one ends where processors are emulated twice over and busy.
const LIMIT: Duration = Duration::from_secs(900);
const EACH: Duration = Duration::from_millis(100);

/// Whom a role is played as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum As {
    /// The user whose VMMs these are.
    User,
    /// This process's user.
    Myself,
    /// The user of vaults that something else than their VMM starts.
    OfVaults,
}

/// The users and the KVM device.
pub struct Stage {
    /// The user of the VMMs, if it is not this process's.
    user: Option<u32>,
    /// How long a role may take.
    limit: Duration,
    /// What the VMMs open.
    device: PathBuf,
    /// What holds the device while this lives.
    directory: Option<TempDir>,
    /// Why rows of other users are not played.
    pub lacks: Vec<String>,
}

const KVM: &str = "/dev/kvm";

impl Stage {
    /// As root, VMMs run as an unprivileged user with a KVM device of its own; otherwise as this user.
    pub fn new(effort: Effort) -> Self {
        let limit = LIMIT + EACH * effort.conversions;
        let mut stage = Self { user: None, limit, device: KVM.into(), directory: None, lacks: Vec::new() };
        if !rustix::process::geteuid().is_root() {
            stage.lacks.push("attacks by root: this is not root".into());
            return stage;
        }
        match device() {
            Ok((directory, device)) => {
                (stage.user, stage.device, stage.directory) = (Some(UNPRIVILEGED), device, Some(directory));
            }
            Err(error) => stage
                .lacks
                .push(format!("attacks by an unprivileged user: it cannot be given a kvm device of its own: {error}")),
        }
        stage
    }

    /// The KVM device that VMMs open.
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Whether the user of the VMMs is unprivileged.
    pub fn has_user(&self) -> bool {
        self.user.is_some() || !self.has_root()
    }

    /// Whether there can be vaults of another user, and VMMs of root.
    pub fn has_vault_user(&self) -> bool {
        self.directory.is_some()
    }

    /// Where the user of vaults can make a socket that VMMs can reach; and a copy of this program that other users than root
    /// can execute and not read.
    pub fn for_vaults(&self) -> io::Result<(PathBuf, PathBuf)> {
        let directory = self.directory.as_ref().ok_or(io::ErrorKind::NotFound)?.path();
        let (sockets, program) = (directory.join("vaults"), directory.join("unreadable"));
        if !program.exists() {
            fs::create_dir(&sockets)?;
            chown(&sockets, Some(OF_VAULTS), Some(OF_VAULTS))?;
            fs::copy("/proc/self/exe", &program)?;
            fs::set_permissions(&program, fs::Permissions::from_mode(0o711))?;
        }
        Ok((sockets.join("socket"), program))
    }

    pub fn has_root(&self) -> bool {
        rustix::process::geteuid().is_root()
    }

    /// This program in another role.
    pub fn start(&self, who: As, role: &[&str]) -> io::Result<Played> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("--role").args(role).stdin(Stdio::piped()).stdout(Stdio::piped());
        let user = match who {
            As::User => self.user,
            As::Myself => None,
            As::OfVaults => Some(OF_VAULTS),
        };
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        // Nobody may depend on where this program was started; the user may not even go there.
        let mut child = command.current_dir("/").spawn()?;
        let pid = child.id().cast_signed();
        let output = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let (over, wait) = mpsc::channel::<()>();
        let limit = self.limit;
        std::thread::spawn(move || {
            if wait.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                crate::killing::kill(pid);
            }
        });
        Ok(Played { child, output: BufReader::new(output), _over: over })
    }

    /// Plays a role to its end.
    pub fn play(&self, who: As, role: &[&str]) -> io::Result<Vec<Finding>> {
        self.start(who, role)?.end()
    }
}

/// A KVM device that an unprivileged user may open, in a directory that is gone with the result.
fn device() -> io::Result<(TempDir, PathBuf)> {
    let original = fs::metadata(KVM)?;
    let directory = tempfile::Builder::new().prefix("cvm-attacks").tempdir()?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o711))?;
    let device = directory.path().join("kvm");
    mknodat(rustix::fs::CWD, &device, FileType::CharacterDevice, Mode::empty(), original.rdev())?;
    // Whatever the mask of this process says.
    fs::set_permissions(&device, fs::Permissions::from_mode(0o666))?;
    // A file system may be mounted such that its devices do not work.
    fs::File::open(&device)?;
    Ok((directory, device))
}

/// A role that is being played.
pub struct Played {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
    _over: mpsc::Sender<()>,
}

impl Played {
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// The next line that it prints.
    pub fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    /// Ends it at once.
    pub fn kill(mut self) {
        // It may have ended by itself; then there is nothing to kill, but still something to wait for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Lets it come to its end, which it does when nobody writes to it any more, and takes what it found.
    pub fn end(mut self) -> io::Result<Vec<Finding>> {
        drop(self.child.stdin.take());
        let mut output = String::new();
        self.output.read_to_string(&mut output)?;
        let status = self.child.wait()?;
        if !status.success() {
            return Err(io::Error::other(format!("a role ended with {status}: {output}")));
        }
        output.lines().map(|line| serde_json::from_str(line).map_err(io::Error::other)).collect()
    }
}
