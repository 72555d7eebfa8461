//! What came of a test, and the document.

use crate::isolation::{self, ASSETS, Isolation, Situation};
use crate::outcome::{Finding, Observed, Row};
use crate::rows::{TABLES, Table};
use crate::stage::Stage;
use cvm::platform::Party;
use libtest_mimic::Failed;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/isolation.md");

/// What stands above it in the document is written by hand.
const MARK: &str = "<!-- What follows is generated: cargo test --test attacks -- --write -->\n";

/// What was found so far in a test.
#[derive(Default)]
pub struct Report {
    seen: BTreeSet<&'static str>,
    failures: Vec<String>,
}

fn rows() -> impl Iterator<Item = (&'static Table, &'static Row)> {
    TABLES.iter().flat_map(|table| table.rows.iter().map(move |row| (table, row)))
}

/// Whom a row is played by: what its name begins with, or else what follows from its table.
fn group(table: &Table, row: &Row) -> &'static str {
    match (row.id.split_once('/'), table.party) {
        (Some((group, _)), _) => group,
        (None, Some(_)) => "vmm",
        (None, None) if row.id.starts_with("kill-") => row.id,
        (None, None) => "guest",
    }
}

/// That each row is of one of these groups, and each group has a row.
pub fn groups<'a>(played: impl Iterator<Item = &'a &'static str>) -> Result<(), Failed> {
    let mut played: Vec<_> = played.copied().collect();
    played.sort_unstable();
    let there = rows().map(|(table, row)| group(table, row)).collect::<BTreeSet<_>>();
    if !there.iter().eq(&played) {
        return Err(format!("rows are of the groups {there:?}, and tests play {played:?}").into());
    }
    Ok(())
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
            match row.judge(isolation, table.party, &observed) {
                Ok(()) if matches!(observed, Observed::Unable(_) | Observed::NoSuchCall) => {
                    eprintln!("SKIPPED: {id}: {observed}")
                }
                Ok(()) => {}
                Err(why) => self.fail(format!("{isolation:?}: {id}: {why}")),
            }
            self.seen.insert(row.id);
        }
    }

    /// That every row of these groups was played which could be.
    pub fn complete(&mut self, isolation: Isolation, stage: &Stage, groups: &[&str]) {
        for (table, row) in rows().filter(|(table, row)| groups.contains(&group(table, row))) {
            let played = match group(table, row) {
                "user" => stage.has_user(),
                "root" => stage.has_root(),
                // They take a user of the vault's, or a VMM that is root.
                "start" | "vmm-root" | "vmm-apart" => stage.has_vault_user(),
                _ => true,
            };
            if played && !self.seen.contains(row.id) {
                self.fail(format!("{isolation:?}: {}: it was not played", row.id));
            }
        }
    }

    pub fn fail(&mut self, why: String) {
        self.failures.push(why);
    }

    /// How it went.
    pub fn end(self) -> Result<(), Failed> {
        if self.failures.is_empty() { Ok(()) } else { Err(self.failures.join("\n").into()) }
    }
}

/// Writes the document, or compares it with what it should be.
pub fn document(write: bool) -> Result<(), Failed> {
    let current = fs::read_to_string(DOCUMENT).map_err(|error| format!("failed to read {DOCUMENT}: {error}"))?;
    let (prose, generated) = current
        .split_once(MARK)
        .ok_or_else(|| format!("{DOCUMENT} has no line that says where the generated part begins"))?;
    let wanted = generate();
    if write {
        fs::write(DOCUMENT, format!("{prose}{MARK}{wanted}"))
            .map_err(|error| format!("failed to write {DOCUMENT}: {error}"))?;
    } else if generated != wanted {
        return Err(format!("{DOCUMENT} is not what the rows say: run `cargo test --test attacks -- --write`").into());
    }
    Ok(())
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
