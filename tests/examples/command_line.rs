//! The command lines of all examples.

use crate::example;
use std::fs;
use std::path::{Path, PathBuf};

#[path = "../common/help.rs"]
mod help;

#[test]
fn every_example_and_each_of_its_subcommands_says_how_it_is_run() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let sources = |path: &PathBuf| if path.is_dir() { path.join("main.rs") } else { path.clone() };
    let paths = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    // The others have no options.
    let parse = |path: &PathBuf| fs::read_to_string(sources(path)).is_ok_and(|source| source.contains("Parser"));
    let examples: Vec<_> = paths.filter(parse).collect();
    assert!(examples.len() >= 5, "{examples:?}");
    for path in examples {
        help::ask(&example(path.file_stem().unwrap().to_str().unwrap()), &[]);
    }
}
