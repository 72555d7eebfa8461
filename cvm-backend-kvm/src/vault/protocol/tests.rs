use super::orders::PARTS;
use super::*;
use cvm_core::doorbell::{Access, DEVICE_SPACE, Doorbell, MAX_DEVICES, SPACE, Transport, device_base};
use cvm_core::interrupt::InterruptController;
use cvm_core::memory::LeftAs;
use cvm_core::x86::Register;
use cvm_core::{Answer, ConversionRequest, Event, Exit, Gpa, Measurement, PageKind, Policy, Trigger};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::mem::offset_of;

/// The vCPU whose replies are looked at.
const VCPU: u32 = 3;

/// What one end says to the other.
trait Said: Clone + Debug + PartialEq + Sized + 'static {
    /// All that can be said.
    fn any() -> BoxedStrategy<Self>;
    fn encode(&self) -> Encoded;
    fn decode(message: &Message, text: &[u8]) -> Result<Self, Malformed>;
}

macro_rules! said {
    ($said:ty, $any:expr, $decode:expr) => {
        impl Said for $said {
            fn any() -> BoxedStrategy<Self> {
                $any.boxed()
            }

            fn encode(&self) -> Encoded {
                self.encode()
            }

            fn decode(message: &Message, text: &[u8]) -> Result<Self, Malformed> {
                $decode(message, text)
            }
        }
    };
}

said!(Request, request(), Self::decode);
said!(Reply, reply(), |message, text| Self::decode(VCPU, message, text));
said!(Order, order(), Self::decode);
said!(Report, report(), Self::decode);

/// Numbers, and those at which something ends more often than others.
fn number<T: Arbitrary + TryFrom<u64> + Clone + 'static>() -> BoxedStrategy<T> {
    let edge = |number: u64| T::try_from(number).ok();
    let edges: Vec<T> = [0, 1, 0xff, 0xffff, u32::MAX.into(), u64::MAX].into_iter().filter_map(edge).collect();
    prop_oneof![any::<T>(), select(edges)].boxed()
}

fn a_range() -> impl Strategy<Value = GpaRange> {
    const PAGES: u64 = cvm_core::address::GPA_LIMIT / PAGE_SIZE;
    (0..PAGES).prop_flat_map(|first| {
        (1..=PAGES - first).prop_map(move |pages| GpaRange::from_pages(first * PAGE_SIZE, pages).unwrap())
    })
}

fn side() -> impl Strategy<Value = Side> {
    select(&[Side::Private, Side::Shared][..])
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        number().prop_map(Event::Interrupt),
        (number(), any::<bool>()).prop_map(|(vector, asserted)| Event::Line { vector, asserted }),
    ]
}

/// Texts that arrive as they were sent.
fn text() -> impl Strategy<Value = String> {
    "\\PC{0,64}"
}

fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        Just(Request::Run(Given::Nothing)),
        number().prop_map(|value| Request::Run(Given::Value(value))),
        select(vec![Answer::Done, Answer::Invalid, Answer::Retry])
            .prop_map(|answer| Request::Run(Given::Answer(answer))),
        (a_range(), side()).prop_map(|(range, to)| Request::Convert { range, to }),
        a_range().prop_map(Request::Poison),
        select(&Register::ALL[..]).prop_map(Request::Register),
        event().prop_map(Request::Inject),
    ]
}

fn exit() -> impl Strategy<Value = Exit> {
    let register =
        || (0..MAX_DEVICES, 0..DEVICE_SPACE / 4).prop_map(|(device, register)| device_base(device) + 4 * register);
    let width = || select(&[1u8, 2, 4][..]);
    let request = |(gpa, pages, to)| Exit::Conversion(ConversionRequest::from_guest(VCPU, gpa, pages, to));
    let port_write = |(port, width, value): (_, u8, u32)| {
        let value = value & (u32::MAX >> (32 - 8 * u32::from(width)));
        Exit::PortWrite { port, width, value }
    };
    prop_oneof![
        (number(), number(), side()).prop_map(request),
        number().prop_map(Exit::Console),
        (register(), number()).prop_map(|(register, value)| Exit::DoorbellWrite { register, value }),
        register().prop_map(|register| Exit::DoorbellRead { register }),
        (number(), width(), number()).prop_map(port_write),
        (number(), width()).prop_map(|(port, width)| Exit::PortRead { port, width }),
        (number(), number()).prop_map(|(index, value)| Exit::MsrWrite { index, value }),
        number().prop_map(|index| Exit::MsrRead { index }),
        Just(Exit::Halted),
        number().prop_map(|code| Exit::Ended { code }),
        Just(Exit::Kicked),
    ]
}

