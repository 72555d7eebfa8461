//! The interrupt guard: what the host may inject into a guest.

use std::fmt;

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
    /// Nothing but maskable interrupts is ever injected into a protected guest.
    #[error("a protected guest takes maskable interrupts only")]
    NotAnInterrupt,
}

/// The vectors that a guest accepts: part of the measured launch configuration. By default none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InterruptPolicy {
    accepted: [u64; 4],
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

    /// The accepted vectors as 256 bits, vector 0 first.
    pub fn bits(&self) -> [u64; 4] {
        self.accepted
    }

    fn accepts(&self, vector: u8) -> bool {
        self.accepted[usize::from(vector / 64)] >> (vector % 64) & 1 == 1
    }
}

/// Decides about injections.
#[derive(Debug, Clone, Copy)]
pub struct InterruptGuard {
    policy: InterruptPolicy,
}

impl InterruptGuard {
    /// A guard that lets pass what `policy` accepts.
    pub fn new(policy: InterruptPolicy) -> Self {
        Self { policy }
    }

    /// Whether the host may inject `event`.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, event: Event) -> Result<(), Refusal> {
        match event {
            Event::Interrupt(0..32) => Err(Refusal::Reserved),
            Event::Interrupt(vector) if self.policy.accepts(vector) => Ok(()),
            Event::Interrupt(_) => Err(Refusal::NotAccepted),
            _ => Err(Refusal::NotAnInterrupt),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_accepted_vectors_pass() {
        let guard = InterruptGuard::new(InterruptPolicy::default().accept(0x41).unwrap().accept(0xff).unwrap());
        for vector in 0..=255 {
            let expected = match vector {
                0..32 => Err(Refusal::Reserved),
                0x41 | 0xff => Ok(()),
                _ => Err(Refusal::NotAccepted),
            };
            assert_eq!(guard.check(Event::Interrupt(vector)), expected, "vector {vector:#x}");
            assert_eq!(guard.check(Event::Exception(vector)), Err(Refusal::NotAnInterrupt));
        }
        for event in [Event::Nmi, Event::Smi, Event::Init, Event::Startup] {
            assert_eq!(guard.check(event), Err(Refusal::NotAnInterrupt));
        }
    }

    #[test]
    fn a_policy_cannot_accept_exceptions() {
        assert_eq!(InterruptPolicy::default().accept(31), Err(Refusal::Reserved));
    }
}
