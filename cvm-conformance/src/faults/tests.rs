use super::*;
use std::fs::{self, File};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether there is something to test; if not it says so past the test harness, which keeps to itself what a successful
/// test prints.
fn able() -> bool {
    let Err(why) = available() else { return true };
    let line = format!("SKIPPED: {}: {why}\n", thread::current().name().unwrap_or_default());
    io::stderr().write_all(line.as_bytes()).unwrap();
    false
}

const FAULT: i32 = libc::EXDEV;

fn fail(nth: u64) -> Option<Fault> {
    Some(Fault { nth, errno: FAULT })
}

/// One candidate.
fn memfd() -> Result<(), i32> {
    // SAFETY: the name is a C string, and the descriptor is nobody else's.
    let made = checked(unsafe { libc::memfd_create(c"cvm-fault".as_ptr(), libc::MFD_CLOEXEC) }.into());
    let made = made.map_err(|error| error.raw_os_error().unwrap_or_default())?;
    // SAFETY: as above.
    drop(unsafe { OwnedFd::from_raw_fd(made as c_int) });
    Ok(())
}

fn three() -> [Result<(), i32>; 3] {
    [memfd(), memfd(), memfd()]
}

#[test]
fn without_a_fault_calls_are_counted_and_nothing_else_is_different() {
    if able() {
        let outcome = with_fault(None, || (three(), fs::read("/proc/self/comm").unwrap().len())).unwrap();
        let (made, read) = outcome.result.unwrap();
        assert_eq!(made, [Ok(()); 3]);
        assert!(read > 0);
        assert!(outcome.calls >= 4, "three files and one that was opened: {}", outcome.calls);
        assert_eq!((outcome.failed, outcome.outlived), (None, false));
    }
}

#[test]
fn the_call_with_the_number_fails_and_no_other_does() {
    if able() {
        for nth in 0..4 {
            let outcome = with_fault(fail(nth), three).unwrap();
            let expected = [0, 1, 2].map(|call| if call == nth { Err(FAULT) } else { Ok(()) });
            assert_eq!(outcome.result.unwrap(), expected, "call {nth}");
            assert_eq!(outcome.calls, 3);
            assert_eq!(outcome.failed.as_deref(), (nth < 3).then_some("memfd_create"));
        }
        assert_eq!(three(), [Ok(()); 3], "outside nothing fails");
    }
}

#[test]
fn commands_are_told_from_each_other() {
    if able() {
        let outcome = with_fault(fail(1), || {
            let file = File::open("/dev/null").unwrap();
            // SAFETY: KVM_RUN takes no pointer, and the file has no such command.
            unsafe { libc::ioctl(file.as_raw_fd(), 0xae80, 0) }
        });
        let outcome = outcome.unwrap();
        assert_eq!(outcome.result.unwrap(), -1);
        assert_eq!(outcome.failed.as_deref(), Some("ioctl 0xae80"));
    }
}

#[test]
fn a_number_that_is_no_error_is_refused() {
    for errno in [-1, 0, 4096] {
        let refused = with_fault(Some(Fault { nth: 0, errno }), || ()).map(drop).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{errno}");
    }
}

#[test]
fn a_panic_of_the_work_is_its_result() {
    if able() {
        let outcome = with_fault(None, || {
            memfd().unwrap();
            std::panic::resume_unwind(Box::new("as it should"));
        });
        let outcome = outcome.unwrap();
        assert_eq!(outcome.result.map(|()| "none").unwrap_err().downcast_ref(), Some(&"as it should"));
        assert_eq!(outcome.calls, 1);
    }
}

#[test]
fn threads_that_the_work_starts_are_included() {
    if able() {
        let work = || (memfd(), thread::spawn(memfd).join().unwrap());
        let calls = with_fault(None, work).unwrap().calls;
        assert!(calls >= 3, "two files and a thread: {calls}");
        let outcome = with_fault(fail(calls - 1), work).unwrap();
        assert_eq!(outcome.result.unwrap(), (Ok(()), Err(FAULT)));
        assert_eq!(outcome.failed.as_deref(), Some("memfd_create"));
    }
}

#[test]
fn a_thread_that_cannot_be_started_is_an_error_of_who_starts_it() {
    if able() {
        let start = || thread::Builder::new().spawn(|| ()).map(|thread| thread.join().unwrap());
        let outcome = with_fault(fail(0), start).unwrap();
        assert_eq!(outcome.result.unwrap().unwrap_err().raw_os_error(), Some(FAULT));
    }
}

/// A process that opens a file and says by its status whether it could.
fn opener(first: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &format!("{first} exec 3</proc/self/comm")]).stderr(std::process::Stdio::null());
    command
}

#[test]
fn a_process_that_the_work_starts_is_included_and_its_end_is_seen() {
    if able() {
        let work = || opener("").status();
        let counted = with_fault(None, work).unwrap();
        assert!(counted.result.unwrap().unwrap().success());
        assert!(!counted.outlived);
        let mut failed = Vec::new();
        for nth in 0..counted.calls {
            let outcome = with_fault(fail(nth), work).unwrap();
            assert!(!outcome.outlived, "{nth}: {:?}", outcome.failed);
            let succeeded = outcome.result.unwrap().is_ok_and(|status| status.success());
            failed.extend(outcome.failed.filter(|_| !succeeded));
        }
        assert!(failed.iter().any(|failed| failed == "openat of another process"), "{failed:?}");
        assert!(failed.iter().any(|failed| failed.starts_with("execve")), "{failed:?}");
    }
}

