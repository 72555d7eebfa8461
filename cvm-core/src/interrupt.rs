//! The interrupt guard: what the host may inject into a guest.

use crate::doorbell::Trigger;
use std::fmt;
use std::num::NonZeroU32;
use std::time::Instant;

/// A maskable interrupt that a host may want to inject into a vCPU. A protected guest takes no other event: there is no
/// value for an exception, an NMI, an SMI, INIT or a start-up signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// An edge: a maskable interrupt with this vector, once.
    Interrupt(u8),
    /// The line of a level-triggered vector. While it is asserted, the vector is injected whenever the guest can take
    /// an interrupt, so its handler must make the host lower the line before it returns. A limit counts it when it is
    /// raised.
    Line {
        /// The vector.
        vector: u8,
        /// Whether the line is asserted from now on, or lowered.
        asserted: bool,
    },
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Interrupt(vector) => write!(f, "interrupt {vector:#x}"),
            Self::Line { vector, asserted: true } => write!(f, "raising the line of interrupt {vector:#x}"),
            Self::Line { vector, asserted: false } => write!(f, "lowering the line of interrupt {vector:#x}"),
        }
    }
}

/// Who hands interrupts to the guest. Part of the measured launch configuration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[repr(u64)]
pub enum InterruptController {
    /// Nobody but the vCPU's own thread, by [`Vcpu::inject`](crate::Vcpu::inject). The guest acknowledges nothing, and
    /// its halts are exits.
    #[default]
    None = 0,
    /// A local APIC in each vCPU, which the kernel emulates. It starts software-enabled and in x2APIC mode, which the
    /// guest cannot leave; the APIC's id is the vCPU's index. The guest ends each interrupt by writing 0 to the MSR
    /// `0x80b`, EOI (Intel SDM, volume 3, section 12.12). There is no I/O APIC, PIC or timer chip, and no
    /// level-triggered vector. Halts stay in the kernel.
    Apic = 1,
}

/// Who keeps a host from injecting what a guest does not expect.
///
/// Either guard holds against whoever has no descriptor of the VM itself: with that, the kernel routes anything to any
/// vector. The descriptors of [`Vm::interrupt_fd`](crate::Vm::interrupt_fd) are good for their own interrupt only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Guarding {
    /// This library, in the VMM's process: it keeps an honest VMM from mistakes, and nobody else from anything.
    Library,
    /// A party that the VMM cannot get around.
    Enforced,
}

/// Why an event is not injected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// Vectors below 32 are exceptions, which a host has no business to raise.
    #[error("vectors below 32 belong to exceptions")]
    Reserved,
    /// The guest's policy does not list this vector.
    #[error("the guest does not accept this vector")]
    NotAccepted,
    /// The guest accepts this vector as an edge and not as a level, or the reverse.
    #[error("the guest accepts this vector with the other trigger")]
    WrongTrigger,
    /// The interrupt controller takes messages, which are edges.
    #[error("the local apic takes edges only: a level needs a vm without interrupt controller")]
    EdgesOnly,
    /// The guest has had as many interrupts in the last second as it accepts.
    #[error("the guest accepts {most} interrupts a second, and has had them")]
    TooMany {
        /// How many.
        most: NonZeroU32,
    },
}

/// What a guest accepts from the start: part of the measured launch configuration. By default nothing. While it runs, a
/// guest may accept more vectors, see [`control::ACCEPT`](crate::doorbell::control::ACCEPT).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InterruptPolicy {
    accepted: [u64; 4],
    /// Those of them that are levels.
    level: [u64; 4],
    most_per_second: Option<NonZeroU32>,
}

impl InterruptPolicy {
    /// Also accepts `vector` as an edge.
    ///
    /// # Errors
    /// [`Refusal::Reserved`] below 32, [`Refusal::WrongTrigger`] for a vector that is accepted as a level.
    pub fn accept(self, vector: u8) -> Result<Self, Refusal> {
        self.accept_as(vector, Trigger::Edge)
    }

    /// Also accepts `vector` as a level.
    ///
    /// # Errors
    /// [`Refusal::Reserved`] below 32, [`Refusal::WrongTrigger`] for a vector that is accepted as an edge.
    pub fn accept_level(self, vector: u8) -> Result<Self, Refusal> {
        self.accept_as(vector, Trigger::Level)
    }

