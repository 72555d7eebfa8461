//! A VMM of a few lines.

use crate::guest::{GHCB, MAX_GHCBS, REPORT};
use crate::quality;
use cvm_core::launch::Loader;
use cvm_core::memory::{Allocated, ConversionTotals, ViewError};
use cvm_core::{
    Answer, ConversionRequest, Error, Exit, Gpa, GpaRange, Launch, PAGE_SIZE, PageState, Vcpu, Vm, Watchdog,
};
use std::panic::resume_unwind;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryError};

/// How long a guest may take before its clause fails: far longer than the slowest one needs, which has 258 vCPUs, where
/// processors are emulated and shared with other work.
pub(crate) const LIMIT: Duration = Duration::from_secs(300);

/// `pages` pages from `start` on.
pub(crate) fn range(start: u64, pages: u64) -> GpaRange {
    GpaRange::from_pages(start, pages).expect("a sound range")
}

/// Whether it is one page from `gpa` on by which a vCPU talks to its host.
pub(crate) fn is_ghcb(gpa: Gpa, pages: u64) -> bool {
    pages == 1 && (GHCB..GHCB + MAX_GHCBS * PAGE_SIZE).contains(&gpa.0)
}

/// Whether a vCPU asks for the page by which it talks to its host, as its code begins.
pub(crate) fn is_of_ghcb(request: &ConversionRequest) -> bool {
    is_ghcb(request.gpa(), request.pages())
}

/// Runs a vCPU up to its next exit. What it has to have converted before it can talk at all is done without a word.
pub(crate) fn run<V: Vm>(vm: &V, vcpu: &mut V::Vcpu) -> Result<Exit, Error> {
    loop {
        match vcpu.run()? {
            Exit::Conversion(request) if is_of_ghcb(&request) => {
                let conversion = vm.convert(&request);
                assert_eq!(conversion.answer(), Answer::Done, "{:?}", conversion.cause());
                vcpu.answer_conversion(conversion)?;
            }
            exit => return Ok(exit),
        }
    }
}

/// Runs a vCPU, carries out all that it asks for, and returns what it stops for otherwise. A busy host may need more than
/// one go.
pub(crate) fn drive<V: Vm>(vm: &V, vcpu: &mut V::Vcpu) -> Result<Exit, Error> {
    loop {
        match vcpu.run()? {
            Exit::Conversion(request) => {
                let conversion = vm.convert(&request);
                assert_ne!(conversion.answer(), Answer::Invalid, "{:?}", conversion.cause());
                vcpu.answer_conversion(conversion)?;
            }
            exit => return Ok(exit),
        }
    }
}

/// What is left of a conversion when the guest has its answer.
#[derive(Debug)]
pub struct Converted {
    /// What the guest asked for.
    pub request: ConversionRequest,
    /// What it heard.
    pub answer: Answer,
    /// How many pages changed sides.
    pub pages: u64,
    /// Why it was not done, with all sources, or nothing.
    pub cause: String,
}

/// A VM under a watchdog, with its vCPUs.
#[derive(Debug)]
pub struct Guest<V: Vm> {
    /// Its vCPUs.
    pub vcpus: Vec<V::Vcpu>,
    /// The VM.
    pub vm: V,
    watchdog: Watchdog,
}

impl<V: Vm> Guest<V> {
    /// The guest of a launch that is complete.
    pub fn from_launch<L: Loader<Vm = V>>(launch: Launch<L>) -> Self {
        Self::from_vm(launch.seal().unwrap_or_else(|error| panic!("{}", quality::told(&error))))
    }

    /// The guest in a VM that still has its vCPUs.
    pub fn from_vm(mut vm: V) -> Self {
        let vcpus = vm.take_vcpus();
        let kickers = vcpus.iter().map(Vcpu::kicker).collect();
        let watchdog = Watchdog::new(LIMIT, kickers).expect("a thread for the watchdog");
        Self { vcpus, vm, watchdog }
    }

    /// Whether the guest took too long.
    pub fn is_overdue(&self) -> bool {
        self.watchdog.fired()
    }

    /// Runs a vCPU up to its next exit.
    ///
    /// # Errors
    /// As [`Vcpu::run`].
    pub fn try_run(&mut self, vcpu: usize) -> Result<Exit, Error> {
        run(&self.vm, &mut self.vcpus[vcpu])
    }

