//! The programs of the machine that the tasks use.

use std::env;
use std::iter;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};

use crate::error::{Context, Error, Result};

/// The path of `program`, or an error that names the Debian package it comes in.
pub fn find(program: &str, package: &str) -> Result<PathBuf> {
    on_path(program).ok_or_else(|| Error::new(format!("no {program} on PATH; on Debian: apt-get install {package}")))
}

/// The path of `program`, when there is one.
pub fn on_path(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|directory| directory.join(program)).find(|path| path.is_file())
}

/// Runs a program that says on its own what it does; succeeds when the program does.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().context(|| describe(command))?;
    check(command, status)
}

/// Runs a program for what it prints.
pub fn output(command: &mut Command) -> Result<String> {
    command.stderr(Stdio::inherit());
    let output = command.output().context(|| describe(command))?;
    check(command, output.status)?;
    String::from_utf8(output.stdout).context(|| describe(command))
}

fn check(command: &Command, status: ExitStatus) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    Err(Error::new(format!("{} failed: {status}", describe(command))))
}

/// A command line, for an error.
fn describe(command: &Command) -> String {
    let words = iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}
