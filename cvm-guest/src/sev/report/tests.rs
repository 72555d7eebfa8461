use super::super::fake::{Host, Pages, Seen, boot, shared, vcpu};
use super::super::ghcb::offset as field;
use super::super::{Protection, fake};
use super::*;
use cvm_core::GpaRange;
use cvm_core::boot::MemoryRange;
use cvm_core::doorbell::Doorbell;
use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

const SECRET_KEY: [u8; KEY_LEN] = [7; KEY_LEN];
const PAGE: usize = PAGE_SIZE as usize;

/// A secure processor: it answers messages that have the number it waits for.
#[derive(Default)]
struct Firmware {
    count: Cell<u64>,
    /// All that it got, as (number, bytes).
    got: RefCell<Vec<(u64, Vec<u8>)>>,
}

impl Firmware {
    /// The firmware's code.
    fn request(&self, host: &Host) -> u32 {
        let mut header = Header::new_zeroed();
        host.memory.read(PAGE, header.as_mut_bytes()).unwrap();
        let mut payload = vec![0; usize::from(header.len)];
        host.memory.read(PAGE + HEADER_LEN, &mut payload).unwrap();
        self.got.borrow_mut().push((header.number, payload.clone()));
        if header.number != self.count.get() + 1 {
            return 22;
        }
        let cipher = Aes256Gcm::new(&SECRET_KEY.into());
        let nonce = header.nonce().into();
        let tag = Tag::from(header.tag);
        if cipher.decrypt_inout_detached(&nonce, header.authenticated(), payload[..].as_mut().into(), &tag).is_err() {
            return 5;
        }
        let request = ReportRequest::read_from_bytes(&payload).unwrap();
        let mut response = ReportResponse { len: REPORT_LEN as u32, ..ReportResponse::new_zeroed() };
        response.report[0x50..0x90].copy_from_slice(&request.data);
        let mut header = Header::new(REPORT_RESPONSE, header.number + 1, size_of::<ReportResponse>());
        let nonce = header.nonce().into();
        let tag = cipher.encrypt_inout_detached(&nonce, header.authenticated(), response.as_mut_bytes().into());
        header.tag = tag.unwrap().into();
        host.memory.write(2 * PAGE, header.as_bytes()).unwrap();
        host.memory.write(2 * PAGE + HEADER_LEN, response.as_bytes()).unwrap();
        self.count.set(self.count.get() + 2);
        0
    }
}

struct Setting {
    host: Host,
    pages: Pages,
    firmware: Rc<Firmware>,
    secrets: *mut [u8; PAGE],
}

impl Setting {
    /// `meddle` is what the host does after the firmware has answered; what it returns is the answer to the guest.
    fn new(meddle: impl Fn(&Host, Seen, u32) -> u64 + 'static) -> Self {
        let host = Host::new(Protection::SevSnp, 3);
        let firmware = Rc::new(Firmware::default());
        let secrets: *mut [u8; PAGE] = Box::into_raw(Box::new([0; PAGE]));
        let setting = Self { host, pages: Pages::default(), firmware: Rc::clone(&firmware), secrets };
        setting.secrets().store(KEY, &SECRET_KEY);
        setting.host.answer_by(move |host, seen| {
            assert!(matches!(seen.code, code::GUEST_REQUEST | code::EXTENDED_GUEST_REQUEST));
            assert_eq!((seen.info1, seen.info2), (host.memory.gpa(PAGE).0, host.memory.gpa(2 * PAGE).0));
            let answer = firmware.request(host);
            host.write(field::EXIT_INFO_2, meddle(host, seen, answer));
            true
        });
        setting
    }

    fn honest() -> Self {
        Self::new(|_, _, answer| answer.into())
    }

    /// As a guest finds them after each start.
    fn secrets(&self) -> SecretsPage {
        #[allow(unsafe_code, reason = "a reset guest finds the page again")]
        // SAFETY: the page is leaked, and only one such reference at a time is in use.
        SecretsPage::new(unsafe { &mut *self.secrets })
    }

    fn reporter(&self) -> Reporter {
        let range = GpaRange::new(self.host.memory.gpa(PAGE).0, 2 * PAGE_SIZE).unwrap();
        let base = std::ptr::NonNull::new(std::ptr::with_exposed_provenance_mut(range.start().0 as usize)).unwrap();
        #[allow(unsafe_code, reason = "it is leaked memory of the test's own")]
        // SAFETY: the fake host's memory is leaked, and nobody has references into it.
        let messages = unsafe { SharedRegion::mapped_at(base, range) };
        Reporter::new(self.secrets(), messages).unwrap()
    }

    fn report(&self, reporter: &mut Reporter, certificates: Option<&SharedRegion>) -> Result<Report, Error> {
        self.report_of(&[0x5a; 64], reporter, certificates)
    }

    fn report_of(
        &self,
        data: &[u8; 64],
        reporter: &mut Reporter,
        certificates: Option<&SharedRegion>,
    ) -> Result<Report, Error> {
        let memory = MemoryRange { start: self.host.memory.gpa(0).0, len: 3 * PAGE_SIZE };
        let mut boot = boot(Protection::SevSnp, Doorbell::Port, memory);
        boot.accepted = u64::MAX;
        let vcpu = vcpu(&self.host, &self.pages, &boot).unwrap();
        reporter.report(&vcpu, data, certificates)
    }