fn failure() -> impl Strategy<Value = Failure> {
    let access = || prop_oneof![Just(Access::Read), number().prop_map(Access::Write)];
    prop_oneof![
        (number(), any::<bool>()).prop_map(|(gpa, write)| Failure::Mmio { gpa: Gpa(gpa), write }),
        number().prop_map(|gpa| Failure::MissingConversion { gpa: Gpa(gpa) }),
        (number(), access()).prop_map(|(register, access)| Failure::UnknownDoorbell { register, access }),
        text().prop_map(Failure::Crashed),
        Just(Failure::Lost),
        text().prop_map(Failure::Host),
    ]
}

fn refusal() -> impl Strategy<Value = Refusal> {
    let plain = [Refusal::Reserved, Refusal::NotAccepted, Refusal::WrongTrigger, Refusal::EdgesOnly];
    prop_oneof![select(plain.to_vec()), any::<NonZeroU32>().prop_map(|most| Refusal::TooMany { most })]
}

fn reply() -> impl Strategy<Value = Reply> {
    let left_as = select(&[LeftAs::Before, LeftAs::Unknown][..]);
    prop_oneof![
        exit().prop_map(Reply::Exit),
        failure().prop_map(Reply::Failed),
        Just(Reply::Done),
        (left_as, text()).prop_map(|(left_as, reason)| Reply::NotConverted { left_as, reason }),
        prop::option::of(number()).prop_map(Reply::Register),
        refusal().prop_map(Reply::InjectionRefused),
        text().prop_map(Reply::Refused),
        text().prop_map(Reply::Outdated),
    ]
}

fn order() -> impl Strategy<Value = Order> {
    let trigger = select(&[Trigger::Edge, Trigger::Level][..]);
    let accept = (any::<[u64; 4]>(), trigger, any::<Option<NonZeroU32>>())
        .prop_map(|(vectors, trigger, most_per_second)| Order::Accept { vectors, trigger, most_per_second });
    let doorbell = select(&[Doorbell::Port, Doorbell::Msr][..]);
    let transport = select(&[Transport::Doorbell, Transport::Hypercall][..]);
    let controller = select(&[InterruptController::None, InterruptController::Apic][..]);
    let create = (number(), number(), doorbell, transport, controller).prop_map(
        |(vcpus, policy, doorbell, transport, interrupt_controller)| {
            let policy = Policy::from_bits_retain(policy);
            Order::Create { vcpus, policy, doorbell, transport, interrupt_controller }
        },
    );
    let kind = select(&[PageKind::Measured, PageKind::Zero, PageKind::Unmeasured][..]);
    let registers = (0..PARTS, any::<[u64; 5]>()).prop_map(|(part, words)| Order::Registers { part, words });
    prop_oneof![
        a_range().prop_map(Order::Slot),
        accept,
        create,
        (a_range(), kind).prop_map(|(range, kind)| Order::Load { range, kind }),
        number().prop_map(|index| Order::SetVcpu { index }),
        registers,
        Just(Order::Seal),
        Just(Order::Count),
        number().prop_map(Order::DoorbellFd),
        (number(), number()).prop_map(|(vcpu, vector)| Order::InterruptFd { vcpu, vector }),
        Just(Order::CountDropped),
    ]
}

fn report() -> impl Strategy<Value = Report> {
    prop_oneof![
        Just(Report::Done),
        any::<[[u8; 16]; 3]>().prop_map(|digest| Report::Sealed(Measurement(digest.concat().try_into().unwrap()))),
        (prop::option::of(number()), number()).prop_map(|(private, shared)| Report::Memory { private, shared }),
        text().prop_map(Report::Failed),
        text().prop_map(Report::NoDescriptor),
        refusal().prop_map(Report::InjectionRefused),
        number().prop_map(Report::Dropped),
    ]
}

