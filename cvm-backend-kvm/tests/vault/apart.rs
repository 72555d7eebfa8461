//! Vaults that something else than their VMM starts, as another user where this one may choose users.

use crate::common::{Guest, config, load, skip};
use crate::death::assert_dead;
use crate::guests::{SAYS_SECRET, spin, witness};
use crate::hostile_vmm::{Heard, Vault};
use crate::{Alone, PATIENCE, Vaults, vaults};
use cvm_backend_kvm::vault::protocol::Report;
use cvm_backend_kvm::vault::{use_program, use_socket};
use cvm_backend_kvm::{Error as KvmError, KvmPlatform};
use cvm_core::platform::{Asset, Party, Powers};
use cvm_core::{Platform, Protection, Vm};
use rustix::fs::{FileType, Mode, mknodat, stat};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The user of the vaults, where this one is root.
const OF_VAULTS: u32 = 65533;

/// Waits for something that has to come.
#[track_caller]
fn wait(what: &str, mut is_there: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_there() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A launcher that listens in a directory of its own.
struct Launcher {
    process: Child,
    directory: TempDir,
}

fn program(directory: &TempDir) -> PathBuf {
    directory.path().join("cvm-vault")
}

/// A directory with a copy of the program and, for root, a KVM device, which another user may use.
fn directory() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::copy(env!("CARGO_BIN_EXE_cvm-vault"), program(&directory)).unwrap();
    fs::set_permissions(program(&directory), Permissions::from_mode(0o711)).unwrap();
    if geteuid().is_root() {
        let device = directory.path().join("kvm");
        let number = stat("/dev/kvm").unwrap().st_rdev;
        mknodat(rustix::fs::CWD, &device, FileType::CharacterDevice, Mode::empty(), number).unwrap();
        fs::set_permissions(&device, Permissions::from_mode(0o666)).unwrap();
        chown(directory.path(), Some(OF_VAULTS), Some(OF_VAULTS)).unwrap();
    } else {
        std::os::unix::fs::symlink("/dev/kvm", directory.path().join("kvm")).unwrap();
    }
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    directory
}

impl Launcher {
    fn start(user: u32, most: usize) -> Self {
        let directory = directory();
        let socket = directory.path().join("socket");
        let mut command = Command::new(program(&directory));
        command.arg("--listen").arg(&socket).arg("--device").arg(directory.path().join("kvm"));
        command.args(["--user", &user.to_string(), "--most", &most.to_string()]).stdin(Stdio::null());
        if geteuid().is_root() {
            command.uid(OF_VAULTS).gid(OF_VAULTS);
        }
        let launcher = Self { process: command.spawn().unwrap(), directory };
        // The flags of a socket that listens (Linux net/unix/af_unix.c, unix_seq_show).
        let listens = |line: &str| line.contains(" 00010000 ") && line.ends_with(&*socket.to_string_lossy());
        wait("the launcher does not listen", || fs::read_to_string("/proc/net/unix").unwrap().lines().any(listens));
        use_socket(socket);
        launcher
    }

    /// The vaults that live.
    fn vaults(&self) -> Vec<Pid> {
        let vault = |entry: fs::DirEntry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            let mut words = stat.rsplit_once(") ")?.1.split(' ');
            let lives = words.next()? != "Z";
            let parent: u32 = words.next()?.parse().ok()?;
            (lives && parent == self.process.id()).then(|| Pid::from_raw(pid)).flatten()
        };
        fs::read_dir("/proc").unwrap().filter_map(|entry| vault(entry.ok()?)).collect()
    }

    fn platform(&self) -> Result<KvmPlatform, KvmError> {
        KvmPlatform::open(Path::new("/dev/kvm"), Some(Protection::Vault))
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        use_program(env!("CARGO_BIN_EXE_cvm-vault"));
        assert!(self.directory.path().exists());
    }
}

/// This test's turn, where there is a KVM.
fn turn() -> Option<Alone> {
    vaults().map(|Vaults { _alone: alone, .. }| alone)
}

fn own() -> u32 {
    geteuid().as_raw()
}

#[test]
fn a_vault_apart_serves_its_vmm_and_ends_with_the_vm() {
    let Some(_alone) = turn() else { return };
    let launcher = Launcher::start(own(), 8);
    let platform = launcher.platform().unwrap();
    let [mut one, mut other] = [(); 2].map(|()| Guest::from_launch(load(&platform, config(1), witness)));
    for guest in [&mut one, &mut other] {
        assert_eq!(guest.run(), SAYS_SECRET);
        guest.vm.allocated().unwrap();
    }
    // That of the platform's trial has ended.
    wait("there is not one vault for each vm", || launcher.vaults().len() == 2);
    drop(one);
    wait("a vault outlives its vm", || launcher.vaults().len() == 1);
    assert_eq!(other.run(), SAYS_SECRET);
    drop(other);
    wait("a vault outlives its vm", || launcher.vaults().is_empty());
}

