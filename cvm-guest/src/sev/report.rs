//! Reports of the secure processor about this guest, asked for by encrypted messages (AMD publication 56860, chapter 7).

#![allow(unsafe_code, reason = "a number that is used up must be in memory before the message is out")]

use super::event::code;
use super::ghcb::{Event, offset};
use super::{Exit, Fault, Ghcb, GhcbVcpu, Validate};
use crate::{Error, SharedRegion};
use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Tag};
use core::fmt;
use cvm_core::{Gpa, PAGE_SIZE};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};
use zeroize::Zeroizing;

/// How many bytes a report has.
pub const REPORT_LEN: usize = 1184;

const KEY_LEN: usize = 32;
const TAG_LEN: usize = 16;

/// Offsets in the page of secrets: the key of the highest privilege level, and the area for the guest's system, in which
/// Linux too keeps how many messages this key was used for.
const KEY: usize = 0x20;
const COUNT: usize = 0xa0;

/// What the secure processor and this guest know, and nobody else.
pub struct SecretsPage(&'static mut [u8; PAGE_SIZE as usize]);

impl fmt::Debug for SecretsPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretsPage(..)")
    }
}

impl SecretsPage {
    /// The secrets in `page`: that at [`BootPage::secrets`](cvm_core::boot::BootPage::secrets), which must stay as it is
    /// through every reset of the guest that it survives.
    pub fn new(page: &'static mut [u8; PAGE_SIZE as usize]) -> Self {
        Self(page)
    }

    fn key(&self) -> Zeroizing<[u8; KEY_LEN]> {
        Zeroizing::new(core::array::from_fn(|index| self.0[KEY + index]))
    }

    /// How many messages went to and fro.
    fn count(&self) -> u32 {
        u32::from_le_bytes(core::array::from_fn(|index| self.0[COUNT + index]))
    }

    fn store(&mut self, offset: usize, bytes: &[u8]) {
        for (to, byte) in self.0.iter_mut().skip(offset).zip(bytes) {
            // SAFETY: it is a reference's target. It is volatile so that it is in memory when the guest exits next.
            unsafe { core::ptr::write_volatile(to, *byte) };
        }
    }

    /// Whether the key can be used: there is one, and there are numbers left for a message and its answer.
    fn is_usable(&self) -> bool {
        *self.key() != [0; KEY_LEN] && self.count() < u32::MAX - 1
    }

    /// Takes the number of the next message; that of its answer is one higher. Neither will be used again, whatever comes
    /// of the message, and also if the guest is reset before it knows.
    fn take_number(&mut self) -> Result<u64, Fault> {
        if !self.is_usable() {
            return Err(Fault::KeyDisabled);
        }
        let count = self.count();
        self.store(COUNT, &(count + 2).to_le_bytes());
        Ok(u64::from(count) + 1)
    }
}

/// Before each message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    tag: [u8; TAG_LEN],
    rest_of_tag: [u8; 16],
    number: u64,
    reserved0: u64,
    /// From here on authenticated.
    algorithm: u8,
    header_version: u8,
    header_len: u16,
    kind: u8,
    version: u8,
    len: u16,
    reserved1: u32,
    key: u8,
    reserved2: [u8; 35],
}

const HEADER_LEN: usize = size_of::<Header>();
/// Where what is authenticated begins: 48 bytes of the header.
const AUTHENTICATED: usize = 0x30;

const REPORT_REQUEST: u8 = 5;
const REPORT_RESPONSE: u8 = 6;

impl Header {
    fn new(kind: u8, number: u64, len: usize) -> Self {
        Self {
            number,
            // AES-256-GCM.
            algorithm: 1,
            header_version: 1,
            header_len: HEADER_LEN as u16,
            kind,
            version: 1,
            len: len as u16,
            ..Self::new_zeroed()
        }
    }

