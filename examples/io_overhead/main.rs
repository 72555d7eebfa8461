//! What bouncing costs: the same I/O in a guest whose payloads bounce and in one whose buffers are shared.
//!
//! Both guests are launched on the same KVM with the same isolation, and take turns, so that what disturbs one disturbs
//! the other as well. Every I/O is checked: reads and received frames by the guest, writes and sent frames by the VMM.

#![deny(clippy::print_stdout, clippy::print_stderr, reason = "they panic where the stream is closed or full")]

#[path = "../common/block.rs"]
mod block;
mod chart;
mod cpu;
mod disk;
#[path = "../common/files.rs"]
mod files;
mod guest;
#[path = "../common/net.rs"]
mod net;
#[path = "../common/options.rs"]
mod options;
mod outcome;
#[path = "../common/program.rs"]
mod program;
mod responder;
#[path = "../common/virtio.rs"]
mod virtio;
mod worker;

use clap::Parser;
use cvm::kvm::KvmPlatform;
use cvm::{BoxError, Protection};
use guest::{Guest, Sample};
use io_guest::{Case, MAX_DATAGRAM, Operation};
use options::IsolationChoice;
use outcome::{Outcome, Row};
use program::{conclude, note};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Measure what bounce buffers cost: virtio disk and network card of a protected guest beside those of a guest without.
///
/// Two guests are launched with the same isolation. One keeps its buffers private and bounces payloads through a shared
/// pool; the other shares its buffers at its start, and nothing is copied. They do the same I/O, with up to 5 requests
/// to the disk or 8 frames in flight, and take turns case by case and round by round. Both poll.
///
/// What is measured, from the guest's first request to its last answer, and given as medians of the rounds:
///
/// - throughput: payload over wall-clock time
///
/// - slowdown: the median of the rounds' ratios, and beside it that of each guest's fastest round
///
/// - guest cpu: what the vCPU's thread used, and with isolation vault what the vault used; polling counts
///
/// - host cpu: what the threads of the devices used
///
/// - copied: payload that the guest itself copied to and from shared memory, as it counted
///
/// Threads that run are accounted for by the kernel at every tick of its scheduler, so CPU times are exact to a few
/// milliseconds in each round; those of the vCPU's own thread to the nanosecond, and those of threads that sleep.
#[derive(Debug, Parser)]
#[command(name = "io_overhead")]
struct Options {
    /// What keeps private memory private, in both guests [default: vault, the strongest]
    #[arg(long, value_enum)]
    isolation: Option<IsolationChoice>,

    /// How long all measuring should take, about; a case has two I/Os at least, however long they take
    #[arg(long, value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,

    /// How many I/Os each case has in each round, whatever the time
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    ios: Option<u32>,

    /// How many rounds there are
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,

    /// Print the result as JSON, and nothing else, on the standard output
    #[arg(long)]
    json: bool,

    /// Draw the throughput of both guests into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// The KVM device
    #[arg(long, value_name = "FILE", default_value = "/dev/kvm")]
    kvm: PathBuf,
}

const DISK_SIZES: [u32; 3] = [4 << 10, 64 << 10, 1 << 20];
const FRAME_SIZES: [u32; 5] = [64, 256, 1500, 4096, 9000];

/// The most I/Os of a case in one round.
const MOST_IOS: u32 = 20_000;
/// The fewest.
const FEWEST_IOS: u32 = 2;

/// What is measured: operation and size.
fn cases() -> Vec<(Operation, u32)> {
    let of = |operations: &[Operation], sizes: &[u32]| -> Vec<_> {
        operations.iter().flat_map(|operation| sizes.iter().map(|size| (*operation, *size))).collect()
    };
    use Operation::*;
    let disk = of(&[ReadSequential, ReadRandom, WriteSequential, WriteRandom], &DISK_SIZES);
    let net = of(&[Send, Receive, Echo], &FRAME_SIZES);
    [disk, net, of(&[Exchange], &[64, MAX_DATAGRAM as u32])].concat()
}

