//! The interrupt guard: what the host may inject into a guest.

use std::fmt;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

/// Something that a host may want to inject into a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// A maskable interrupt with its vector.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// An exception with its vector.
    Exception(u8),
    /// A system-management interrupt.
    Smi,
    /// An INIT signal.
    Init,
    /// A start-up signal.
    Startup,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Interrupt(vector) => write!(f, "interrupt {vector:#x}"),
            Self::Nmi => f.write_str("an nmi"),
            Self::Exception(vector) => write!(f, "exception {vector:#x}"),
            Self::Smi => f.write_str("an smi"),
            Self::Init => f.write_str("init"),
            Self::Startup => f.write_str("start-up"),
        }
    }
}

/// Who keeps a host from injecting what a guest does not expect.
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
    /// The guest has had as many interrupts as it accepts in a second.
    #[error("the guest accepts {most} interrupts in a second")]
    TooMany {
        /// How many.
        most: NonZeroU32,
    },
    /// Nothing but maskable interrupts is ever injected into a protected guest.
    #[error("a protected guest takes maskable interrupts only")]
    NotAnInterrupt,
}

/// What a guest accepts from the start: part of the measured launch configuration. By default nothing. While it runs, a
/// guest may accept more vectors, see [`control::ACCEPT`](crate::doorbell::control::ACCEPT).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InterruptPolicy {
    accepted: [u64; 4],
    most_per_second: Option<NonZeroU32>,
}

impl InterruptPolicy {
    /// Also accepts `vector`.
    ///
    /// # Errors
    /// [`Refusal::Reserved`] below 32.
    pub fn accept(mut self, vector: u8) -> Result<Self, Refusal> {
        if vector < 32 {
            return Err(Refusal::Reserved);
        }
        self.accepted[usize::from(vector / 64)] |= 1 << (vector % 64);
        Ok(self)
    }

    /// Accepts at most `most` interrupts on each vCPU in a second.
    pub fn limit(mut self, most: NonZeroU32) -> Self {
        self.most_per_second = Some(most);
        self
    }

    /// The accepted vectors as 256 bits, vector 0 first.
    pub fn bits(&self) -> [u64; 4] {
        self.accepted
    }

    /// How many interrupts it accepts on each vCPU in a second; nothing if there is no limit.
    pub fn most_per_second(&self) -> Option<NonZeroU32> {
        self.most_per_second
    }

    fn accepts(&self, vector: u8) -> bool {
        self.accepted[usize::from(vector / 64)] >> (vector % 64) & 1 == 1
    }
}

/// Decides about injections into one vCPU.
#[derive(Debug, Clone)]
pub struct InterruptGuard {
    policy: InterruptPolicy,
    /// When the second began in which interrupts are being counted, and how many there were.
    second: Option<(Instant, u32)>,
}

impl InterruptGuard {
    /// A guard that lets pass what `policy` accepts.
    pub fn new(policy: InterruptPolicy) -> Self {
        Self { policy, second: None }
    }

    /// For backends: the guest accepts `vector` from now on.
    ///
    /// # Errors
    /// [`Refusal::Reserved`] below 32.
    pub fn accept(&mut self, vector: u8) -> Result<(), Refusal> {
        self.policy = self.policy.accept(vector)?;
        Ok(())
    }

    /// Lets `event` pass, and counts it, or not. `now` is the time.
    ///
    /// # Errors
    /// Why the host must not inject it.
    pub fn admit(&mut self, event: Event, now: Instant) -> Result<(), Refusal> {
        match event {
            Event::Interrupt(0..32) => return Err(Refusal::Reserved),
            Event::Interrupt(vector) if self.policy.accepts(vector) => {}
            Event::Interrupt(_) => return Err(Refusal::NotAccepted),
            _ => return Err(Refusal::NotAnInterrupt),
        }
        let Some(most) = self.policy.most_per_second else { return Ok(()) };
        let current = self.second.filter(|(begin, _)| now.saturating_duration_since(*begin) < Duration::from_secs(1));
        let (begin, count) = current.unwrap_or((now, 0));
        if count >= most.get() {
            return Err(Refusal::TooMany { most });
        }
        self.second = Some((begin, count + 1));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_accepted_vectors_pass() {
        let mut guard = InterruptGuard::new(InterruptPolicy::default().accept(0x41).unwrap());
        guard.accept(0xff).unwrap();
        let now = Instant::now();
        for vector in 0..=255 {
            let expected = match vector {
                0..32 => Err(Refusal::Reserved),
                0x41 | 0xff => Ok(()),
                _ => Err(Refusal::NotAccepted),
            };
            assert_eq!(guard.admit(Event::Interrupt(vector), now), expected, "vector {vector:#x}");
            assert_eq!(guard.admit(Event::Exception(vector), now), Err(Refusal::NotAnInterrupt));
        }
        for event in [Event::Nmi, Event::Smi, Event::Init, Event::Startup] {
            assert_eq!(guard.admit(event, now), Err(Refusal::NotAnInterrupt));
        }
    }

    #[test]
    fn neither_a_policy_nor_a_guest_can_accept_exceptions() {
        assert_eq!(InterruptPolicy::default().accept(31), Err(Refusal::Reserved));
        assert_eq!(InterruptGuard::new(InterruptPolicy::default()).accept(31), Err(Refusal::Reserved));
    }

    #[test]
    fn no_second_has_more_interrupts_than_the_guest_accepts() {
        let most = NonZeroU32::new(3).unwrap();
        let mut guard = InterruptGuard::new(InterruptPolicy::default().accept(0x41).unwrap().limit(most));
        let begin = Instant::now();
        let mut admitted = |millis| guard.admit(Event::Interrupt(0x41), begin + Duration::from_millis(millis));
        assert_eq!([0, 10, 999].map(&mut admitted), [Ok(()); 3]);
        assert_eq!(admitted(999), Err(Refusal::TooMany { most }));
        assert_eq!([1000, 1001, 1002].map(&mut admitted), [Ok(()); 3]);
        assert_eq!(admitted(1999), Err(Refusal::TooMany { most }));
        assert_eq!(admitted(5000), Ok(()));
        assert_eq!(admitted(0), Ok(()), "a clock that goes back is no way out of the limit, but no refusal either");
    }
}
