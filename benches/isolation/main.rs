//! What each isolation costs beside the system calls that nobody can do without. `cargo xtask ratios` makes a table of
//! the results.
//!
//! | row | one iteration |
//! |---|---|
//! | `I/exit` | one exit to the VMM by the doorbell, and back into the guest |
//! | `I/convert/N` | the guest shares N bytes and takes them back: two conversions, eight exits, no page touched |
//! | `I/convert-touched/N` | the same, and the guest writes to the first page each time |
//! | `I/io` | a device interrupts the guest by descriptor, and the guest's handler rings for the device by descriptor |
//! | `I/boot` | launch a VM of 16 MiB with eight pages, seal it, run it to its first exit, drop it |
//!
//! I is an isolation. The floors run the same guests, by `kvm-ioctls` and nothing else:
//!
//! | floor | one iteration |
//! |---|---|
//! | `raw/exit` | one `KVM_RUN` to the exit by a port |
//! | `raw/remap-P/N` | the system calls of both conversions without any guest |
//! | `raw/convert-P/N` | these, and the guest's eight exits by ports |
//! | `raw/convert-P-touched/N` | the same, and the guest writes to the first page each time |
//! | `raw/boot` | make VM, file, window, slot; write the pages; make the vCPU, set CPUID and registers; one exit; drop |
//!
//! P is what private memory is. In a floor, a conversion is for
//!
//! - `file`: `mmap` of the other file in the window behind the memory slot, and `fallocate` of a hole in the file that
//!   loses;
//! - `guest-memfd`: `KVM_SET_MEMORY_ATTRIBUTES`, `mmap` in the window of the shared file or of nothing (so that KVM
//!   finds no bytes of the host where the guest is private), and `fallocate` of a hole in the one that loses.
//!
//! The floor of `boot` does not ask KVM for its CPUID leaves: a VMM can do that once.

mod guest;
mod raw;

use criterion::Criterion;
use cvm::doorbell::Transport;
use cvm::interrupt::{InterruptController, InterruptPolicy};
use cvm::kvm::{KvmLoader, KvmPlatform, KvmVcpu, KvmVm};
use cvm::{Answer, Exit, Launch, PageKind, Platform, Protection, Vcpu, Vm, VmConfig, Watchdog};
use guest::{DOORBELL, Guest, VECTOR, range};
use raw::{Converting, Host, Machine, Private};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{read, write};
use std::path::Path;
use std::thread;
use std::time::Duration;

/// What is compared, as far as this host offers it.
const ISOLATIONS: [Protection; 3] = [Protection::None, Protection::GuestMemfd, Protection::Vault];

/// What is converted, and whether the guest touches it.
const CONVERSIONS: [(u64, &str, bool); 4] =
    [(4 << 10, "4KiB", false), (4 << 10, "4KiB", true), (2 << 20, "2MiB", false), (64 << 20, "64MiB", false)];

/// How long a row may take: far longer than any does.
const LIMIT: Duration = Duration::from_secs(120);

/// What the floor of an isolation has for private memory.
fn private(isolation: Protection) -> Private {
    match isolation {
        Protection::GuestMemfd => Private::GuestMemfd,
        _ => Private::File,
    }
}

fn launch(platform: &KvmPlatform, guest: &Guest) -> (KvmVm, KvmVcpu) {
    let config = VmConfig { transport: Some(Transport::Doorbell), ..VmConfig::new(guest.memory, 1).unwrap() };
    seal(platform.launch(config).unwrap(), guest)
}

fn seal(mut launch: Launch<KvmLoader>, guest: &Guest) -> (KvmVm, KvmVcpu) {
    for (gpa, contents) in &guest.pages {
        launch.load(*gpa, contents, PageKind::Measured).unwrap();
    }
    launch.set_vcpu(0, &guest.state).unwrap();
    let mut vm = launch.seal().unwrap();
    let vcpu = vm.take_vcpus().remove(0);
    (vm, vcpu)
}

fn ring(vcpu: &mut KvmVcpu) {
    let exit = vcpu.run().unwrap();
    assert!(matches!(exit, Exit::DoorbellWrite { register: DOORBELL, .. }), "{exit:?}");
}

/// A VMM under a watchdog.
struct Vmm {
    vm: KvmVm,
    vcpu: KvmVcpu,
    _watchdog: Watchdog,
}

impl Vmm {
    fn new(platform: &KvmPlatform, guest: &Guest) -> Self {
        let (vm, vcpu) = launch(platform, guest);
        // Its only kick is an exit that nothing here expects, and so ends the benchmark.
        let _watchdog = Watchdog::new(LIMIT, vec![vcpu.kicker()]).unwrap();
        Self { vm, vcpu, _watchdog }
    }

