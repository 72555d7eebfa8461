//! Requests of a hostile VMM on a vCPU's page.

use crate::common::{DATA, MEMORY, REPORT, range};
use crate::guests::{HEARD, POOL, POOL_PAGES, SAYS_SECRET, SECRET, pool, says, witness};
use crate::hostile_vmm::{FIRST, Hostage};
use crate::vaults;
use cvm_backend_kvm::vault::protocol::{Given, Message, Reply, Request};
use cvm_core::doorbell::PORT_BASE;
use cvm_core::interrupt::Refusal;
use cvm_core::x86::Register;
use cvm_core::{Answer, Event, Exit, Gpa, PAGE_SIZE, Side};
use std::os::unix::fs::FileExt;

#[test]
fn nothing_is_converted_but_what_the_guest_has_asked_for_and_as_long_as_it_waits() {
    let Some(_vaults) = vaults() else { return };
    let mut guest = Hostage::start(2, witness);
    let convert = |range, to| Request::Convert { range, to };
    let secret = convert(range(DATA, 1), Side::Shared);
    guest.outdated(&secret);
    assert_eq!(guest.run(Given::Nothing), SAYS_SECRET);
    guest.outdated(&secret);
    guest.outdated(&Request::Run(Given::Answer(Answer::Done)));
    guest.refused(&Request::Run(Given::Value(1)));
    assert_eq!(guest.run(Given::Nothing), SAYS_SECRET);

    // It reads: it takes a value and nothing else.
    assert_eq!(guest.run(Given::Nothing), Exit::DoorbellRead { register: HEARD });
    guest.refused(&Request::Run(Given::Nothing));
    guest.outdated(&Request::Run(Given::Answer(Answer::Done)));
    for answer in [Answer::Invalid, Answer::Retry] {
        guest.refused(&Request::Run(Given::Answer(answer)));
    }
    guest.outdated(&secret);
    assert_eq!(guest.run(Given::Value(0xffff_ffff_0000_0007)), says(7));

    // It asks: it takes what is true.
    for to in [Side::Shared, Side::Private] {
        assert!(matches!(guest.run(Given::Nothing), Exit::Conversion(request) if request.gpa() == Gpa(POOL)));
        guest.refused(&Request::Run(Given::Nothing));
        guest.refused(&Request::Run(Given::Value(0)));
        guest.outdated(&Request::Run(Given::Answer(Answer::Done)));
        for wrong in [
            secret.clone(),
            convert(pool(), to.other()),
            convert(range(POOL, POOL_PAGES + 1), to),
            convert(range(POOL - PAGE_SIZE, 2), to),
            convert(range(0, MEMORY / PAGE_SIZE), to),
            convert(range(MEMORY, 1), to),
            Request::Poison(pool()),
            Request::Poison(range(DATA, 1)),
            Request::Poison(range(MEMORY, 1)),
        ] {
            guest.outdated(&wrong);
        }
        let other = guest.ask(1, &convert(pool(), to));
        assert!(matches!(other, Reply::Outdated(_)), "on another's behalf: {other:?}");
        assert_eq!(guest.ask(FIRST, &convert(range(POOL, 1), to)), Reply::Done);
        guest.outdated(&Request::Run(Given::Answer(Answer::Done)));
        assert_eq!(guest.ask(FIRST, &convert(pool(), to)), Reply::Done);
        assert_eq!(guest.run(Given::Answer(Answer::Done)), says(Answer::Done as u32));
        guest.outdated(&convert(pool(), to));
        guest.outdated(&convert(pool(), to.other()));
    }
    // What is refused cannot be carried out afterwards.
    for answer in [Answer::Retry, Answer::Invalid] {
        while !matches!(guest.run(Given::Nothing), Exit::DoorbellRead { .. }) {}
        assert_eq!(guest.run(Given::Value(1)), says(1));
        for to in [Side::Shared, Side::Private] {
            assert!(matches!(guest.run(Given::Nothing), Exit::Conversion(_)));
            assert_eq!(guest.run(Given::Answer(answer)), says(answer as u32));
            guest.outdated(&convert(pool(), to));
            guest.outdated(&Request::Run(Given::Answer(Answer::Done)));
        }
    }
    assert_eq!(guest.run(Given::Nothing), SAYS_SECRET);
    let (mut page, nothing) = ([0xff; PAGE_SIZE as usize], [0; PAGE_SIZE as usize]);
    guest.shared.read_exact_at(&mut page, DATA).unwrap();
    assert_eq!(page, nothing, "the secret's page has never been shared");
}

