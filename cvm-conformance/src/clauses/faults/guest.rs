//! A guest that notices what is done to it, and a VMM that takes whatever comes.

use crate::guest::{Assembler, REPORT};
use crate::held::descendants;
use crate::tiny::{self, DATA};
use crate::vmm::{LIMIT, drive, is_of_ghcb};
use crate::{Bench, Guest, VmOf, quality};
use cvm_core::{
    Answer, Error, Exit, Gpa, Launch, PAGE_SIZE, PageState, Platform, Policy, Side, Vcpu, Vm, VmConfig, Watchdog,
};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::fs;
use std::process;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// A page that stays private.
const KEPT: u64 = DATA + 2 * PAGE_SIZE;

/// What is written where, and by whom.
const KEPT_CONTENTS: u32 = 0x5eed;
const PRIVATE_CONTENTS: u32 = 0x4444;
const GUESTS_CONTENTS: u32 = 0x1111;
const HOSTS_CONTENTS: u32 = 0x7777;

/// How often a vCPU may come back without having done anything, and how often the guest asks for the same.
const MOST_KICKS: usize = 8;
const MOST_TRIES: usize = 3;

/// Shares a page and takes it back, asking until it is done. It tells each answer, and what it finds then.
fn code(a: &mut Assembler) -> Result<(), IcedError> {
    a.store(KEPT, Side::Private, KEPT_CONTENTS)?;
    a.store(DATA, Side::Private, PRIVATE_CONTENTS)?;
    let (mut share, mut is_shared) = (a.create_label(), a.create_label());
    a.set_label(&mut share)?;
    a.convert(DATA, 1, Side::Shared)?;
    a.mov(r12d, eax)?;
    a.report()?;
    a.test(r12d, r12d)?;
    a.je(is_shared)?;
    a.load(DATA, Side::Private)?;
    a.report()?;
    a.jmp(share)?;
    a.set_label(&mut is_shared)?;
    a.store(DATA, Side::Shared, GUESTS_CONTENTS)?;
    a.mov(eax, 0)?;
    a.report()?;
    a.load(DATA, Side::Shared)?;
    a.report()?;
    let mut take = a.create_label();
    a.set_label(&mut take)?;
    a.convert(DATA, 1, Side::Private)?;
    a.mov(r12d, eax)?;
    a.report()?;
    a.test(r12d, r12d)?;
    a.jne(take)?;
    a.load(KEPT, Side::Private)?;
    a.report()?;
    a.end(0)
}

fn told(error: &Error) -> String {
    quality::assert_good(error);
    quality::told(error)
}

/// What the processes that hold a VM have given up, as far as the kernel says.
fn confinement() -> Vec<String> {
    let of = |id: u32| {
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let given_up = ["NoNewPrivs", "Seccomp", "Cap", "Uid", "Gid", "Groups"];
        let lines = status.lines().filter(|line| given_up.iter().any(|what| line.starts_with(what)));
        let limits = fs::read_to_string(format!("/proc/{id}/limits")).unwrap_or_default();
        let files = fs::read_dir(format!("/proc/{id}/fd")).map(Iterator::count).ok();
        format!("{}, {files:?} files, {limits}", lines.collect::<Vec<_>>().join(", "))
    };
    descendants(process::id()).iter().map(|process| of(process.id)).collect()
}

/// Looks at what the process has while calls fail under who asks, and not under this.
pub(super) struct Witness(Mutex<(Sender<()>, Receiver<Vec<String>>)>);

impl Witness {
    pub(super) fn new() -> Self {
        let (ask, asked) = channel();
        let (tell, told) = channel();
        let look = move || asked.iter().map_while(|()| tell.send(confinement()).ok()).for_each(drop);
        thread::Builder::new().name("witness".into()).spawn(look).expect("a thread");
        Self(Mutex::new((ask, told)))
    }

    fn confinement(&self) -> Vec<String> {
        let channels = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        channels.0.send(()).expect("a witness");
        channels.1.recv().expect("a witness")
    }
}

