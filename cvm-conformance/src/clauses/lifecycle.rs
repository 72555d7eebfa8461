//! Chapter 9: what can be done with a running VM.

use crate::Bench;
use crate::clause::{Clause, Verdict};
use crate::guest::DATA;
use crate::quality;
use cvm_core::export::Target;
use cvm_core::{Error, Lifecycle, LifecycleAnswer, PAGE_SIZE, Platform, Side, Vm, VmConfig};
use iced_x86::code_asm::*;
use std::fs;

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("9.1", "each question about a VM is answered with yes or with a reason", answers),
        Clause::new("9.2", "a VM can be stopped and copied if and only if it has an export", stop_and_copy),
        Clause::new("9.3", "nothing is promised that there is no call for", promised),
        Clause::new("9.4", "nothing is exported for a target that nobody vouches for", strangers),
        Clause::new("9.5", "a VM whose memory can be swapped has none that is unevictable", swap).alone(),
    ]
}

fn answers<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(1), |a| {
        a.report()?;
        a.end(0)
    });
    let all = |vm: &crate::VmOf<P>| Lifecycle::ALL.map(|what| vm.lifecycle(what));
    let first = all(&guest.vm);
    for (what, answer) in Lifecycle::ALL.into_iter().zip(first) {
        let LifecycleAnswer::No(reason) = answer else { continue };
        let is_sentence = reason.split(' ').count() >= 4 && !reason.ends_with('.') && !reason.contains('\n');
        assert!(is_sentence && reason.trim() == reason, "{what:?}: {reason:?}");
        assert!(!reason.chars().next().is_some_and(char::is_uppercase), "{what:?}: {reason:?}");
    }
    guest.report();
    assert_eq!(all(&guest.vm), first, "while the guest runs");
    guest.end();
    assert_eq!(all(&guest.vm), first, "when the guest has ended");
    Verdict::Met
}

/// A target with keys of nobody.
fn nobody() -> Target {
    Target { key: vec![1; 64], chain: vec![2; 64], maker: vec![3; 64] }
}

fn stop_and_copy<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let start = || {
        bench.guest(bench.config(2), |a| {
            a.mov(eax, 0x600du32)?;
            a.report()?;
            a.end(0)
        })
    };
    let (mut guest, mut other) = (start(), start());
    let can = guest.vm.lifecycle(Lifecycle::StopAndCopy) == LifecycleAnswer::Yes;
    assert_eq!(guest.vm.export().is_some(), can);
    assert_eq!(guest.report(), 0x600d);
    if let Some(export) = guest.vm.export() {
        let strange = export.begin(&mut other.vcpus, &nobody()).err();
        assert!(matches!(strange, Some(Error::Config(_))), "the vcpus of another vm: {strange:?}");
        for some in [0, 1] {
            let few = export.begin(&mut guest.vcpus[..some], &nobody()).err();
            assert!(matches!(few, Some(Error::Config(_))), "{some} of its vcpus: {few:?}");
        }
    }
    guest.end();
    assert_eq!(guest.report_of(1), 0x600d);
    assert_eq!(other.report(), 0x600d);
    other.end();
    Verdict::Met
}

fn strangers<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(1), |a| a.end(0));
    if let Some(export) = guest.vm.export() {
        let begun = export.begin(&mut guest.vcpus, &nobody()).map(|exporting| exporting.cancel());
        guest.end();
        assert!(matches!(begun, Err(Error::Backend { .. })), "an export for nobody: {begun:?}");
        quality::assert_good(&begun.expect_err("it was refused"));
    }
    Verdict::Met
}

fn promised<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let guest = bench.guest(bench.config(1), |a| a.end(0));
    for what in [Lifecycle::Migrate, Lifecycle::Snapshot, Lifecycle::Dump, Lifecycle::Reset, Lifecycle::Hotplug] {
        assert!(matches!(guest.vm.lifecycle(what), LifecycleAnswer::No(_)), "{what:?} is promised, and cannot be done");
    }
    Verdict::Met
}

/// How much memory the kernel cannot swap, in bytes.
fn unevictable() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").expect("the kernel's account of its memory");
    let line = text.lines().find_map(|line| line.strip_prefix("Unevictable:"));
    let kibibytes = line.and_then(|rest| rest.trim().strip_suffix("kB")).and_then(|number| number.trim().parse().ok());
    kibibytes.map_or_else(|| panic!("the kernel does not say what it cannot swap: {text}"), |number: u64| number << 10)
}

fn swap<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const BYTES: u64 = 32 << 20;
    const FROM: u64 = 8 << 20;
    let config = || {
        let memory = crate::vmm::range(0, (FROM + BYTES) / PAGE_SIZE);
        VmConfig { memory: vec![memory], ..bench.config(1) }
    };
    let answer = bench.guest(bench.config(1), |a| a.end(0)).vm.lifecycle(Lifecycle::Swap);
    if answer != LifecycleAnswer::Yes {
        // That is an answer too: 9.1 sees to its reason.
        return Verdict::Met;
    }
    let mut guest = bench.guest(config(), |a| {
        a.report()?;
        let mut again = a.create_label();
        a.mov(r8d, FROM as u32)?;
        a.set_label(&mut again)?;
        a.mov(dword_ptr(r8), r8d)?;
        a.add(r8d, PAGE_SIZE as i32)?;
        a.cmp(r8d, (FROM + BYTES) as u32)?;
        a.jne(again)?;
        a.report()?;
        a.load(DATA, Side::Private)?;
        a.end(0)
    });
    guest.report();
    let before = unevictable();
    guest.report();
    let more = unevictable().saturating_sub(before);
    // Others may pin memory meanwhile, but hardly as much.
    assert!(more < BYTES / 2, "{more} bytes more cannot be swapped after the guest has touched {BYTES}");
    if let Some(private) = guest.vm.allocated().expect("it is counted").private {
        assert!(private >= BYTES, "the guest has not touched its memory: {private}");
    }
    guest.end();
    Verdict::Met
}
