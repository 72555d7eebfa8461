//! What a vault has given up, as other processes see it.

use crate::common::{Guest, config, load, skip};
use crate::guests::{SAYS_SECRET, witness};
use crate::{children, vaults};
use rustix::io::{FdFlags, fcntl_setfd};
use std::fs::{self, File};
use std::path::Path;

#[test]
fn a_vault_has_nothing_but_what_it_needs() {
    let Some(vaults) = vaults() else { return };
    // What other code of a VMM may have forgotten to protect.
    let inherited = File::open("/dev/zero").unwrap();
    fcntl_setfd(&inherited, FdFlags::empty()).unwrap();
    let mut guest = Guest::from_launch(load(&vaults.platform, config(2), witness));
    fcntl_setfd(&inherited, FdFlags::CLOEXEC).unwrap();
    assert_eq!(guest.run(), SAYS_SECRET);
    let [vault] = children()[..] else { panic!("one vault") };
    let proc = |file: &str| format!("/proc/{}/{file}", vault.as_raw_nonzero());
    let read = |file: &str| fs::read_to_string(proc(file)).unwrap();

    let status = read("status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {name}")).trim()
    };
    assert_eq!((field("Name"), field("NoNewPrivs"), field("Seccomp")), ("cvm-vault", "1", "2"));
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    assert_eq!(
        read("limits").lines().find(|line| line.starts_with("Max core file size")).map(|line| line
            .split_whitespace()
            .skip(4)
            .take(2)
            .collect()),
        Some(vec!["0", "0"])
    );
    if !rustix::process::geteuid().is_root() {
        assert!(fs::read_dir(proc("fd")).is_err() && fs::read(proc("environ")).is_err(), "its user can look into it");
        return skip("the rest is not to be seen but by root");
    }
    assert_eq!(field("CapBnd"), "0000000000000000");
    let threads: Vec<_> = fs::read_dir(proc("task")).unwrap().map(|thread| thread.unwrap().path()).collect();
    assert!(threads.len() > 2, "its vCPUs have threads: {threads:?}");
    for thread in threads {
        let status = fs::read_to_string(thread.join("status")).unwrap();
        for line in ["Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000"] {
            assert!(status.lines().any(|found| found == line), "{line} of {}: {status}", thread.display());
        }
    }
    // A message of the C library lands in an empty file that cannot be written.
    for standard in ["fd/1", "fd/2"] {
        assert_eq!(fs::read_link(proc(standard)).unwrap(), Path::new("/memfd:cvm-nothing (deleted)"), "{standard}");
    }
    // The loader's paths are for it to start at all.
    let environment = read("environ");
    let environment: Vec<_> =
        environment.split_terminator('\0').filter(|entry| !entry.starts_with("LD_LIBRARY_PATH=")).collect();
    assert_eq!(environment, ["CVM_IS_VAULT=1"]);
    assert_eq!(fs::read_link(proc("cwd")).unwrap(), Path::new("/"));
    let descriptors = fs::read_dir(proc("fd")).unwrap();
    let descriptors = descriptors.map(|entry| fs::read_link(entry.unwrap().path()).unwrap().into_os_string());
    let mut descriptors: Vec<_> = descriptors.map(|target| target.into_string().unwrap()).collect();
    descriptors.sort();
    let allowed = ["/dev/kvm", "/memfd:cvm-", "anon_inode:[eventfd]", "anon_inode:kvm-v", "socket:["];
    for target in &descriptors {
        let is_allowed = allowed.iter().any(|prefix| target.starts_with(prefix)) || target.contains("[kvm-gmem]");
        assert!(is_allowed, "{target} in {descriptors:?}");
    }
    let count = |prefix: &str| descriptors.iter().filter(|target| target.starts_with(prefix)).count();
    let counts =
        ["/dev/kvm", "socket:[", "anon_inode:[eventfd]", "anon_inode:kvm-vm", "anon_inode:kvm-vcpu"].map(count);
    // The second socket is that of kicks.
    assert_eq!(counts, [1, 2, 0, 1, 2], "{descriptors:?}");
}
