//! Two contenders that take turns, so that what disturbs the machine disturbs both.
//!
//! Criterion measures one benchmark after the other, and these machines change their speed in between by more than what
//! there is to see. So the contender's samples have the floor's in between, and the ratio is that of each sample. `cargo
//! xtask ratios` finds the medians in `criterion/paired` beside criterion's own results.

mod worker;

pub use worker::Worker;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{env, fs};

/// How often the two take turns in one sample.
const TURNS: u64 = 16;

/// The medians of what was measured.
#[derive(Debug, Serialize)]
struct Medians {
    /// Of the contender, for one iteration.
    nanoseconds: f64,
    /// Of the floor.
    floor: f64,
    /// Of the ratios of both, sample by sample.
    ratio: f64,
}

/// Measures `contender` as `group/function/parameter`, with `floor` taking turns. Both do as many iterations as they are
/// told to.
pub fn paired(
    group: &mut BenchmarkGroup<'_, WallTime>,
    (name, function, parameter): (&str, &str, &str),
    mut contender: impl FnMut(u64),
    mut floor: impl FnMut(u64),
) {
    let time = |work: &mut dyn FnMut(u64), iterations| {
        let begin = Instant::now();
        work(iterations);
        begin.elapsed()
    };
    let mut samples = Vec::new();
    group.bench_function(BenchmarkId::new(function, parameter), |bencher| {
        bencher.iter_custom(|iterations| {
            let mut sums = [Duration::ZERO; 2];
            for turn in 0..TURNS {
                let share = iterations * (turn + 1) / TURNS - iterations * turn / TURNS;
                sums[0] += time(&mut contender, share);
                sums[1] += time(&mut floor, share);
            }
            // Shorter ones are criterion's, to find out how many iterations it wants.
            if sums[1] > Duration::from_micros(500) {
                samples.push(sums.map(|sum| sum.as_secs_f64() * 1e9 / iterations as f64));
            }
            sums[0]
        });
    });
    let median = |of: &dyn Fn(&[f64; 2]) -> f64| {
        let mut values: Vec<_> = samples.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    let medians = (median(&|sample| sample[0]), median(&|sample| sample[1]), median(&|sample| sample[0] / sample[1]));
    if let (Some(nanoseconds), Some(floor), Some(ratio)) = medians {
        println!("{:24}floor:  {floor:.1} ns, ratio {ratio:.3}", "");
        let path = directory().join(format!("{name}/{function}/{parameter}.json"));
        let json = serde_json::to_string(&Medians { nanoseconds, floor, ratio }).expect("numbers are JSON");
        let parent = path.parent().unwrap_or(&path);
        fs::create_dir_all(parent).and_then(|()| fs::write(&path, json)).expect("results can be written");
    }
}

/// `criterion/paired` in the target directory, which this program is in: `target/release/deps/bounce-...`.
fn directory() -> PathBuf {
    let program = env::current_exe().expect("a program has a path");
    program.ancestors().nth(3).unwrap_or(Path::new("target")).join("criterion/paired")
}
