//! `io_overhead`: which payloads are copied, and the chart.

use crate::{kvm, run, stderr, stdout};
use serde_json::Value;
use std::fs;

/// What both guests of `io_overhead` did, case by case, in a short run.
fn io_overhead(arguments: &[&str]) -> Value {
    let output = run("io_overhead", &[&["--json", "--ios", "2", "--rounds", "1"], arguments].concat());
    let json = crate::parse(&stdout(&output))
        .unwrap_or_else(|error| panic!("{arguments:?} gave no json: {error}\n{}", stderr(&output)));
    assert!(output.status.success() && json["ok"] == true, "{arguments:?}: {json:#}");
    json
}

#[test]
fn payloads_are_copied_once_each_way_when_protected_and_never_when_not() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let chart = directory.path().join("chart.svg");
    let json = io_overhead(&["--svg", chart.to_str().unwrap()]);
    let cases = json["cases"].as_array().unwrap();
    let (blocks, frames) = ([4 << 10, 64 << 10, 1 << 20], [64, 256, 1500, 4096, 9000]);
    let mut expected = Vec::new();
    for (operation, copied) in
        [("read sequential", (0, 1)), ("read random", (0, 1)), ("write sequential", (1, 0)), ("write random", (1, 0))]
    {
        expected.extend(blocks.map(|size| (operation, size, copied)));
    }
    for (operation, copied) in [("send", (1, 0)), ("receive", (0, 1)), ("echo", (1, 1))] {
        expected.extend(frames.map(|size| (operation, size, copied)));
    }
    assert_eq!(cases.len(), expected.len() + 2, "these, and two of the network stack");
    let ios = 2;
    for (case, (operation, size, (to_device, from_device))) in cases.iter().zip(expected) {
        assert_eq!((&case["operation"], &case["size"]), (&operation.into(), &size.into()));
        let (protected, unprotected) = (&case["protected"], &case["unprotected"]);
        for side in [protected, unprotected] {
            assert_eq!((&side["ios"], &side["bytes"]), (&ios.into(), &(ios * size).into()), "{case:#}");
            assert_eq!(side["verified"], true, "{case:#}");
            // The guest compares what comes to it; the VMM what leaves it.
            assert_eq!(side["compared"].as_u64().unwrap() > 0, from_device > 0, "{case:#}");
        }
        assert_eq!(protected["copied_to_device"], to_device * ios * size, "{case:#}");
        assert_eq!(protected["copied_from_device"], from_device * ios * size, "{case:#}");
        assert_eq!(protected["copies_per_io"], (to_device + from_device) as f64, "{case:#}");
        for copied in ["copied_to_device", "copied_from_device", "headers_copied"] {
            assert_eq!(unprotected[copied], 0, "{case:#}");
        }
        assert_eq!(unprotected["copies_per_io"], 0.0, "{case:#}");
    }
    for case in &cases[cases.len() - 2..] {
        assert_eq!(case["operation"], "udp echo");
        for side in [&case["protected"], &case["unprotected"]] {
            assert_eq!(side["compared"], side["bytes"], "datagrams are compared byte by byte: {case:#}");
        }
    }
    let (protected, unprotected) = (&json["shared_protected"], &json["shared_unprotected"]);
    assert!(protected.as_u64().unwrap() < unprotected.as_u64().unwrap());

    let chart = fs::read_to_string(chart).unwrap();
    for case in cases {
        assert!(chart.contains(&format!(">{}</text>", case["name"].as_str().unwrap())), "{chart}");
    }
    // A bar for each side, and what says which is which.
    assert_eq!(chart.matches("<rect class=").count(), 2 * cases.len() + 2);
}
