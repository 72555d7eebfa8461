//! Programs' own descriptions of their command lines.

use std::path::Path;
use std::process::Command;

/// Asks `program` and each of its subcommands, and theirs, for help. A debug build of a program checks its command line
/// meanwhile, and panics where that contradicts itself.
pub fn ask(program: &Path, subcommands: &[&str]) {
    let output = Command::new(program).args(subcommands).arg("--help").output().unwrap();
    let name = format!("{} {}", program.display(), subcommands.join(" "));
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(help.contains("Usage: "), "{name}: {help}");
    let list = help.split("Commands:\n").nth(1).unwrap_or_default().lines();
    // Descriptions can go on in further lines, which are indented further.
    let names = list.map_while(|line| line.strip_prefix("  ")).filter(|line| !line.starts_with(' '));
    let names: Vec<_> = names.filter_map(|line| line.split_whitespace().next()).collect();
    assert!(names.is_empty() || names.contains(&"help"), "{name}: {names:?}");
    for subcommand in names.into_iter().filter(|name| *name != "help") {
        ask(program, &[subcommands, &[subcommand]].concat());
    }
}