#[test]
fn a_process_that_outlives_the_work_is_not_waited_for_and_can_go_on() {
    if able() {
        // The process waits until its input is closed, which `wait` does.
        let start = || opener("read line;").stdin(std::process::Stdio::piped()).spawn();
        // Its own open, after its start, is what would fail.
        let calls = with_fault(None, || start().unwrap().wait()).unwrap().calls;
        let outcome = supervised(fail(calls - 1), Duration::from_millis(1), start).unwrap();
        assert!(outcome.outlived);
        assert_eq!(outcome.failed, None);
        let mut process = outcome.result.unwrap().unwrap();
        assert!(process.wait().unwrap().success(), "nothing fails after the work");
    }
}

#[test]
fn anonymous_memory_is_no_candidate_but_what_is_put_in_its_place_is() {
    if able() {
        const LEN: usize = 1 << 16;
        let map = |at, flags, fd| {
            // SAFETY: a fixed mapping replaces one that was made here, to which there are no references.
            let at = unsafe { libc::mmap(at, LEN, libc::PROT_NONE, flags | libc::MAP_PRIVATE, fd, 0) };
            if at == libc::MAP_FAILED { Err(io::Error::last_os_error().raw_os_error().unwrap()) } else { Ok(at) }
        };
        let count = |work: &(dyn Fn() + Sync)| {
            let outcome = with_fault(None, work).unwrap();
            outcome.result.unwrap();
            outcome.calls
        };
        let anonymous = || map(std::ptr::null_mut(), libc::MAP_ANONYMOUS, -1).unwrap();
        // SAFETY: the mapping was made here, and there are no references to it.
        let unmap = |at| assert_eq!(unsafe { libc::munmap(at, LEN) }, 0);
        assert_eq!(count(&|| unmap(anonymous())), 0);
        assert_eq!(count(&|| drop(std::hint::black_box(vec![1u8; 64 << 20]))), 0);
        assert_eq!(count(&|| unmap(map(anonymous(), libc::MAP_ANONYMOUS | libc::MAP_FIXED, -1).unwrap())), 1);

        let file = File::open("/proc/self/exe").unwrap();
        assert_eq!(count(&|| unmap(map(std::ptr::null_mut(), 0, file.as_raw_fd()).unwrap())), 1);
        let failed = with_fault(fail(0), || map(std::ptr::null_mut(), 0, file.as_raw_fd()).map(drop)).unwrap();
        assert_eq!(failed.result.unwrap(), Err(FAULT));
        assert_eq!(failed.failed.as_deref(), Some("mmap"));
    }
}

#[test]
fn calls_that_signals_interrupt_are_counted_once() {
    extern "C" fn ignore(_: c_int) {}

    if able() {
        // SAFETY: the handler does nothing, and the structure is initialised; nothing else of this process has this signal.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as extern "C" fn(c_int) as usize;
            action.sa_flags = libc::SA_RESTART;
            assert_eq!(libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()), 0);
        }
        const CALLS: u64 = 2000;
        let outcome = with_fault(None, || {
            let done = AtomicBool::new(false);
            // SAFETY: it has no preconditions.
            let target = unsafe { libc::pthread_self() };
            thread::scope(|scope| {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        // SAFETY: the thread waits for this one.
                        unsafe { libc::pthread_kill(target, libc::SIGUSR1) };
                        thread::yield_now();
                    }
                });
                let made = (0..CALLS).filter(|_| memfd().is_ok()).count() as u64;
                done.store(true, Ordering::Relaxed);
                made
            })
        });
        let outcome = outcome.unwrap();
        assert_eq!(outcome.result.unwrap(), CALLS);
        // The thread that sends the signals is one more.
        assert_eq!(outcome.calls, CALLS + 1);
    }
}

#[test]
fn nobody_is_under_two_supervisors() {
    if able() {
        let outcome = with_fault(None, || with_fault(None, || ()).map(drop)).unwrap();
        let refused = outcome.result.unwrap().unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EBUSY));
    }
}

#[test]
fn supervising_leaves_no_descriptor_and_no_thread() {
    if able() {
        // A process of its own, where nobody else opens files: this test, run again.
        const ALONE: &str = "CVM_FAULTS_ALONE";
        if std::env::var_os(ALONE).is_none() {
            let name = "faults::tests::supervising_leaves_no_descriptor_and_no_thread";
            let program = std::env::current_exe().unwrap();
            let output = Command::new(program).args(["--exact", name]).env(ALONE, "1").output().unwrap();
            return assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        }
        let held = || ["fd", "task"].map(|what| fs::read_dir(format!("/proc/self/{what}")).unwrap().count());
        let before = held();
        for nth in 0..4 {
            with_fault(fail(nth), three).unwrap();
            // The kernel lists a thread that has ended for a moment longer.
            let settled = (0..12_000).any(|_| held() == before || (thread::sleep(Duration::from_millis(10)), false).1);
            assert!(settled, "open files, threads: {:?}, not {before:?}", held());
        }
    }
}