    /// The number is what a key is used with once.
    fn nonce(&self) -> [u8; 12] {
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&self.number.to_le_bytes());
        nonce
    }

    fn authenticated(&self) -> &[u8] {
        &self.as_bytes()[AUTHENTICATED..]
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ReportRequest {
    data: [u8; 64],
    privilege_level: u32,
    key_select: u32,
    reserved: [u8; 24],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ReportResponse {
    status: u32,
    len: u32,
    reserved: [u8; 24],
    report: [u8; REPORT_LEN],
}

/// What the host made of a message to the secure processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Requested {
    /// The firmware's code; 0 is success.
    firmware: u32,
    /// The host's code; 0 is success.
    host: u32,
    /// How many pages the certificates need, if the host says that there are too few.
    pages: u64,
}

/// The host's codes: too few pages for certificates, and try again (AMD publication 56421, section 4.1.8).
const TOO_FEW_PAGES: u32 = 1;
const BUSY: u32 = 2;

impl Ghcb {
    /// Sends the message in one shared page to the secure processor; its answer will be in the other.
    fn guest_request(
        &self,
        exit: &impl Exit,
        request: Gpa,
        response: Gpa,
        certificates: Option<&SharedRegion>,
    ) -> Result<Requested, Fault> {
        let mut event = Event { code: code::GUEST_REQUEST, info1: request.0, info2: response.0, ..Event::default() };
        if let Some(pages) = certificates.map(SharedRegion::range) {
            event.code = code::EXTENDED_GUEST_REQUEST;
            (event.rax, event.rbx) = (Some(pages.start().0), Some(pages.pages()));
        }
        let reply = self.exit(exit, event)?;
        let info2 = reply.info2()?;
        let (firmware, host) = (info2 as u32, (info2 >> 32) as u32);
        let needs = certificates.is_some() && host == TOO_FEW_PAGES;
        Ok(Requested { firmware, host, pages: if needs { reply.register(offset::RBX)? } else { 0 } })
    }
}

/// What the secure processor says of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// The report (AMD publication 56860, table 23), as it came. It is signed, so whoever gets it can check it.
    pub bytes: [u8; REPORT_LEN],
    /// How many pages the host's certificates need, if it was given too few; else 0.
    pub certificate_pages: u64,
}

/// A message that was sealed and not answered yet. Its number was taken for these bytes and goes with no others.
#[derive(Debug)]
struct Pending {
    number: u64,
    data: [u8; 64],
    bytes: [u8; HEADER_LEN + size_of::<ReportRequest>()],
}

impl Pending {
    fn seal(secrets: &mut SecretsPage, cipher: &Aes256Gcm, data: &[u8; 64]) -> Result<Self, Fault> {
        let number = secrets.take_number()?;
        let mut request = ReportRequest { data: *data, ..ReportRequest::new_zeroed() };
        let mut header = Header::new(REPORT_REQUEST, number, size_of::<ReportRequest>());
        let sealed = cipher.encrypt_inout_detached(
            &header.nonce().into(),
            header.authenticated(),
            request.as_mut_bytes().into(),
        );
        header.tag = sealed.map_err(|_| Fault::NotAuthentic)?.into();
        let mut bytes = [0; _];
        let (head, payload) = bytes.split_at_mut(HEADER_LEN);
        head.copy_from_slice(header.as_bytes());
        payload.copy_from_slice(request.as_bytes());
        Ok(Self { number, data: *data, bytes })
    }
}

/// Asks for reports.
///
/// A message that has no answer yet is kept, and is sent again byte by byte: neither a host that is busy nor one that lies
/// can make the guest use its number for another. So keep the reporter; with it a message that is pending is lost, and the
/// secure processor takes no other in its place.
#[derive(Debug)]
pub struct Reporter {
    secrets: SecretsPage,
    messages: SharedRegion,
    pending: Option<Pending>,
}

impl Reporter {
    /// With the key in `secrets`, by `messages`: two shared pages, one for each way.
    ///
    /// # Errors
    /// [`Fault::NoPage`] when `messages` has not two pages.
    pub fn new(secrets: SecretsPage, messages: SharedRegion) -> Result<Self, Fault> {
        if messages.range().pages() != 2 {
            return Err(Fault::NoPage(messages.gpa(0).0));
        }
        Ok(Self { secrets, messages, pending: None })
    }