    fn accept_as(mut self, vector: u8, trigger: Trigger) -> Result<Self, Refusal> {
        match self.trigger(vector) {
            _ if vector < 32 => return Err(Refusal::Reserved),
            Some(accepted) if accepted != trigger => return Err(Refusal::WrongTrigger),
            _ => set(&mut self.accepted, vector),
        }
        if trigger == Trigger::Level {
            set(&mut self.level, vector);
        }
        Ok(self)
    }

    /// Accepts at most `most` interrupts on each vCPU in any second, whenever it begins.
    pub fn limit(mut self, most: NonZeroU32) -> Self {
        self.most_per_second = Some(most);
        self
    }

    /// The accepted vectors as 256 bits, vector 0 first.
    pub fn bits(&self) -> [u64; 4] {
        self.accepted
    }

    /// Those of the accepted vectors that are levels, as 256 bits, vector 0 first.
    pub fn level_bits(&self) -> [u64; 4] {
        self.level
    }

    /// All that it consists of: the accepted vectors, those of them that are levels, and the limit.
    pub(crate) fn parts(&self) -> ([u64; 4], [u64; 4], Option<NonZeroU32>) {
        // No `..` here: what is added has to be measured too.
        let Self { accepted, level, most_per_second } = *self;
        (accepted, level, most_per_second)
    }

    /// How many interrupts it accepts on each vCPU in any second; nothing if there is no limit.
    pub fn most_per_second(&self) -> Option<NonZeroU32> {
        self.most_per_second
    }

    /// The trigger that it accepts `vector` with; nothing if it does not.
    pub fn trigger(&self, vector: u8) -> Option<Trigger> {
        let level = if has(&self.level, vector) { Trigger::Level } else { Trigger::Edge };
        has(&self.accepted, vector).then_some(level)
    }
}

fn set(bits: &mut [u64; 4], vector: u8) {
    bits[usize::from(vector / 64)] |= 1 << (vector % 64);
}

fn has(bits: &[u64; 4], vector: u8) -> bool {
    bits[usize::from(vector / 64)] >> (vector % 64) & 1 == 1
}

/// Decides about injections into one vCPU.
#[derive(Debug, Clone)]
pub struct InterruptGuard {
    policy: InterruptPolicy,
    controller: InterruptController,
    recent: Option<Recent>,
}

impl InterruptGuard {
    /// A guard that lets pass what `policy` accepts and `controller` can carry.
    pub fn new(policy: InterruptPolicy, controller: InterruptController) -> Self {
        Self { policy, controller, recent: None }
    }

    /// For backends: the guest accepts `vector` with this trigger from now on.
    ///
    /// # Errors
    /// [`Refusal::Reserved`] below 32, [`Refusal::WrongTrigger`] for a vector that it has accepted with the other one,
    /// [`Refusal::EdgesOnly`] for a level where there is an [`InterruptController::Apic`].
    pub fn accept(&mut self, vector: u8, trigger: Trigger) -> Result<(), Refusal> {
        if (self.controller, trigger) == (InterruptController::Apic, Trigger::Level) {
            return Err(Refusal::EdgesOnly);
        }
        self.policy = self.policy.accept_as(vector, trigger)?;
        Ok(())
    }

    /// Whether the guest accepts `vector` with this trigger now, however many interrupts there were in the last second.
    ///
    /// # Errors
    /// Why the host must not inject it.
    pub fn accepts(&self, vector: u8, trigger: Trigger) -> Result<(), Refusal> {
        match self.policy.trigger(vector) {
            _ if vector < 32 => Err(Refusal::Reserved),
            _ if (self.controller, trigger) == (InterruptController::Apic, Trigger::Level) => Err(Refusal::EdgesOnly),
            Some(accepted) if accepted == trigger => Ok(()),
            Some(_) => Err(Refusal::WrongTrigger),
            None => Err(Refusal::NotAccepted),
        }
    }

    /// Lets `event` pass, and counts it, or not. `now` is the time; one before that of an earlier call counts as that one.
    /// A line that is lowered does not count.
    ///
    /// # Errors
    /// Why the host must not inject it.
    pub fn admit(&mut self, event: Event, now: Instant) -> Result<(), Refusal> {
        match event {
            Event::Interrupt(vector) => self.accepts(vector, Trigger::Edge)?,
            Event::Line { vector, asserted: true } => self.accepts(vector, Trigger::Level)?,
            Event::Line { vector, asserted: false } => return self.accepts(vector, Trigger::Level),
        }
        let Some(most) = self.policy.most_per_second else { return Ok(()) };
        let recent = self.recent.get_or_insert_with(|| Recent::new(now));
        if recent.count_within(most, now) { Ok(()) } else { Err(Refusal::TooMany { most }) }
    }
}

