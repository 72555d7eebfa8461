//! Chapter 12: errors.

mod causes;

use super::exits::fail_alone;
use crate::clause::{Clause, Verdict};
use crate::guest::{Assembler, BOOT_PAGE, CODE, DATA, EXTRA, MEMORY, TABLES};
use crate::vmm::range;
use crate::{Bench, quality};
use cvm_core::doorbell::{Access, Doorbell, PORT_BASE, Transport, control};
use cvm_core::image::Image;
use cvm_core::launch::{APIC_PAGE, MAX_VCPUS};
use cvm_core::x86::VcpuState;
use cvm_core::{
    BoxError, Error, Gpa, GpaRange, InterruptController, InterruptPolicy, PAGE_SIZE, PageKind, Platform, Policy, Side,
    VmConfig,
};
use iced_x86::code_asm::*;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::error::Error as _;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::thread;

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("12.1", "a configuration that is refused says what is wrong with it", configurations),
        Clause::new("12.2", "a step of a launch that is refused names the pages or the vCPU", launches),
        Clause::new("12.3", "a conversion that is not carried out says which pages and why", causes::conversions),
        Clause::new("12.4", "a notification that is refused says what and why", causes::notifications),
        Clause::new("12.5", "what ends a vCPU names it and says what it did", ends),
        Clause::new("12.6", "a call out of order names the vCPU and what was out of order", causes::out_of_order),
        Clause::new("12.7", "no error tells what is private", no_secret),
        Clause::new("12.8", "a host that fails says at what step and why", host_fails).alone(),
    ]
}

/// That an error is well said, and says all of these.
#[track_caller]
fn assert_says(error: &Error, words: &[String]) {
    quality::assert_good(error);
    let text = quality::told(error);
    for word in words {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
}

fn configurations<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let refused = |config: VmConfig, words: &[String]| {
        let checked = config.check();
        let text = format!("{config:?}");
        match bench.platform.launch(config) {
            Err(error @ (Error::Config(_) | Error::Layout(_))) => {
                assert_says(&error, words);
                if let Err(checked) = checked {
                    let (said, known) = (error.to_string(), checked.to_string());
                    assert_eq!(said, known, "it is said in another way than VmConfig::check does");
                }
            }
            Err(other) => panic!("{text}: {other}"),
            Ok(_) => panic!("taken: {text}"),
        }
    };
    let config = || bench.config(1);
    for vcpus in [0, MAX_VCPUS + 1, u32::MAX] {
        refused(VmConfig { vcpus, ..config() }, &[format!("{vcpus} vcpus")]);
        assert_says(&VmConfig::new(MEMORY, vcpus).unwrap_err(), &[format!("{vcpus} vcpus")]);
    }
    refused(VmConfig { memory: vec![], ..config() }, &[]);
    let twice = vec![range(0, 4), range(3 * PAGE_SIZE, 4)];
    refused(VmConfig { memory: twice, ..config() }, &["0x3000".into()]);
    let interrupt_controller = InterruptController::Apic;
    let interrupts = InterruptPolicy::default().accept_level(0x41).unwrap();
    refused(VmConfig { interrupts, interrupt_controller, ..config() }, &["apic".into()]);
    let memory = vec![range(0, MEMORY / PAGE_SIZE), range(APIC_PAGE.0, 1)];
    refused(VmConfig { memory, interrupt_controller, ..config() }, &[APIC_PAGE.to_string()]);
    refused(VmConfig { policy: Policy::from_bits_retain(1 << 63), ..config() }, &[]);
    // What is offered differs.
    for transport in [Transport::Doorbell, Transport::Hypercall, Transport::PageState] {
        match bench.platform.launch(VmConfig { transport: Some(transport), ..config() }) {
            Ok(_) => {}
            Err(error @ Error::Config(_)) => assert_says(&error, &[]),
            Err(other) => panic!("{transport:?}: {other}"),
        }
    }
    Verdict::Met
}