    fn numbers(&self) -> Vec<u64> {
        self.firmware.got.borrow().iter().map(|(number, _)| *number).collect()
    }
}

/// The message without an answer is sent again by the same reporter, whatever it is asked for, and the key is there.
fn assert_pending(setting: &Setting, reporter: &mut Reporter) {
    let before = setting.firmware.got.borrow().last().unwrap().clone();
    for data in [[0x5a; 64], [0x5b; 64]] {
        assert!(setting.report_of(&data, reporter, None).is_err());
        assert_eq!(*setting.firmware.got.borrow().last().unwrap(), before);
    }
    assert_eq!(*setting.secrets().key(), SECRET_KEY);
}

#[test]
fn a_report_has_the_guests_data_and_each_message_its_own_number() {
    let setting = Setting::honest();
    let mut reporter = setting.reporter();
    for _ in 0..3 {
        let report = setting.report(&mut reporter, None).unwrap();
        assert_eq!(report.bytes[0x50..0x90], [0x5a; 64]);
        assert_eq!(report.certificate_pages, 0);
    }
    assert_eq!(setting.numbers(), [1, 3, 5]);
    assert!(setting.firmware.got.borrow().iter().all(|(_, bytes)| !bytes.windows(8).any(|part| part == [0x5a; 8])));
}

#[test]
fn a_reset_guest_goes_on_with_the_next_number() {
    let setting = Setting::honest();
    setting.report(&mut setting.reporter(), None).unwrap();
    setting.report(&mut setting.reporter(), None).unwrap();
    assert_eq!(setting.numbers(), [1, 3]);
    // Reset while a message is out: its number is gone.
    setting.secrets().take_number().unwrap();
    assert!(setting.report(&mut setting.reporter(), None).is_err());
    assert_eq!(setting.numbers(), [1, 3, 7]);
}

#[test]
fn a_key_that_was_used_too_often_is_not_used_any_more() {
    let setting = Setting::honest();
    for count in [u32::MAX, u32::MAX - 1] {
        setting.secrets().store(COUNT, &count.to_le_bytes());
        assert_eq!(setting.report(&mut setting.reporter(), None), Err(Fault::KeyDisabled.into()));
    }
    setting.secrets().store(COUNT, &(u32::MAX - 2).to_le_bytes());
    setting.firmware.count.set(u64::from(u32::MAX) - 2);
    assert!(setting.report(&mut setting.reporter(), None).is_ok());
    assert!(setting.report(&mut setting.reporter(), None).is_err());
}

#[test]
fn an_answer_that_was_changed_or_replayed_is_none_and_the_message_stays_the_only_one_of_its_number() {
    let changes: [fn(&Host, usize); 4] = [
        |host, _| host.memory.write(2 * PAGE + HEADER_LEN + 40, &[1]).unwrap(),
        |host, _| host.memory.write(2 * PAGE, &[1]).unwrap(),
        // Truncated: nothing there, or another length in the header.
        |host, _| host.memory.zero(2 * PAGE, PAGE).unwrap(),
        |host, _| host.memory.write(2 * PAGE + 0x36, &[32, 0]).unwrap(),
    ];
    for change in changes {
        let setting = Setting::new(move |host, _, answer| {
            change(host, 0);
            answer.into()
        });
        let mut reporter = setting.reporter();
        assert_eq!(setting.report(&mut reporter, None), Err(Fault::NotAuthentic.into()));
        assert_pending(&setting, &mut reporter);
    }

    let first: RefCell<Option<Vec<u8>>> = RefCell::default();
    let setting = Setting::new(move |host, _, answer| {
        let mut page = vec![0; PAGE];
        host.memory.read(2 * PAGE, &mut page).unwrap();
        let mut first = first.borrow_mut();
        let replayed = first.get_or_insert(page);
        host.memory.write(2 * PAGE, replayed).unwrap();
        answer.into()
    });
    let mut reporter = setting.reporter();
    setting.report(&mut reporter, None).unwrap();
    assert_eq!(setting.report(&mut reporter, None), Err(Fault::NotAuthentic.into()));
    assert_pending(&setting, &mut reporter);
}

#[test]
fn a_message_that_is_thrown_away_or_refused_is_sent_again() {
    for (answer, firmware, host) in [(0x16, 0x16, 0), (3 << 32, 0, 3)] {
        let setting = Setting::new(move |_, _, _| answer);
        let mut reporter = setting.reporter();
        let error = Fault::Request { firmware, host };
        assert_eq!(setting.report(&mut reporter, None), Err(error.into()));
        assert_pending(&setting, &mut reporter);
    }
}

