//! The secure processor: what is counted of it, and the controls of the faked one.

use cvm_core::Protection;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use std::{fs, io, thread};

const PARAMETERS: &str = "/sys/module/ccp/parameters";

/// Whether it is the faked one, which tests can look into.
pub fn is_faked() -> bool {
    fs::exists("/proc/fakepsp").unwrap_or(false)
}

/// Its log so far; nothing where it is not faked.
pub fn log() -> String {
    fs::read_to_string("/proc/fakepsp").unwrap_or_default()
}

/// What it calls the digest of the last launch of SEV or SEV-ES.
pub fn digest() -> Option<String> {
    let log = log();
    let line = log.lines().rfind(|line| line.starts_with("LAUNCH_MEASURE"))?;
    Some(line.split_once(" ld=")?.1.split_once(' ')?.0.to_owned())
}

/// What it says of the end of the last launch of SEV-SNP.
pub fn snp_finish() -> String {
    log().lines().rfind(|line| line.contains("host_data=")).expect("a launch that ended").to_owned()
}

/// Sets a parameter of the faked one.
pub fn set_parameter(name: &str, value: u32) {
    fs::write(format!("{PARAMETERS}/{name}"), value.to_string()).unwrap();
}

/// While this exists, the faked one really changes memory that it encrypts in place.
pub struct Scrambling(());

impl Scrambling {
    /// Nothing where it is not faked.
    pub fn new() -> Option<Self> {
        fs::write(format!("{PARAMETERS}/scramble"), "1").ok().map(|()| Self(()))
    }
}

impl Drop for Scrambling {
    fn drop(&mut self) {
        set_parameter("scramble", 0);
    }
}

/// Has the command with this number fail once with this status, after it was successful `after` times.
pub fn fail(command: u32, status: u32, after: u32) {
    for (name, value) in [("fail_status", status), ("fail_after", after), ("fail_cmd", command)] {
        set_parameter(name, value);
    }
}

/// Whether a failure that was wished for is still to come.
pub fn fails() -> bool {
    fs::read_to_string(format!("{PARAMETERS}/fail_cmd")).unwrap().trim() != "0"
}

/// How many address space ids are taken, by kind.
pub type Asids = BTreeMap<String, u64>;

const GROUPS: &str = "/sys/fs/cgroup";

/// How many are taken now.
pub fn asids() -> Asids {
    // Only groups that pass the controller on show what is counted.
    let _ = fs::write(format!("{GROUPS}/cgroup.subtree_control"), "+misc");
    let text = fs::read_to_string(format!("{GROUPS}/misc.current")).expect("control groups that count");
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.map(|(kind, count)| (kind.to_owned(), count.trim().parse().unwrap())).collect()
}

/// The same with `more` of those that SEV-ES and SEV-SNP share.
pub fn with_more(asids: &Asids, more: u64) -> Asids {
    let mut asids = asids.clone();
    *asids.get_mut("sev_es").expect("a count of identifiers") += more;
    asids
}

/// Waits until as many are taken: the kernel gives those of SEV-SNP back after the last descriptor is closed.
pub fn assert_asids(expected: &Asids) {
    let start = Instant::now();
    while asids() != *expected {
        assert!(start.elapsed() < Duration::from_secs(120), "{:?} are taken, not {expected:?}", asids());
        thread::sleep(Duration::from_millis(10));
    }
}

/// A control group that this process is in, and that allows so many identifiers of a kind. It is over when dropped.
pub struct Limit;

const GROUP: &str = "/sys/fs/cgroup/cvm-test";

impl Limit {
    /// Fails where there can be no control group.
    pub fn new(protection: Protection, most: u64) -> io::Result<Self> {
        let kind = if protection == Protection::Sev { "sev" } else { "sev_es" };
        fs::write(format!("{GROUPS}/cgroup.subtree_control"), "+misc")?;
        fs::create_dir(GROUP)?;
        let limit = Self;
        fs::write(format!("{GROUP}/misc.max"), format!("{kind} {most}")).unwrap();
        fs::write(format!("{GROUP}/cgroup.procs"), std::process::id().to_string()).unwrap();
        Ok(limit)
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        fs::write(format!("{GROUPS}/cgroup.procs"), std::process::id().to_string()).unwrap();
        fs::remove_dir(GROUP).unwrap();
    }
}

/// Runs `then` on a thread that may pin hardly anything: with a small limit, and without the capability to exceed it.
pub fn unprivileged<T: Send>(then: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let before = getrlimit(Resource::Memlock);
            setrlimit(Resource::Memlock, Rlimit { current: Some(0x10000), ..before }).unwrap();
            let mut capabilities = capabilities(None).unwrap();
            capabilities.effective.remove(CapabilitySet::IPC_LOCK);
            set_capabilities(None, capabilities).unwrap();
            let result = then();
            setrlimit(Resource::Memlock, before).unwrap();
            result
        });
        thread.join().unwrap()
    })
}
