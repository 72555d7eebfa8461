//! What vouches for guests besides the library in the VMM's process.

use crate::VmOf;
use cvm_core::boot::Interface;
use cvm_core::launch::{Launch, Loader, Never, Transcript, VmConfig};
use cvm_core::x86::VcpuState;
use cvm_core::{BoxError, Error, Gpa, GpaRange, PAGE_SIZE, PageKind, Platform};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// A page's contents.
type Page = Box<[u8; PAGE_SIZE as usize]>;

/// What a trusted entity reports of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// What it has measured.
    pub measurement: String,
    /// What it shows besides of data that the host gave it at the launch, by which the configuration is bound; nothing if it has
    /// no place for that.
    pub host_data: Option<String>,
}

/// A trusted entity, as the suite asks it: clauses compare what it reports, not what the library computes for itself.
pub trait TrustedEntity<P: Platform>: Sync {
    /// What it reports of `vm`, which was sealed last and still exists.
    ///
    /// # Errors
    /// That it cannot be asked, for which the clause fails.
    fn reported(&self, vm: &VmOf<P>) -> Result<Report, BoxError>;

    /// What it will report of a launch that was rehearsed, computed without it.
    ///
    /// # Errors
    /// That there can be no such launch.
    fn predicted(&self, platform: &P, launch: &Rehearsed) -> Result<Report, BoxError>;
}

/// A launch without a platform: its transcript, and the contents of its pages.
#[derive(Debug, Clone)]
pub struct Rehearsed {
    /// All that was submitted.
    pub transcript: Transcript,
    pages: BTreeMap<Gpa, Page>,
}

impl Rehearsed {
    /// The contents of a page that has some.
    pub fn page(&self, gpa: Gpa) -> Option<&[u8; PAGE_SIZE as usize]> {
        self.pages.get(&gpa).map(|page| &**page)
    }

    /// Rehearses the launch that `submit` loads on a platform with this interface.
    pub(crate) fn new(
        config: VmConfig,
        interface: Interface,
        submit: impl FnOnce(&mut Launch<Recorder>) -> Result<(), Error>,
    ) -> Self {
        let recorder = Recorder::default();
        let (pages, transcript) = (Rc::clone(&recorder.pages), Rc::clone(&recorder.transcript));
        let mut launch = Launch::new(recorder, config, interface).expect("a configuration that a platform has taken");
        submit(&mut launch).expect("what a platform has taken");
        let _nothing_is_sealed = launch.seal();
        let transcript = transcript.borrow_mut().take().expect("a launch that is complete");
        Self { transcript, pages: pages.take() }
    }
}

/// A loader that keeps what it is given, and seals nothing.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    pages: Rc<RefCell<BTreeMap<Gpa, Page>>>,
    transcript: Rc<RefCell<Option<Transcript>>>,
}

impl Loader for Recorder {
    type Vm = Never;

    fn load(&mut self, range: GpaRange, contents: &[u8], _: PageKind) -> Result<(), BoxError> {
        let (pages, _) = contents.as_chunks::<{ PAGE_SIZE as usize }>();
        for (number, page) in (0..).zip(pages) {
            self.pages.borrow_mut().insert(Gpa(range.start().0 + number * PAGE_SIZE), Box::new(*page));
        }
        Ok(())
    }

    fn set_vcpu(&mut self, _: u32, _: &VcpuState) -> Result<(), BoxError> {
        Ok(())
    }

    fn seal(self, transcript: Transcript) -> Result<Never, BoxError> {
        *self.transcript.borrow_mut() = Some(transcript);
        Err("it is kept, and not sealed".into())
    }
}
