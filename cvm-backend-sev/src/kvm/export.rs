//! SEV guests leave this platform and arrive here: pages sealed by the firmware of one for that of the other.

#![allow(unsafe_code, reason = "commands hold addresses")]

use super::command::{Command, Commands};
use super::sev::{Encrypted, MOST_BLOB, blob};
use super::{Error, device};
use crate::SevPolicy;
use crate::owner::HEADER_BYTES;
use cvm_backend_kvm::backend::{LocalVcpu, LocalVm, failed};
use cvm_core::export::{Export, Exporting, Origin, SealedPage, Target};
use cvm_core::{BoxError, Error as CoreError, Gpa, GpaRange, PAGE_SIZE, Transcript};
use kvm_bindings::{kvm_sev_receive_start, kvm_sev_receive_update_data, kvm_sev_send_start, kvm_sev_send_update_data};
use std::sync::Arc;

/// Length of a session: nonce, wrapped keys, initialisation vector, two MACs (Secure Encrypted Virtualization API,
/// `SEND_START`).
const SESSION_BYTES: usize = 16 + 32 + 16 + 32 + 32;

const PAGE: usize = PAGE_SIZE as usize;

/// Exports the pages of one VM.
#[derive(Debug)]
pub(super) struct SevExport {
    commands: Commands,
    policy: SevPolicy,
    vcpus: usize,
    /// Where the guest's memory is in this process, slot by slot. It lives as long as the VM that this belongs to.
    places: Vec<(GpaRange, u64)>,
}

impl SevExport {
    pub(super) fn new(made: &Encrypted, policy: SevPolicy) -> Result<Self, Error> {
        let memory = made.memory()?;
        let places = made.slots().iter().map(|slot| Ok((*slot, memory.address(*slot)?)));
        let places = places.collect::<Result<_, Error>>()?;
        Ok(Self { commands: made.commands.clone(), policy, vcpus: made.vcpus(), places })
    }

    fn start(&self, target: &Target) -> Result<Origin, Error> {
        let (pdh_cert_uaddr, pdh_cert_len) = blob("the target's certificate", &target.key)?;
        let (plat_certs_uaddr, plat_certs_len) = blob("the target's chain of certificates", &target.chain)?;
        let (amd_certs_uaddr, amd_certs_len) = blob("the maker's certificates", &target.maker)?;
        let key = device::platform_keys(self.commands.device())?.certificate;
        let mut session = vec![0; SESSION_BYTES];
        let mut start = kvm_sev_send_start {
            pdh_cert_uaddr,
            pdh_cert_len,
            plat_certs_uaddr,
            plat_certs_len,
            amd_certs_uaddr,
            amd_certs_len,
            session_uaddr: session.as_mut_ptr() as u64,
            session_len: session.len() as u32,
            ..Default::default()
        };
        // SAFETY: the kernel reads and writes a kvm_sev_send_start, reads the bytes of the certificates, and writes the session,
        // which has as many bytes as it says.
        unsafe { self.commands.give_with(Command::SendStart, &mut start)? };
        session.truncate(start.session_len as usize);
        Ok(Origin { key, policy: self.policy.bits().into(), session })
    }

    /// Seals the page in `page`, which lies at `place` in this process.
    fn seal(&self, page: GpaRange, place: u64) -> Result<SealedPage, Error> {
        let (mut proof, mut data) = (vec![0; HEADER_BYTES], vec![0; PAGE]);
        let mut update = kvm_sev_send_update_data {
            hdr_uaddr: proof.as_mut_ptr() as u64,
            hdr_len: proof.len() as u32,
            guest_uaddr: place,
            guest_len: PAGE as u32,
            trans_uaddr: data.as_mut_ptr() as u64,
            trans_len: data.len() as u32,
            ..Default::default()
        };
        // SAFETY: the kernel reads and writes a kvm_sev_send_update_data, and writes header and data, which have as many bytes
        // as it says; the firmware reads the guest's page.
        let sealed = unsafe { self.commands.give_with(Command::SendUpdateData, &mut update) };
        sealed.map_err(|error| error.at(page))?;
        Ok(SealedPage { gpa: page.start(), proof, data })
    }
}

