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

mod rehearsal;

pub use rehearsal::{Never, Rehearsal};

use crate::boot::{self, BootPage, Interface, MemoryRange};
use crate::doorbell::{Doorbell, Transport};
use crate::image::Image;
use crate::interrupt::{InterruptController, InterruptPolicy, Refusal};
#[cfg(all(feature = "linux", target_arch = "x86_64"))]
use crate::linux::LinuxImage;
use crate::memory::Slots;
use crate::x86::{self, VcpuState};
use crate::{BoxError, Error, Gpa, GpaRange, PAGE_SIZE, Policy};
use sha2::{Digest, Sha384};
use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;
use zerocopy::{FromZeros, IntoBytes};

/// The most vCPUs that a VM can have. KVM on x86 allows 1024 (`KVM_CAP_MAX_VCPUS`), and hosts may allow fewer.
pub const MAX_VCPUS: u32 = 1024;

/// The most memory that a VM can have, in bytes: what the doorbell's 32-bit page frame number can name.
pub const MAX_MEMORY: u64 = PAGE_SIZE << 32;

/// The page of the local APIC (Intel SDM, volume 3, section 12.4.1). No access to it is emulated, but KVM may use it.
pub const APIC_PAGE: Gpa = Gpa(0xfee0_0000);

/// What a guest accepts memory by, in bytes: where what was loaded ends for it.
const LARGE_PAGE: u64 = 2 << 20;

/// What a VM shall be.
#[derive(Debug, Clone)]
pub struct VmConfig {
    /// Where memory is: one slot each.
    pub memory: Vec<GpaRange>,
    /// How many vCPUs there are.
    pub vcpus: u32,
    /// Which interrupts the guest accepts.
    pub interrupts: InterruptPolicy,
    /// Who hands them to it.
    pub interrupt_controller: InterruptController,
    /// What it demands of its host besides isolation.
    pub policy: Policy,
    /// Which instructions ring the doorbell.
    pub doorbell: Doorbell,
    /// How the guest asks for conversions; `None` is the best that works on this host.
    pub transport: Option<Transport>,
}

impl VmConfig {
    /// A VM with `bytes` of memory from address 0, `vcpus` vCPUs, and the defaults for the rest.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Layout`] as [`VmConfig::check`].
    pub fn new(bytes: u64, vcpus: u32) -> Result<Self, Error> {
        let memory = GpaRange::new(0, bytes).map_err(|error| Error::Layout(error.to_string()))?;
        let config = Self {
            memory: vec![memory],
            vcpus,
            interrupts: InterruptPolicy::default(),
            interrupt_controller: InterruptController::None,
            policy: Policy::empty(),
            doorbell: Doorbell::Port,
            transport: None,
        };
        config.check()?;
        Ok(config)
    }

    /// Whether it makes sense, on whatever platform.
    ///
    /// # Errors
    /// [`Error::Config`] for a number of vCPUs that is 0 or above [`MAX_VCPUS`]; [`Error::Layout`] for no memory, more
    /// than [`MAX_MEMORY`] or [`boot::MAX_RANGES`] slots of it, or slots that overlap. With an
    /// [`InterruptController::Apic`] also [`Error::Config`] for level-triggered vectors, and [`Error::Layout`] for memory
    /// at [`APIC_PAGE`].
    pub fn check(&self) -> Result<(), Error> {
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(Error::Config(format!("{} vcpus; it takes 1 to {MAX_VCPUS}", self.vcpus)));
        }
        if self.memory.len() > boot::MAX_RANGES {
            return Err(Error::Layout(format!("more than {} ranges of memory", boot::MAX_RANGES)));
        }
        if let Some(range) = self.memory.iter().find(|range| range.end().0 > MAX_MEMORY) {
            return Err(Error::Layout(format!("{range} ends above {MAX_MEMORY:#x}")));
        }
        let slots = Slots::new(&self.memory)?;
        if self.interrupt_controller == InterruptController::Apic {
            if self.interrupts.level_bits() != [0; 4] {
                return Err(Error::Config(Refusal::EdgesOnly.to_string()));
            }
            if slots.find(APIC_PAGE).is_some() {
                return Err(Error::Layout(format!("there is memory at {APIC_PAGE}, where the local apic is")));
            }
        }
        Ok(())
    }
}

/// What a submitted page is to the measurement. The numbers are those of the transcript.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u64)]
pub enum PageKind {
    /// Its contents are measured.
    Measured = 1,
    /// It is zero, which is measured.
    Zero = 3,
    /// Only its address is measured, not its contents: the guest must not trust them.
    Unmeasured = 4,
    /// The trusted entity fills it with what only it and the guest know.
    Secrets = 5,
    /// The trusted entity has checked that the CPUID leaves in it are such as this processor has.
    Cpuid = 6,
}

/// A line of the transcript.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// What the guest was promised before any page.
    Config {
        /// How many vCPUs.
        vcpus: u32,
        /// The accepted vectors as 256 bits.
        interrupts: [u64; 4],
        /// Those of them that are levels, as 256 bits.
        levels: [u64; 4],
        /// The most interrupts in a second; 0 for no limit.
        most_interrupts: u32,
        /// The policy.
        policy: Policy,
        /// The interrupt controller.
        interrupt_controller: InterruptController,
    },
    /// One page with contents.
    Page {
        /// What it is to the measurement.
        kind: PageKind,
        /// Where it is.
        gpa: Gpa,
        /// SHA-384 of its contents if it is [`PageKind::Measured`], else zeros.
        contents: [u8; 48],
    },
    /// Pages of zeros.
    Zero {
        /// Where they are.
        range: GpaRange,
    },
    /// The first state of a vCPU.
    Vcpu {
        /// Its index.
        index: u32,
        /// The state.
        state: VcpuState,
    },
}

