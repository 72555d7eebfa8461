//! Who used how much of the processors.

use rustix::thread::Pid;
use rustix::time::{ClockId, clock_gettime};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// What this thread has used so far, to the nanosecond.
pub fn this_thread() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

/// What another thread of this process has used. Exact for one that sleeps; one that runs has used up to a tick of the
/// scheduler more, a few milliseconds.
pub fn thread(thread: Pid) -> Duration {
    used(Path::new(&format!("/proc/self/task/{thread}")))
}

/// What the processes that this one has started have used, as for [`thread`]: vaults.
pub fn children() -> Duration {
    let this = std::process::id();
    let is_child = |path: &Path| {
        let status = fs::read_to_string(path.join("stat")).unwrap_or_default();
        // "pid (name) state parent ..."; the name may have anything in it (proc_pid_stat(5)).
        let parent = status.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
        parent == Some(this)
    };
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let children = entries(Path::new("/proc")).filter(|path| is_child(path));
    children.flat_map(|path| entries(&path.join("task")).map(|task| used(&task)).collect::<Vec<_>>()).sum()
}

/// The first number of `schedstat` is the time on a processor in nanoseconds (Linux
/// `Documentation/scheduler/sched-stats.rst`); every kernel with KVM has it.
fn used(task: &Path) -> Duration {
    let text = fs::read_to_string(task.join("schedstat")).unwrap_or_default();
    Duration::from_nanos(text.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0))
}