fn launches<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut launch = bench.platform.launch(bench.config(2)).unwrap_or_else(|error| panic!("{}", quality::told(&error)));
    let page = [1u8; PAGE_SIZE as usize];
    let outside = |result: Result<(), Error>, gpa: u64| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::OutsideMemory { gpa: at } if at.0 == gpa), "{error}");
        assert_says(&error, &[format!("{gpa:#x}")]);
    };
    outside(launch.load(Gpa(MEMORY), &page, PageKind::Measured), MEMORY);
    outside(launch.zero(range(MEMORY - PAGE_SIZE, 2)), MEMORY);
    outside(launch.load_boot_page(Gpa(MEMORY), [0; 4]), MEMORY);
    launch.load(Gpa(CODE), &page, PageKind::Measured).unwrap();
    let twice = |result: Result<(), Error>, expected: GpaRange| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::LoadedTwice { range } if range == expected), "{error}");
        assert_says(&error, &[expected.to_string()]);
    };
    twice(launch.zero(range(CODE - PAGE_SIZE, 3)), range(CODE, 1));
    twice(launch.load(Gpa(CODE), &page, PageKind::Measured), range(CODE, 1));
    let empty = launch.load(Gpa(EXTRA), &[], PageKind::Measured).unwrap_err();
    let crooked = launch.load(Gpa(EXTRA + 1), &page, PageKind::Measured).unwrap_err();
    assert_says(&crooked, &[format!("{:#x}", EXTRA + 1)]);
    let filled = launch.load(Gpa(EXTRA), &page, PageKind::Zero).unwrap_err();
    assert_says(&filled, &[range(EXTRA, 1).to_string()]);
    for error in [empty, crooked, filled] {
        assert!(matches!(error, Error::Layout(_)), "{error}");
        quality::assert_good(&error);
    }
    let root = TABLES | launch.interface().private_bit.map_or(0, |bit| 1 << bit);
    let state = |index| VcpuState::long_mode(Gpa(CODE), Gpa(root), index, Gpa(BOOT_PAGE));
    let vcpu = |error: Error, index: u32| {
        assert!(matches!(error, Error::VcpuState { vcpu, .. } if vcpu == index), "{error}");
        assert_says(&error, &[format!("vcpu {index}: ")]);
    };
    launch.set_vcpu(0, &state(0)).unwrap();
    for index in [0, 2, u32::MAX] {
        vcpu(launch.set_vcpu(index, &state(index)).unwrap_err(), index);
    }
    vcpu(launch.seal().map(drop).unwrap_err(), 1);
    for file in [&b""[..], b"no image", b"\x7fELF\x02\x01\x01"] {
        let error = Image::from_elf(file).unwrap_err();
        assert!(matches!(error, Error::Image { .. }), "{error}");
        quality::assert_good(&error);
    }
    Verdict::Met
}

