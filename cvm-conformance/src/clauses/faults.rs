//! Chapter 13: faults at every step.

mod guest;
mod sweep;

use crate::clause::{Clause, Verdict};
use crate::faults::{available, with_fault};
use crate::{Bench, quality};
use cvm_core::platform::{Asset, Party, Powers};
use cvm_core::{Offer, Platform};
use guest::Launches;
use sweep::{Sweep, every};

/// How many calls of a launch, of conversions and exits, and of both fail in a clause at most.
const MOST: u64 = 120;

/// The smallest launch cannot do without as many calls; how many it can do without is up to the system's libraries.
const LEAST_FAILURES: u64 = 10;

pub(super) fn clauses<P: Platform + Sync>() -> Vec<Clause<P>> {
    vec![
        Clause::new("13.1", "a call that fails under a launch is told or made up for", launches).alone(),
        Clause::new("13.2", "a call that fails under a running guest is told or made up for", guests).alone(),
        Clause::new("13.3", "after a call that failed the next VM is as good as any", afterwards).alone(),
        Clause::new("13.4", "a call that a signal interrupts is told or made up for", interrupted).alone(),
        Clause::new("13.5", "a host that fails when it is asked offers no more than it has", asked).alone(),
    ]
}

/// How many calls there are.
fn calls<T: Send>(work: impl FnOnce() -> T + Send) -> u64 {
    let outcome = with_fault(None, work).expect("a filter for system calls");
    assert!(outcome.result.is_ok(), "it panics without a fault");
    outcome.calls
}

/// How many calls there are before a guest runs, or some fewer: a launch that is dropped makes some for that, too.
fn calls_of_launch<P: Platform + Sync>(launches: &Launches<'_, P>) -> u64 {
    calls(|| launches.launch().map(drop)).saturating_sub(4)
}

fn launches<P: Platform + Sync>(bench: &Bench<'_, P>) -> Verdict {
    if let Err(why) = available() {
        return Verdict::NotOffered(why);
    }
    let launches = Launches::new(bench);
    let sweep = Sweep::new(bench, || launches.launch_and_run());
    let end = calls(|| launches.launch().map(drop));
    let failures = sweep.run(libc::EIO, every(0..end, MOST, 0), |_| {});
    assert!(failures >= LEAST_FAILURES, "of {end} calls only {failures} were errors");
    Verdict::Met
}

fn guests<P: Platform + Sync>(bench: &Bench<'_, P>) -> Verdict {
    if let Err(why) = available() {
        return Verdict::NotOffered(why);
    }
    let launches = Launches::new(bench);
    let sweep = Sweep::new(bench, || launches.launch_and_run());
    let begin = calls_of_launch(&launches);
    let failures = sweep.run(libc::EIO, every(begin..sweep.calls, MOST, 0), |_| {});
    assert!(failures > 0, "no call was an error of those from {begin} to {}", sweep.calls);
    Verdict::Met
}

fn afterwards<P: Platform + Sync>(bench: &Bench<'_, P>) -> Verdict {
    if let Err(why) = available() {
        return Verdict::NotOffered(why);
    }
    let launches = Launches::new(bench);
    let sweep = Sweep::new(bench, || launches.launch_and_run());
    sweep.run(libc::ENOMEM, every(0..sweep.calls, MOST / 10, 2), |_| launches.drive_to_end());
    Verdict::Met
}

fn interrupted<P: Platform + Sync>(bench: &Bench<'_, P>) -> Verdict {
    if let Err(why) = available() {
        return Verdict::NotOffered(why);
    }
    let launches = Launches::new(bench);
    let sweep = Sweep::new(bench, || launches.launch_and_run());
    sweep.run(libc::EINTR, every(0..sweep.calls, MOST / 6, 0), |_| {});
    sweep.run(libc::EAGAIN, every(0..sweep.calls, MOST / 6, 1), |_| {});
    Verdict::Met
}

/// The kinds of protection that are offered, each with whether it is.
fn offers<P: Platform>() -> Vec<(String, bool)> {
    let offer = |Offer { protection, missing, .. }: Offer| {
        for lack in &missing {
            assert!(!lack.what.is_empty() && !lack.remedy.is_empty(), "{protection}: {lack:?}");
        }
        (protection.to_string(), missing.is_empty())
    };
    P::probe().into_iter().map(offer).collect()
}

/// Who can do what to guests of a platform.
fn trust<P: Platform>(platform: &P) -> Vec<Powers> {
    let assets = [Asset::PrivateMemory, Asset::Registers, Asset::Interrupts];
    let model = platform.trust_model();
    Party::ALL.into_iter().flat_map(|party| assets.map(|asset| model.powers(party, asset))).collect()
}

fn asked<P: Platform + Sync>(bench: &Bench<'_, P>) -> Verdict {
    if let Err(why) = available() {
        return Verdict::NotOffered(why);
    }
    let offered = offers::<P>();
    let probe = || {
        let found = offers::<P>();
        assert_eq!(found.len(), offered.len(), "kinds of protection are left out");
        for ((protection, now), (_, then)) in found.iter().zip(&offered) {
            assert!(!now || *then, "{protection} is offered when a call fails, and else is not");
        }
        Ok(())
    };
    let sweep = Sweep::new(bench, probe);
    sweep.run(libc::EIO, every(0..sweep.calls, MOST / 6, 0), |_| {});
    let trusted = trust(bench.platform);
    let open = || {
        match bench.open() {
            Ok(platform) => {
                let now = trust(&platform);
                let no_less = now.iter().zip(&trusted).all(|(now, before)| now.contains(*before));
                assert!(no_less, "the trust model promises more than without the failure: {now:?}");
            }
            Err(error) => quality::assert_good(&*error),
        }
        Ok(())
    };
    let sweep = Sweep::new(bench, open);
    sweep.run(libc::EMFILE, every(0..sweep.calls, MOST, 0), |_| {});
    Verdict::Met
}