/// What has to be the same, whatever has failed on the way.
#[derive(Debug, PartialEq)]
pub(super) struct Made {
    measurement: String,
    confinement: Vec<String>,
}

/// Launches of the guest on some host.
pub(super) struct Launches<'a, P> {
    bench: &'a Bench<'a, P>,
    /// All that the host can be held to.
    policy: Policy,
    witness: Witness,
}

impl<'a, P: Platform> Launches<'a, P> {
    pub(super) fn new(bench: &'a Bench<'a, P>) -> Self {
        let is_offered =
            |policy: &Policy| bench.platform.launch(VmConfig { policy: *policy, ..tiny::config(bench, 1) }).is_ok();
        Self { bench, policy: Policy::all().iter().filter(is_offered).collect(), witness: Witness::new() }
    }

    fn load(&self) -> Result<Launch<P::Loader>, Error> {
        let config = VmConfig { policy: self.policy, ..tiny::config(self.bench, 2) };
        tiny::load(self.bench, config, code)
    }

    /// Launches it.
    pub(super) fn launch(&self) -> Result<(VmOf<P>, Made), String> {
        let vm = self.load().and_then(Launch::seal).map_err(|error| {
            let is_of_launch = matches!(error, Error::Backend { .. } | Error::Config(_));
            assert!(is_of_launch, "a launch failed with {error:?}");
            told(&error)
        })?;
        let measurement = vm.transcript().measurement().to_string();
        Ok((vm, Made { measurement, confinement: self.witness.confinement() }))
    }

    /// Launches it and runs it to its end.
    pub(super) fn launch_and_run(&self) -> Result<Made, String> {
        let (mut vm, made) = self.launch()?;
        let mut vcpus = vm.take_vcpus();
        let watchdog = Watchdog::new(LIMIT, vcpus.iter().map(Vcpu::kicker).collect());
        let watchdog = watchdog.map_err(|error| error.to_string())?;
        let mut run = Run { vm: &vm, vcpu: &mut vcpus[0], refused: None };
        let ran = run.all();
        assert!(!watchdog.fired(), "the guest hangs");
        let refused = run.refused;
        ran.and(refused.map_or(Ok(()), Err))?;
        Ok(made)
    }

    /// Launches it and has it run to its end, without faults.
    pub(super) fn drive_to_end(&self) {
        let launch = self.load().unwrap_or_else(|error| panic!("{}", quality::told(&error)));
        let mut guest = Guest::from_launch(launch);
        let mut reports = Vec::new();
        loop {
            match drive(&guest.vm, &mut guest.vcpus[0]).unwrap_or_else(|error| panic!("{}", quality::told(&error))) {
                Exit::DoorbellWrite { register: REPORT, value } => reports.push(value),
                Exit::Kicked if !guest.is_overdue() => {}
                exit => {
                    assert_eq!(exit, Exit::Ended { code: 0 });
                    assert_eq!(reports, [0, 0, GUESTS_CONTENTS, 0, KEPT_CONTENTS]);
                    return;
                }
            }
        }
    }
}

/// A guest under way, of which an error says why it does not go on.
struct Run<'a, V: Vm> {
    vm: &'a V,
    vcpu: &'a mut V::Vcpu,
    /// Why the guest did not get what it asked for, the first time.
    refused: Option<String>,
}