fn ends<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mmio = |a: &mut Assembler| a.load(MEMORY + 0x5010, Side::Private);
    let crash = |a: &mut Assembler| a.ud2();
    let ring = |a: &mut Assembler| a.listen(control::END);
    let narrow = |a: &mut Assembler| a.mov(eax, 0x65u32).and_then(|()| a.port_out(PORT_BASE + control::CONSOLE, 1));
    let errors = fail_alone(bench, Doorbell::Port, &[&mmio, &crash, &ring, &narrow]);
    for (vcpu, error) in (1..).zip(&errors) {
        assert_says(error, &[format!("vcpu {vcpu} ")]);
        let named = match error {
            Error::MmioRefused { vcpu, gpa, .. } => {
                assert_says(error, &[gpa.to_string()]);
                vcpu
            }
            Error::UnknownDoorbell { vcpu, register, access } => {
                assert_says(error, &[format!("register {register:#x}")]);
                if let Access::Write(value) = access {
                    assert_says(error, &[format!("{value:#x}")]);
                }
                vcpu
            }
            Error::Crashed { vcpu, reason } => {
                assert!(!reason.trim().is_empty(), "{error:?}");
                vcpu
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(*named, vcpu, "{error}");
        assert!(error.source().is_none(), "a guest's own deed has no cause on the host: {error:?}");
    }
    assert!(matches!(errors[1], Error::Crashed { .. }), "{:?}", errors[1]);
    assert!(matches!(errors[2], Error::UnknownDoorbell { register: control::END, access: Access::Read, .. }));
    assert!(matches!(errors[3], Error::UnknownDoorbell { access: Access::Write(0x65), .. }), "{:?}", errors[3]);
    Verdict::Met
}

fn no_secret<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const SECRET: u64 = 0x5ec2_e75e_c2e7_5ed3;
    // As an operand of the instruction that fails, right behind it, in the page that was asked for, and in registers.
    let keep = |a: &mut Assembler| {
        a.mov(r12, SECRET)?;
        let [data, nowhere] = [DATA, MEMORY].map(|gpa| a.address(gpa, Side::Private));
        a.mov(rbx, data)?;
        a.mov(qword_ptr(rbx), r12)?;
        a.mov(rbx, nowhere)
    };
    let immediate = |a: &mut Assembler| keep(a).and_then(|()| a.mov(dword_ptr(rbx), SECRET as u32));
    let register = |a: &mut Assembler| keep(a).and_then(|()| a.mov(qword_ptr(rbx), r12));
    let behind = |a: &mut Assembler| keep(a).and_then(|()| a.ud2()).and_then(|()| a.db(&SECRET.to_le_bytes()));
    let vector = |a: &mut Assembler| {
        keep(a)?;
        a.movq(xmm0, r12)?;
        a.movups(xmmword_ptr(rbx), xmm0)
    };
    let ring = |a: &mut Assembler| {
        keep(a)?;
        a.mov(rax, SECRET)?;
        a.port_in(PORT_BASE + control::END, 1)
    };
    let string = |a: &mut Assembler| keep(a).and_then(|()| a.string(PORT_BASE, 8, DATA, true));
    let wrongs: &[super::exits::Wrong<'_>] = &[&immediate, &register, &behind, &vector, &ring, &string];
    for error in fail_alone(bench, Doorbell::Port, wrongs) {
        quality::assert_keeps(&format!("{}; {error:?}; {error:x?}", quality::told(&error)), SECRET);
    }
    // Pages that are loaded are private too.
    let contents = SECRET.to_le_bytes().repeat(8);
    let mut launch = bench.platform.launch(bench.config(1)).unwrap_or_else(|error| panic!("{}", quality::told(&error)));
    launch.load(Gpa(EXTRA), &contents, PageKind::Measured).unwrap();
    let refused = [
        launch.load(Gpa(EXTRA), &contents, PageKind::Measured).unwrap_err(),
        launch.load(Gpa(MEMORY), &contents, PageKind::Measured).unwrap_err(),
        launch.load(Gpa(EXTRA + PAGE_SIZE), &contents, PageKind::Zero).unwrap_err(),
    ];
    for error in refused {
        quality::assert_keeps(&format!("{}; {error:?}", quality::told(&error)), SECRET);
    }
    Verdict::Met
}

/// Puts the limit of open files back.
struct Limited(Rlimit);

impl Drop for Limited {
    fn drop(&mut self) {
        setrlimit(Resource::Nofile, self.0).expect("what was the limit before");
    }
}

fn host_fails<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    // What a platform finds out once, it finds out now.
    bench.guest(bench.config(1), |a| a.end(0)).end();
    let before = getrlimit(Resource::Nofile);
    let first_free = File::open("/dev/null").expect("a file").as_raw_fd();
    let launched = {
        let _limited = Limited(before);
        setrlimit(Resource::Nofile, Rlimit { current: Some(first_free as u64), ..before }).expect("a lower limit");
        bench.platform.launch(bench.config(1)).map(drop)
    };
    let error = launched.expect_err("a vm without a descriptor");
    // Errors go wherever work is done on other threads.
    let error: BoxError = error.into();
    let error = thread::spawn(move || error).join().expect("the thread does nothing");
    let error = error.downcast::<Error>().expect("what it was");
    let Error::Backend { step, .. } = &*error else { panic!("{error:?}") };
    assert_says(&error, &[format!("failed to {step}")]);
    let said = quality::told(&*error);
    assert!(error.source().is_some() && said.contains("os error 24"), "it does not say why: {said}");
    // It was this launch alone that failed.
    bench.guest(bench.config(1), |a| a.end(0)).end();
    Verdict::Met
}
