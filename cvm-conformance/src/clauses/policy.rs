//! Chapter 8: policy.

use crate::clause::{Clause, Verdict};
use crate::{Bench, Guest, VmOf, quality};
use cvm_core::launch::Entry;
use cvm_core::platform::{Asset, Party, Powers};
use cvm_core::x86::Register;
use cvm_core::{Error, Launch, Platform, Policy, RegisterRead, Vcpu, Vm, VmConfig};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::fs;

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("8.1", "each demand is met or the launch is refused with a reason", each),
        Clause::new("8.2", "a demand that is not known is refused", unknown),
        Clause::new("8.3", "a demand enters the transcript and the measurement", measured),
        Clause::new("8.4", "a guest that demands no performance counters has none", counters),
        Clause::new("8.5", "a guest that demands no debugging is hidden from its VMM", debugging),
        Clause::new("8.6", "a guest that demands no multithreading is refused where there is some", threads),
    ]
}

fn demanding<P: Platform>(bench: &Bench<'_, P>, policy: Policy, vcpus: u32) -> VmConfig {
    VmConfig { policy, ..bench.config(vcpus) }
}

/// A guest that demands this, or why it is refused.
fn guest<P: Platform>(
    bench: &Bench<'_, P>,
    policy: Policy,
    vcpus: u32,
    write: impl FnOnce(&mut crate::guest::Assembler) -> Result<(), IcedError>,
) -> Result<Guest<VmOf<P>>, String> {
    match bench.load(demanding(bench, policy, vcpus), write) {
        Ok(launch) => Ok(Guest::from_launch(launch)),
        Err(Error::Config(reason)) => {
            assert!(reason.contains(' ') && !reason.ends_with('.'), "{policy:?} is refused: {reason:?}");
            Err(reason)
        }
        Err(error) => panic!("{policy:?} is neither met nor refused: {}", quality::told(&error)),
    }
}

/// Those demands that are met.
fn met<P: Platform>(bench: &Bench<'_, P>) -> Policy {
    Policy::all().iter().filter(|demand| bench.platform.launch(demanding(bench, *demand, 1)).is_ok()).collect()
}

/// That by the trust model the VMM can neither see what the guest has nor have it tell.
#[track_caller]
fn assert_kept_out<P: Platform>(bench: &Bench<'_, P>) {
    let model = bench.platform.trust_model();
    for asset in [Asset::Registers, Asset::PrivateMemory] {
        let powers = model.powers(Party::VmmProcess, asset);
        assert!(!powers.intersects(Powers::READ | Powers::STEER), "{asset:?}: the vmm can do {powers:?}");
    }
}

fn each<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut reasons: Vec<(Policy, String)> = Vec::new();
    let mut met = Policy::empty();
    for demand in Policy::all() {
        match guest(bench, demand, 1, |a| a.end(0)) {
            Ok(mut guest) => {
                if demand == Policy::NO_DEBUG {
                    assert_kept_out(bench);
                }
                guest.end();
                met |= demand;
            }
            Err(reason) => {
                let twin = reasons.iter().find(|(_, other)| *other == reason);
                assert!(twin.is_none(), "{demand:?} and {twin:?} are refused with one reason");
                reasons.push((demand, reason));
            }
        }
    }
    guest(bench, met, 1, |a| a.end(0)).expect("what is met one by one is met together").end();
    // What cannot be met is refused whatever else can be.
    for (demand, reason) in reasons {
        let together = guest(bench, met | demand, 1, |a| a.end(0)).err();
        assert_eq!(together, Some(reason), "{demand:?} together with {met:?}");
    }
    Verdict::Met
}

fn unknown<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let known = Policy::all().bits();
    let others = (0..64).map(|bit| 1u64 << bit).filter(|bit| known & bit == 0);
    let met = met(bench);
    for bits in others.clone().chain([!known]) {
        for demand in [Policy::from_bits_retain(bits), Policy::from_bits_retain(bits) | met] {
            let refused = bench.platform.launch(demanding(bench, demand, 1)).err();
            assert!(matches!(&refused, Some(Error::Config(_))), "{bits:#x}: {refused:?}");
        }
    }
    Verdict::Met
}

fn measured<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let transcript = |policy| {
        let launch = bench.load(demanding(bench, policy, 1), |a| a.end(0)).and_then(Launch::seal);
        launch.unwrap_or_else(|error| panic!("{}", quality::told(&error))).transcript().clone()
    };
    let policy = met(bench);
    // The strict one first: nothing of it is left for the other.
    let (all, none) = (transcript(policy), transcript(Policy::empty()));
    for transcript in [&all, &none] {
        let first = transcript.entries().first();
        assert!(matches!(first, Some(Entry::Config(_))), "{first:?}");
    }
    assert_eq!(all.config() != none.config(), !policy.is_empty());
    assert_eq!(all.measurement() != none.measurement(), !policy.is_empty());
    Verdict::Met
}

fn counters<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    /// The version of what Intel's processors have, and that AMD's have more than four (Intel SDM volume 2, CPUID; AMD64 APM
    /// volume 3, section E.4.2).
    const INTEL: (u32, u32) = (0xa, 0xff);
    const AMD: (u32, u32) = (0x8000_0001, 1 << 23);
    let guest = guest(bench, Policy::NO_PERFORMANCE_COUNTERS, 2, |a| {
        let mut second = a.create_label();
        a.cmp(edi, 1)?;
        a.je(second)?;
        a.cpuid_of(INTEL.0, Register::Rax)?;
        a.report()?;
        a.cpuid_of(AMD.0, Register::Rcx)?;
        a.report()?;
        // The first counter: to read one that is not there is a fault, which this guest has nobody for.
        a.read_counter(0)?;
        a.end(0)?;
        a.set_label(&mut second)?;
        a.end(0)
    });
    let mut guest = match guest {
        Ok(guest) => guest,
        Err(reason) => return Verdict::NotOffered(reason),
    };
    assert_eq!(guest.report() & INTEL.1, 0, "the processor says that it has counters");
    assert_eq!(guest.report() & AMD.1, 0, "the processor says that it has more counters");
    let read = guest.try_run(0);
    assert!(matches!(read, Err(Error::Crashed { vcpu: 0, .. })), "a counter can be read: {read:?}");
    let other = guest.try_run(1);
    assert!(matches!(other, Ok(cvm_core::Exit::Ended { code: 0 })), "another vcpu: {other:?}");
    Verdict::Met
}

fn debugging<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let guest = guest(bench, Policy::NO_DEBUG, 1, |a| {
        a.mov(r9, 0x005e_c2e7u64)?;
        a.report()?;
        a.end(0)
    });
    let mut guest = match guest {
        Ok(guest) => guest,
        Err(reason) => return Verdict::NotOffered(reason),
    };
    assert_kept_out(bench);
    guest.report();
    let read = guest.vcpus[0].register(Register::R9);
    assert!(matches!(read, Ok(RegisterRead::Hidden)), "the vmm reads a register: {read:?}");
    guest.end();
    Verdict::Met
}

fn threads<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let active = fs::read_to_string("/sys/devices/system/cpu/smt/active").unwrap_or_default();
    match guest(bench, Policy::NO_SMT, 1, |a| a.end(0)) {
        Ok(mut guest) => {
            assert_ne!(active.trim(), "1", "multithreading is on");
            guest.end();
            Verdict::Met
        }
        // That is the demand met, by the other way that there is.
        Err(_) if active.trim() == "1" => Verdict::Met,
        Err(reason) => Verdict::NotOffered(reason),
    }
}
