//! What came of a run: on standard output, and as a document.

use crate::isolation::{self, ASSETS, Isolation, Situation};
use crate::outcome::{Finding, Observed, Row};
use crate::rows::{TABLES, Table};
use crate::stage::Stage;
use cvm::platform::Party;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::process::ExitCode;

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/isolation.md");

/// What stands above it in the document is written by hand.
const MARK: &str = "<!-- What follows is generated: cargo test --test attacks -- --write -->\n";

/// What was found so far.
#[derive(Default)]
pub struct Report {
    seen: BTreeSet<(&'static str, String)>,
    failures: Vec<String>,
    skipped: Vec<String>,
    right: usize,
}

fn rows() -> impl Iterator<Item = (&'static Table, &'static Row)> {
    TABLES.iter().flat_map(|table| table.rows.iter().map(move |row| (table, row)))
}

impl Report {
    /// Takes what a role has found; `prefix` says who played it.
    pub fn take(&mut self, isolation: Isolation, prefix: &str, findings: Vec<Finding>) {
        for Finding { row, observed } in findings {
            let id = format!("{prefix}{row}");
            let Some((table, row)) = rows().find(|(_, row)| row.id == id) else {
                self.fail(format!("{id}: nothing is expected of it"));
                continue;
            };
            let judged = row.judge(isolation, table.party, &observed);
            let mark = if judged.is_ok() { "ok" } else { "WRONG" };
            println!("{mark:5} {:11} {id:18} {observed}", format!("{isolation:?}"));
            match judged {
                Ok(()) if matches!(observed, Observed::Unable(_)) => self.skip(&format!("{id}: {observed}")),
                Ok(()) => self.right += 1,
                Err(why) => self.fail(format!("{isolation:?}: {id}: {why}")),
            }
            self.seen.insert((row.id, format!("{isolation:?}")));
        }
    }

    /// That every row was played which could be.
    pub fn complete(&mut self, isolation: Isolation, stage: &Stage) {
        for (table, row) in rows() {
            let played = match table.party {
                Some(Party::SameUser) => stage.has_user(),
                Some(Party::Root) => stage.has_root(),
                _ => true,
            };
            // They take a user of the vault's, or a VMM that is root.
            let played = match row.id.split_once('/') {
                Some(("start" | "vmm-root" | "vmm-apart", _)) => stage.has_vault_user(),
                _ => played,
            };
            if played && !self.seen.contains(&(row.id, format!("{isolation:?}"))) {
                self.fail(format!("{isolation:?}: {}: it was not played", row.id));
            }
        }
    }

    pub fn fail(&mut self, why: String) {
        self.failures.push(why);
    }

    pub fn skip(&mut self, what: &str) {
        eprintln!("SKIPPED: {what}");
        self.skipped.push(what.to_owned());
    }

    /// Writes the document, or compares it with what it should be.
    pub fn document(&mut self, write: bool) {
        let current = fs::read_to_string(DOCUMENT).unwrap_or_default();
        let Some((prose, generated)) = current.split_once(MARK) else {
            return self.fail(format!("{DOCUMENT} has no line that says where the generated part begins"));
        };
        let wanted = generate();
        if write {
            if let Err(error) = fs::write(DOCUMENT, format!("{prose}{MARK}{wanted}")) {
                self.fail(format!("{DOCUMENT}: {error}"));
            }
        } else if generated != wanted {
            self.fail(format!("{DOCUMENT} is not what the rows say: run `cargo test --test attacks -- --write`"));
        }
    }

    /// Says how it went.
    pub fn end(&self) -> ExitCode {
        for why in &self.failures {
            println!("FAILED: {why}");
        }
        println!("{} rows as expected, {} failures, {} skipped", self.right, self.failures.len(), self.skipped.len());
        if self.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// The generated part of the document: the same on every machine.
fn generate() -> String {
    let mut text = String::new();
    let mut line = |arguments: std::fmt::Arguments<'_>| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{arguments}");
    };
    line(format_args!("\n## Whom a guest has to trust\n"));
    line(format_args!("What each party can do to what is the guest's, by `Platform::trust_model`."));
    for (isolation, protection) in Isolation::offered() {
        let situations = if isolation == Isolation::Vault { &Situation::ALL[..] } else { &[(Situation::Closed, "")] };
        for (situation, name) in situations {
            let name = if name.is_empty() { String::new() } else { format!(", {name}") };
            line(format_args!("\n### With `{protection}`{name}\n"));
            line(format_args!("| party | {} |", ASSETS.map(|(_, name)| name).join(" | ")));
            line(format_args!("|---|{}", "---|".repeat(ASSETS.len())));
            for party in Party::ALL {
                let powers = ASSETS.map(|(asset, _)| {
                    let words =
                        [false, true].map(|gmem| isolation::words(isolation.powers(*situation, gmem, party, asset)));
                    let [file, gmem] = words;
                    if file == gmem { file } else { format!("{file}; in a guest_memfd: {gmem}") }
                });
                line(format_args!("| {} | {} |", isolation::party(party), powers.join(" | ")));
            }
        }
    }
    let columns: Vec<_> = Isolation::offered().map(|(_, protection)| format!("`{protection}`")).collect();
    for Table { title, text, rows, .. } in TABLES {
        line(format_args!("\n## {title}\n\n{text}\n"));
        line(format_args!("| attack | {} |", columns.join(" | ")));
        line(format_args!("|---|{}", "---|".repeat(columns.len())));
        for row in *rows {
            let outcomes: Vec<_> =
                Isolation::offered().map(|(isolation, _)| row.outcome(isolation).to_string()).collect();
            line(format_args!("| {} | {} |", row.what, outcomes.join(" | ")));
        }
    }
    text
}
