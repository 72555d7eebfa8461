//! Chapter 10: what VMs take up, and that it comes back.

pub(crate) mod killed;

use crate::clause::{Clause, Verdict};
use crate::guest::Assembler;
use crate::held::{Held, anonymous, assert_back, assert_back_but_memory, assert_more};
use crate::tiny::{self, DATA, memory};
use crate::{Bench, Guest, VmOf, quality};
use cvm_core::doorbell::{Doorbell, Transport, device_base};
use cvm_core::{
    Error, Gpa, InterruptController, InterruptPolicy, Launch, PAGE_SIZE, PageKind, Platform, Policy, Side, Vcpu, Vm,
    VmConfig,
};
use iced_x86::IcedError;
use iced_x86::code_asm::eax;
use std::num::NonZeroU32;
use std::thread;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// A control register that there is not.
const UNKNOWN: u16 = 0x1c;
/// A vector that guests accept.
const VECTOR: u8 = 0x40;
/// How many VMs come one after the other.
const MANY: u64 = 20;

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("10.1", "a VM that is dropped leaves nothing at whatever stage", dropped).alone(),
        Clause::new("10.2", "what is refused leaves nothing", refused).alone(),
        Clause::new("10.3", "whoever of a VM and its vCPUs and kickers goes last takes the rest along", last).alone(),
        Clause::new("10.4", "a view that outlives its VM keeps shared memory and nothing else", view).alone(),
        Clause::new("10.5", "descriptors that outlive their VM keep nothing but themselves", descriptors).alone(),
        Clause::new("10.6", "many VMs one after the other take up no more than one", many).alone(),
        Clause::new("10.7", "a process that is killed leaves nothing at whatever stage", killed::killed).alone(),
    ]
}

/// Shares a page, tells so, takes it back, and does then what no guest may do.
fn code(a: &mut Assembler) -> Result<(), IcedError> {
    a.convert(DATA, 1, Side::Shared)?;
    a.mov(eax, 1u32)?;
    a.report()?;
    a.convert(DATA, 1, Side::Private)?;
    a.ring(UNKNOWN)
}

fn launched<P: Platform>(bench: &Bench<'_, P>) -> Launch<P::Loader> {
    let launch = tiny::load(bench, tiny::config(bench, 2), code);
    launch.unwrap_or_else(|error| panic!("{}", quality::told(&error)))
}

fn sealed<P: Platform>(bench: &Bench<'_, P>) -> VmOf<P> {
    launched(bench).seal().unwrap_or_else(|error| panic!("{}", quality::told(&error)))
}

/// A guest whose page is shared.
fn ran<P: Platform>(bench: &Bench<'_, P>) -> Guest<VmOf<P>> {
    let mut guest = Guest::from_launch(launched(bench));
    assert_eq!(guest.convert().pages, 1);
    assert_eq!(guest.report(), 1);
    guest
}

/// What is there when nothing is: handlers of signals and whatever else comes with the first VM and stays.
fn nothing<P: Platform>(bench: &Bench<'_, P>) -> Held {
    let before = Held::settled(bench);
    drop(ran(bench));
    // The first one's libraries and handlers stay, but neither threads nor anything outside.
    assert_back_but_memory(bench, &before, "the first vm");
    Held::settled(bench)
}

fn dropped<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let before = nothing(bench);
    let check = |stage: &str, drop_it: &mut dyn FnMut()| {
        assert_more(bench, &before, stage);
        drop_it();
        assert_back(bench, &before, stage);
    };

    let mut launch = Some(bench.platform.launch(tiny::config(bench, 2)).expect("a launch"));
    check("launched", &mut || drop(launch.take()));

    let mut launch = Some(launched(bench));
    check("loaded", &mut || drop(launch.take()));

    let mut vm = Some(sealed(bench));
    check("sealed", &mut || drop(vm.take()));

    let mut guest = Some(ran(bench));
    check("ran", &mut || drop(guest.take()));

    let mut guest = Guest::from_launch(launched(bench));
    guest.request();
    let mut guest = Some(guest);
    check("left a question open", &mut || drop(guest.take()));

    let mut guest = ran(bench);
    guest.request();
    guest.vcpus[0].refuse_conversion().expect("an answer");
    let error = guest.try_run(0).expect_err("there is no such register");
    assert!(matches!(error, Error::UnknownDoorbell { .. }), "{}", quality::told(&error));
    let mut guest = Some(guest);
    check("failed", &mut || drop(guest.take()));
    Verdict::Met
}

