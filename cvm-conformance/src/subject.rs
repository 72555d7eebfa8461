//! What the suite has to know of a backend.

use crate::TrustedEntity;
use crate::guest::{self, Assembler};
use crate::quality;
use crate::vmm::Guest;
use cvm_core::launch::Loader;
use cvm_core::{BoxError, Error, Gpa, Launch, PageKind, Platform, Protection, VmConfig};
use iced_x86::IcedError;

/// The VMs of a platform.
pub type VmOf<P> = <<P as Platform>::Loader as Loader>::Vm;

/// A clause that a backend does not meet on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Departure {
    /// The clause's number.
    pub clause: &'static str,
    /// Why: a sentence for users.
    pub reason: String,
    /// How the clause shows it. Any other failure of the clause is a failure of the backend.
    pub shown_by: ShownBy,
}

/// How a clause shows that it is not met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShownBy {
    /// The backend refuses what the clause is about, as the contract says: [`Verdict::NotOffered`](crate::Verdict::NotOffered).
    Refusal,
    /// The check fails, and its message contains these words.
    Failure(&'static str),
}

impl Departure {
    /// The backend does not offer what `clause` is about, because of `reason`.
    pub fn not_offered(clause: &'static str, reason: impl Into<String>) -> Self {
        Self { clause, reason: reason.into(), shown_by: ShownBy::Refusal }
    }

    /// `clause` fails because of `reason`, with `words` in the message of its failure.
    pub fn fails(clause: &'static str, words: &'static str, reason: impl Into<String>) -> Self {
        Self { clause, reason: reason.into(), shown_by: ShownBy::Failure(words) }
    }
}

/// A backend with one kind of protection, to be tested.
pub trait Subject: Send + Sync + 'static {
    /// Its platform.
    type Platform: Platform + Send + Sync + 'static;

    /// What protects its guests.
    fn protection(&self) -> Protection;

    /// The platform on this host.
    ///
    /// # Errors
    /// What the host lacks. Nothing is tested then, which is said, or fails if it is [required](Subject::required).
    fn open(&self) -> Result<Self::Platform, BoxError>;

    /// Whether a host without this is a failure.
    fn required(&self) -> bool {
        false
    }

    /// The clauses that are not met here, with the reasons.
    fn departures(&self, platform: &Self::Platform) -> Vec<Departure> {
        let _ = platform;
        Vec::new()
    }

    /// What vouches for its guests and can be asked by the suite; nothing where nobody but the library in the VMM's process
    /// measures a launch, or where only a guest can ask.
    fn trusted_entity(&self) -> Option<&dyn TrustedEntity<Self::Platform>> {
        None
    }

    /// What this backend's VMs take up outside the process, by name, such as identifiers of address spaces: all of it has to
    /// come back. What the process itself has (open files, threads, children, memory) the suite counts.
    fn held(&self) -> Vec<(String, u64)> {
        Vec::new()
    }
}

/// Where a launch has what a guest needs.
pub(crate) struct Places {
    pub(crate) boot_page: Gpa,
    pub(crate) tables: Gpa,
    pub(crate) code: Gpa,
}

/// Where guests have it that are not in want of room.
const PLACES: Places = Places { boot_page: Gpa(guest::BOOT_PAGE), tables: Gpa(guest::TABLES), code: Gpa(guest::CODE) };

/// A subject on this host, for the check of a clause.
pub struct Bench<'a, P> {
    /// The platform.
    pub platform: &'a P,
    /// What protects its guests.
    pub protection: Protection,
    /// What vouches for its guests, if the suite can ask it.
    pub(crate) trusted_entity: Option<&'a dyn TrustedEntity<P>>,
    /// Whether the main of this program is the suite's.
    pub(crate) is_of_suite: bool,
    open: &'a (dyn Fn() -> Result<P, BoxError> + Sync),
    held: &'a (dyn Fn() -> Vec<(String, u64)> + Sync),
}

impl<'a, P: Platform> Bench<'a, P> {
    /// A platform whose guests have this protection, for tests of a backend's own that want guests as the suite has them.
    pub fn new(platform: &'a P, protection: Protection) -> Self {
        let open = &|| Err("it was opened elsewhere".into());
        Self { platform, protection, trusted_entity: None, is_of_suite: false, open, held: &Vec::new }
    }

    /// The same with a way to [open](Subject::open) the platform once more, one to [count](Subject::held) what VMs take up outside
    /// the process, and the [trusted entity](Subject::trusted_entity).
    pub(crate) fn of_subject(
        self,
        open: &'a (dyn Fn() -> Result<P, BoxError> + Sync),
        held: &'a (dyn Fn() -> Vec<(String, u64)> + Sync),
        trusted_entity: Option<&'a dyn TrustedEntity<P>>,
    ) -> Self {
        Self { is_of_suite: true, open, held, trusted_entity, ..self }
    }

    /// The platform once more.
    ///
    /// # Errors
    /// What the host lacks.
    pub(crate) fn open(&self) -> Result<P, BoxError> {
        (self.open)()
    }

    /// What the backend's VMs take up outside the process.
    pub fn held(&self) -> Vec<(String, u64)> {
        (self.held)()
    }

    /// A VM with [`guest::MEMORY`], and the defaults for the rest.
    pub fn config(&self, vcpus: u32) -> VmConfig {
        VmConfig::new(guest::MEMORY, vcpus).expect("a sound configuration")
    }

    /// The machine code for `gpa` of a guest in the VM of this launch.
    pub fn assemble(
        &self,
        launch: &Launch<P::Loader>,
        gpa: u64,
        write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
    ) -> Vec<u8> {
        let mut assembler = Assembler::new(launch.config().doorbell, *launch.interface());
        write(&mut assembler).and_then(|()| assembler.assemble(gpa)).expect("sound code")
    }

    /// Loads all that a guest needs, after what `first` has loaded: each vCPU starts at the code that `write` has written.
    ///
    /// # Errors
    /// What the launch failed with.
    pub fn load_after(
        &self,
        config: VmConfig,
        first: impl FnOnce(&Self, &mut Launch<P::Loader>) -> Result<(), Error>,
        write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
    ) -> Result<Launch<P::Loader>, Error> {
        self.load_at(&PLACES, config, first, write)
    }

    /// The same with other places for it.
    pub(crate) fn load_at(
        &self,
        places: &Places,
        config: VmConfig,
        first: impl FnOnce(&Self, &mut Launch<P::Loader>) -> Result<(), Error>,
        write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
    ) -> Result<Launch<P::Loader>, Error> {
        let mut launch = self.platform.launch(config)?;
        first(self, &mut launch)?;
        let code = self.assemble(&launch, places.code.0, |a| a.begin().and_then(|()| write(a)));
        launch.load(places.code, &code, PageKind::Measured)?;
        launch.start_in_long_mode(places.code, places.tables, places.boot_page)?;
        launch.load_boot_page(places.boot_page, [0; 4])?;
        Ok(launch)
    }

    /// Loads all that a guest needs: each vCPU starts at the code that `write` has written.
    ///
    /// # Errors
    /// What the launch failed with.
    pub fn load(
        &self,
        config: VmConfig,
        write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
    ) -> Result<Launch<P::Loader>, Error> {
        self.load_after(config, |_, _| Ok(()), write)
    }

    /// A guest that is ready to run.
    pub fn guest(
        &self,
        config: VmConfig,
        write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
    ) -> Guest<VmOf<P>> {
        Guest::from_launch(self.load(config, write).unwrap_or_else(|error| panic!("{}", quality::told(&error))))
    }
}
