//! What all rounds came to: medians, a table of them, and whether every I/O was right.

use crate::guest::Sample;
use cvm::{PAGE_SIZE, Protection};
use io_guest::{DISK_DEPTH, NET_DEPTH, Operation};
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// All rounds of one case.
pub struct Row {
    /// What is done.
    pub operation: Operation,
    /// How many bytes one I/O has.
    pub size: u32,
    /// How many I/Os a round has.
    pub count: u32,
    samples: [Vec<Sample>; 2],
}

impl Row {
    /// A case without samples.
    pub fn new(operation: Operation, size: u32, count: u32) -> Self {
        Self { operation, size, count, samples: Default::default() }
    }

    /// Adds a round: of the protected guest, and of the other one.
    pub fn add(&mut self, samples: [Sample; 2]) {
        self.samples.iter_mut().zip(samples).for_each(|(all, sample)| all.push(sample));
    }
}

/// One guest's part of a case. Times are medians of the rounds; counts are the same in each, and those of one.
#[derive(Debug, Serialize)]
pub struct Side {
    /// How many I/Os were done in a round.
    pub ios: u64,
    /// How many bytes of payload they had.
    pub bytes: u64,
    /// 10^6 bytes of payload in a second.
    pub mb_per_s: f64,
    /// The same in the slowest and the fastest round.
    pub mb_per_s_range: [f64; 2],
    /// Wall-clock time for one I/O, in microseconds.
    pub wall_us_per_io: f64,
    /// Cycles of the guest's time-stamp counter for one I/O.
    pub cycles_per_io: f64,
    /// Processor time of the vCPU for one I/O, in microseconds.
    pub guest_cpu_us_per_io: f64,
    /// Processor time of the devices for one I/O, in microseconds.
    pub host_cpu_us_per_io: f64,
    /// How many bytes of payload were copied to shared memory.
    pub copied_to_device: u64,
    /// How many bytes of payload were copied from shared memory.
    pub copied_from_device: u64,
    /// How many bytes of headers and answers were copied besides.
    pub headers_copied: u64,
    /// How often the payload of an I/O was copied.
    pub copies_per_io: f64,
    /// How many bytes the guest compared.
    pub compared: u64,
    /// Whether every round had the same counts, and all that was to be found was there.
    pub verified: bool,
}

/// One case.
#[derive(Debug, Serialize)]
pub struct Measured {
    /// What it is called.
    pub name: String,
    /// "disk" or "net".
    pub device: &'static str,
    /// What is done.
    pub operation: &'static str,
    /// How many bytes one I/O has.
    pub size: u32,
    /// With bounce buffers.
    pub protected: Side,
    /// Without.
    pub unprotected: Side,
    /// How many times as long as unprotected a protected I/O takes: the median of the ratios of the rounds.
    pub slowdown: f64,
    /// The same of the fastest round of each: what else runs on the machine disturbs that least.
    pub slowdown_of_fastest: f64,
}

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// Whether every I/O was right, and was copied as often as it should have been.
    pub ok: bool,
    /// What both guests were isolated by.
    pub isolation: String,
    /// How many rounds the medians are of.
    pub rounds: u32,
    /// How many requests to the disk are in flight at most.
    pub disk_depth: usize,
    /// How many frames are in flight at most, each way.
    pub net_depth: usize,
    /// How much memory the protected guest shares, in bytes.
    pub shared_protected: u64,
    /// How much memory the other one shares, in bytes.
    pub shared_unprotected: u64,
    /// The cases.
    pub cases: Vec<Measured>,
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match (values.len(), values.len() / 2) {
        (0, _) => 0.0,
        (len, middle) if len.is_multiple_of(2) => (values[middle - 1] + values[middle]) / 2.0,
        (_, middle) => values[middle],
    }
}

/// What the table and the chart call an operation.
fn name(operation: Operation) -> &'static str {
    match operation {
        Operation::ReadSequential => "read sequential",
        Operation::ReadRandom => "read random",
        Operation::WriteSequential => "write sequential",
        Operation::WriteRandom => "write random",
        Operation::Send => "send",
        Operation::Receive => "receive",
        Operation::Echo => "echo",
        Operation::Exchange => "udp echo",
    }
}

fn size(bytes: u32) -> String {
    match bytes {
        _ if bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
        _ if bytes.is_multiple_of(1 << 10) => format!("{} KiB", bytes >> 10),
        _ => format!("{bytes} B"),
    }
}

impl Side {
    fn new(samples: &[Sample]) -> Option<Self> {
        let report = samples.first()?.report;
        let ios = report.ios.max(1) as f64;
        let us = |time: fn(&Sample) -> Duration| median(samples.iter().map(|s| time(s).as_secs_f64() * 1e6 / ios));
        let rates = || samples.iter().map(|s| s.report.bytes as f64 / 1e6 / s.wall.as_secs_f64().max(1e-9));
        let counts = |s: &Sample| {
            let report = s.report;
            let copied = (report.copied_to_device, report.copied_from_device, report.copies, report.headers_copied);
            (report.ios, report.bytes, copied, report.pool_used)
        };
        let first = samples.first().map(counts);
        Some(Self {
            ios: report.ios,
            bytes: report.bytes,
            mb_per_s: median(rates()),
            mb_per_s_range: [rates().fold(f64::MAX, f64::min), rates().fold(0.0, f64::max)],
            wall_us_per_io: us(|sample| sample.wall),
            cycles_per_io: median(samples.iter().map(|sample| sample.report.cycles as f64 / ios)),
            guest_cpu_us_per_io: us(|sample| sample.guest_cpu),
            host_cpu_us_per_io: us(|sample| sample.host_cpu),
            copied_to_device: report.copied_to_device,
            copied_from_device: report.copied_from_device,
            headers_copied: report.headers_copied,
            copies_per_io: report.copies as f64 / ios,
            compared: report.compared,
            verified: samples.iter().all(|sample| sample.verified && Some(counts(sample)) == first),
        })
    }
}

