//! What this host offers of each isolation technology, what is missing for the others, and how to enable it.

#![deny(clippy::print_stdout, clippy::print_stderr, reason = "they panic where the stream is closed or full")]

#[path = "common/program.rs"]
mod program;

use clap::Parser;
use cvm::kvm::KvmPlatform;
use cvm::sev::kvm::SevPlatform;
use cvm::{BoxError, Platform};
use program::print;
use serde_json::json;
use std::process::ExitCode;

/// Report what this host offers of each isolation technology, what is missing for the others, and how to enable it.
///
/// The exit status is 0 whatever is found.
#[derive(Debug, Parser)]
#[command(name = "probe")]
struct Options {
    /// Print an array of {protection, offered, missing: [{what, remedy}], notes}
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    cvm::kvm::vault::init();
    program::run(run)
}

fn run(options: Options) -> Result<ExitCode, BoxError> {
    let offers: Vec<_> = KvmPlatform::probe().into_iter().chain(SevPlatform::probe()).collect();
    if options.json {
        let offers = offers.iter().map(|offer| {
            let missing = offer.missing.iter();
            let missing: Vec<_> = missing.map(|m| json!({ "what": m.what, "remedy": m.remedy })).collect();
            let protection = offer.protection.to_string();
            json!({
                "protection": protection, "offered": missing.is_empty(), "missing": missing, "notes": offer.notes,
            })
        });
        print(format_args!("{:#}", offers.collect::<serde_json::Value>()))?;
        return Ok(ExitCode::SUCCESS);
    }
    for offer in offers {
        let verdict = if offer.missing.is_empty() { "offered" } else { "not offered" };
        print(format_args!("{:<18}{verdict}", offer.protection.to_string()))?;
        for missing in offer.missing {
            print(format_args!("  missing  {}\n  remedy   {}", missing.what, missing.remedy))?;
        }
        for note in offer.notes {
            print(format_args!("  note     {note}"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
