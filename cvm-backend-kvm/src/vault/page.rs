//! The page by which a VMM and a vCPU's thread in the vault talk: one question at a time, and the answer to it.
//!
//! | offset | what | who writes |
//! |---|---|---|
//! | 0 | sequence number of the last request | VMM |
//! | 64 | its message | VMM |
//! | 128 | whether the vault may sleep until there is another | vault |
//! | 192 | sequence number of the last reply; [`DEAD`] when there will be none | vault; [`DEAD`] the VMM itself |
//! | 256 | its message | vault |
//! | 320 | whether the VMM may sleep until there is another | VMM |
//! | 384 | whether the vCPU is to be kicked | VMM; the vault clears it |
//! | 512 | the text of the request | VMM |
//! | 1024 | the text of the reply | vault |
//!
//! Either end may change anything at any time. So a message is copied before it is looked at, and all that is in the
//! page is read and written by atomic or volatile accesses.

use super::bell::{Bell, Overdue, Patience, Word};
use super::protocol::{Encoded, MOST_TEXT, Message, WORDS};
use crate::Error;
use crate::local::Backing;
use cvm_core::PAGE_SIZE;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};
use zerocopy::IntoBytes;

/// The bit of a reply's sequence number that says that the vault is dead, or that the VMM has given it up.
const DEAD: u32 = 1 << 31;

const KICK: usize = 384;

/// One direction of a page.
#[derive(Debug, Clone, Copy)]
struct Direction {
    sequence: usize,
    message: usize,
    sleeps: usize,
    text: usize,
}

const REQUESTS: Direction = Direction { sequence: 0, message: 64, sleeps: 128, text: 512 };
const REPLIES: Direction = Direction { sequence: 192, message: 256, sleeps: 320, text: 1024 };

/// How often to look for a message before sleeping: for some fifty microseconds, which is what waking a thread costs.
const LOOKS: u32 = 5000;

/// How often to look for what a vault does by itself, without its guest: some system calls.
const PATIENT_LOOKS: u32 = 20_000;

/// Whether it is worth to look: with one processor, who is waited for cannot run meanwhile. The first call opens files.
pub(super) fn worth_looking() -> bool {
    static WORTH: OnceLock<bool> = OnceLock::new();
    *WORTH.get_or_init(|| std::thread::available_parallelism().is_ok_and(|processors| processors.get() > 1))
}

/// The pages of all vCPUs of a VM.
#[derive(Debug)]
pub(super) struct Pages {
    region: MmapRegion,
    looks: bool,
}

impl Pages {
    /// How large the file of the pages of so many vCPUs is.
    pub(super) fn bytes(vcpus: u32) -> u64 {
        u64::from(vcpus) * PAGE_SIZE
    }

    /// The pages in `backing`, which has been checked to be of this size for good.
    pub(super) fn map(backing: &Backing, vcpus: u32) -> Result<Self, Error> {
        let map = || {
            let file = FileOffset::new(backing.file().try_clone()?, 0);
            MmapRegion::from_file(file, Self::bytes(vcpus) as usize).map_err(io::Error::other)
        };
        let region = map().map_err(Error::vault("map the pages of its vcpus"))?;
        Ok(Self { region, looks: worth_looking() })
    }

    /// The page of vCPU `index`, which must exist.
    pub(super) fn page(&self, index: u32) -> Page<'_> {
        Page { region: &self.region, base: index as usize * PAGE_SIZE as usize, looks: self.looks }
    }

    /// How many there are.
    pub(super) fn count(&self) -> u32 {
        (self.region.size() / PAGE_SIZE as usize) as u32
    }
}

/// The page of one vCPU.
#[derive(Debug, Clone, Copy)]
pub(super) struct Page<'a> {
    region: &'a MmapRegion,
    base: usize,
    /// Whether to look for messages before sleeping.
    looks: bool,
}

