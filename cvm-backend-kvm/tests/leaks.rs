//! A VM that is dropped leaves nothing, at whatever stage. This is a process of its own, for nobody else to open files.

mod common;

use common::*;
use cvm_core::{Exit, Gpa, PageKind, Platform, Side, Vcpu, Vm};
use iced_x86::code_asm::eax;
use std::fs;

/// How many files are open, and how many mappings there are of guest memory and vCPUs.
fn held() -> (usize, usize) {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let ours = |line: &&str| line.contains("memfd:cvm-") || line.contains("kvm-vcpu");
    (fs::read_dir("/proc/self/fd").unwrap().count(), maps.lines().filter(ours).count())
}

#[test]
fn a_dropped_vm_leaves_nothing_at_whatever_stage() {
    let Some(platform) = kvm() else { return };
    let launched = || {
        load(&platform, config(2), |a| {
            a.convert(DATA, 1, Side::Shared)?;
            a.store(DATA, 1)?;
            a.mov(eax, 1u32)?;
            a.report()?;
            a.store(MEMORY, 1)
        })
    };
    let run = |guest: &mut Guest| {
        assert_eq!(guest.convert().pages, 1);
        assert_eq!(guest.report(), 1);
    };
    // The signal handler and whatever else is there once.
    run(&mut Guest::from_launch(launched()));

    let before = held();
    let check = |stage: &str| assert_eq!(held(), before, "{stage}: open files, mappings");
    // Each stage holds something, or there would be nothing to see.
    let holds = |stage: &str| {
        let (files, mappings) = held();
        assert!(files > before.0 && mappings > before.1, "{stage}: {files} files, {mappings} mappings");
    };
    for _ in 0..3 {
        let launch = platform.launch(config(2)).unwrap();
        holds("launched");
        drop(launch);
        check("launched");

        let launch = launched();
        holds("loaded");
        drop(launch);
        check("loaded");

        let mut launch = launched();
        launch.load(Gpa(MEMORY), &[1], PageKind::Measured).unwrap_err();
        drop(launch);
        check("refused a page");

        platform.launch(config(2)).unwrap().seal().map(drop).unwrap_err();
        check("refused the seal");

        let vm = launched().seal().unwrap();
        holds("sealed");
        drop(vm);
        check("sealed");

        let mut guest = Guest::from_launch(launched());
        run(&mut guest);
        holds("ran");
        drop(guest);
        check("ran");

        let mut guest = Guest::from_launch(launched());
        let exit = guest.run();
        assert!(matches!(exit, Exit::Conversion(_)), "{exit:?}");
        drop(guest);
        check("left a question open");

        let mut guest = Guest::from_launch(launched());
        run(&mut guest);
        guest.vcpus[0].run().unwrap_err();
        holds("failed");
        drop(guest);
        check("failed");

        // Whichever goes last takes the rest along.
        let mut vm = launched().seal().unwrap();
        let mut vcpus = vm.take_vcpus();
        let kicker = vcpus[0].kicker();
        drop(vm);
        holds("vm gone");
        vcpus.pop();
        holds("one vcpu left");
        drop(vcpus);
        kicker.kick();
        drop(kicker);
        check("vcpus and kicker outlived the vm");
    }
}