/// How many parts of a second the guard counts by.
const PARTS: u64 = 32;

/// The interrupts of the last second, in a ring of counts for each part of a second.
///
/// A part that the last second only begins or ends in counts in full, so no second has more than the limit, and a host that has used
/// the limit up waits for at most one part longer than a second.
#[derive(Debug, Clone)]
struct Recent {
    begin: Instant,
    /// The part that the last call was in, counted from `begin`.
    part: u64,
    counts: [u32; PARTS as usize + 1],
}

impl Recent {
    fn new(begin: Instant) -> Self {
        Self { begin, part: 0, counts: [0; PARTS as usize + 1] }
    }

    /// Counts an interrupt at `now` if there are at most `most` with it, and returns whether it did.
    fn count_within(&mut self, most: NonZeroU32, now: Instant) -> bool {
        let parts = self.counts.len() as u64;
        let elapsed = now.saturating_duration_since(self.begin);
        let part = elapsed.as_secs() * PARTS + u64::from(elapsed.subsec_nanos()) * PARTS / 1_000_000_000;
        for passed in self.part + 1..=part.min(self.part + parts) {
            self.counts[(passed % parts) as usize] = 0;
        }
        self.part = self.part.max(part);
        if self.counts.iter().map(|count| u64::from(*count)).sum::<u64>() >= u64::from(most.get()) {
            return false;
        }
        self.counts[(self.part % parts) as usize] += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    /// A guard without interrupt controller.
    fn guard(policy: InterruptPolicy) -> InterruptGuard {
        InterruptGuard::new(policy, InterruptController::None)
    }

    #[test]
    fn only_accepted_vectors_pass() {
        let mut guard = guard(InterruptPolicy::default().accept(0x41).unwrap());
        guard.accept(0xff, Trigger::Edge).unwrap();
        let now = Instant::now();
        for vector in 0..=255 {
            let expected = match vector {
                0..32 => Err(Refusal::Reserved),
                0x41 | 0xff => Ok(()),
                _ => Err(Refusal::NotAccepted),
            };
            assert_eq!(guard.admit(Event::Interrupt(vector), now), expected, "vector {vector:#x}");
        }
    }

    #[test]
    fn neither_a_policy_nor_a_guest_can_accept_exceptions() {
        for vector in 0..32 {
            assert_eq!(InterruptPolicy::default().accept(vector), Err(Refusal::Reserved));
            assert_eq!(InterruptPolicy::default().accept_level(vector), Err(Refusal::Reserved));
            for trigger in [Trigger::Edge, Trigger::Level] {
                let refused = guard(InterruptPolicy::default()).accept(vector, trigger);
                assert_eq!(refused, Err(Refusal::Reserved));
            }
        }
    }

    #[test]
    fn a_vector_keeps_its_trigger() {
        let policy = InterruptPolicy::default().accept(0x41).unwrap().accept_level(0x42).unwrap();
        assert_eq!(policy.accept_level(0x41), Err(Refusal::WrongTrigger));
        assert_eq!(policy.accept(0x42), Err(Refusal::WrongTrigger));
        assert_eq!(policy.accept(0x41).unwrap().accept_level(0x42), Ok(policy));
        assert_eq!((policy.bits(), policy.level_bits()), ([0, 6, 0, 0], [0, 4, 0, 0]));
        assert_eq!(guard(policy).accept(0x41, Trigger::Level), Err(Refusal::WrongTrigger));
    }

    #[test]
    fn an_edge_on_a_level_vector_and_a_line_of_an_edge_vector_are_refused() {
        let mut guard = guard(InterruptPolicy::default().accept(0x41).unwrap().accept_level(0x42).unwrap());
        let now = Instant::now();
        assert_eq!(guard.admit(Event::Interrupt(0x42), now), Err(Refusal::WrongTrigger));
        for asserted in [true, false] {
            assert_eq!(guard.admit(Event::Line { vector: 0x41, asserted }, now), Err(Refusal::WrongTrigger));
            assert_eq!(guard.admit(Event::Line { vector: 0x42, asserted }, now), Ok(()));
            assert_eq!(guard.admit(Event::Line { vector: 0x43, asserted }, now), Err(Refusal::NotAccepted));
            assert_eq!(guard.admit(Event::Line { vector: 31, asserted }, now), Err(Refusal::Reserved));
        }
    }

    #[test]
    fn a_line_counts_when_it_is_raised_and_can_be_lowered_whatever_the_limit() {
        let most = NonZeroU32::new(1).unwrap();
        let mut guard = guard(InterruptPolicy::default().accept_level(0x42).unwrap().limit(most));
        let now = Instant::now();
        let mut line = |asserted| guard.admit(Event::Line { vector: 0x42, asserted }, now);
        assert_eq!([line(false), line(true), line(false)], [Ok(()); 3]);
        assert_eq!(line(true), Err(Refusal::TooMany { most }));
        assert_eq!(line(false), Ok(()));
    }

    #[test]
    fn an_apic_takes_no_levels() {
        let policy = InterruptPolicy::default().accept(0x41).unwrap().accept_level(0x42).unwrap();
        let mut guard = InterruptGuard::new(policy, InterruptController::Apic);
        let now = Instant::now();
        assert_eq!(guard.accept(0x43, Trigger::Level), Err(Refusal::EdgesOnly));
        assert_eq!(guard.admit(Event::Line { vector: 0x42, asserted: true }, now), Err(Refusal::EdgesOnly));
        assert_eq!(guard.admit(Event::Interrupt(0x41), now), Ok(()));
    }

    #[test]
    fn a_limit_is_not_doubled_around_the_end_of_a_second() {
        let most = NonZeroU32::new(3).unwrap();
        let mut guard = guard(InterruptPolicy::default().accept(0x41).unwrap().limit(most));
        let begin = Instant::now();
        let mut admitted = |millis| guard.admit(Event::Interrupt(0x41), begin + Duration::from_millis(millis));
        assert_eq!([0, 998, 999].map(&mut admitted), [Ok(()); 3]);
        assert_eq!(admitted(1000), Err(Refusal::TooMany { most }));
        assert_eq!(admitted(1032), Ok(()), "the first one was more than a second ago");
        assert_eq!(admitted(1998), Err(Refusal::TooMany { most }));
        assert_eq!([2032, 2032].map(&mut admitted), [Ok(()); 2]);
        assert_eq!(admitted(0), Err(Refusal::TooMany { most }), "a clock that goes back is no way out of the limit");
        assert_eq!(admitted(5000), Ok(()));
    }

    proptest! {
        #[test]
        fn no_second_has_more_interrupts_than_the_guest_accepts_and_no_longer_time_refuses_one(
            most in 1..20u32, micros in proptest::collection::vec(prop_oneof![0..2000u64, 0..1_100_000u64], 1..200),
        ) {
            let limit = NonZeroU32::new(most).unwrap();
            let mut guard = guard(InterruptPolicy::default().accept(0x41).unwrap().limit(limit));
            let (second, part) = (Duration::from_secs(1), Duration::from_secs(1) / PARTS as u32);
            let (mut now, mut admitted) = (Instant::now(), Vec::new());
            for wait in micros {
                now += Duration::from_micros(wait);
                let since = |time: &Instant| now - *time;
                if guard.admit(Event::Interrupt(0x41), now).is_ok() {
                    admitted.push(now);
                    let earlier = admitted.iter().rev().nth(most as usize).map(since);
                    prop_assert!(earlier.is_none_or(|earlier| earlier > second), "{earlier:?} for {most} and one more");
                } else {
                    let recent = admitted.iter().filter(|time| since(time) <= second + part).count();
                    prop_assert!(recent >= most as usize, "refused after {recent} of {most}");
                }
            }
        }

        #[test]
        fn whatever_passes_was_accepted_with_its_trigger(
            accepted: Vec<(u8, bool)>, apic: bool, events: Vec<(u8, Option<bool>)>,
        ) {
            let controller = if apic { InterruptController::Apic } else { InterruptController::None };
            let mut guard = InterruptGuard::new(InterruptPolicy::default(), controller);
            let mut model = std::collections::BTreeMap::new();
            for (vector, level) in accepted {
                let trigger = if level { Trigger::Level } else { Trigger::Edge };
                let possible = vector >= 32 && !(apic && level);
                let fits = possible && *model.entry(vector).or_insert(level) == level;
                prop_assert_eq!(guard.accept(vector, trigger).is_ok(), fits);
            }
            for (vector, line) in events {
                let event = line.map_or(Event::Interrupt(vector), |asserted| Event::Line { vector, asserted });
                let passes = guard.admit(event, Instant::now()).is_ok();
                prop_assert_eq!(passes, model.get(&vector) == Some(&line.is_some()));
            }
        }
    }
}