impl<'a> Page<'a> {
    fn word(&self, at: usize) -> &'a AtomicU32 {
        self.region.get_atomic_ref(self.base + at).expect("every word lies in the page")
    }

    /// The sequence number after `now`.
    fn after(now: u32) -> u32 {
        now.wrapping_add(1) & !DEAD
    }

    fn write(&self, to: Direction, sequence: u32, (mut message, text): Encoded) {
        message.sequence = sequence;
        let mut words = [0; WORDS];
        words.as_mut_bytes().copy_from_slice(message.as_bytes());
        for (at, word) in (self.base + to.message..).step_by(size_of::<u64>()).zip(words) {
            let slot = self.region.get_atomic_ref::<AtomicU64>(at).expect("every message lies in the page");
            slot.store(word, Ordering::Relaxed);
        }
        if !text.is_empty() {
            let texts = self.region.as_volatile_slice().write_slice(text.as_bytes(), self.base + to.text);
            texts.expect("every text lies in the page");
        }
        self.bell(to).ring(sequence);
    }

    /// Waits for a sequence number other than `last`, as long as `limit` allows before each sleep.
    fn wait(
        &self,
        on: Direction,
        last: u32,
        looks: u32,
        limit: impl FnMut() -> Result<Option<Duration>, Overdue>,
    ) -> Result<u32, Overdue> {
        self.bell(on).wait(last, if self.looks { looks } else { 0 }, limit)
    }

    fn bell(&self, of: Direction) -> Bell<'a, AtomicU32> {
        Bell { number: self.word(of.sequence), sleeps: self.word(of.sleeps) }
    }

    fn read(&self, from: Direction) -> (Message, Vec<u8>) {
        let mut words = [0u64; WORDS];
        for (at, word) in (self.base + from.message..).step_by(size_of::<u64>()).zip(&mut words) {
            let slot = self.region.get_atomic_ref::<AtomicU64>(at).expect("every message lies in the page");
            *word = slot.load(Ordering::Relaxed);
        }
        let mut message = Message::default();
        message.as_mut_bytes().copy_from_slice(words.as_bytes());
        let mut text = vec![0; usize::from(message.text).min(MOST_TEXT)];
        if !text.is_empty() {
            let texts = self.region.as_volatile_slice().read_slice(&mut text, self.base + from.text);
            texts.expect("every text lies in the page");
        }
        (message, text)
    }

    /// For the VMM: there will be no more replies.
    pub(super) fn poison(&self) {
        let sequence = self.word(REPLIES.sequence);
        sequence.fetch_or(DEAD, Ordering::SeqCst);
        sequence.wake();
    }

    /// For the VMM: the vCPU shall be kicked when the vault looks.
    pub(super) fn ask_for_kick(&self) {
        self.word(KICK).store(1, Ordering::SeqCst);
    }

    /// For the vault: whether the vCPU shall be kicked.
    pub(super) fn take_kick(&self) -> bool {
        self.word(KICK).swap(0, Ordering::SeqCst) != 0
    }
}

/// How often a VMM that waits for the end of a run looks whether the vCPU was kicked meanwhile.
const KICK_CHECK: Duration = Duration::from_secs(1);

/// How long the VMM waits for a reply.
#[derive(Clone, Copy)]
pub(super) enum Limit<'a> {
    /// This long: the vault does it by itself.
    Within(Duration),
    /// As long as the guest runs, and this long after the vCPU was kicked.
    AfterKick { within: Duration, is_kicked: &'a dyn Fn() -> bool },
}

impl Limit<'_> {
    fn looks(self) -> u32 {
        match self {
            Self::Within(_) => PATIENT_LOOKS,
            Self::AfterKick { .. } => LOOKS,
        }
    }

    /// What says before each sleep how long it may take.
    fn clock(self) -> impl FnMut() -> Result<Option<Duration>, Overdue> {
        let mut patience = None;
        move || {
            let within = match self {
                Self::Within(within) => within,
                Self::AfterKick { within, is_kicked } if is_kicked() => within,
                // Nothing wakes a sleeping thread for a kick but the vault, which may be stopped.
                Self::AfterKick { within, .. } => {
                    patience = None;
                    return Ok(Some(within.min(KICK_CHECK)));
                }
            };
            patience.get_or_insert_with(|| Patience::new(within)).slice(Instant::now()).map(Some)
        }
    }
}

/// The VMM's end.
#[derive(Debug, Default)]
pub(super) struct Asking {
    last: u32,
}

/// Why there is no reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoReply {
    Dead,
    OutOfOrder,
    Overdue,
}

impl Asking {
    /// Sends a request, and waits for the reply to it.
    pub(super) fn ask(
        &mut self,
        page: Page<'_>,
        request: Encoded,
        limit: Limit<'_>,
    ) -> Result<(Message, Vec<u8>), NoReply> {
        let before = self.last;
        self.last = Page::after(before);
        page.write(REQUESTS, self.last, request);
        let now = page.wait(REPLIES, before, limit.looks(), limit.clock()).map_err(|Overdue| NoReply::Overdue)?;
        if now & DEAD != 0 {
            return Err(NoReply::Dead);
        }
        let (message, text) = page.read(REPLIES);
        if now != self.last || message.sequence != now {
            return Err(NoReply::OutOfOrder);
        }
        Ok((message, text))
    }
}

/// The vault's end.
#[derive(Debug, Default)]
pub(super) struct Answering {
    last: u32,
}

impl Answering {
    /// Waits for a request; nothing if what came is out of order. Either has to be [answered](Answering::answer).
    pub(super) fn next(&mut self, page: Page<'_>) -> Option<(Message, Vec<u8>)> {
        let before = self.last;
        // It may wait for ever: the main thread ends the process when the VMM is gone. Without a limit nothing is overdue.
        self.last = page.wait(REQUESTS, before, LOOKS, || Ok(None)).unwrap_or(before);
        let (message, text) = page.read(REQUESTS);
        (self.last == Page::after(before) && message.sequence == self.last).then_some((message, text))
    }

