//! What the programs of this workspace have in common: how they start, print and end.
//!
//! `println!` panics on a closed pipe and on a full disk. The functions here return an error, and `main` ends by it.

#![allow(dead_code, reason = "each program uses a part")]

use clap::Parser;
use std::error::Error;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

/// A failed write to the standard output.
#[derive(Debug)]
pub struct OutputError(io::Error);

impl OutputError {
    /// The exit status of a program that SIGPIPE ends, as a shell reports it: 128 and the signal's number.
    const CLOSED: u8 = 128 + 13;

    /// Whether the reader of a pipe closed it, as `head` does when it has seen enough.
    pub fn is_closed(&self) -> bool {
        self.0.kind() == io::ErrorKind::BrokenPipe
    }
}

impl From<io::Error> for OutputError {
    fn from(error: io::Error) -> Self {
        Self(error)
    }
}

impl fmt::Display for OutputError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "failed to write to the standard output: {}", self.0)
    }
}

impl Error for OutputError {}

/// Writes bytes to the standard output.
pub fn print_bytes(bytes: &[u8]) -> Result<(), OutputError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes)?;
    // The flush at the end of a program drops errors.
    Ok(stdout.flush()?)
}

/// Writes `text` and a line feed to the standard output.
pub fn print(text: impl fmt::Display) -> Result<(), OutputError> {
    print_bytes(format!("{text}\n").as_bytes())
}

/// Prints what a program found, and gives its verdict as the exit status, whether or not the reader stayed to the end.
pub fn conclude(found: impl fmt::Display, ok: bool) -> Result<ExitCode, OutputError> {
    match print(found.to_string().trim_end()) {
        Err(error) if !error.is_closed() => Err(error),
        _ if ok => Ok(ExitCode::SUCCESS),
        _ => Ok(ExitCode::FAILURE),
    }
}

/// Writes `text` and a line feed to the standard error. If that fails, nobody is left to tell.
pub fn note(text: impl fmt::Display) {
    let _ = io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// The error with its sources, each behind a colon.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

/// Parses the command line, runs the program, and reports its error.
///
/// A program whose reader has closed the pipe ends without a message.
pub fn run<O: Parser>(program: impl FnOnce(O) -> Result<ExitCode, Box<dyn Error + Send + Sync>>) -> ExitCode {
    end(match O::try_parse() {
        Ok(options) => program(options),
        // A mistake, whose message goes to the standard error.
        Err(error) if error.use_stderr() => {
            let _ = error.print();
            return ExitCode::from(2);
        }
        // --help or --version.
        Err(text) => text.print().map(|()| ExitCode::SUCCESS).map_err(|error| OutputError(error).into()),
    })
}

/// The exit status of a program that came to `result`, after its error was reported.
pub fn end(result: Result<ExitCode, Box<dyn Error + Send + Sync>>) -> ExitCode {
    result.unwrap_or_else(|error| match error.downcast_ref::<OutputError>() {
        Some(output) if output.is_closed() => ExitCode::from(OutputError::CLOSED),
        _ => {
            note(format_args!("error: {}", chain(&*error)));
            ExitCode::FAILURE
        }
    })
}
