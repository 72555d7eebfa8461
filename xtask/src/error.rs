//! The one error of the tasks: a sentence for whoever ran them.

use std::fmt;

use crate::program::OutputError;

/// What failed, why, and what to do about it.
#[derive(Debug)]
pub enum Error {
    /// A sentence.
    Message(String),
    /// The task has nowhere to write to.
    Output(OutputError),
}

/// The result of a task or a part of one.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error that says `message`.
    pub fn new(message: impl Into<String>) -> Self {
        Self::Message(message.into())
    }

    /// The error as the program ends by it.
    pub fn boxed(self) -> Box<dyn std::error::Error + Send + Sync> {
        match self {
            Self::Message(message) => message.into(),
            Self::Output(error) => error.into(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Message(message) => f.write_str(message),
            Self::Output(error) => error.fmt(f),
        }
    }
}

impl From<OutputError> for Error {
    fn from(error: OutputError) -> Self {
        Self::Output(error)
    }
}

impl std::error::Error for Error {}

/// Adds what was being done to the cause of a failure.
pub trait Context<T> {
    /// Turns a failure into "`doing`: cause".
    fn context(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for Result<T, E> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|cause| Error::new(format!("{}: {cause}", doing())))
    }
}
