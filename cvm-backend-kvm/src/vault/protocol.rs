//! What a VMM and its vault say to each other.
//!
//! Everything is a [`Message`]: a sequence number, a kind, six operands, and for some kinds a short text. Either end may
//! be compromised, so that each checks all that it takes: a kind that it does not know, an operand that is out of range,
//! one that should be zero, or a text where there is none or of another length makes a message [`Malformed`].
//!
//! | | on | from the VMM | from the vault |
//! |---|---|---|---|
//! | until the launch is sealed, and for what is not about a vCPU | a socket | [`Order`] | [`Report`] |
//! | for each vCPU, after the seal | a shared page | [`Request`] | [`Reply`] |
//!
//! No two kinds have the same number, so that none of the four is ever taken for another.
//!
//! Each message from the VMM has one from the vault as its answer, with the same sequence number, before the next may
//! come.

mod orders;
mod requests;

pub use orders::{Order, Report};
pub use requests::{Failure, Given, Reply, Request};

use cvm_core::interrupt::Refusal;
use cvm_core::{GpaRange, PAGE_SIZE, Side};
use std::num::NonZeroU32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The most bytes of text that a message has.
pub const MOST_TEXT: usize = 256;

/// The fixed part of every message, little endian as the processor that both ends run on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Message {
    /// Counts the VMM's messages; an answer has that of its question.
    pub sequence: u32,
    /// What it is.
    pub kind: u16,
    /// How many bytes of text follow.
    pub text: u16,
    /// What the kind says; those that it does not use are zero.
    pub operands: [u64; 6],
}

/// A message that means nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a message of kind {kind:#x} is malformed")]
pub struct Malformed {
    /// Its kind.
    pub kind: u16,
}

/// A message and its text.
pub type Encoded = (Message, String);

fn encoded(kind: u16, operands: &[u64]) -> Encoded {
    let mut message = Message { kind, ..Message::default() };
    for (slot, operand) in message.operands.iter_mut().zip(operands) {
        *slot = *operand;
    }
    (message, String::new())
}

fn with_text((mut message, _): Encoded, text: &str) -> Encoded {
    let text: String = text.chars().filter(|letter| !letter.is_control()).collect();
    let end = text.char_indices().map(|(at, letter)| at + letter.len_utf8()).take_while(|end| *end <= MOST_TEXT).last();
    let text = text[..end.unwrap_or(0)].to_owned();
    message.text = text.len() as u16;
    (message, text)
}

/// What a refusal is in a message.
fn refusal_operands(refusal: Refusal) -> [u64; 2] {
    match refusal {
        Refusal::Reserved => [0, 0],
        Refusal::NotAccepted => [1, 0],
        Refusal::TooMany { most } => [2, most.get().into()],
        Refusal::WrongTrigger => [3, 0],
        Refusal::EdgesOnly => [4, 0],
    }
}

/// Takes a message apart.
struct Parts<'a> {
    kind: u16,
    operands: std::slice::Iter<'a, u64>,
    text: Option<&'a [u8]>,
}

impl<'a> Parts<'a> {
    fn of(message: &'a Message, text: &'a [u8]) -> Result<Self, Malformed> {
        let parts = Self { kind: message.kind, operands: message.operands.iter(), text: Some(text) };
        if text.len() == usize::from(message.text) { Ok(parts) } else { Err(parts.malformed()) }
    }

    fn malformed(&self) -> Malformed {
        Malformed { kind: self.kind }
    }

    /// The next operand.
    fn next<T: TryFrom<u64>>(&mut self) -> Result<T, Malformed> {
        let operand = self.operands.next().copied().unwrap_or(0);
        T::try_from(operand).map_err(|_| self.malformed())
    }

    /// The next operand as one of `choices`, by the number that `number` gives each.
    fn choice<T: Copy>(&mut self, choices: &[T], number: impl Fn(T) -> u64) -> Result<T, Malformed> {
        let operand = self.next::<u64>()?;
        choices.iter().copied().find(|choice| number(*choice) == operand).ok_or(self.malformed())
    }

    fn flag(&mut self) -> Result<bool, Malformed> {
        self.choice(&[false, true], u64::from)
    }

    fn side(&mut self) -> Result<Side, Malformed> {
        self.choice(&[Side::Private, Side::Shared], |side| side as u64)
    }

    fn range(&mut self) -> Result<GpaRange, Malformed> {
        let (start, len) = (self.next()?, self.next()?);
        GpaRange::new(start, len).map_err(|_| self.malformed())
    }

    fn refusal(&mut self) -> Result<Refusal, Malformed> {
        Ok(match (self.next()?, self.next()?) {
            (0u64, 0u32) => Refusal::Reserved,
            (1, 0) => Refusal::NotAccepted,
            (2, most) => Refusal::TooMany { most: NonZeroU32::new(most).ok_or(self.malformed())? },
            (3, 0) => Refusal::WrongTrigger,
            (4, 0) => Refusal::EdgesOnly,
            _ => return Err(self.malformed()),
        })
    }

    fn text(&mut self) -> Result<String, Malformed> {
        let text = self.text.take().and_then(|text| str::from_utf8(text).ok());
        let text = text.filter(|text| text.len() <= MOST_TEXT && !text.contains(char::is_control));
        text.map(str::to_owned).ok_or(self.malformed())
    }

    /// What was made of the message, if nothing of it is left over.
    fn end<T>(self, made: T) -> Result<T, Malformed> {
        let empty = self.text.is_none_or(<[u8]>::is_empty);
        if empty && self.operands.clone().all(|operand| *operand == 0) { Ok(made) } else { Err(self.malformed()) }
    }
}

/// The size of [`Message`] in words of the page that carries it.
pub(super) const WORDS: usize = size_of::<Message>() / size_of::<u64>();
const _: () = assert!(size_of::<Message>() == 56 && PAGE_SIZE == 4096);

#[cfg(test)]
mod tests;
