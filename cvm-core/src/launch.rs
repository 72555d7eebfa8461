//! The launch of a VM: configure, load, seal.
//!
//! | step | type | what can be done |
//! |---|---|---|
//! | configure | [`VmConfig`] | memory, vCPUs, interrupt policy, how guest and VMM talk |
//! | load | [`Launch`] | pages and vCPU states, each once; every one enters the [`Transcript`] |
//! | seal | [`Vm`](crate::Vm) | run; nothing can be loaded any more |
//!
//! Each step consumes the one before, so that a VM which is not sealed cannot run and one that is sealed cannot be
//! loaded. When a backend's step fails, the launch is over. Dropping a [`Launch`] leaves nothing of the VM.
//!
//! What a launch will be measured as can be known before, see [`Rehearsal`].

mod config;
mod encoding;
mod rehearsal;
mod transcript;

pub use config::{APIC_PAGE, MAX_MEMORY, MAX_VCPUS, VmConfig};
pub use encoding::ConfigDigest;
pub use rehearsal::{Never, Rehearsal};
pub use transcript::{Entry, Measurement, PageKind, Transcript, digest};

use crate::boot::{self, BootPage, Interface, MemoryRange};
use crate::doorbell::Transport;
use crate::image::Image;
#[cfg(all(feature = "linux", target_arch = "x86_64"))]
use crate::linux::LinuxImage;
use crate::memory::Slots;
use crate::x86::{self, VcpuState};
use crate::{BoxError, Error, Gpa, GpaRange, PAGE_SIZE};
use std::collections::BTreeMap;
use zerocopy::FromZeros;

/// What a guest accepts memory by, in bytes: where what was loaded ends for it.
const LARGE_PAGE: u64 = 2 << 20;

/// A backend's part in a launch. What it is called with has been checked against the configuration.
pub trait Loader {
    /// What the launch becomes.
    type Vm: crate::Vm;

    /// Puts `contents`, as long as `range`, into private memory. For [`PageKind::Zero`], [`PageKind::Secrets`] and
    /// [`PageKind::Cpuid`] it is empty: the pages have to be zero, or are one page that is the backend's to fill. The last
    /// two kinds come only where the [`Interface`] says so.
    ///
    /// # Errors
    /// The launch is over then.
    fn load(&mut self, range: GpaRange, contents: &[u8], kind: PageKind) -> Result<(), BoxError>;

    /// Sets the first state of a vCPU.
    ///
    /// # Errors
    /// The launch is over then.
    fn set_vcpu(&mut self, index: u32, state: &VcpuState) -> Result<(), BoxError>;

    /// Ends the launch.
    ///
    /// # Errors
    /// Nothing is left of the VM then.
    fn seal(self, transcript: Transcript) -> Result<Self::Vm, BoxError>;
}

/// A VM that is being loaded.
#[derive(Debug)]
pub struct Launch<L> {
    loader: L,
    config: VmConfig,
    interface: Interface,
    digest: ConfigDigest,
    memory: Slots,
    loaded: BTreeMap<Gpa, GpaRange>,
    /// What the guest was told to be accepted: memory below this.
    accepted: Option<Gpa>,
    vcpus: Vec<bool>,
    transcript: Transcript,
    failed: bool,
}