#[test]
fn a_vmm_notices_that_a_vault_apart_dies() {
    let Some(_alone) = turn() else { return };
    let launcher = Launcher::start(own(), 8);
    let platform = launcher.platform().unwrap();
    let mut guest = Guest::from_launch(load(&platform, config(1), spin));
    wait("there is no vault", || launcher.vaults().len() == 1);
    let vault = launcher.vaults()[0];
    let killer = thread::spawn(move || kill_process(vault, Signal::KILL).unwrap());
    assert_dead(guest.try_run(0), "a vcpu");
    killer.join().unwrap();
    assert_dead(guest.vm.allocated(), "the vm");
}

#[test]
fn a_user_who_is_not_given_vaults_gets_none() {
    let Some(_alone) = turn() else { return };
    let launcher = Launcher::start(own() + 1, 8);
    let error = launcher.platform().unwrap_err();
    let KvmError::VaultSocket { path, source } = &error else { panic!("{error}") };
    assert_eq!(*path, launcher.directory.path().join("socket"));
    assert!(source.to_string().contains("is this user given vaults?"), "{source}");
    let offers = KvmPlatform::probe();
    let vault = offers.iter().find(|offer| offer.protection == Protection::Vault).unwrap();
    assert!(vault.missing.iter().any(|missing| missing.what.contains("is this user given vaults?")), "{vault:?}");
}

#[test]
fn a_launcher_starts_no_more_vaults_than_it_may() {
    let Some(_alone) = turn() else { return };
    let launcher = Launcher::start(own(), 1);
    let platform = launcher.platform().unwrap();
    // A vault counts until its last thread has ended, and that of the platform's trial is ending.
    let mut launch = None;
    let mut is_launched = || {
        launch = platform.launch(config(1)).ok();
        launch.is_some()
    };
    wait("the trial's vault does not end", &mut is_launched);
    assert!(platform.launch(config(1)).is_err());
    drop(launch.take());
    wait("a vault outlives its launch", || platform.launch(config(1)).is_ok());
}

#[test]
fn a_socket_where_nobody_listens_is_named() {
    let Some(_alone) = turn() else { return };
    let directory = tempfile::tempdir().unwrap();
    use_socket(directory.path().join("none"));
    let error = KvmPlatform::new().unwrap_err();
    use_program(env!("CARGO_BIN_EXE_cvm-vault"));
    assert!(error.to_string().ends_with("/none"), "{error}");
    assert!(matches!(error, KvmError::VaultSocket { .. }), "{error:?}");
}

#[test]
fn the_trust_model_of_a_vault_apart_is_of_the_users_as_they_are() {
    let Some(_alone) = turn() else { return };
    let launcher = Launcher::start(own(), 8);
    let model = launcher.platform().unwrap().trust_model();
    let steers = |party| model.powers(party, Asset::PrivateMemory).contains(Powers::STEER);
    // Root can trace every vault; and a launcher that cannot choose its user is of this one.
    assert_eq!(steers(Party::VmmProcess), own() == 0);
    assert!(steers(Party::SameUser));
}

#[test]
fn a_launcher_is_not_root() {
    if !geteuid().is_root() {
        return skip("this is not root");
    }
    let _alone = Alone::new();
    let directory = directory();
    let mut command = Command::new(program(&directory));
    command.arg("--listen").arg(directory.path().join("socket")).args(["--user", "7"]);
    let mut launcher = command.stderr(Stdio::piped()).spawn().unwrap();
    wait("the launcher runs as root", || launcher.try_wait().unwrap().is_some());
    let mut said = String::new();
    launcher.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.contains("start it as a user of its own"), "{said}");
}

/// As systemd starts it for a connection, without the arguments and the environment that a VMM gives.
#[test]
fn a_program_that_is_given_a_connection_is_the_vault_of_it() {
    let Some(_alone) = turn() else { return };
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    set_socket_timeout(&ours, Timeout::Recv, Some(PATIENCE)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_cvm-vault"));
    command.args(["--connection", "--device", "/dev/kvm"]).stdin(theirs);
    let mut vault = Vault { process: command.spawn().unwrap(), socket: Some(ours), sequence: 0 };
    drop(command);
    assert!(matches!(vault.hear(), Heard::Report(Report::Done)));
    drop(vault.socket.take());
    wait("the vault outlives its connection", || vault.process.try_wait().unwrap().is_some());
}
