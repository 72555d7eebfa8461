//! Garbage on a vCPU's page.

use crate::common::{DATA, REPORT};
use crate::guests::{HEARD, POOL, SAYS_SECRET, pool, witness};
use crate::hostile_vmm::{FIRST, Hostage, at};
use crate::{PATIENCE, vaults};
use cvm_backend_kvm::vault::protocol::{Given, Message, Reply, Request};
use cvm_core::{Answer, Exit, PAGE_SIZE};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Instant;

/// Numbers without a pattern, the same each time.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        // xorshift64.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        std::iter::repeat_with(|| self.next().to_le_bytes()).flatten().take(len).collect()
    }

    fn of(&mut self, choices: &[u64]) -> u64 {
        choices[self.next() as usize % choices.len()]
    }

    /// A message that is a request in form, or almost.
    fn message(&mut self) -> Message {
        let any = self.next() >> (self.next() % 64);
        let address = self.of(&[POOL, POOL, POOL + PAGE_SIZE, DATA, 0, 1 << 52, any]);
        let len = self.of(&[PAGE_SIZE, PAGE_SIZE, 2 * PAGE_SIZE, 3 * PAGE_SIZE, 0, any]);
        let small = self.next() % 4;
        let (kind, operands) = match self.next() % 20 {
            0..5 => (1, [0; 3]),
            5..7 => (2, [any, 0, 0]),
            7 => (3, [small, 0, 0]),
            8..15 => (4, [address, len, self.next() % 2]),
            15 => (5, [address, len, 0]),
            16 => (6, [any % 32, 0, 0]),
            17 => (7, [small * 2, any % 512, 0]),
            18 => (small as u16 + 4, [address, any, small]),
            _ => (any as u16, [any, small, any]),
        };
        let mut message = Message { kind, ..Message::default() };
        message.operands[..3].copy_from_slice(&operands);
        match self.next() % 32 {
            0 => message.text = any as u16,
            1 => message.operands[3..].fill(any),
            _ => {}
        }
        message
    }
}

#[test]
fn garbage_on_its_page_does_not_touch_a_guest() {
    const ROUNDS: u32 = 2000;
    let Some(_vaults) = vaults() else { return };
    let mut guest = Hostage::start(1, witness);
    let mut kinds = [0; 4];
    for seed in [1, 0x0123_4567_89ab_cdef] {
        let mut noise = Noise(seed);
        for round in 0..ROUNDS / 2 {
            if noise.next().is_multiple_of(2) {
                guest.fill(FIRST, at::REQUEST_MESSAGE, &noise.bytes(at::REPLY - at::REQUEST_MESSAGE));
                guest.fill(FIRST, at::REPLY + 4, &noise.bytes(PAGE_SIZE as usize - at::REPLY - 4));
            }
            if noise.next().is_multiple_of(8) {
                guest.word(FIRST, at::KICK).store(noise.next() as u32, Ordering::SeqCst);
                guest.signal();
            }
            let mut sequence = guest.next(FIRST);
            let mut message = noise.message();
            message.sequence = sequence;
            guest.post(FIRST, sequence, &message, &[]);
            if noise.next().is_multiple_of(4) {
                // While it is being looked at, or the guest runs.
                for _ in 0..4 {
                    guest.fill(FIRST, at::REQUEST_MESSAGE, &noise.bytes(at::REPLY - at::REQUEST_MESSAGE));
                    guest.fill(FIRST, at::REPLY_MESSAGE, &noise.bytes(PAGE_SIZE as usize - at::REPLY_MESSAGE));
                }
                sequence = noise.next() as u32 & !(1 << 31);
                guest.ring(FIRST, sequence);
                guest.last[0] = sequence;
                // What it says may be garbage of this test by now.
                let begin = Instant::now();
                while guest.word(FIRST, at::REPLY).load(Ordering::SeqCst) != sequence {
                    assert!(begin.elapsed() < PATIENCE, "round {round}: the vault does not reply");
                    thread::yield_now();
                }
                continue;
            }
            let reply = guest.hear(FIRST, sequence).expect("the vault has ended");
            let request = Request::decode(&message, &[]);
            match (&request, &reply) {
                (_, Reply::Refused(_) | Reply::Outdated(_)) => kinds[0] += 1,
                (Ok(Request::Run(_)), Reply::Exit(exit)) => {
                    kinds[1] += 1;
                    let is_report = matches!(exit, Exit::DoorbellWrite { register: REPORT, .. });
                    assert!(!is_report || *exit == SAYS_SECRET, "round {round}: {exit:?}");
                }
                (Ok(Request::Convert { range, .. }), Reply::Done) => {
                    kinds[2] += 1;
                    assert!(pool().contains_range(range), "round {round}: {request:?}");
                }
                (Ok(Request::Register(_)), Reply::Register(_)) => kinds[3] += 1,
                (Ok(Request::Inject(_)), Reply::InjectionRefused(_)) => {}
                _ => panic!("round {round}: {request:?} with {reply:?}"),
            }
        }
    }
    assert!(kinds.iter().all(|count| *count > 0), "the noise tries everything: {kinds:?}");
    // Back to what is honest, wherever it has stopped.
    let mut given = [Given::Nothing, Given::Answer(Answer::Invalid), Given::Value(0)].into_iter();
    let first = given.find_map(|given| match guest.ask(FIRST, &Request::Run(given)) {
        Reply::Exit(exit) => Some(exit),
        Reply::Refused(_) | Reply::Outdated(_) => None,
        reply => panic!("{reply:?}"),
    });
    let mut exit = first.expect("it cannot go on");
    let mut reports = 0;
    while reports < 4 {
        let given = match exit {
            SAYS_SECRET => {
                reports += 1;
                Given::Nothing
            }
            Exit::DoorbellRead { .. } => Given::Value(0),
            Exit::Conversion(request) => {
                let convert = Request::Convert { range: pool(), to: request.to() };
                assert_eq!(guest.ask(FIRST, &convert), Reply::Done);
                Given::Answer(Answer::Done)
            }
            Exit::DoorbellWrite { register: HEARD, .. } | Exit::Kicked => Given::Nothing,
            other => panic!("{other:?}"),
        };
        exit = guest.run(given);
    }
}