impl<V: Vm> Run<'_, V> {
    fn all(&mut self) -> Result<(), String> {
        self.convert(Side::Shared)?;
        assert_eq!(self.report()?, 0);
        assert_eq!(self.read(), Some(GUESTS_CONTENTS));
        assert_eq!(self.report()?, GUESTS_CONTENTS);
        self.write(HOSTS_CONTENTS);
        self.convert(Side::Private)?;
        assert_eq!(self.report()?, KEPT_CONTENTS, "a page that nobody has converted");
        match self.next()? {
            Exit::Ended { code: 0 } => Ok(()),
            other => panic!("{other:?} where the end should be"),
        }
    }

    fn next(&mut self) -> Result<Exit, String> {
        let mut kicks = 0;
        loop {
            match self.vcpu.run() {
                Ok(Exit::Kicked) if kicks < MOST_KICKS => kicks += 1,
                Ok(Exit::Conversion(request)) if is_of_ghcb(&request) => {
                    let conversion = self.vm.convert(&request);
                    // Without that page the guest cannot talk.
                    conversion.cause().map_or(Ok(()), |cause| Err(told(cause)))?;
                    self.vcpu.answer_conversion(conversion).map_err(|error| told(&error))?;
                }
                Ok(exit) => return Ok(exit),
                Err(error) => {
                    // One that has failed says so again.
                    let again = self.vcpu.run();
                    assert!(again.is_err(), "{} and then {again:?}", quality::told(&error));
                    return Err(told(&error));
                }
            }
        }
    }

    fn report(&mut self) -> Result<u32, String> {
        match self.next()? {
            Exit::DoorbellWrite { register: REPORT, value } => Ok(value),
            other => panic!("{other:?} where a report should be"),
        }
    }

    fn state(&self) -> Option<PageState> {
        self.vm.memory().map().get(Gpa(DATA))
    }

    /// What the host reads, if it may.
    fn read(&self) -> Option<u32> {
        self.vm.memory().memory().read_obj(GuestAddress(DATA)).ok()
    }

    fn write(&self, contents: u32) {
        self.vm.memory().memory().write_obj(contents, GuestAddress(DATA)).expect("a shared page");
    }

    /// Has the guest get its page to a side, however often it has to ask.
    fn convert(&mut self, to: Side) -> Result<(), String> {
        for _ in 0..MOST_TRIES {
            let request = match self.next()? {
                Exit::Conversion(request) => request,
                other => panic!("{other:?} where a request should be"),
            };
            assert_eq!((request.gpa(), request.pages(), request.to()), (Gpa(DATA), 1, to));
            let conversion = self.vm.convert(&request);
            let is_done = conversion.answer() == Answer::Done;
            let cause = conversion.cause().map(told);
            assert_eq!(is_done, cause.is_none(), "{:?}: {cause:?}", conversion.answer());
            let is_lost = matches!(conversion.cause(), Some(Error::Poisoned { .. } | Error::Lost));
            let expected = match (is_done, is_lost) {
                (true, _) => PageState::from(to),
                (false, false) => PageState::from(to.other()),
                (false, true) => PageState::Poisoned,
            };
            assert_eq!(self.state(), Some(expected), "{cause:?}");
            let contents = match (expected, to) {
                (PageState::Shared, Side::Shared) => Some(None),
                (PageState::Shared, Side::Private) => Some(Some(HOSTS_CONTENTS)),
                _ => None,
            };
            match contents {
                None => assert_eq!(self.read(), None, "the view shows what is {expected:?}"),
                // What was private the host does not know, or does not see.
                Some(None) => assert!(self.read().is_some(), "the view refuses what is shared"),
                Some(contents) => assert_eq!(self.read(), contents, "{cause:?}"),
            }
            self.vcpu.answer_conversion(conversion).map_err(|error| told(&error))?;
            self.refused = self.refused.take().or(cause.clone());
            if is_lost {
                return self.ask_for_what_is_lost(cause);
            }
            assert_eq!(self.report()? == 0, is_done, "the guest heard something else than {cause:?}");
            if is_done {
                return Ok(());
            }
            if to == Side::Shared {
                assert_eq!(self.report()?, PRIVATE_CONTENTS, "a page that could not be shared");
            }
        }
        panic!("the guest has asked {MOST_TRIES} times: {:?}", self.refused)
    }

    /// The page is lost, and stays lost, whatever the guest touches or asks for now.
    fn ask_for_what_is_lost(&mut self, cause: Option<String>) -> Result<(), String> {
        if let Ok(heard) = self.report() {
            assert_ne!(heard, 0, "the guest heard that it was done");
            if let Ok(Exit::Conversion(request)) = self.next() {
                assert_eq!(self.vm.convert(&request).answer(), Answer::Invalid, "it is lost");
                assert_eq!(self.state(), Some(PageState::Poisoned));
            }
        }
        Err(cause.unwrap_or_default())
    }
}
