//! What the launch digest of SEV-SNP costs, beside SHA-384 of the same bytes. `cargo xtask ratios` makes a table of the
//! results.
//!
//! | row | one iteration | floor |
//! |---|---|---|
//! | `measure/snp/1` | the digest of 16 MiB in normal pages, on one thread | SHA-384 of the 16 MiB |
//! | `measure/snp/2` | the same on two | two threads with SHA-384 of half of them each |
//! | `measure/launch/pages` | 16 MiB through a launch whose backend does nothing, by a page at a time | SHA-384 of each page |
//! | `measure/launch/image` | the same, all at once | the same |
//!
//! Each page is 33 blocks of SHA-384 where the floor of the first two has 32, and 2 more in the chain: 1.09 times as many.
//! Contents are random, so that no page is like the one before. Floors take turns with what is compared with them.

// Its worker would spin on the other core while it waits, which is where the contender works.
#[path = "paired/mod.rs"]
#[allow(dead_code, unused_imports, reason = "others have use for the worker")]
mod paired;

use criterion::{Criterion, Throughput};
use cvm::doorbell::Transport;
use cvm::launch::digest;
use cvm::sev::LaunchDigest;
use cvm::{Gpa, Launch, PAGE_SIZE, PageKind, VmConfig};
use paired::paired;
use sha2::{Digest, Sha384};
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::time::Duration;

const BYTES: usize = 16 << 20;

/// Bytes without a pattern, by xorshift.
fn image() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let numbers = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    });
    numbers.take(BYTES / 8).flat_map(u64::to_le_bytes).collect()
}

fn main() {
    let criterion = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(300));
    let mut criterion = criterion.measurement_time(Duration::from_secs(5)).configure_from_args();
    let image = image();
    let (first, second) = image.split_at(BYTES / 2);
    let chain = |threads: usize| {
        let empty = LaunchDigest::new().with_threads(NonZeroUsize::new(threads).expect("it is not 0"));
        let image = &image;
        move |iterations| {
            for _ in 0..iterations {
                let mut digest = empty;
                digest.normal(Gpa(0), black_box(image)).expect("these are whole pages");
                black_box(digest.measurement());
            }
        }
    };
    let hash = |bytes: &[u8], iterations| {
        for _ in 0..iterations {
            black_box(Sha384::digest(black_box(bytes)));
        }
    };
    let mut group = criterion.benchmark_group("measure");
    group.throughput(Throughput::Bytes(BYTES as u64));
    paired(&mut group, ("measure", "snp", "1"), chain(1), |iterations| hash(&image, iterations));
    let halves = |iterations| {
        std::thread::scope(|scope| {
            scope.spawn(|| hash(second, iterations));
            hash(first, iterations);
        });
    };
    paired(&mut group, ("measure", "snp", "2"), chain(2), halves);
    let launch = |at_once: usize| {
        let image = &image;
        move |iterations| {
            for _ in 0..iterations {
                let config = VmConfig::new(BYTES as u64, 1).expect("it makes sense");
                let mut launch = Launch::rehearse(config, Transport::Doorbell).expect("it makes sense");
                for (gpa, contents) in (0..).step_by(at_once).zip(black_box(image).chunks(at_once)) {
                    launch.load(Gpa(gpa), contents, PageKind::Measured).expect("these are whole pages");
                }
                black_box(launch);
            }
        }
    };
    let pages = |iterations| {
        for _ in 0..iterations {
            image.chunks(PAGE_SIZE as usize).for_each(|page| _ = black_box(digest(black_box(page))));
        }
    };
    paired(&mut group, ("measure", "launch", "pages"), launch(PAGE_SIZE as usize), pages);
    paired(&mut group, ("measure", "launch", "image"), launch(BYTES), pages);
    group.finish();
    criterion.final_summary();
}