/// Any message, of which more mean something than by chance.
fn message() -> impl Strategy<Value = (Message, Vec<u8>)> {
    let kind = prop_oneof![4 => 0u16..0x60, 2 => 0x100u16..0x110, 2 => 0x200u16..0x210, 1 => any::<u16>()];
    let operand =
        || prop_oneof![4 => Just(0), 2 => 0u64..8, 2 => (0u64..8).prop_map(|page| page * PAGE_SIZE), 1 => number()];
    let operands = prop::array::uniform6(operand());
    let bytes = prop_oneof![
        4 => Just(Vec::new()),
        1 => text().prop_map(String::into_bytes),
        1 => prop::collection::vec(any::<u8>(), 0..300),
    ];
    (number(), kind, operands, bytes, prop::option::weighted(0.1, number())).prop_map(
        |(sequence, kind, operands, bytes, lies)| {
            let text = lies.unwrap_or(bytes.len() as u16);
            (Message { sequence, kind, text, operands }, bytes)
        },
    )
}

/// A message that says something, but for one operand, the kind, or the length of its text.
fn almost<T: Said>() -> impl Strategy<Value = (Message, Vec<u8>)> {
    (T::any(), any::<Index>(), number::<u64>()).prop_map(|(said, which, value)| {
        let (mut message, text) = said.encode();
        match which.index(8) {
            6 => message.kind = value as u16,
            7 => message.text = value as u16,
            operand => message.operands[operand] = value,
        }
        (message, text.into_bytes())
    })
}

/// That there is no other message for what a message says.
fn check_canonical<T: Said>(message: &Message, text: &[u8]) -> Result<bool, TestCaseError> {
    let Ok(said) = T::decode(message, text) else { return Ok(false) };
    let (again, its_text) = said.encode();
    prop_assert_eq!(Message { sequence: message.sequence, ..again }, *message, "{:?}", said);
    prop_assert_eq!(its_text.as_bytes(), text);
    Ok(true)
}

fn check_round_trip<T: Said>(said: &T) -> Result<(), TestCaseError> {
    let (message, text) = said.encode();
    prop_assert!(text.len() <= MOST_TEXT && text.len() == usize::from(message.text));
    prop_assert_eq!(message.sequence, 0);
    prop_assert_eq!(T::decode(&message, text.as_bytes()), Ok(said.clone()));
    let others = [
        Request::decode(&message, text.as_bytes()).is_ok(),
        Reply::decode(VCPU, &message, text.as_bytes()).is_ok(),
        Order::decode(&message, text.as_bytes()).is_ok(),
        Report::decode(&message, text.as_bytes()).is_ok(),
    ];
    prop_assert_eq!(others.iter().filter(|other| **other).count(), 1, "{:?} is of one type only", said);
    Ok(())
}

fn check_text<T: Said>(said: impl Fn(String) -> T, text: &str) -> Result<(), TestCaseError> {
    let (message, sent) = said(text.to_owned()).encode();
    let clean: String = text.chars().filter(|letter| !letter.is_control()).collect();
    prop_assert!(clean.starts_with(&sent) && sent.len() <= MOST_TEXT);
    prop_assert!(sent == clean || sent.len() > MOST_TEXT - 4, "it is cut no shorter than a letter takes");
    prop_assert_eq!(T::decode(&message, sent.as_bytes()), Ok(said(sent)));
    Ok(())
}

proptest! {
    #[test]
    fn what_is_said_is_what_is_heard(request in Request::any(), reply in Reply::any(), order in Order::any(), report in Report::any()) {
        check_round_trip(&request)?;
        check_round_trip(&reply)?;
        check_round_trip(&order)?;
        check_round_trip(&report)?;
    }

    #[test]
    fn no_two_messages_say_the_same(
        (message, text) in prop_oneof![
            message(),
            almost::<Request>(),
            almost::<Reply>(),
            almost::<Order>(),
            almost::<Report>(),
        ],
    ) {
        let meanings = [
            check_canonical::<Request>(&message, &text)?,
            check_canonical::<Reply>(&message, &text)?,
            check_canonical::<Order>(&message, &text)?,
            check_canonical::<Report>(&message, &text)?,
        ];
        prop_assert!(meanings.iter().filter(|means| **means).count() <= 1);
    }

    #[test]
    fn long_and_dirty_texts_arrive_as_far_as_they_fit(letters in prop::collection::vec(any::<char>(), 0..400)) {
        let text: String = letters.into_iter().collect();
        check_text(Reply::Refused, &text)?;
        check_text(|text| Reply::Failed(Failure::Crashed(text)), &text)?;
        check_text(|text| Reply::Failed(Failure::Host(text)), &text)?;
        check_text(|reason| Reply::NotConverted { left_as: LeftAs::Unknown, reason }, &text)?;
        check_text(Report::Failed, &text)?;
    }
}