/// All that was submitted to a launch, in the order of submission.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transcript {
    entries: Vec<Entry>,
}

impl Transcript {
    /// Its lines.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The measurement of software-only isolation: a chain of SHA-384.
    ///
    /// It starts as SHA-384 of the ASCII text `cvm software launch 1`. Each page, vCPU and configuration makes it
    /// SHA-384 of: the measurement so far (48 bytes), a kind (8 bytes, little endian: the [`PageKind`], 16 for a
    /// configuration, 17 for a vCPU), a place (8 bytes, little endian: the GPA, the number of vCPUs, the vCPU's index),
    /// and a digest (48 bytes: of a page, the entry's; of a vCPU, SHA-384 of its state's bytes; of a configuration,
    /// SHA-384 of five things, little endian: 32 bytes of accepted vectors, 32 of those that are levels, 8 of the most
    /// interrupts in a second, 8 of the policy, 8 of the [`InterruptController`]; of a zero page, zeros).
    pub fn measurement(&self) -> Measurement {
        let mut chain = digest(b"cvm software launch 1");
        let mut extend = |kind: u64, place: u64, contents: &[u8; 48]| {
            let next = Sha384::new().chain_update(chain).chain_update(kind.to_le_bytes());
            chain = next.chain_update(place.to_le_bytes()).chain_update(contents).finalize().into();
        };
        for entry in &self.entries {
            match entry {
                Entry::Config { vcpus, interrupts, levels, most_interrupts, policy, interrupt_controller } => {
                    let others = [u64::from(*most_interrupts), policy.bits(), *interrupt_controller as u64];
                    let promises = interrupts.iter().chain(levels).chain(&others);
                    let promises = promises.flat_map(|number| number.to_le_bytes()).collect::<Vec<_>>();
                    extend(16, u64::from(*vcpus), &digest(&promises));
                }
                Entry::Page { kind, gpa, contents } => extend(*kind as u64, gpa.0, contents),
                Entry::Zero { range } => {
                    for page in 0..range.pages() {
                        extend(PageKind::Zero as u64, range.start().0 + page * PAGE_SIZE, &[0; 48]);
                    }
                }
                Entry::Vcpu { index, state } => extend(17, u64::from(*index), &digest(state.as_bytes())),
            }
        }
        Measurement(chain)
    }
}

/// For whoever computes the measurement of a launch that somebody else made.
impl FromIterator<Entry> for Transcript {
    fn from_iter<I: IntoIterator<Item = Entry>>(entries: I) -> Self {
        Self { entries: entries.into_iter().collect() }
    }
}

/// What enters the measurement for the contents of a page, or for the bytes of a vCPU's state: SHA-384.
pub fn digest(contents: &[u8]) -> [u8; 48] {
    Sha384::digest(contents).into()
}

/// The digest that stands for a whole launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Measurement(pub [u8; 48]);

impl fmt::Display for Measurement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

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
        let first = Entry::Config {
            vcpus: config.vcpus,
            interrupts: config.interrupts.bits(),
            levels: config.interrupts.level_bits(),
            most_interrupts: config.interrupts.most_per_second().map_or(0, NonZeroU32::get),
            policy: config.policy,
            interrupt_controller: config.interrupt_controller,
        };
        Ok(Self {
            loader,
            interface: interface.into(),
            memory,
            loaded: BTreeMap::new(),
            accepted: None,
            vcpus: vec![false; config.vcpus as usize],
            transcript: Transcript { entries: vec![first] },
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
    /// Where a guest has to accept memory that was not loaded, it is told here from what address on: the next multiple of
    /// 2 MiB above all that was loaded so far. So what lies above must be loaded before; what is not loaded below will be
    /// zero, which is measured at the seal.
    ///
    /// # Errors
    /// As [`Launch::load`].
    pub fn load_boot_page(&mut self, gpa: Gpa, argument: [u64; 4]) -> Result<(), Error> {
        let following = |page: u64| gpa.0.saturating_add(page * PAGE_SIZE);
        let Interface { transport, exits, private_bit, acceptance, vouched_pages } = self.interface;
        let last = self.loaded.values().next_back().map_or(0, |range| range.end().0);
        let accepted = last.max(following(1 + 2 * u64::from(vouched_pages))).checked_next_multiple_of(LARGE_PAGE);
        let accepted = accepted.filter(|_| acceptance).unwrap_or(boot::ALL_ACCEPTED);
        let mut page = BootPage {
            magic: boot::MAGIC,
            vcpus: self.config.vcpus,
            doorbell: self.config.doorbell as u32,
            transport: transport as u32,
            exits: exits as u32,
            shared_at: if private_bit.is_some() { x86::SHARED_AT } else { 0 },
            accepted,
            argument,
            ..BootPage::new_zeroed()
        };
        if vouched_pages {
            (page.secrets, page.cpuid) = (following(1), following(2));
        }
        for (entry, range) in page.memory.iter_mut().zip(&self.config.memory) {
            *entry = MemoryRange { start: range.start().0, len: range.len() };
        }
        self.load(gpa, page.as_bytes(), PageKind::Measured)?;
        if vouched_pages {
            for (gpa, kind) in [(page.secrets, PageKind::Secrets), (page.cpuid, PageKind::Cpuid)] {
                let range = GpaRange::new(gpa, PAGE_SIZE).map_err(|error| Error::Layout(error.to_string()))?;
                self.submit(range, &[], kind)?;
            }
        }
        self.accepted = (accepted != boot::ALL_ACCEPTED).then_some(Gpa(accepted));
        Ok(())
    }

    /// Declares zero what the guest was told to be accepted and was not loaded.
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