    /// Answers the last request.
    pub(super) fn answer(&self, page: Page<'_>, reply: Encoded) {
        page.write(REPLIES, self.last, reply);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vault::protocol::{Given, Request};
    use zerocopy::FromBytes;

    const PATIENT: Limit<'_> = Limit::Within(Duration::from_secs(60));

    fn pages(vcpus: u32) -> Pages {
        let backing = Backing::new("cvm-pages", Pages::bytes(vcpus)).unwrap();
        Pages::map(&backing, vcpus).unwrap()
    }

    #[test]
    fn each_question_gets_its_own_answer() {
        let pages = pages(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut answering = Answering::default();
                for _ in 0..1000 {
                    let (message, text) = answering.next(pages.page(1)).unwrap();
                    let Ok(Request::Run(Given::Value(value))) = Request::decode(&message, &text) else { panic!() };
                    answering.answer(pages.page(1), Request::Run(Given::Value(value + 1)).encode());
                }
            });
            let mut asking = Asking::default();
            for value in 0..1000 {
                let (message, _) =
                    asking.ask(pages.page(1), Request::Run(Given::Value(value)).encode(), PATIENT).unwrap();
                assert_eq!(message.operands[0], value + 1);
                if value % 100 == 0 {
                    // Long enough for the other end to fall asleep.
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
            }
        });
    }

    #[test]
    fn who_waits_for_a_dead_vault_is_woken_and_who_asks_it_later_hears_at_once() {
        let pages = pages(1);
        std::thread::scope(|scope| {
            let asked =
                scope.spawn(|| Asking::default().ask(pages.page(0), Request::Run(Given::Nothing).encode(), PATIENT));
            std::thread::sleep(std::time::Duration::from_millis(20));
            pages.page(0).poison();
            assert_eq!(asked.join().unwrap(), Err(NoReply::Dead));
        });
        let again = Asking::default().ask(pages.page(0), Request::Run(Given::Nothing).encode(), PATIENT);
        assert_eq!(again, Err(NoReply::Dead));
    }

    #[test]
    fn a_silent_vault_is_overdue() {
        let pages = pages(1);
        let limit = Limit::Within(Duration::from_millis(20));
        let asked = Asking::default().ask(pages.page(0), Request::Run(Given::Nothing).encode(), limit);
        assert_eq!(asked, Err(NoReply::Overdue));
    }

    #[test]
    fn a_run_is_overdue_only_after_a_kick() {
        let pages = pages(1);
        let within = Duration::from_millis(20);
        let checks = AtomicU32::new(0);
        let is_kicked = || checks.fetch_add(1, Ordering::Relaxed) >= 10;
        let limit = Limit::AfterKick { within, is_kicked: &is_kicked };
        let asked = Asking::default().ask(pages.page(0), Request::Run(Given::Nothing).encode(), limit);
        assert_eq!(asked, Err(NoReply::Overdue));
        assert!(checks.load(Ordering::Relaxed) > 10, "it gave up before the kick");
    }

    #[test]
    fn a_message_with_another_number_is_out_of_order_on_either_end() {
        let pages = pages(1);
        let page = pages.page(0);
        let mut answering = Answering::default();
        for sequence in [2, 2 + DEAD, 7] {
            page.write(REQUESTS, sequence, Request::Run(Given::Nothing).encode());
            assert_eq!(answering.next(page), None, "sequence {sequence}");
        }
        page.write(REQUESTS, 8, Request::Run(Given::Nothing).encode());
        assert!(answering.next(page).is_some(), "one that is in order again");
        page.write(REPLIES, 5, Request::Run(Given::Nothing).encode());
        assert_eq!(
            Asking::default().ask(page, Request::Run(Given::Nothing).encode(), PATIENT),
            Err(NoReply::OutOfOrder)
        );
    }

    #[test]
    fn sequence_numbers_wrap_around_without_being_taken_for_death() {
        assert_eq!(Page::after(DEAD - 1), 0);
        let pages = pages(1);
        let mut asking = Asking { last: DEAD - 1 };
        let mut answering = Answering { last: DEAD - 1 };
        pages.page(0).word(REQUESTS.sequence).store(DEAD - 1, Ordering::SeqCst);
        pages.page(0).word(REPLIES.sequence).store(DEAD - 1, Ordering::SeqCst);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                answering.next(pages.page(0)).unwrap();
                answering.answer(pages.page(0), Request::Run(Given::Nothing).encode());
            });
            asking.ask(pages.page(0), Request::Run(Given::Nothing).encode(), PATIENT).unwrap();
        });
    }

    #[test]
    fn a_message_has_no_bytes_that_it_does_not_own() {
        assert!(Message::read_from_bytes(&[0xff; 56]).is_ok(), "every bit pattern is a message");
        let text_ends = REQUESTS.text + MOST_TEXT;
        assert!(text_ends <= REPLIES.text && REPLIES.text + MOST_TEXT <= PAGE_SIZE as usize);
    }
}