    /// Carries out the guest's next two requests.
    fn convert_twice(&mut self) {
        for _ in 0..2 {
            let exit = self.vcpu.run().unwrap();
            let Exit::Conversion(request) = exit else { panic!("{exit:?}") };
            let conversion = self.vm.convert(&request);
            assert_eq!(conversion.answer(), Answer::Done, "{:?}", conversion.cause());
            self.vcpu.answer_conversion(conversion).unwrap();
        }
    }
}

fn exit(criterion: &mut Criterion, host: &Host, platforms: &[KvmPlatform]) {
    let guest = Guest::ringing();
    let mut raw = Machine::new(host, &guest);
    criterion.bench_function("raw/exit", |bencher| bencher.iter(|| raw.ring()));
    for platform in platforms {
        let mut vmm = Vmm::new(platform, &guest);
        let name = format!("{}/exit", platform.protection());
        criterion.bench_function(&name, |bencher| bencher.iter(|| ring(&mut vmm.vcpu)));
    }
}

fn convert(criterion: &mut Criterion, host: &Host, platforms: &[KvmPlatform]) {
    for (len, size, touches) in CONVERSIONS {
        let (range, touched) = (range(len), if touches { "-touched" } else { "" });
        let guest = Guest::converting(range, touches);
        for (kind, name) in [(Private::File, "file"), (Private::GuestMemfd, "guest-memfd")] {
            if !platforms.iter().any(|platform| private(platform.protection()) == kind) {
                continue;
            }
            let mut raw = Converting::new(host, kind, range, &guest);
            if !touches {
                let name = format!("raw/remap-{name}/{size}");
                criterion.bench_function(&name, |bencher| bencher.iter(|| raw.remap_twice()));
            }
            let name = format!("raw/convert-{name}{touched}/{size}");
            criterion.bench_function(&name, |bencher| bencher.iter(|| raw.convert_twice()));
        }
        for platform in platforms {
            let mut vmm = Vmm::new(platform, &guest);
            let name = format!("{}/convert{touched}/{size}", platform.protection());
            criterion.bench_function(&name, |bencher| bencher.iter(|| vmm.convert_twice()));
        }
    }
}

fn io(criterion: &mut Criterion, platforms: &[KvmPlatform]) {
    let guest = Guest::echoing();
    for platform in platforms {
        let config = VmConfig {
            transport: Some(Transport::Doorbell),
            interrupts: InterruptPolicy::default().accept(VECTOR).unwrap(),
            interrupt_controller: InterruptController::Apic,
            ..VmConfig::new(guest.memory, 1).unwrap()
        };
        let (vm, mut vcpu) = match platform.launch(config) {
            Ok(launch) => seal(launch, &guest),
            Err(error) => {
                eprintln!("{}/io: {error}", platform.protection());
                continue;
            }
        };
        let (interrupt, doorbell) = (vm.interrupt_fd(0, VECTOR).unwrap(), vm.doorbell_fd(DOORBELL).unwrap());
        let kicker = vcpu.kicker();
        let running = thread::spawn(move || vcpu.run().unwrap());
        let name = format!("{}/io", platform.protection());
        criterion.bench_function(&name, |bencher| {
            bencher.iter(|| {
                write(&interrupt, &1u64.to_ne_bytes()).unwrap();
                let limit = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
                assert_eq!(poll(&mut [PollFd::new(&doorbell, PollFlags::IN)], Some(&limit)), Ok(1), "no answer");
                read(&doorbell, &mut [0; 8]).unwrap();
            });
        });
        kicker.kick();
        assert_eq!(running.join().unwrap(), Exit::Kicked);
    }
}

fn boot(criterion: &mut Criterion, host: &Host, platforms: &[KvmPlatform]) {
    let guest = Guest::ringing();
    criterion.bench_function("raw/boot", |bencher| bencher.iter(|| Machine::new(host, &guest).ring()));
    for platform in platforms {
        let name = format!("{}/boot", platform.protection());
        criterion.bench_function(&name, |bencher| {
            bencher.iter(|| {
                let (_vm, mut vcpu) = launch(platform, &guest);
                ring(&mut vcpu);
            });
        });
    }
}

fn main() {
    cvm::kvm::vault::init();
    let open = |isolation| {
        let opened = KvmPlatform::open(Path::new("/dev/kvm"), Some(isolation));
        opened.inspect_err(|error| eprintln!("{isolation}: {error}")).ok()
    };
    let platforms: Vec<_> = ISOLATIONS.into_iter().filter_map(open).collect();
    if platforms.is_empty() {
        return;
    }
    let host = Host::open().unwrap();
    let criterion = Criterion::default().sample_size(30).warm_up_time(Duration::from_millis(500));
    let mut criterion = criterion.measurement_time(Duration::from_secs(3)).configure_from_args();
    // Floor and isolations by turns, so that they find the machine in much the same state.
    exit(&mut criterion, &host, &platforms);
    convert(&mut criterion, &host, &platforms);
    io(&mut criterion, &platforms);
    boot(&mut criterion, &host, &platforms);
    criterion.final_summary();
}