impl Export<LocalVcpu> for SevExport {
    fn begin<'a>(
        &'a self,
        vcpus: &'a mut [LocalVcpu],
        target: &Target,
    ) -> Result<Box<dyn Exporting<LocalVcpu> + 'a>, CoreError> {
        if vcpus.len() != self.vcpus || !vcpus.iter().all(|vcpu| Arc::ptr_eq(vcpu.vm(), self.commands.vm())) {
            return Err(CoreError::Config(format!("it takes all {} vcpus of this vm", self.vcpus)));
        }
        let origin = self.start(target).map_err(failed("begin an export"))?;
        Ok(Box::new(Sending { export: self, vcpus, origin, over: false }))
    }
}

/// An export under way.
struct Sending<'a> {
    export: &'a SevExport,
    vcpus: &'a mut [LocalVcpu],
    origin: Origin,
    over: bool,
}

impl Exporting<LocalVcpu> for Sending<'_> {
    fn origin(&self) -> &Origin {
        &self.origin
    }

    fn vcpus(&mut self) -> &mut [LocalVcpu] {
        self.vcpus
    }

    fn page(&mut self, gpa: Gpa) -> Result<SealedPage, CoreError> {
        let outside = CoreError::OutsideMemory { gpa };
        let Ok(page) = GpaRange::from_pages(gpa.0, 1) else { return Err(outside) };
        let slot = self.export.places.iter().find(|(slot, _)| slot.contains_range(&page));
        let Some((slot, address)) = slot else { return Err(outside) };
        let sealed = self.export.seal(page, address + (gpa.0 - slot.start().0));
        sealed.map_err(|error| CoreError::Backend { step: "export a page", range: Some(page), source: error.into() })
    }

    fn finish(mut self: Box<Self>) -> Result<(), CoreError> {
        self.export.commands.give(Command::SendFinish).map_err(failed("finish an export"))?;
        self.over = true;
        self.vcpus.iter_mut().for_each(LocalVcpu::retire);
        Ok(())
    }

    fn cancel(mut self: Box<Self>) -> Result<(), CoreError> {
        self.over = true;
        self.export.commands.give(Command::SendCancel).map_err(failed("cancel an export"))
    }
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        // A guest whose export cannot be cancelled can still run, but not be exported again: that says so then.
        if !self.over {
            let _ = self.export.commands.give(Command::SendCancel);
        }
    }
}

/// The pages that have not arrived, of those that a guest has: a bit for each.
#[derive(Debug)]
struct MissingPages {
    slots: Vec<(GpaRange, Vec<u64>)>,
    count: u64,
}

impl MissingPages {
    fn all(slots: &[GpaRange]) -> Self {
        let count = slots.iter().map(GpaRange::pages).sum();
        let bits = |slot: &GpaRange| vec![u64::MAX; slot.pages().div_ceil(64) as usize];
        Self { slots: slots.iter().map(|slot| (*slot, bits(slot))).collect(), count }
    }

    /// The word with the bit of the page at `gpa`, and that bit; nothing if no slot has such a page.
    fn place(&mut self, gpa: Gpa) -> Option<(&mut u64, u64)> {
        let (slot, bits) = self.slots.iter_mut().find(|(slot, _)| slot.contains(gpa))?;
        let page = gpa.0.is_multiple_of(PAGE_SIZE).then_some((gpa.0 - slot.start().0) / PAGE_SIZE)?;
        Some((bits.get_mut((page / 64) as usize)?, 1 << (page % 64)))
    }

    fn contains(&mut self, gpa: Gpa) -> bool {
        self.place(gpa).is_some_and(|(word, bit)| *word & bit != 0)
    }

    /// Takes out a page; whether it was in.
    fn remove(&mut self, gpa: Gpa) -> bool {
        let was_in = self.place(gpa).is_some_and(|(word, bit)| std::mem::replace(word, *word & !bit) & bit != 0);
        self.count -= u64::from(was_in);
        was_in
    }

    fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// A guest that arrives: a VM that has no contents yet. Dropping it leaves nothing of it.
///
/// What the firmware of the target notices, and what it does not (Secure Encrypted Virtualization API, `SEND_UPDATE_DATA` and
/// `RECEIVE_UPDATE_DATA`):
///
/// | on the way | noticed |
/// |---|---|
/// | a page is changed, cut or extended | yes: each has a MAC by a key that the two share for this export |
/// | a page of another export is put in | yes: that had another key |
/// | a page of this export is held back, or sent again when it has changed | no: the MAC has no counter |
/// | two pages change places | no: the MAC has no address |
///
/// This wants each page once, and so notices the loss of one. Nobody but the host vouches for that, and a host can move
/// pages of a running SEV guest anyway.
#[derive(Debug)]
pub struct Receiving {
    made: Encrypted,
    policy: SevPolicy,
    missing: MissingPages,
}

impl Receiving {
    pub(super) fn new(made: Encrypted, origin: &Origin) -> Result<Self, Error> {
        let policy = u32::try_from(origin.policy).map_err(|_| Error::Origin("its policy has more than 32 bits"))?;
        let (pdh_uaddr, pdh_len) = blob("the origin's certificate", &origin.key)?;
        let (session_uaddr, session_len) = blob("the origin's session", &origin.session)?;
        let mut start =
            kvm_sev_receive_start { policy, pdh_uaddr, pdh_len, session_uaddr, session_len, ..Default::default() };
        let policy = SevPolicy::from_bits(policy).map_err(|_| Error::Origin("its policy has reserved bits"))?;
        // SAFETY: the kernel reads and writes a kvm_sev_receive_start, and reads the bytes of certificate and session.
        unsafe { made.commands.give_with(Command::ReceiveStart, &mut start)? };
        let missing = MissingPages::all(made.slots());
        Ok(Self { made, policy, missing })
    }

    /// Has the firmware open `page`, and put it at its place.
    ///
    /// # Errors
    /// [`Error::Origin`] for a page that is not missing, or whose length cannot be; [`Error::Command`], with
    /// [`FirmwareError::BadMeasurement`](crate::FirmwareError::BadMeasurement) for one that was changed.
    pub fn page(&mut self, page: &SealedPage) -> Result<(), Error> {
        if page.data.len() != PAGE || page.proof.len() > MOST_BLOB {
            return Err(Error::Origin("a page has another length than a page"));
        }
        if !self.missing.contains(page.gpa) {
            return Err(Error::Origin("a page came twice, or is none of this guest's"));
        }
        let range = GpaRange::from_pages(page.gpa.0, 1).map_err(|_| Error::Origin("a page is nowhere"))?;
        let (hdr_uaddr, hdr_len) = blob("the proof of a page", &page.proof)?;
        let mut update = kvm_sev_receive_update_data {
            hdr_uaddr,
            hdr_len,
            guest_uaddr: self.made.memory()?.address(range)?,
            guest_len: PAGE as u32,
            trans_uaddr: page.data.as_ptr() as u64,
            trans_len: PAGE as u32,
            ..Default::default()
        };
        // SAFETY: the kernel reads a kvm_sev_receive_update_data and the bytes of header and data; the firmware writes to the
        // guest's page, and to nothing else.
        let opened = unsafe { self.made.commands.give_with(Command::ReceiveUpdateData, &mut update) };
        opened.map_err(|error| error.at(range))?;
        self.missing.remove(page.gpa);
        Ok(())
    }

    /// The VM, when all private pages have arrived: all but those in `shared`, which are shared in it and zero. Its vCPUs have
    /// still to be [restored](LocalVcpu::restore). `transcript` is what the origin says that the guest was launched from.
    ///
    /// # Errors
    /// [`Error::Origin`] if a page is missing, or is shared and came; [`Error::Command`].
    pub fn finish(mut self, shared: &[GpaRange], transcript: Transcript) -> Result<LocalVm, BoxError> {
        for page in shared.iter().flat_map(|range| (range.start().0..range.end().0).step_by(PAGE)) {
            if !self.missing.remove(Gpa(page)) {
                return Err(Error::Origin("a shared page was sent as a private one, or twice").into());
            }
        }
        if !self.missing.is_empty() {
            return Err(Error::Origin("a page is missing").into());
        }
        self.made.commands.give(Command::ReceiveFinish)?;
        self.made.finish(self.policy, transcript, shared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_of_a_guest_is_missing_until_it_is_taken_out_once() {
        let slot = |start: u64, pages: u64| GpaRange::from_pages(start * PAGE_SIZE, pages).unwrap();
        let slots = [slot(0, 65), slot(100, 1)];
        let mut missing = MissingPages::all(&slots);
        for gpa in [65 * PAGE_SIZE, 99 * PAGE_SIZE, 101 * PAGE_SIZE, 1, u64::MAX] {
            assert!(!missing.contains(Gpa(gpa)) && !missing.remove(Gpa(gpa)), "{gpa:#x}");
        }
        for page in (0..65).chain([100]) {
            let gpa = Gpa(page * PAGE_SIZE);
            assert!(!missing.is_empty() && missing.contains(gpa) && missing.remove(gpa), "{page}");
            assert!(!missing.contains(gpa) && !missing.remove(gpa), "{page}");
        }
        assert!(missing.is_empty());
    }
}
