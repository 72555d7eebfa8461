//! Another process that attacks the one which holds the guest.

use crate::find;
use crate::kvm;
use crate::outcome::Observed;
use crate::sys;
use kvm_bindings::kvm_regs;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

/// The process that holds the guest.
#[derive(Debug, Clone, Copy)]
pub struct Victim {
    pub pid: i32,
    pub nonce: u64,
}

impl Victim {
    fn directory(self) -> PathBuf {
        format!("/proc/{}", self.pid).into()
    }
}

type Attack = fn(Victim) -> io::Result<Observed>;

pub const ATTACKS: &[(&str, Attack)] = &[
    ("proc-mem", |victim| {
        let memory = File::open(victim.directory().join("mem"))?;
        search(victim, |page, at| memory.read_at(page, at))
    }),
    ("vm-readv", |victim| {
        // Without a list of its mappings any address shows whether it is allowed at all.
        sys::read_process(victim.pid, 0x40_0000, &mut [0]).or_else(unless_denied)?;
        search(victim, |page, at| sys::read_process(victim.pid, at, page))
    }),
    ("ptrace", |victim| {
        sys::attach(victim.pid)?;
        Ok(Observed::Got("it stops".into()))
    }),
    ("getfd", |victim| {
        let found = duplicates(victim)?.into_iter().find_map(|(file, name)| {
            (find::is_memory(&name) && find::in_file(&File::from(file), victim.nonce)).then_some(name)
        });
        Ok(match found {
            Some(name) => Observed::Got(format!("the secret, in {name}")),
            None => Observed::Refused("not found".into()),
        })
    }),
    ("getfd-vcpu", |victim| {
        let vcpu = duplicates(victim)?.into_iter().find(|(_, name)| name.contains("kvm-vcpu"));
        let (vcpu, _) = vcpu.ok_or(io::ErrorKind::NotFound)?;
        kvm::GET_REGS.call(&vcpu, &mut kvm_regs::default())?;
        Ok(Observed::Got("the guest's registers".into()))
    }),
    ("proc-fd", |victim| {
        let found = find::descriptors(&victim.directory())?.into_iter().find(|(fd, name)| {
            let file = || File::open(victim.directory().join(format!("fd/{fd}")));
            find::is_memory(name) && file().is_ok_and(|file| find::in_file(&file, victim.nonce))
        });
        Ok(match found {
            Some((_, name)) => Observed::Got(format!("the secret, in {name}")),
            None => Observed::Refused("not found".into()),
        })
    }),
    ("proc-maps", |victim| {
        let mappings = find::mappings(&victim.directory())?;
        Ok(if mappings.is_empty() { Observed::Refused("empty".into()) } else { Observed::Got("its layout".into()) })
    }),
    ("proc-root", |victim| {
        fs::read_link(victim.directory().join("root"))?;
        Ok(Observed::Got("its root".into()))
    }),
    ("kcmp", |victim| {
        sys::compare_files(victim.pid, i32::try_from(std::process::id()).map_err(io::Error::other)?)?;
        Ok(Observed::Got("which of its files are the same as others".into()))
    }),
    ("core", |victim| {
        // What describes it belongs to root if it is not dumpable, and else to its user (proc_pid(5)).
        let dumpable = fs::metadata(victim.directory().join("maps"))?.uid() != 0;
        Ok(match dumpable {
            true => Observed::Got("a core dump, when it crashes".into()),
            false => Observed::Refused("not dumpable".into()),
        })
    }),
];

/// All of them, by name.
pub fn all(victim: Victim) -> impl Iterator<Item = (&'static str, Observed)> {
    let failed = |error: io::Error| match error.raw_os_error() {
        Some(libc::ENOSYS) => Observed::NoSuchCall,
        _ => Observed::Refused(sys::name(&error)),
    };
    ATTACKS.iter().map(move |(name, attack)| (*name, attack(victim).unwrap_or_else(failed)))
}

/// The victim's descriptors up to number 63, with the names that the kernel gives.
fn duplicates(victim: Victim) -> io::Result<Vec<(OwnedFd, String)>> {
    let pid = Pid::from_raw(victim.pid).ok_or(io::ErrorKind::InvalidInput)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let mut duplicates = Vec::new();
    for number in 0..64 {
        match pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()) {
            Ok(file) => {
                let name = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
                duplicates.push((file, name.to_string_lossy().into_owned()));
            }
            Err(Errno::BADF) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(duplicates)
}

fn unless_denied(error: io::Error) -> io::Result<usize> {
    if error.raw_os_error() == Some(libc::EFAULT) { Ok(0) } else { Err(error) }
}

fn search(victim: Victim, read: impl Fn(&mut [u8], u64) -> io::Result<usize>) -> io::Result<Observed> {
    let mappings = find::mappings(&victim.directory())?;
    Ok(match find::in_mappings(&mappings, victim.nonce, read) {
        Some(name) => Observed::Got(format!("the secret, in {name}")),
        None => Observed::Refused("not found".into()),
    })
}