/// The kinds of what `T::any` gives, and those of which anything decodes as a `T`.
fn kinds<T: Said>() -> (BTreeSet<u16>, BTreeSet<u16>) {
    let mut runner = TestRunner::deterministic();
    let samples: Vec<_> = (0..2000).map(|_| T::any().new_tree(&mut runner).unwrap().current().encode()).collect();
    let given = samples.iter().map(|(message, _)| message.kind).collect();
    let operands: BTreeSet<_> = samples.iter().map(|(message, _)| message.operands).take(400).collect();
    let decodes = |kind: &u16| {
        let decodes = |operands| T::decode(&Message { kind: *kind, operands, ..Message::default() }, &[]).is_ok();
        operands.iter().copied().chain((0..16).map(|first| [first, 0, 0, 0, 0, 0])).any(decodes)
    };
    (given, (0..0x400).filter(decodes).collect())
}

#[test]
fn the_tests_here_say_everything_that_can_be_said() {
    let all = [kinds::<Request>(), kinds::<Reply>(), kinds::<Order>(), kinds::<Report>()];
    for (given, decoded) in &all {
        assert_eq!(given, decoded);
    }
    let count: usize = all.iter().map(|(given, _)| given.len()).sum();
    let different: BTreeSet<_> = all.iter().flat_map(|(given, _)| given).collect();
    assert_eq!(count, different.len(), "each kind has its own number");
}

/// The message of a kind with these operands and no text.
fn plain(kind: u16, operands: &[u64]) -> Message {
    encoded(kind, operands).0
}

#[test]
fn operands_out_of_range_are_malformed() {
    let width = 1 << 32;
    for (kind, operands) in [
        (1, vec![1]),
        (2, vec![1, 1]),
        (3, vec![3]),
        (4, vec![0, 0, 0]),
        (4, vec![1, PAGE_SIZE, 0]),
        (4, vec![0, PAGE_SIZE, 2]),
        (4, vec![0, PAGE_SIZE, 0, 1]),
        (5, vec![!0xfff, 2 * PAGE_SIZE]),
        (5, vec![1 << 52, PAGE_SIZE]),
        (6, vec![Register::ALL.len() as u64]),
        (7, vec![0, 256]),
        (7, vec![2, 256]),
        (7, vec![3, 0]),
        (7, vec![width, 0]),
        (0, vec![]),
        (8, vec![]),
    ] {
        let message = plain(kind, &operands);
        assert_eq!(Request::decode(&message, &[]), Err(Malformed { kind }), "request {operands:?}");
    }
    for (kind, operands) in [
        (0x11, vec![0, 0, 2]),
        (0x12, vec![256]),
        (0x13, vec![0, 0]),
        (0x13, vec![u64::from(device_base(0)) + 1, 0]),
        (0x13, vec![u64::from(SPACE), 0]),
        (0x13, vec![u64::from(device_base(0)), width]),
        (0x14, vec![0x1fc]),
        (0x15, vec![0x10000, 1, 0]),
        (0x15, vec![0, 3, 0]),
        (0x15, vec![0, 1, 0x100]),
        (0x15, vec![0, 2, 0x1_0000]),
        (0x16, vec![0, 8]),
        (0x17, vec![width, 0]),
        (0x19, vec![1]),
        (0x1b, vec![0, 0, 0, 0, 0, 1]),
        (0x20, vec![0, 2]),
        (0x22, vec![0, 0, 1]),
        (0x22, vec![0, 2, 0]),
        (0x31, vec![2]),
        (0x32, vec![0, 1]),
        (0x40, vec![6]),
        (0x40, vec![0, 1]),
        (0x40, vec![2, 0]),
        (0x40, vec![2, width]),
    ] {
        let message = plain(kind, &operands);
        assert_eq!(Reply::decode(VCPU, &message, &[]), Err(Malformed { kind }), "reply {operands:?}");
    }
    for (kind, operands) in [
        (0x101, vec![0, 0]),
        (0x101, vec![0x800, PAGE_SIZE]),
        (0x102, vec![0, 0, 0, 0, width]),
        (0x102, vec![0, 0, 0, 0, 0, 2]),
        (0x103, vec![width, 0, 0, 0]),
        (0x103, vec![1, 0, 2, 0]),
        (0x103, vec![1, 0, 0, 2]),
        (0x103, vec![1, 0, 0, 0, 2]),
        (0x108, vec![0x10000]),
        (0x109, vec![0, 256]),
        (0x104, vec![0, PAGE_SIZE, 0]),
        (0x104, vec![0, PAGE_SIZE, 2]),
        (0x105, vec![width]),
        (0x10b, vec![6, 1, 2, 3, 4, 5]),
        (0x106, vec![1]),
        (0x107, vec![0, 1]),
    ] {
        let message = plain(kind, &operands);
        assert_eq!(Order::decode(&message, &[]), Err(Malformed { kind }), "order {operands:?}");
    }
    for (kind, operands) in [(0x201, vec![1]), (0x203, vec![2]), (0x203, vec![0, 1, 0]), (0x204, vec![1])] {
        let message = plain(kind, &operands);
        assert_eq!(Report::decode(&message, &[]), Err(Malformed { kind }), "report {operands:?}");
    }
}