#[test]
fn a_host_may_be_busy_for_any_time_and_gets_the_same_bytes_until_it_forwards_them() {
    let setting = Setting::honest();
    let (left, firmware) = (Rc::new(Cell::new(5000)), Rc::clone(&setting.firmware));
    let busy = Rc::clone(&left);
    let first: RefCell<Vec<u8>> = RefCell::default();
    setting.host.answer_by(move |host, _| {
        let mut message = vec![0; PAGE];
        host.memory.read(PAGE, &mut message).unwrap();
        let mut first = first.borrow_mut();
        if first.is_empty() {
            first.clone_from(&message);
        }
        let answer = match busy.get() {
            0 => {
                first.clear();
                firmware.request(host).into()
            }
            _ => {
                assert!(*first == message);
                busy.set(busy.get() - 1);
                u64::from(BUSY) << 32
            }
        };
        host.write(field::EXIT_INFO_2, answer);
        true
    });
    let mut reporter = setting.reporter();
    for _ in 0..5000 {
        assert_eq!(setting.report(&mut reporter, None), Err(Fault::Busy.into()));
    }
    let report = setting.report(&mut reporter, None).unwrap();
    assert_eq!((&report.bytes[0x50..0x90], setting.numbers()), (&[0x5a; 64][..], vec![1]));

    // Another report is asked for than the one that the host had no time for: it comes, and so does the first message.
    left.set(1);
    assert_eq!(setting.report(&mut reporter, None), Err(Fault::Busy.into()));
    let report = setting.report_of(&[0x77; 64], &mut reporter, None).unwrap();
    assert_eq!((&report.bytes[0x50..0x90], setting.numbers()), (&[0x77; 64][..], vec![1, 3, 5]));
}

#[test]
fn with_too_few_pages_for_certificates_the_report_comes_without() {
    let setting = Setting::honest();
    let firmware = Rc::clone(&setting.firmware);
    setting.host.answer_by(move |host, seen| {
        if seen.code == code::EXTENDED_GUEST_REQUEST {
            assert_eq!(host.read(field::RBX), 1);
            host.registers(&[(field::RBX, 3)]);
            host.write(field::EXIT_INFO_2, u64::from(TOO_FEW_PAGES) << 32);
        } else {
            host.write(field::EXIT_INFO_2, firmware.request(host).into());
        }
        true
    });
    let range = GpaRange::from_pages(0x10_0000, 1).unwrap();
    #[allow(unsafe_code, reason = "it is leaked memory of the test's own")]
    // SAFETY: the memory is leaked, and nobody has references into it.
    let pages = unsafe { SharedRegion::mapped_at(shared(1), range) };
    let mut reporter = setting.reporter();
    let report = setting.report(&mut reporter, Some(&pages)).unwrap();
    assert_eq!((report.certificate_pages, &report.bytes[0x50..0x90]), (3, &[0x5a; 64][..]));
    assert_eq!(setting.report(&mut reporter, None).unwrap().certificate_pages, 0);
    assert_eq!(setting.numbers(), [1, 3]);
}

#[test]
fn guests_that_are_not_of_snp_get_no_report_and_lose_nothing() {
    let setting = Setting::honest();
    let host = Host::new(Protection::SevEs, 3);
    let memory = MemoryRange { start: host.memory.gpa(0).0, len: 3 * PAGE_SIZE };
    let boot = fake::boot(Protection::SevEs, Doorbell::Port, memory);
    let pages = Pages::default();
    let vcpu = vcpu(&host, &pages, &boot).unwrap();
    let error = Err(Fault::SnpOnly.into());
    assert_eq!(setting.reporter().report(&vcpu, &[0; 64], None), error);
    assert_eq!(setting.secrets().count(), 0);
}

proptest! {
    /// Whatever a host does, no number is used for two different messages, also when the guest is reset at any time.
    #[test]
    fn no_number_is_used_for_two_messages(steps in prop::collection::vec((0u8..5, any::<bool>()), 1..12)) {
        let turn = Rc::new(Cell::new(0));
        let (now, plan) = (Rc::clone(&turn), steps.clone());
        let setting = Setting::new(move |host, _, answer| match plan[now.get()].0 {
            0 => 0x1_0000_0000,
            1 => {
                host.memory.write(2 * PAGE + 0x100, &[1, 2, 3]).unwrap();
                0
            }
            _ => answer.into(),
        });
        let mut reporter = setting.reporter();
        for (step, (_, reset)) in steps.iter().enumerate() {
            turn.set(step);
            // Other data in each, so that a number which is used again is seen.
            let _ = setting.report_of(&[step as u8; 64], &mut reporter, None);
            if *reset {
                reporter = setting.reporter();
            }
        }
        let mut used: Vec<(u64, Vec<u8>)> = setting.firmware.got.borrow().clone();
        used.dedup();
        let mut numbers: Vec<u64> = used.iter().map(|(number, _)| *number).collect();
        let count = numbers.len();
        numbers.dedup();
        prop_assert_eq!(numbers.len(), count);
    }
}

#[test]
fn copies_of_the_key_are_zeroed_when_they_are_dropped() {
    fn are_zeroed<T: zeroize::ZeroizeOnDrop>(_: &T) {}
    let setting = Setting::new(|_, _, _| 0);
    let key = setting.secrets().key();
    are_zeroed(&key);
    are_zeroed(&Aes256Gcm::new((&*key).into()));
}