    /// Runs the first vCPU up to its next exit.
    pub fn run(&mut self) -> Exit {
        self.try_run(0).unwrap_or_else(|error| panic!("{}", quality::told(&error)))
    }

    /// Runs the first vCPU up to its next request.
    pub fn request(&mut self) -> ConversionRequest {
        match self.run() {
            Exit::Conversion(request) => request,
            other => panic!("{other:?} where a request should be"),
        }
    }

    /// Runs the first vCPU up to its next request, and carries that out.
    pub fn convert(&mut self) -> Converted {
        let request = self.request();
        let conversion = self.vm.convert(&request);
        let cause = conversion.cause().map(|cause| {
            quality::assert_good(cause);
            quality::told(cause)
        });
        let cause = cause.unwrap_or_default();
        let converted = Converted { request, answer: conversion.answer(), pages: conversion.pages(), cause };
        self.vcpus[0].answer_conversion(conversion).expect("an answer to what was asked");
        converted
    }

    /// Runs the first vCPU up to its next report.
    pub fn report(&mut self) -> u32 {
        self.report_of(0)
    }

    /// Runs a vCPU up to its next report.
    pub fn report_of(&mut self, vcpu: usize) -> u32 {
        match self.try_run(vcpu) {
            Ok(Exit::DoorbellWrite { register: REPORT, value }) => value,
            other => panic!("{other:?} where a report should be"),
        }
    }

    /// Runs the first vCPU to its end.
    pub fn end(&mut self) {
        assert_eq!(self.run(), Exit::Ended { code: 0 });
    }

    /// What the host reads through the view of the shared side.
    ///
    /// # Errors
    /// That the page is private.
    pub fn read(&self, gpa: u64) -> Result<u32, GuestMemoryError> {
        self.vm.memory().memory().read_obj(GuestAddress(gpa))
    }

    /// Writes through the view of the shared side.
    pub fn write(&self, gpa: u64, value: u32) {
        self.vm.memory().memory().write_obj(value, GuestAddress(gpa)).expect("a shared page");
    }

    /// That the view refuses all pages of `range`, for reads and for writes, each with its own address.
    pub fn assert_private(&self, range: GpaRange) {
        let memory = self.vm.memory().memory();
        for page in 0..range.pages() {
            let gpa = GuestAddress(range.start().0 + page * PAGE_SIZE);
            for result in [memory.read_obj::<u8>(gpa).map(drop), memory.write_obj(1u8, gpa)] {
                let error = result.expect_err("a private page can be reached");
                assert_eq!(ViewError::of(&error), Some(ViewError::Private(Gpa(gpa.0))), "{error}");
            }
        }
    }

    /// How many pages are shared, but for those by which vCPUs talk to the host.
    pub fn shared_pages(&self) -> u64 {
        self.vm.memory().map().count(PageState::Shared) - self.ghcbs()
    }

    /// What was converted, but for those pages.
    pub fn conversions(&self) -> ConversionTotals {
        let totals = self.vm.conversions();
        let ghcbs = self.ghcbs();
        ConversionTotals { requests: totals.requests - ghcbs, to_shared: totals.to_shared - ghcbs, ..totals }
    }

    /// How much memory it takes up, but for those pages.
    pub fn allocated(&self) -> Allocated {
        let allocated = self.vm.allocated().unwrap_or_else(|error| panic!("{}", quality::told(&error)));
        Allocated { shared: allocated.shared.saturating_sub(self.ghcbs() * PAGE_SIZE), ..allocated }
    }

    /// Runs each vCPU on a thread of its own as `each` says, all from the same moment on.
    pub fn run_all(&mut self, each: impl Fn(&V, &mut V::Vcpu) + Sync) {
        let (vm, each, start) = (&self.vm, &each, &Barrier::new(self.vcpus.len()));
        thread::scope(|scope| {
            let run = |vcpu| {
                scope.spawn(move || {
                    start.wait();
                    each(vm, vcpu);
                })
            };
            let threads: Vec<_> = self.vcpus.iter_mut().map(run).collect();
            for thread in threads {
                thread.join().unwrap_or_else(|panic| resume_unwind(panic));
            }
        });
    }

    fn ghcbs(&self) -> u64 {
        let map = self.vm.memory().map();
        let pages = (0..MAX_GHCBS).map(|page| Gpa(GHCB + page * PAGE_SIZE));
        pages.filter(|gpa| map.get(*gpa) == Some(PageState::Shared)).count() as u64
    }
}
