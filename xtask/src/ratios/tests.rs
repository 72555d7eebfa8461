use super::Measure::*;
use super::targets::target;
use super::*;

const TWO: &[Target] = &[
    target("small", Ratio("copy/safe/64", "copy/plain/64")).most(2.0),
    target("large", Ratio("copy/safe/4096", "copy/plain/4096")).most(1.05),
];
const WITHOUT: &[Target] = &[target("either", Ratio("copy/safe/64", "copy/plain/64"))];

fn measured(directory: &Path, function: &str, size: &str, median: f64) {
    let directory = directory.join("copy").join(function).join(size).join("new");
    fs::create_dir_all(&directory).unwrap();
    fs::write(
        directory.join("benchmark.json"),
        format!(
            r#"{{"group_id":"copy","function_id":"{function}","value_str":"{size}",
                 "throughput":null,"full_id":"copy/{function}/{size}"}}"#
        ),
    )
    .unwrap();
    fs::write(
        directory.join("estimates.json"),
        format!(r#"{{"mean":{{"point_estimate":1.0}},"median":{{"point_estimate":{median:?}}}}}"#),
    )
    .unwrap();
}

#[test]
fn medians_become_ratios_with_a_verdict() {
    let directory = tempfile::tempdir().unwrap();
    measured(directory.path(), "plain", "64", 10.0);
    measured(directory.path(), "safe", "64", 15.0);
    measured(directory.path(), "plain", "4096", 100.0);
    measured(directory.path(), "safe", "4096", 110.0);

    let report = Report::new(TWO, &Results::read(directory.path()).unwrap()).unwrap();
    assert_eq!(
        report.to_string(),
        "                    target\n\
         small     1.50        2.00     holds\n\
         large     1.10        1.05     misses\n\
         1 hold, 1 miss"
    );
    assert_eq!(
        serde_json::to_value(&report.rows).unwrap()[0],
        serde_json::json!({"name": "small", "value": 1.5, "unit": "ratio", "target": 2.0, "holds": true})
    );
}

#[test]
fn a_ratio_without_a_target_has_no_verdict() {
    let directory = tempfile::tempdir().unwrap();
    measured(directory.path(), "plain", "64", 10.0);
    measured(directory.path(), "safe", "64", 30.0);

    let report = Report::new(WITHOUT, &Results::read(directory.path()).unwrap()).unwrap();
    assert_eq!(report.to_string(), "                     target\neither     3.00\n0 hold, 0 miss");
    assert_eq!(
        serde_json::to_value(&report.rows).unwrap()[0],
        serde_json::json!({"name": "either", "value": 3.0, "unit": "ratio", "target": null, "holds": null})
    );
}

#[test]
fn a_floor_that_took_turns_is_what_counts() {
    const PAIRED: &[Target] = &[
        target("send", ToFloor("copy/safe/64")).most(1.2),
        target("time", Nanoseconds("copy/safe/64")).most(10.0),
        target("more", AboveFloor("copy/safe/64")).most(4.0),
    ];
    let directory = tempfile::tempdir().unwrap();
    measured(directory.path(), "safe", "64", 12.0);
    let paired = directory.path().join("paired/copy/safe");
    fs::create_dir_all(&paired).unwrap();
    fs::write(paired.join("64.json"), r#"{"nanoseconds":13.0,"floor":10.0,"ratio":1.25}"#).unwrap();
    let report = Report::new(PAIRED, &Results::read(directory.path()).unwrap()).unwrap();
    assert_eq!(
        report.to_string(),
        "                   target\n\
         send     1.25        1.20     misses\n\
         time     12.0 ns     10.0 ns  misses\n\
         more      3.0 ns      4.0 ns  holds\n\
         1 hold, 2 miss"
    );
}

#[test]
fn a_target_without_results_is_named() {
    let directory = tempfile::tempdir().unwrap();
    measured(directory.path(), "plain", "64", 10.0);
    measured(directory.path(), "safe", "64", 15.0);
    measured(directory.path(), "safe", "4096", 110.0);

    let report = Report::new(TWO, &Results::read(directory.path()).unwrap()).unwrap();
    assert!(report.to_string().ends_with("1 hold, 0 miss; not measured: large"));
}

#[test]
fn no_results_at_all_say_what_to_run() {
    let directory = tempfile::tempdir().unwrap();
    let none = Results::read(&directory.path().join("missing")).unwrap();
    let error = Report::new(TWO, &none).unwrap_err().to_string();
    assert!(error.contains("cargo bench"), "{error}");
}

#[test]
fn a_damaged_result_names_its_file() {
    let directory = tempfile::tempdir().unwrap();
    measured(directory.path(), "plain", "64", 10.0);
    let damaged = directory.path().join("copy/plain/64/new/estimates.json");
    fs::write(&damaged, "{").unwrap();
    let error = Results::read(directory.path()).unwrap_err().to_string();
    assert!(error.contains("estimates.json"), "{error}");
}