impl<L: Loader> Launch<L> {
    /// For backends: a launch of what `config` says through `loader`, whose guest will find the platform as `interface` says.
    ///
    /// # Errors
    /// As [`VmConfig::check`].
    pub fn new(loader: L, config: VmConfig, interface: impl Into<Interface>) -> Result<Self, Error> {
        config.check()?;
        let memory = Slots::new(&config.memory)?;
        let interface = interface.into();
        let digest = config.digest(&interface);
        Ok(Self {
            loader,
            interface,
            memory,
            loaded: BTreeMap::new(),
            accepted: None,
            vcpus: vec![false; config.vcpus as usize],
            digest,
            transcript: Transcript { entries: vec![Entry::Config(digest)] },
            config,
            failed: false,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// How the guest will ask for conversions.
    pub fn transport(&self) -> Transport {
        self.interface.transport
    }

    /// How the guest will find the platform.
    pub fn interface(&self) -> &Interface {
        &self.interface
    }

    /// The digest of the configuration and the interface: what the guest finds in its boot page.
    pub fn config_digest(&self) -> ConfigDigest {
        self.digest
    }

    /// Passes on the result of a backend's step, after whose failure nothing else works.
    fn done<T>(
        &mut self,
        step: &'static str,
        range: Option<GpaRange>,
        result: Result<T, BoxError>,
    ) -> Result<T, Error> {
        self.failed |= result.is_err();
        result.map_err(|source| Error::Backend { step, range, source })
    }

    fn claim(&mut self, range: GpaRange) -> Result<(), Error> {
        if self.failed {
            return Err(Error::LaunchFailed);
        }
        self.memory.split(range)?;
        if let Some(accepted) = self.accepted.filter(|accepted| range.end() > *accepted) {
            let problem =
                format!("{range} is loaded too late: the boot page says that memory from {accepted} on was not");
            return Err(Error::Layout(problem));
        }
        let before = self.loaded.range(..range.end()).next_back();
        if let Some(twice) = before.and_then(|(_, earlier)| earlier.intersection(&range)) {
            return Err(Error::LoadedTwice { range: twice });
        }
        self.loaded.insert(range.start(), range);
        Ok(())
    }

    pub(crate) fn submit(&mut self, range: GpaRange, contents: &[u8], kind: PageKind) -> Result<(), Error> {
        self.claim(range)?;
        for part in self.memory.split(range)? {
            // A zero page has no contents, so there is nothing to cut then.
            let from = (part.start().0 - range.start().0) as usize;
            let cut = contents.get(from..from + part.len() as usize).unwrap_or_default();
            let loaded = self.loader.load(part, cut, kind);
            self.done("load pages", Some(part), loaded)?;
        }
        match kind {
            PageKind::Zero => self.transcript.entries.push(Entry::Zero { range }),
            PageKind::Secrets | PageKind::Cpuid => {
                self.transcript.entries.push(Entry::Page { kind, gpa: range.start(), contents: [0; 48] });
            }
            PageKind::Measured | PageKind::Unmeasured => {}
        }
        for (page, contents) in (0..).zip(contents.chunks(PAGE_SIZE as usize)) {
            let gpa = Gpa(range.start().0 + page * PAGE_SIZE);
            let contents = if kind == PageKind::Measured { digest(contents) } else { [0; 48] };
            self.transcript.entries.push(Entry::Page { kind, gpa, contents });
        }
        Ok(())
    }

    /// Loads `contents` at `gpa`, the start of a page; the rest of the last page is zero.
    ///
    /// # Errors
    /// [`Error::Layout`] for a `gpa` within a page or no contents, [`Error::OutsideMemory`], [`Error::LoadedTwice`],
    /// [`Error::Backend`].
    pub fn load(&mut self, gpa: Gpa, contents: &[u8], kind: PageKind) -> Result<(), Error> {
        let len = (contents.len() as u64).next_multiple_of(PAGE_SIZE);
        let range = GpaRange::new(gpa.0, len).map_err(|error| Error::Layout(error.to_string()))?;
        self.memory.split(range)?;
        if !matches!(kind, PageKind::Measured | PageKind::Unmeasured) {
            return Err(Error::Layout(format!("{range} has contents, which a page of kind {kind:?} has not")));
        }
        let mut padded = contents.to_vec();
        padded.resize(len as usize, 0);
        self.submit(range, &padded, kind)
    }

    /// Declares that `range` is zero, which is measured.
    ///
    /// # Errors
    /// As [`Launch::load`].
    pub fn zero(&mut self, range: GpaRange) -> Result<(), Error> {
        self.submit(range, &[], PageKind::Zero)
    }

    /// Loads the pages of an image, measured, in the order of their addresses.
    ///
    /// # Errors
    /// As [`Launch::load`].
    pub fn load_image(&mut self, image: &Image) -> Result<(), Error> {
        for (range, contents) in image.pages() {
            match contents {
                Some(contents) => self.submit(*range, contents, PageKind::Measured)?,
                None => self.zero(*range)?,
            }
        }
        Ok(())
    }

    /// Loads the pages of a kernel and all that it is given, measured, in the order of their addresses, and makes the
    /// vCPU start there.
    ///
    /// # Errors
    /// [`Error::Config`] with more than one vCPU: each would start the kernel, which wakes its others itself, by an
    /// interrupt controller and tables that guests do not have here. [`Error::Layout`] when the image was laid out for
    /// other memory than this launch has. As [`Launch::load`] and [`Launch::set_vcpu`].
    #[cfg(all(feature = "linux", target_arch = "x86_64"))]
    pub fn load_linux(&mut self, image: &LinuxImage) -> Result<(), Error> {
        if self.config.vcpus != 1 {
            return Err(Error::Config(format!("{} vcpus; linux starts on one", self.config.vcpus)));
        }
        if self.memory != *image.memory() {
            return Err(Error::Layout("the image was laid out for other memory".into()));
        }
        if self.interface != Interface::from(self.interface.transport) {
            return Err(Error::Config("a kernel is started here without firmware, which this platform needs".into()));
        }
        self.load_image(image.image())?;
        self.set_vcpu(0, &image.first_state())
    }

    /// Loads a measured [`BootPage`] at `gpa`, with `argument` for the guest. Where the trusted entity has pages for the guest,
    /// they follow: that of secrets, and that of CPUID leaves.
    ///
    /// Where a guest has to accept or to initialise memory that was not loaded, it is told here from what address on: the next
    /// multiple of 2 MiB above all that was loaded so far. So what lies above must be loaded before; what is not loaded below
    /// will be loaded as zeros, which are measured, at the seal.
    ///
    /// # Errors
    /// As [`Launch::load`].
    pub fn load_boot_page(&mut self, gpa: Gpa, argument: [u64; 4]) -> Result<(), Error> {
        let following = |page: u64| gpa.0.saturating_add(page * PAGE_SIZE);
        let Interface { transport, exits, private_bit, acceptance: _, fresh_memory, vouched_pages } = self.interface;
        let last = self.loaded.values().next_back().map_or(0, |range| range.end().0);
        let accepted = last.max(following(1 + 2 * u64::from(vouched_pages))).checked_next_multiple_of(LARGE_PAGE);
        let accepted = accepted.filter(|_| !self.interface.is_all_accepted()).unwrap_or(boot::ALL_ACCEPTED);
        let mut page = BootPage {
            magic: boot::MAGIC,
            vcpus: self.config.vcpus,
            doorbell: self.config.doorbell as u32,
            transport: transport as u32,
            exits: exits as u32,
            shared_at: if private_bit.is_some() { x86::SHARED_AT } else { 0 },
            accepted,
            argument,
            fresh_memory: fresh_memory as u64,
            config: self.digest.0,
            ..BootPage::new_zeroed()
        };
        if vouched_pages {
            (page.secrets, page.cpuid) = (following(1), following(2));
        }
        for (entry, range) in page.memory.iter_mut().zip(&self.config.memory) {
            *entry = MemoryRange { start: range.start().0, len: range.len() };
        }
        self.load(gpa, &page.to_bytes(), PageKind::Measured)?;
        if vouched_pages {
            for (gpa, kind) in [(page.secrets, PageKind::Secrets), (page.cpuid, PageKind::Cpuid)] {
                let range = GpaRange::new(gpa, PAGE_SIZE).map_err(|error| Error::Layout(error.to_string()))?;
                self.submit(range, &[], kind)?;
            }
        }
        self.accepted = (accepted != boot::ALL_ACCEPTED).then_some(Gpa(accepted));
        Ok(())
    }

    /// Declares zero what lies below the address that the guest was told, and was not loaded.
    fn fill(&mut self) -> Result<(), Error> {
        let Some(accepted) = self.accepted else { return Ok(()) };
        let mut holes = Vec::new();
        for slot in self.memory.ranges() {
            let end = slot.end().min(accepted);
            let mut next = slot.start();
            // What was loaded lies in slots, and nothing of it overlaps; a range may go on in the slot behind.
            for loaded in self.loaded.values().filter(|range| range.end() > slot.start() && range.start() < end) {
                holes.push((next, loaded.start()));
                next = loaded.end();
            }
            holes.push((next, end));
        }
        for (start, end) in holes {
            if start < end {
                let hole = GpaRange::new(start.0, end.0 - start.0).map_err(|error| Error::Layout(error.to_string()))?;
                self.zero(hole)?;
            }
        }
        Ok(())
    }

    /// Makes every vCPU start in 64-bit mode at `entry`, on page tables that map all memory to its own address and are
    /// loaded, measured, from `tables` on; RDI is the vCPU's index and RSI the boot page. How the tables tell the sides
    /// apart, where they do, is said at [`x86::identity_map`].
    ///
    /// # Errors
    /// As [`Launch::load`] and [`Launch::set_vcpu`].
    pub fn start_in_long_mode(&mut self, entry: Gpa, tables: Gpa, boot_page: Gpa) -> Result<(), Error> {
        let top = self.config.memory.iter().map(|range| range.end().0).max().unwrap_or(0);
        let private_bit = self.interface.private_bit;
        self.load(tables, &x86::identity_map(tables, top, private_bit)?, PageKind::Measured)?;
        let root = Gpa(tables.0 | private_bit.map_or(0, |bit| 1 << bit));
        for index in 0..self.config.vcpus {
            self.set_vcpu(index, &VcpuState::long_mode(entry, root, index, boot_page))?;
        }
        Ok(())
    }

    /// Sets the first state of a vCPU, which is measured.
    ///
    /// # Errors
    /// [`Error::VcpuState`] if there is no such vCPU or its state is set already, [`Error::Backend`].
    pub fn set_vcpu(&mut self, index: u32, state: &VcpuState) -> Result<(), Error> {
        if self.failed {
            return Err(Error::LaunchFailed);
        }
        match self.vcpus.get_mut(index as usize) {
            None => return Err(Error::VcpuState { vcpu: index, problem: "there is no such vcpu" }),
            Some(true) => return Err(Error::VcpuState { vcpu: index, problem: "its state is set already" }),
            Some(set) => *set = true,
        }
        let set = self.loader.set_vcpu(index, state);
        self.done("set the first state of a vcpu", None, set)?;
        self.transcript.entries.push(Entry::Vcpu { index, state: *state });
        Ok(())
    }

    /// Makes sure that nothing lacks.
    fn complete(&mut self) -> Result<(), Error> {
        if self.failed {
            return Err(Error::LaunchFailed);
        }
        if let Some(vcpu) = self.vcpus.iter().position(|set| !set) {
            return Err(Error::VcpuState { vcpu: vcpu as u32, problem: "it has no state to start from" });
        }
        self.fill()
    }

    /// Ends the launch: from here on the guest runs, and nothing more can be loaded.
    ///
    /// # Errors
    /// [`Error::VcpuState`] if a vCPU has no state, [`Error::LaunchFailed`], [`Error::Backend`].
    pub fn seal(mut self) -> Result<L::Vm, Error> {
        self.complete()?;
        let sealed = self.loader.seal(self.transcript);
        sealed.map_err(|source| Error::Backend { step: "seal the vm", range: None, source })
    }
}

#[cfg(test)]
mod tests;