fn refused<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let before = nothing(bench);
    let config = || tiny::config(bench, 1);
    let level = InterruptPolicy::default().accept_level(VECTOR).expect("no exception's");
    let mut configs = vec![
        VmConfig { vcpus: 0, ..config() },
        VmConfig { memory: Vec::new(), ..config() },
        VmConfig { memory: vec![memory(), memory()], ..config() },
        VmConfig { interrupts: level, interrupt_controller: InterruptController::Apic, ..config() },
        VmConfig { policy: Policy::from_bits_retain(1 << 63), ..config() },
    ];
    let senseless = configs.len();
    // What follows makes sense, and is not offered everywhere.
    configs.extend(Policy::all().iter().map(|policy| VmConfig { policy, ..config() }));
    let transports = [Transport::Doorbell, Transport::Hypercall, Transport::PageState];
    configs.extend(transports.map(|transport| VmConfig { transport: Some(transport), ..config() }));
    configs.push(VmConfig { interrupt_controller: InterruptController::Apic, ..config() });
    configs.push(VmConfig { doorbell: Doorbell::Msr, ..config() });
    for (number, config) in configs.into_iter().enumerate() {
        let what = format!("{config:?}");
        match bench.platform.launch(config) {
            Ok(_) => assert!(number >= senseless, "{what} was not refused"),
            Err(error) => quality::assert_good(&error),
        }
        assert_back(bench, &before, &what);
    }

    let mut launch = launched(bench);
    let outside = launch.load(Gpa(memory().end().0), &[1], PageKind::Measured);
    assert!(matches!(outside, Err(Error::OutsideMemory { .. })), "{outside:?}");
    drop(launch);
    assert_back(bench, &before, "refused a page outside");

    let mut launch = bench.platform.launch(config()).expect("a launch");
    launch.load(Gpa(DATA), &[1], PageKind::Measured).expect("a page");
    let twice = launch.load(Gpa(DATA), &[1], PageKind::Measured);
    assert!(matches!(twice, Err(Error::LoadedTwice { .. })), "{twice:?}");
    let stateless = launch.seal().map(drop);
    assert!(matches!(stateless, Err(Error::VcpuState { .. })), "{stateless:?}");
    assert_back(bench, &before, "refused the seal");
    Verdict::Met
}

fn last<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let before = nothing(bench);

    let mut vm = sealed(bench);
    let mut vcpus = vm.take_vcpus();
    drop(vm);
    assert_more(bench, &before, "the vm went first");
    vcpus.pop();
    assert_more(bench, &before, "one vcpu is left");
    drop(vcpus);
    assert_back(bench, &before, "the vm went first");

    let mut vm = sealed(bench);
    drop(vm.take_vcpus());
    assert_more(bench, &before, "the vcpus went first");
    drop(vm);
    assert_back(bench, &before, "the vcpus went first");

    // A watchdog or a thread that ends guests may be late.
    let mut vm = sealed(bench);
    let vcpus = vm.take_vcpus();
    let kickers: Vec<_> = vcpus.iter().map(Vcpu::kicker).collect();
    drop((vm, vcpus));
    kickers.iter().for_each(|kicker| kicker.kick());
    drop(kickers);
    assert_back(bench, &before, "kickers went last");

    // All at once, on threads that have made nothing of it.
    let mut vm = sealed(bench);
    let vcpus = vm.take_vcpus();
    thread::scope(|scope| {
        vcpus.into_iter().for_each(|vcpu| drop(scope.spawn(move || drop(vcpu))));
        scope.spawn(move || drop(vm.memory().clone()));
    });
    assert_back(bench, &before, "all went at once");
    Verdict::Met
}

fn view<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let before = nothing(bench);
    let guest = ran(bench);
    guest.write(DATA, 0x1234_5678);
    let view = guest.vm.memory().named("a device");
    drop(guest);
    assert_back_but_memory(bench, &before, "a view is left");
    let pinned = view.memory();
    assert_eq!(pinned.read_obj::<u32>(GuestAddress(DATA)).expect("a shared page"), 0x1234_5678);
    pinned.read_obj::<u32>(GuestAddress(DATA + PAGE_SIZE)).expect_err("a private page can be reached");
    drop(view);
    assert_eq!(pinned.read_obj::<u32>(GuestAddress(DATA)).expect("a shared page"), 0x1234_5678);
    drop(pinned);
    assert_back(bench, &before, "a view went last");
    Verdict::Met
}

fn descriptors<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let before = nothing(bench);
    let limited = InterruptPolicy::default().accept(VECTOR).expect("no exception's");
    let most = NonZeroU32::new(1000).expect("more than none");
    let mut taken = 0;
    for interrupts in [limited, limited.limit(most)] {
        for controller in [InterruptController::None, InterruptController::Apic] {
            let config = VmConfig { interrupts, interrupt_controller: controller, ..tiny::config(bench, 1) };
            let Ok(launch) = tiny::load(bench, config, code) else { continue };
            let vm = launch.seal().unwrap_or_else(|error| panic!("{}", quality::told(&error)));
            let files: Vec<_> =
                [vm.doorbell_fd(device_base(1)), vm.interrupt_fd(0, VECTOR)].into_iter().flatten().collect();
            taken += files.len();
            drop(vm);
            assert_back_but_memory(bench, &before, "descriptors are left");
            for file in &files {
                // Nobody hears of it any more.
                let _ = rustix::io::write(file, &1u64.to_ne_bytes());
            }
            drop(files);
            assert_back(bench, &before, "descriptors went last");
        }
    }
    match taken {
        0 => Verdict::NotOffered("there are no descriptors for notifications".into()),
        _ => Verdict::Met,
    }
}

fn many<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let before = nothing(bench);
    let memory_before = anonymous();
    for _ in 0..MANY {
        drop(ran(bench));
    }
    assert_back(bench, &before, "many vms");
    // Whatever allocator and stacks keep for the next one they keep once.
    let grown = anonymous().saturating_sub(memory_before);
    let most = MANY / 2 * memory().len();
    assert!(grown < most, "{MANY} vms left {grown} bytes");
    Verdict::Met
}