/// Two guests, and how often they were asked.
struct Pair<V: cvm::Vm> {
    protected: Guest<V>,
    unprotected: Guest<V>,
    sequence: u32,
}

impl<V: cvm::Vm> Pair<V> {
    /// Has both do a case; which one begins alternates.
    fn measure(&mut self, operation: Operation, size: u32, count: u32) -> Result<[Sample; 2], BoxError> {
        self.sequence += 1;
        let case = Case { operation, size, count, sequence: self.sequence };
        if self.sequence.is_multiple_of(2) {
            let unprotected = self.unprotected.measure(&case)?;
            Ok([self.protected.measure(&case)?, unprotected])
        } else {
            Ok([self.protected.measure(&case)?, self.unprotected.measure(&case)?])
        }
    }

    /// How many I/Os take about as long as `budget`. The first ones find everything cold, so a try counts for eight times
    /// as many at most.
    fn fit(&mut self, operation: Operation, size: u32, budget: Duration) -> Result<u32, BoxError> {
        let mut count = 1;
        loop {
            let samples = self.measure(operation, size, count)?;
            let slower = samples.iter().map(|sample| sample.wall).max().unwrap_or_default();
            let fits = budget.as_nanos() * u128::from(count) / slower.as_nanos().max(1);
            let fits = u32::try_from(fits).unwrap_or(MOST_IOS).clamp(FEWEST_IOS, MOST_IOS);
            if fits <= 8 * count {
                return Ok(fits);
            }
            count *= 8;
        }
    }
}

/// Shows how far the measurement is: case by case on a terminal, round by round in a file.
fn progress(round: u32, rounds: u32, case: usize, cases: usize) {
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        let end = if case == cases && round == rounds { "\n" } else { "" };
        let _ = stderr.write_all(format!("\rround {round} of {rounds}, case {case:2} of {cases}{end}").as_bytes());
    } else if case == 1 {
        note(format_args!("round {round} of {rounds}"));
    }
}

fn run(options: &Options) -> Result<Outcome, BoxError> {
    let platform = KvmPlatform::open(&options.kvm, options.isolation.map(Protection::from))?;
    let nonce = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), std::process::id());
    note(format_args!("launching two guests with isolation {}", platform.protection()));
    let mut pair = Pair {
        protected: Guest::new(&platform, true, nonce)?,
        unprotected: Guest::new(&platform, false, nonce)?,
        sequence: 0,
    };
    let cases = cases();
    let turns = cases.len() as u32 * options.rounds * 2;
    let budget = Duration::from_secs(options.seconds.into()) / turns;
    let mut rows = Vec::new();
    for (operation, size) in &cases {
        let count = match options.ios {
            Some(ios) => ios,
            None => pair.fit(*operation, *size, budget)?,
        };
        rows.push(Row::new(*operation, *size, count));
    }
    for round in 0..options.rounds {
        for (index, row) in rows.iter_mut().enumerate() {
            progress(round + 1, options.rounds, index + 1, cases.len());
            let samples = pair.measure(row.operation, row.size, row.count)?;
            row.add(samples);
        }
    }
    Ok(Outcome::new(
        platform.protection(),
        options.rounds,
        rows,
        [pair.protected.shared_pages(), pair.unprotected.shared_pages()],
    ))
}

fn write(path: &Path, text: &str) -> Result<(), BoxError> {
    std::fs::write(path, text).map_err(|error| format!("failed to write {}: {error}", path.display()).into())
}

fn report(options: Options) -> Result<ExitCode, BoxError> {
    let outcome = run(&options)?;
    if let Some(path) = &options.svg {
        write(path, &chart::draw(&outcome))?;
    }
    let found = if options.json { serde_json::to_string_pretty(&outcome)? } else { outcome.to_string() };
    Ok(conclude(found, outcome.ok)?)
}

fn main() -> ExitCode {
    cvm::kvm::vault::init();
    program::run(report)
}