#[test]
fn texts_that_are_none_are_malformed() {
    let long = "x".repeat(MOST_TEXT + 1);
    for (declared, text) in [
        (0, &b"x"[..]),
        (2, b"x"),
        (1, b""),
        (2, b"\xc3\x28"),
        (2, b"a\n"),
        (1, b"\0"),
        (long.len() as u16, long.as_bytes()),
    ] {
        let message = Message { text: declared, ..plain(0x50, &[]) };
        assert!(Reply::decode(VCPU, &message, text).is_err(), "{text:?} of length {declared}");
    }
    // Where there is to be no text, any is wrong.
    let message = Message { text: 1, ..plain(0x30, &[]) };
    assert!(Reply::decode(VCPU, &message, b"x").is_err());
    let message = Message { text: 1, ..plain(1, &[]) };
    assert!(Request::decode(&message, b"x").is_err());
}

#[test]
fn a_message_lies_in_memory_as_both_ends_expect() {
    assert_eq!(size_of::<Message>(), 56);
    assert_eq!(offset_of!(Message, sequence), 0);
    assert_eq!(offset_of!(Message, kind), 4);
    assert_eq!(offset_of!(Message, text), 6);
    assert_eq!(offset_of!(Message, operands), 8);

    let range = GpaRange::new(0x0102_0304_5000, 0x6000).unwrap();
    let (message, text) = Request::Convert { range, to: Side::Shared }.encode();
    let message = Message { sequence: 0x0a0b_0c0d, ..message };
    let mut expected = [0; 56];
    expected[..8].copy_from_slice(&[0x0d, 0x0c, 0x0b, 0x0a, 4, 0, 0, 0]);
    expected[8..16].copy_from_slice(&[0, 0x50, 4, 3, 2, 1, 0, 0]);
    expected[16..24].copy_from_slice(&[0, 0x60, 0, 0, 0, 0, 0, 0]);
    expected[24..32].copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(message.as_bytes(), expected);
    assert_eq!(text, "");

    let (message, text) = Report::Failed("nein".into()).encode();
    let mut expected = [0; 56];
    expected[4..8].copy_from_slice(&[4, 2, 4, 0]);
    assert_eq!((message.as_bytes(), text.as_bytes()), (&expected[..], &b"nein"[..]));

    let digest = std::array::from_fn(|at| at as u8);
    let (message, _) = Report::Sealed(Measurement(digest)).encode();
    assert_eq!(message.as_bytes()[8..], digest);
}
