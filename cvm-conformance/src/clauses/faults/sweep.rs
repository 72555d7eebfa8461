//! Work that is done again and again, while one call fails each time.

use crate::Bench;
use crate::faults::{Fault, with_fault};
use crate::held::{Held, assert_back};
use crate::quality::said;
use cvm_core::Platform;
use std::fmt::Debug;
use std::io::{Write, stderr};
use std::ops::Range;
use std::process::abort;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

/// How long one run may take, where processors are emulated.
const PATIENCE: Duration = Duration::from_secs(120);

/// Ends the process if something hangs: a thread in a system call is stopped by nothing less.
struct Alarm(Sender<String>);

impl Alarm {
    fn new() -> Self {
        let (set, next) = channel();
        let mut what = String::from("a run without faults");
        let watch = move || loop {
            match next.recv_timeout(PATIENCE) {
                Ok(next) => what = next,
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    let _ = writeln!(stderr(), "{what}: it hangs");
                    abort();
                }
            }
        };
        thread::Builder::new().name("alarm".into()).spawn(watch).expect("a thread");
        Self(set)
    }

    fn set(&self, what: &str) {
        let _ = self.0.send(what.into());
    }
}

/// The calls of a range, or, if these are more than `most`, every second, third, and so on, beginning at the `turn`-th of
/// those that could be the first: others meet the rest.
pub(super) fn every(range: Range<u64>, most: u64, turn: u64) -> impl Iterator<Item = u64> {
    let stride = (range.end - range.start).div_ceil(most).max(1);
    range.skip((turn % stride) as usize).step_by(stride as usize)
}

/// Work, and what comes of it without a fault.
pub(super) struct Sweep<'a, P, W, T> {
    bench: &'a Bench<'a, P>,
    alarm: Alarm,
    work: W,
    pub(super) calls: u64,
    reference: T,
    before: Held,
}

impl<'a, P: Platform + Sync, T: Send + PartialEq + Debug, W: Fn() -> Result<T, String> + Sync> Sweep<'a, P, W, T> {
    pub(super) fn new(bench: &'a Bench<'a, P>, work: W) -> Self {
        let alarm = Alarm::new();
        // What comes with the first VM and stays.
        let _ = work();
        let outcome = with_fault(None, &work).expect("a filter for system calls");
        let result = outcome.result.unwrap_or_else(|panic| panic!("without a fault: {}", said(&*panic)));
        let reference = result.unwrap_or_else(|told| panic!("without a fault: {told}"));
        Self { bench, alarm, calls: outcome.calls, reference, before: Held::settled(bench), work }
    }

    /// Has each of these calls fail in turn, and `afterwards` done after each. Returns how many times the work failed.
    pub(super) fn run(&self, errno: i32, nth: impl Iterator<Item = u64>, afterwards: impl Fn(&str)) -> u64 {
        let mut failures = 0;
        for nth in nth {
            self.alarm.set(&format!("call {nth}, error {errno}"));
            let outcome = with_fault(Some(Fault { nth, errno }), &self.work).expect("a filter for system calls");
            // It may be a call less than the last time.
            let Some(failed) = outcome.failed else { continue };
            let what = format!("call {nth}, {failed}, error {errno}");
            let result = outcome.result.unwrap_or_else(|panic| panic!("{what}: {}", said(&*panic)));
            assert!(!outcome.outlived, "{what}: a thread or process is still there");
            assert_back(self.bench, &self.before, &what);
            match result {
                Ok(done) => assert_eq!(done, self.reference, "{what}: it is not as it was without"),
                Err(told) => {
                    let is_told = told.contains(&format!("os error {errno}"))
                        // A process that dies of it cannot say why.
                        || failed.ends_with("of another process")
                        // The C library has one number for threads that there cannot be.
                        || failed.starts_with("clone") && told.contains(&format!("os error {}", libc::EAGAIN));
                    assert!(is_told, "{what}: {told}");
                    failures += 1;
                }
            }
            afterwards(&what);
        }
        failures
    }
}
