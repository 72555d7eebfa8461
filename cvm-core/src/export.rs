//! Protected export: private pages leave a VM so that only the target that they are for can open them.
//!
//! Moving a VM takes more, and all of it is the VMM's: shared pages, which are its own anyway, vCPUs where the host sees them,
//! and seeing to it that each page arrives once, at its place. What a trusted entity notices of a page that was changed, held
//! back or sent twice is said by its backend.

use crate::{Error, Gpa};

/// Who shall open what is exported: what a platform says of itself, in the form that its trusted entity has for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The certificate of its key.
    pub key: Vec<u8>,
    /// The certificates that vouch for the key.
    pub chain: Vec<u8>,
    /// The certificates of the maker, which vouch for these.
    pub maker: Vec<u8>,
}

/// What the target has to know before the first page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The certificate of the key of the platform that sends.
    pub key: Vec<u8>,
    /// The guest's policy, in the form that the trusted entity has for it.
    pub policy: u64,
    /// The keys of this export, for the target alone.
    pub session: Vec<u8>,
}

/// A private page on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedPage {
    /// Where it was, and has to be.
    pub gpa: Gpa,
    /// What proves that it is unchanged.
    pub proof: Vec<u8>,
    /// What is in it, encrypted.
    pub data: Vec<u8>,
}

/// A VM whose private pages can leave it: [`Vm::export`](crate::Vm::export).
pub trait Export<V>: Send + Sync {
    /// Begins an export for `target`. It takes all vCPUs of the VM: none runs while it is under way.
    ///
    /// # Errors
    /// [`Error::Config`] if they are not all vCPUs of this VM, [`Error::Backend`] if the trusted entity refuses. The guest can
    /// go on then.
    fn begin<'a>(&'a self, vcpus: &'a mut [V], target: &Target) -> Result<Box<dyn Exporting<V> + 'a>, Error>;
}

/// An export under way. If it is dropped, it is cancelled as by [`Exporting::cancel`].
pub trait Exporting<V> {
    /// What the target has to know.
    fn origin(&self) -> &Origin;

    /// The vCPUs, which do not run.
    fn vcpus(&mut self) -> &mut [V];

    /// Seals the private page at `gpa`.
    ///
    /// # Errors
    /// [`Error::OutsideMemory`], [`Error::Backend`].
    fn page(&mut self, gpa: Gpa) -> Result<SealedPage, Error>;

    /// Ends the export. The guest is the target's now: no vCPU runs here any more.
    ///
    /// # Errors
    /// [`Error::Backend`].
    fn finish(self: Box<Self>) -> Result<(), Error>;

    /// Ends the export, and the guest can go on here.
    ///
    /// # Errors
    /// [`Error::Backend`].
    fn cancel(self: Box<Self>) -> Result<(), Error>;
}