impl Measured {
    fn new(row: &Row) -> Option<Self> {
        let [protected, unprotected] = &row.samples;
        let ratios = protected
            .iter()
            .zip(unprotected)
            .map(|(protected, unprotected)| protected.wall.as_secs_f64() / unprotected.wall.as_secs_f64().max(1e-9));
        let (protected, unprotected) = (Side::new(protected)?, Side::new(unprotected)?);
        let fastest = |side: &Side| side.mb_per_s_range[1];
        Some(Self {
            slowdown: median(ratios),
            slowdown_of_fastest: fastest(&unprotected) / fastest(&protected).max(1e-9),
            name: format!("{} {}", name(row.operation), size(row.size)),
            device: if row.operation.is_disk() { "disk" } else { "net" },
            operation: name(row.operation),
            size: row.size,
            protected,
            unprotected,
        })
    }

    /// Whether payloads were copied once each way when protected, and never when not. Below a network stack there are
    /// frames that are no datagrams, so there it counts only that there were copies.
    fn is_as_should_be(&self, operation: Operation) -> bool {
        let (to, from) = match operation {
            Operation::ReadSequential | Operation::ReadRandom | Operation::Receive => (0, 1),
            Operation::WriteSequential | Operation::WriteRandom | Operation::Send => (1, 0),
            Operation::Echo | Operation::Exchange => (1, 1),
        };
        let Side { bytes, copied_to_device, copied_from_device, copies_per_io, .. } = self.protected;
        let bounced = match operation {
            Operation::Exchange => copied_to_device > bytes && copied_from_device > bytes,
            _ => {
                (copied_to_device, copied_from_device) == (to * bytes, from * bytes)
                    && copies_per_io == (to + from) as f64
            }
        };
        let unprotected = &self.unprotected;
        let copied = unprotected.copied_to_device + unprotected.copied_from_device + unprotected.headers_copied;
        bounced && copied == 0 && self.protected.verified && unprotected.verified
    }
}

impl Outcome {
    /// What `rows` come to.
    pub fn new(protection: Protection, rounds: u32, rows: Vec<Row>, shared_pages: [u64; 2]) -> Self {
        let measured: Vec<_> = rows.iter().filter_map(|row| Some((row.operation, Measured::new(row)?))).collect();
        let right = measured.iter().all(|(operation, measured)| measured.is_as_should_be(*operation));
        let [shared_protected, shared_unprotected] = shared_pages.map(|pages| pages * PAGE_SIZE);
        Self {
            ok: right && measured.len() == rows.len(),
            isolation: protection.to_string(),
            rounds,
            disk_depth: DISK_DEPTH,
            net_depth: NET_DEPTH,
            shared_protected,
            shared_unprotected,
            cases: measured.into_iter().map(|(_, measured)| measured).collect(),
        }
    }
}

/// A number with three digits that count.
pub struct Short(pub f64);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let places = match self.0 {
            100.0.. => 0,
            10.0.. => 1,
            1.0.. => 2,
            _ => 4,
        };
        f.pad(&format!("{:.places$}", self.0))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "isolation {}, {}, {} requests or {} frames in flight; p is protected, u unprotected\n",
            self.isolation,
            if self.rounds == 1 { "one round".into() } else { format!("medians of {} rounds", self.rounds) },
            self.disk_depth,
            self.net_depth
        )?;
        writeln!(
            f,
            "{:<24} {:>15}  {:>8} {:>7}  {:>15}  {:>15}  {:>15}  {:>11}",
            "", "MB/s", "slowdown", "fastest", "guest cpu us/io", "host cpu us/io", "bytes copied/io", "copies/io"
        )?;
        let pair = "       p       u";
        writeln!(f, "{:<24} {pair}  {:>8} {:>7}  {pair}  {pair}  {pair}      p     u", "", "", "")?;
        for Measured { name, protected: p, unprotected: u, slowdown, slowdown_of_fastest, .. } in &self.cases {
            let copied = |side: &Side| (side.copied_to_device + side.copied_from_device) / side.ios.max(1);
            writeln!(
                f,
                "{name:<24} {:>7} {:>7}  {:>8} {:>7}  {:>7} {:>7}  {:>7} {:>7}  {:>7} {:>7}  {:>5.1} {:>5.1}",
                Short(p.mb_per_s),
                Short(u.mb_per_s),
                Short(*slowdown),
                Short(*slowdown_of_fastest),
                Short(p.guest_cpu_us_per_io),
                Short(u.guest_cpu_us_per_io),
                Short(p.host_cpu_us_per_io),
                Short(u.host_cpu_us_per_io),
                copied(p),
                copied(u),
                p.copies_per_io,
                u.copies_per_io,
            )?;
        }
        let verdict = if self.ok { "every i/o was right" } else { "SOMETHING WENT WRONG: see --json" };
        writeln!(f, "\n{verdict}")
    }
}
