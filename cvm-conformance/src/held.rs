//! What a process has, and what its VMs take up elsewhere.

use crate::Bench;
use cvm_core::Platform;
use std::fmt;
use std::fs;
use std::process;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long the kernel may take to take down what nobody has any more, where processors are emulated.
const PATIENCE: Duration = Duration::from_secs(120);

/// What VMs can take up.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    /// What each open file is.
    files: Vec<String>,
    threads: usize,
    /// Processes that this one has started and not heard the end of.
    children: usize,
    /// What is mapped and has a name: files, guest memory, vCPUs. What has none is the allocator's and the stacks'.
    mappings: Vec<String>,
    /// What is outside the process.
    outside: Vec<(String, u64)>,
}

impl Held {
    /// Counts.
    pub(crate) fn now<P: Platform>(bench: &Bench<'_, P>) -> Self {
        let of_self = |what: &str| fs::read_dir(format!("/proc/self/{what}")).expect("a directory of the process");
        let link = |entry: fs::DirEntry| fs::read_link(entry.path()).ok().map(|file| file.display().to_string());
        Self {
            files: of_self("fd").filter_map(|entry| link(entry.ok()?)).collect(),
            threads: of_self("task").count(),
            children: descendants(process::id()).len(),
            mappings: mappings().filter_map(|mapping| mapping.name).collect(),
            outside: bench.held(),
        }
    }

    /// Counts when nothing changes any more: what has ended may be listed for a moment longer.
    pub(crate) fn settled<P: Platform>(bench: &Bench<'_, P>) -> Self {
        let mut last = Self::now(bench);
        loop {
            sleep(Duration::from_millis(20));
            let now = Self::now(bench);
            if now.counts() == last.counts() {
                return now;
            }
            last = now;
        }
    }

    fn counts(&self) -> ([usize; 4], &[(String, u64)]) {
        ([self.files.len(), self.threads, self.children, self.mappings.len()], &self.outside)
    }

    /// Whether there is more of something than there was `before`.
    pub(crate) fn is_more_than(&self, before: &Self) -> bool {
        let ((now, outside), (then, outside_then)) = (self.counts(), before.counts());
        let more_inside = now.iter().zip(then).any(|(now, then)| *now > then);
        more_inside || outside.iter().zip(outside_then).any(|(now, then)| now.1 > then.1)
    }

    /// Whether what is counted outside is as it was `before`; where nothing is counted nobody can tell.
    pub(crate) fn is_so_outside(&self, before: &Self) -> bool {
        !self.outside.is_empty() && self.outside == before.outside
    }

    /// Whether no more threads and processes are there than `before`, nor anything outside; files and mappings may be more.
    fn is_but_memory(&self, before: &Self) -> bool {
        !Self { files: Vec::new(), mappings: Vec::new(), ..self.clone() }.is_more_than(before)
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { files, threads, children, mappings, outside } = self;
        write!(f, "{threads} threads, {children} children, outside {outside:?}, files {files:?}, mappings {mappings:?}")
    }
}

/// Waits until `is_so` of what is held now is true.
#[track_caller]
fn wait<P: Platform>(bench: &Bench<'_, P>, before: &Held, what: &str, is_so: impl Fn(&Held) -> bool) {
    let start = Instant::now();
    loop {
        let now = Held::now(bench);
        if is_so(&now) {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{what}: something is left\n    before: {before}\n    now: {now}");
        sleep(Duration::from_millis(2));
    }
}

/// That no more is held than `before`, if not at once, then soon.
#[track_caller]
pub(crate) fn assert_back<P: Platform>(bench: &Bench<'_, P>, before: &Held, what: &str) {
    wait(bench, before, what, |now| !now.is_more_than(before));
}

/// The same but for files and what is mapped of them.
#[track_caller]
pub(crate) fn assert_back_but_memory<P: Platform>(bench: &Bench<'_, P>, before: &Held, what: &str) {
    wait(bench, before, what, |now| now.is_but_memory(before));
}

/// That something is held that was not `before`, or there would be nothing to see.
#[track_caller]
pub(crate) fn assert_more<P: Platform>(bench: &Bench<'_, P>, before: &Held, what: &str) {
    let now = Held::now(bench);
    assert!(now.is_more_than(before), "{what}: nothing is held\n    before: {before}\n    now: {now}");
}

struct Mapping {
    bytes: u64,
    is_writable: bool,
    /// Nothing for anonymous memory, heap and stack.
    name: Option<String>,
}

fn mappings() -> impl Iterator<Item = Mapping> {
    let maps = fs::read_to_string("/proc/self/maps").expect("the mappings of the process");
    let mapping = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let bytes = number(end)? - number(start)?;
        let is_writable = fields.next()?.contains('w');
        let name = fields.nth(3).filter(|name| !name.starts_with('[')).map(str::to_owned);
        Some(Mapping { bytes, is_writable, name })
    };
    maps.lines().filter_map(mapping).collect::<Vec<_>>().into_iter()
}

/// How many bytes of memory without a name are mapped to be written: the allocator's, stacks, and that of backends which
/// keep guests in such.
pub(crate) fn anonymous() -> u64 {
    mappings().filter(|mapping| mapping.name.is_none() && mapping.is_writable).map(|mapping| mapping.bytes).sum()
}

/// A process, which has its number for itself as long as it is there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Process {
    pub(crate) id: u32,
    parent: u32,
    /// When it was started, in ticks of the kernel's.
    started: u64,
    is_dead: bool,
}

impl Process {
    fn of(id: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        // The name, in parentheses, may have anything in it. State, parent and start are fields 3, 4 and 22 (proc(5)).
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        let is_dead = ["Z", "X"].contains(&fields.next()?);
        let parent = fields.next()?.parse().ok()?;
        let started = fields.nth(17)?.parse().ok()?;
        Some(Self { id, parent, started, is_dead })
    }

    /// Whether it still runs.
    pub(crate) fn is_there(&self) -> bool {
        Self::of(self.id).is_some_and(|now| now.started == self.started && !now.is_dead)
    }
}

/// The processes that `parent` has started, those that these have started, and so on.
pub(crate) fn descendants(parent: u32) -> Vec<Process> {
    let entries = fs::read_dir("/proc").expect("a list of processes");
    let number = |entry: fs::DirEntry| entry.file_name().to_str()?.parse().ok();
    let all: Vec<_> = entries.filter_map(|entry| Process::of(number(entry.ok()?)?)).collect();
    let mut found: Vec<Process> = Vec::new();
    let mut parents = vec![parent];
    while let Some(parent) = parents.pop() {
        let children = all.iter().filter(|process| process.parent == parent);
        parents.extend(children.clone().map(|child| child.id));
        found.extend(children);
    }
    found
}

/// That none of these is there any more, if not at once, then soon.
#[track_caller]
pub(crate) fn assert_gone(processes: &[Process], what: &str) {
    let start = Instant::now();
    while let Some(left) = processes.iter().find(|process| process.is_there()) {
        assert!(start.elapsed() < PATIENCE, "{what}: process {} is still there", left.id);
        sleep(Duration::from_millis(2));
    }
}