    /// A report that has `data` in it. In `certificates`, which must be whole pages, the host puts what it has for whoever
    /// checks reports; the guest need not believe it, since certificates are signed.
    ///
    /// The host is asked once: how long a guest waits for a host that is busy is for its own clock to say. A message that an
    /// earlier call left without an answer is sent first, unless it is for the same `data`.
    ///
    /// # Errors
    /// [`Fault::Busy`], [`Fault::Request`], [`Fault::NotAuthentic`], and faults of the host's: what became of the message is
    /// unknown, and the next call sends it again. [`Fault::NoReport`], [`Fault::KeyDisabled`], [`Fault::SnpOnly`].
    pub fn report<E: Exit, V: Validate>(
        &mut self,
        vcpu: &GhcbVcpu<E, V>,
        data: &[u8; 64],
        certificates: Option<&SharedRegion>,
    ) -> Result<Report, Error> {
        if !vcpu.is_snp() {
            return Err(Fault::SnpOnly.into());
        }
        let cipher = Aes256Gcm::new((&*self.secrets.key()).into());
        if let Some(earlier) = self.pending.take_if(|pending| pending.data != *data) {
            // Whoever asked for it is not there any more.
            self.exchange(vcpu, &cipher, earlier, None)?;
        }
        let pending = match self.pending.take() {
            Some(pending) => pending,
            None => Pending::seal(&mut self.secrets, &cipher, data)?,
        };
        let (response, certificate_pages) = self.exchange(vcpu, &cipher, pending, certificates)?;
        if response.status != 0 || response.len as usize != REPORT_LEN {
            return Err(Fault::NoReport(response.status).into());
        }
        Ok(Report { bytes: response.report, certificate_pages })
    }

    /// Sends a message and opens what comes back. Without an authentic answer the message is pending.
    fn exchange<E: Exit, V: Validate>(
        &mut self,
        vcpu: &GhcbVcpu<E, V>,
        cipher: &Aes256Gcm,
        pending: Pending,
        certificates: Option<&SharedRegion>,
    ) -> Result<(ReportResponse, u64), Error> {
        let answered = self.send(vcpu, cipher, &pending, certificates);
        if answered.is_err() {
            self.pending = Some(pending);
        }
        answered
    }

    fn send<E: Exit, V: Validate>(
        &self,
        vcpu: &GhcbVcpu<E, V>,
        cipher: &Aes256Gcm,
        pending: &Pending,
        mut certificates: Option<&SharedRegion>,
    ) -> Result<(ReportResponse, u64), Error> {
        let answer_at = PAGE_SIZE as usize;
        self.messages.write(0, &pending.bytes)?;
        self.messages.zero(answer_at, PAGE_SIZE as usize)?;

        let (to, from) = (self.messages.gpa(0), self.messages.gpa(answer_at));
        let mut certificate_pages = 0;
        loop {
            let requested = vcpu.ghcb().guest_request(vcpu.exit(), to, from, certificates)?;
            match (requested.firmware, requested.host) {
                (0, 0) => break,
                // Nothing was sent yet. The same message goes without, so that its number is used as it was meant.
                (_, TOO_FEW_PAGES) if certificates.take().is_some() => certificate_pages = requested.pages,
                (_, BUSY) => return Err(Fault::Busy.into()),
                (firmware, host) => return Err(Fault::Request { firmware, host }.into()),
            }
        }

        // Header and payload are read once; what follows looks at the copy.
        let mut answer = [0; HEADER_LEN + size_of::<ReportResponse>()];
        self.messages.read(answer_at, &mut answer)?;
        let (answered, payload) = answer.split_at_mut(HEADER_LEN);
        let answered = Header::read_from_bytes(answered).map_err(|_| Fault::NotAuthentic)?;
        let expected = Header {
            tag: answered.tag,
            rest_of_tag: answered.rest_of_tag,
            ..Header::new(REPORT_RESPONSE, pending.number + 1, size_of::<ReportResponse>())
        };
        if answered != expected {
            return Err(Fault::NotAuthentic.into());
        }
        let opened = cipher.decrypt_inout_detached(
            &expected.nonce().into(),
            expected.authenticated(),
            (&mut *payload).into(),
            &Tag::from(answered.tag),
        );
        opened.map_err(|_| Fault::NotAuthentic)?;
        let response = ReportResponse::read_from_bytes(payload).map_err(|_| Fault::NotAuthentic)?;
        Ok((response, certificate_pages))
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