#[test]
fn registers_show_what_the_exit_exposes_and_nothing_else() {
    let Some(_vaults) = vaults() else { return };
    let mut guest = Hostage::start(1, witness);
    let mut exposed = || {
        let registers =
            Register::ALL.into_iter().map(|register| match guest.ask(FIRST, &Request::Register(register)) {
                Reply::Register(value) => (register, value),
                reply => panic!("{register:?}: {reply:?}"),
            });
        let exposed: Vec<_> = registers.filter_map(|(register, value)| Some((register, value?))).collect();
        (exposed, guest.run(Given::Nothing))
    };
    let port = |register: u16| (Register::Rdx, u64::from(PORT_BASE + register));
    assert_eq!(exposed(), (vec![], SAYS_SECRET));
    let write = vec![(Register::Rax, SECRET.into()), port(REPORT)];
    assert_eq!(exposed(), (write.clone(), SAYS_SECRET));
    assert_eq!(exposed(), (write, Exit::DoorbellRead { register: HEARD }));
    let registers = Register::ALL.map(|register| (register, guest.ask(FIRST, &Request::Register(register))));
    for (register, reply) in registers {
        let expected = if register == Register::Rdx { Some(port(HEARD).1) } else { None };
        assert_eq!(reply, Reply::Register(expected), "{register:?}");
    }
}

#[test]
fn nothing_is_injected_that_the_guest_does_not_accept() {
    let Some(_vaults) = vaults() else { return };
    let mut guest = Hostage::start(1, witness);
    for vector in 0..=255 {
        let refusal = if vector < 32 { Refusal::Reserved } else { Refusal::NotAccepted };
        let reply = guest.ask(FIRST, &Request::Inject(Event::Interrupt(vector)));
        assert_eq!(reply, Reply::InjectionRefused(refusal), "{vector:#x}");
    }
    assert_eq!(guest.run(Given::Nothing), SAYS_SECRET);
}

#[test]
fn requests_whose_numbers_jump_or_disagree_are_refused() {
    let Some(_vaults) = vaults() else { return };
    let mut guest = Hostage::start(1, witness);
    let (run, _) = Request::Run(Given::Nothing).encode();
    for (sequence, within) in [(2, 2), (1, 1), (u32::MAX, u32::MAX), (5, 5), (6, 5), (7, 8), (1 << 31, 1 << 31)] {
        guest.post(FIRST, sequence, &Message { sequence: within, ..run }, &[]);
        let reply = guest.hear(FIRST, sequence);
        assert!(matches!(reply, Some(Reply::Refused(_))), "{sequence}: {reply:?}");
    }
    guest.last[0] = 0;
    assert_eq!(guest.run(Given::Nothing), SAYS_SECRET);
    // A text is none of its business.
    let sequence = guest.next(FIRST);
    guest.post(FIRST, sequence, &Message { sequence, text: 1, ..run }, b"x");
    assert!(matches!(guest.hear(FIRST, sequence), Some(Reply::Refused(_))));
    let sequence = guest.next(FIRST);
    guest.post(FIRST, sequence, &Message { sequence, text: u16::MAX, ..run }, b"x");
    assert!(matches!(guest.hear(FIRST, sequence), Some(Reply::Refused(_))));
    assert_eq!(guest.run(Given::Nothing), SAYS_SECRET);
}
