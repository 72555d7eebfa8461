//! The examples, run as a user runs them. What needs KVM is skipped, loudly, where there is none; with the variable
//! `CVM_REQUIRE_KVM` set that is a failure.

mod bad_input;
mod command_line;
mod io_overhead;
mod measure;
mod others;
mod output;
mod tiny_guest;

use serde_json::Value;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Where cargo has put an example; it builds them before it runs this.
fn example(name: &str) -> PathBuf {
    let this = std::env::current_exe().unwrap();
    let path = this.parent().and_then(Path::parent).unwrap().join("examples").join(name);
    assert!(path.is_file(), "{} is not built: run `cargo build --examples`", path.display());
    path
}

/// Whether guests can run here.
fn kvm() -> bool {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) if std::env::var_os("CVM_REQUIRE_KVM").is_some() => panic!("/dev/kvm is required: {error}"),
        Err(error) => {
            eprintln!("SKIPPED: /dev/kvm cannot be opened: {error}");
            false
        }
    }
}

fn run(name: &str, arguments: &[&str]) -> Output {
    let output = Command::new(example(name)).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!errors.contains("panicked"), "{name} {arguments:?} panicked: {errors}");
    output
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Fails for a number that a reader of JSON with floating-point numbers does not keep: such numbers are strings.
fn assert_exact(json: &Value) {
    const EXACT: u64 = 1 << 53;
    match json {
        Value::Array(values) => values.iter().for_each(assert_exact),
        Value::Object(fields) => fields.values().for_each(assert_exact),
        Value::Number(number) if !number.is_f64() => {
            let magnitude = number.as_u64().or(number.as_i64().map(i64::unsigned_abs));
            assert!(magnitude.is_some_and(|magnitude| magnitude <= EXACT), "{number} is no string");
        }
        _ => {}
    }
}

/// What an example printed with `--json`.
fn parse(printed: &str) -> serde_json::Result<Value> {
    let json = serde_json::from_str(printed)?;
    assert_exact(&json);
    Ok(json)
}

#[test]
#[should_panic(expected = "9007199254740993 is no string")]
fn a_number_that_floating_point_does_not_keep_is_noticed() {
    assert_exact(&serde_json::json!({ "a": [{ "b": 9_007_199_254_740_993u64 }] }));
}

/// Boots the tiny guest and returns the JSON and whether the exit status was 0.
fn boot(arguments: &[&str]) -> (Value, bool) {
    let output = run("boot_tiny_guest", &[arguments, &["--json"]].concat());
    let json = parse(&stdout(&output)).unwrap_or_else(|error| {
        panic!("{arguments:?} gave no json: {error}\n{}\n{}", stdout(&output), stderr(&output))
    });
    (json, output.status.success())
}

/// Boots the tiny guest, which must go well, and has far longer than it needs where processors are emulated.
fn boot_well(arguments: &[&str]) -> Value {
    let (json, success) = boot(&[arguments, &["--timeout", "240"]].concat());
    assert!(success && json["ok"] == true, "{arguments:?}: {json:#}");
    json
}

/// Whether this host offers a kind of protection.
fn offered(protection: &str) -> bool {
    let offers = parse(&stdout(&run("probe", &["--json"]))).unwrap();
    offers.as_array().unwrap().iter().any(|offer| offer["protection"] == protection && offer["offered"] == true)
}

/// The built image with eight bytes changed.
fn changed_image(directory: &Path, offset: usize, value: u64) -> String {
    let mut image = ::tiny_guest::IMAGE.to_vec();
    image[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    let path = directory.join(format!("image-{offset}-{value}"));
    fs::write(&path, image).unwrap();
    path.to_str().unwrap().to_owned()
}
