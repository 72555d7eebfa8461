//! The command lines of `cargo xtask`.

#[path = "../../tests/common/help.rs"]
mod help;

#[test]
fn every_task_says_how_it_is_run() {
    help::ask(env!("CARGO_BIN_EXE_xtask").as_ref(), &[]);
}
