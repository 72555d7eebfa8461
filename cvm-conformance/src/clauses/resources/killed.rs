//! Processes that are killed: this program starts itself again, and is told by a variable what to get to.

use super::{launched, ran, sealed};
use crate::clause::Verdict;
use crate::held::{Held, assert_back, assert_gone, descendants};
use crate::tiny::{self, DATA};
use crate::{Bench, Guest};
use cvm_core::{Gpa, PAGE_SIZE, PageKind, Platform, Vm};
use std::io::{BufRead, BufReader, Read, Write, stdin, stdout};
use std::process::{Command, Stdio, exit};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// The variable that has this program get to a stage of a VM with some protection, `sev-snp/loaded`, and wait there.
const VARIABLE: &str = "CVM_CONFORMANCE_STAGE";

/// What it says then.
const THERE: &str = "conformance: it is there";

/// How long it may take.
const PATIENCE: Duration = Duration::from_secs(90);

const STAGES: [&str; 6] = ["launched", "loading", "loaded", "sealed", "asking", "running"];

/// The protection and the stage that this process is to get to, if it is such a one.
pub(crate) fn wanted() -> Option<(String, String)> {
    let wanted = std::env::var(VARIABLE).ok()?;
    wanted.split_once('/').map(|(protection, stage)| (protection.to_owned(), stage.to_owned()))
}

/// Waits to be killed, or for the end of who would do it.
fn park() -> ! {
    say();
    let _ = stdin().read(&mut [0]);
    exit(1)
}

fn say() {
    let _ = writeln!(stdout(), "{THERE}").and_then(|()| stdout().flush());
}

/// Gets to a stage, and waits there to be killed.
pub(crate) fn reach<P: Platform>(bench: &Bench<'_, P>, stage: &str) -> ! {
    match stage {
        "launched" => {
            let _launch = bench.platform.launch(tiny::config(bench, 2)).expect("a launch");
            park()
        }
        "loading" => {
            let mut launch = bench.platform.launch(tiny::config(bench, 2)).expect("a launch");
            say();
            loop {
                for page in 0..8 {
                    let gpa = Gpa(DATA + page * PAGE_SIZE);
                    launch.load(gpa, &[1; PAGE_SIZE as usize], PageKind::Measured).expect("a page");
                }
                launch = bench.platform.launch(tiny::config(bench, 2)).expect("a launch");
            }
        }
        "loaded" => {
            let _launch = launched(bench);
            park()
        }
        "sealed" => {
            let mut vm = sealed(bench);
            let _vcpus = vm.take_vcpus();
            park()
        }
        "asking" => {
            let mut guest = ran(bench);
            guest.request();
            park()
        }
        "running" => {
            let spin = tiny::load(bench, tiny::config(bench, 2), |a| {
                let mut again = a.create_label();
                a.report()?;
                a.set_label(&mut again)?;
                a.jmp(again)
            });
            let mut guest = Guest::from_launch(spin.expect("a launch"));
            guest.report();
            say();
            // The watchdog ends it if nobody does.
            let _ = guest.try_run(0);
            exit(1)
        }
        unknown => panic!("there is no stage {unknown}"),
    }
}

pub(super) fn killed<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    if !bench.is_of_suite {
        // Started again it would do what it did here, and so start itself again.
        return Verdict::NotOffered("this program does not know what it is started for".into());
    }
    let before = Held::settled(bench);
    for stage in STAGES {
        let program = std::env::current_exe().expect("the path of this program");
        let mut child = Command::new(program)
            .env(VARIABLE, format!("{}/{stage}", bench.protection))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program once more");
        let output = child.stdout.take().expect("a pipe");
        let (tell, told) = mpsc::channel();
        let listener = thread::spawn(move || {
            let mut lines = BufReader::new(output).lines().map_while(Result::ok);
            let _ = tell.send(lines.any(|line| line == THERE));
            // It may say more, and must not fail for that.
            lines.for_each(drop);
        });
        let is_there = told.recv_timeout(PATIENCE);
        let now = Held::now(bench);
        let processes = descendants(child.id());
        child.kill().expect("its end");
        child.wait().expect("its end");
        assert_eq!(is_there, Ok(true), "{stage}: the process ended before, or got nowhere");
        // Between two launches nothing is held.
        assert!(stage == "loading" || !now.is_so_outside(&before), "{stage}: nothing was held: {now}");
        assert_gone(&processes, stage);
        let _ = listener.join();
        assert_back(bench, &before, stage);
    }
    Verdict::Met
}
