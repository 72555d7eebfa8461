use super::*;
use crate::boot::{Exits, FreshMemory};
use crate::doorbell::Doorbell;
use crate::interrupt::{Guarding, InterruptController, InterruptPolicy};
use crate::memory::{Allocated, Conversion, ConversionListener, ConversionRequest, ConversionTotals, SharedMemory};
use crate::{Lifecycle, LifecycleAnswer, Policy, Vm};
use proptest::prelude::*;
use sha2::{Digest, Sha384};
use std::sync::Arc;
use zerocopy::FromBytes;

/// An interface with everything that a platform can ask of its guest.
pub(super) const INTERFACE: Interface = Interface {
    transport: Transport::PageState,
    exits: Exits::Ghcb,
    private_bit: Some(51),
    acceptance: true,
    fresh_memory: FreshMemory::Undefined,
    vouched_pages: true,
};

/// A loader that keeps what it is given, and fails when told to.
#[derive(Debug, Default)]
struct Keeper {
    loads: Vec<(GpaRange, Vec<u8>, PageKind)>,
    fail: bool,
}

/// A VM that is nothing but its transcript.
#[derive(Debug)]
struct Kept {
    loads: Vec<(GpaRange, Vec<u8>, PageKind)>,
    transcript: Transcript,
}

impl Loader for Keeper {
    type Vm = Kept;

    fn load(&mut self, range: GpaRange, contents: &[u8], kind: PageKind) -> Result<(), BoxError> {
        if self.fail {
            return Err("told to fail".into());
        }
        self.loads.push((range, contents.to_vec(), kind));
        Ok(())
    }

    fn set_vcpu(&mut self, _: u32, _: &VcpuState) -> Result<(), BoxError> {
        if self.fail { Err("told to fail".into()) } else { Ok(()) }
    }

    fn seal(self, transcript: Transcript) -> Result<Kept, BoxError> {
        if self.fail {
            return Err("told to fail".into());
        }
        Ok(Kept { loads: self.loads, transcript })
    }
}

impl Vm for Kept {
    type Vcpu = Never;

    fn take_vcpus(&mut self) -> Vec<Never> {
        Vec::new()
    }
    fn memory(&self) -> &SharedMemory {
        panic!("a kept launch has no memory")
    }
    fn convert(&self, _: &ConversionRequest) -> Conversion {
        panic!("a kept launch has no guest")
    }
    fn add_listener(&self, _: Arc<dyn ConversionListener>) {}
    fn conversions(&self) -> ConversionTotals {
        ConversionTotals::default()
    }
    fn allocated(&self) -> Result<Allocated, Error> {
        Ok(Allocated { private: None, shared: 0 })
    }
    fn transcript(&self) -> &Transcript {
        &self.transcript
    }
    fn lifecycle(&self, _: Lifecycle) -> LifecycleAnswer {
        LifecycleAnswer::No("it never lived")
    }
    fn guarding(&self) -> Guarding {
        Guarding::Library
    }
    #[cfg(unix)]
    fn doorbell_fd(&self, _: u16) -> Result<std::os::fd::OwnedFd, Error> {
        Err(Error::NoDescriptor("it never lived".into()))
    }
    #[cfg(unix)]
    fn interrupt_fd(&self, _: u32, _: u8) -> Result<std::os::fd::OwnedFd, Error> {
        Err(Error::NoDescriptor("it never lived".into()))
    }
    fn dropped_interrupts(&self) -> Result<u64, Error> {
        Ok(0)
    }
}

fn range(start: u64, pages: u64) -> GpaRange {
    GpaRange::from_pages(start * PAGE_SIZE, pages).unwrap()
}

/// 16 pages at 0, 16 at 16 and 16 at 64; one vCPU.
fn launch() -> Launch<Keeper> {
    let mut config = VmConfig::new(16 * PAGE_SIZE, 1).unwrap();
    config.memory = vec![range(0, 16), range(16, 16), range(64, 16)];
    Launch::new(Keeper::default(), config, Transport::Doorbell).unwrap()
}

fn state() -> VcpuState {
    VcpuState::long_mode(Gpa(0x1000), Gpa(0x2000), 0, Gpa(0x3000))
}

#[test]
fn configurations_that_make_no_sense_are_refused() {
    for vcpus in [0, MAX_VCPUS + 1, u32::MAX] {
        assert!(matches!(VmConfig::new(1 << 20, vcpus), Err(Error::Config(_))));
    }
    for bytes in [0, 1, PAGE_SIZE + 1, u64::MAX, !(PAGE_SIZE - 1), MAX_MEMORY + PAGE_SIZE] {
        assert!(matches!(VmConfig::new(bytes, 1), Err(Error::Layout(_))), "{bytes:#x}");
    }
    let mut config = VmConfig::new(1 << 20, 1).unwrap();
    config.memory = vec![];
    assert!(matches!(config.check(), Err(Error::Layout(_))));
    config.memory = vec![range(0, 2), range(1, 2)];
    assert!(matches!(config.check(), Err(Error::Layout(_))));
    config.memory = (0..=boot::MAX_RANGES as u64).map(|i| range(2 * i, 1)).collect();
    assert!(matches!(config.check(), Err(Error::Layout(_))));
}

#[test]
fn an_apic_has_its_page_to_itself_and_takes_no_levels() {
    let mut config = VmConfig::new(1 << 20, 1).unwrap();
    config.interrupts = config.interrupts.accept_level(0x41).unwrap();
    config.check().unwrap();
    config.interrupt_controller = InterruptController::Apic;
    assert!(matches!(config.check(), Err(Error::Config(_))));
    config.interrupts = InterruptPolicy::default().accept(0x41).unwrap();
    config.check().unwrap();
    config.memory.push(range(APIC_PAGE.0 / PAGE_SIZE - 1, 1));
    config.check().unwrap();
    config.memory.push(range(APIC_PAGE.0 / PAGE_SIZE, 1));
    assert!(matches!(config.check(), Err(Error::Layout(_))));
}

#[test]
fn pages_are_padded_split_at_slots_and_measured_in_order() {
    let mut launch = launch();
    let config = launch.config().clone();
    launch.load(Gpa(15 * PAGE_SIZE), &[7; PAGE_SIZE as usize + 1], PageKind::Measured).unwrap();
    launch.load(Gpa(64 * PAGE_SIZE), &[9; 8], PageKind::Unmeasured).unwrap();
    launch.zero(range(70, 2)).unwrap();
    launch.set_vcpu(0, &state()).unwrap();
    let vm = launch.seal().unwrap();

    let mut padded = vec![7];
    padded.resize(PAGE_SIZE as usize, 0);
    let mut unmeasured = vec![9; 8];
    unmeasured.resize(PAGE_SIZE as usize, 0);
    let expected = [
        (range(15, 1), vec![7; PAGE_SIZE as usize], PageKind::Measured),
        (range(16, 1), padded.clone(), PageKind::Measured),
        (range(64, 1), unmeasured, PageKind::Unmeasured),
        (range(70, 2), vec![], PageKind::Zero),
    ];
    assert_eq!(vm.loads, expected);

    let digest = |bytes: &[u8]| -> [u8; 48] { Sha384::digest(bytes).into() };
    let page = |kind, page: u64, contents| Entry::Page { kind, gpa: Gpa(page * PAGE_SIZE), contents };
    let entries = [
        Entry::Config(config.digest(&Transport::Doorbell.into())),
        page(PageKind::Measured, 15, digest(&[7; PAGE_SIZE as usize])),
        page(PageKind::Measured, 16, digest(&padded)),
        page(PageKind::Unmeasured, 64, [0; 48]),
        Entry::Zero { range: range(70, 2) },
        Entry::Vcpu { index: 0, state: state() },
    ];
    assert_eq!(vm.transcript.entries(), entries);
}

#[test]
fn the_measurement_is_the_documented_chain() {
    let transcript = Transcript {
        entries: vec![
            Entry::Config(ConfigDigest([4; 48])),
            Entry::Page { kind: PageKind::Measured, gpa: Gpa(0x1000), contents: [5; 48] },
            Entry::Zero { range: range(2, 2) },
            Entry::Vcpu { index: 1, state: state() },
        ],
    };
    // RIP, RSP, RDI, RSI, CR3, then other general registers; flags, CR0, CR4, EFER, the bases of GS, GDT and IDT; the limits of
    // those, and of code and data base, limit, selector and attributes.
    let first = [0x1000u64, 0, 0, 0x3000, 0x2000];
    let rest = [2, 0x8001_0033, 0x60, 0x500, 0, 0, 0, 0xffff_ffff];
    let segments = [0, 0xa09b_0008_ffff_ffff, 0, 0xc093_0010_ffff_ffff];
    let bytes = [&first[..], &[0; 13], &rest, &segments].concat().into_iter().flat_map(u64::to_le_bytes);
    let bytes: Vec<u8> = bytes.collect();
    let lines: [(u64, u64, Vec<u8>); 5] = [
        (16, 0, vec![4; 48]),
        (1, 0x1000, vec![5; 48]),
        (3, 0x2000, vec![0; 48]),
        (3, 0x3000, vec![0; 48]),
        (17, 1, Sha384::digest(bytes).to_vec()),
    ];
    let mut expected = Sha384::digest(b"cvm software launch 2").to_vec();
    for (kind, place, contents) in lines {
        let line = [expected, kind.to_le_bytes().to_vec(), place.to_le_bytes().to_vec(), contents].concat();
        expected = Sha384::digest(line).to_vec();
    }
    assert_eq!(transcript.measurement().0.to_vec(), expected);
    assert_eq!(transcript.measurement().to_string().len(), 96);
}

#[test]
fn pages_outside_memory_and_pages_loaded_twice_are_refused_and_nothing_is_loaded() {
    let mut launch = launch();
    launch.load(Gpa(4 * PAGE_SIZE), &[1; 2 * PAGE_SIZE as usize], PageKind::Measured).unwrap();
    for (page, pages) in [(4, 1), (5, 1), (3, 2), (5, 4), (0, 16)] {
        let twice = launch.zero(range(page, pages)).unwrap_err();
        assert!(matches!(twice, Error::LoadedTwice { .. }), "{page}, {pages}: {twice}");
    }
    for (page, pages) in [(31, 2), (40, 1), (79, 2), (1 << 30, 1)] {
        let outside = launch.zero(range(page, pages)).unwrap_err();
        assert!(matches!(outside, Error::OutsideMemory { .. }), "{page}, {pages}: {outside}");
    }
    assert!(matches!(launch.load(Gpa(0x10), &[1], PageKind::Measured), Err(Error::Layout(_))));
    assert!(matches!(launch.load(Gpa(0), &[], PageKind::Measured), Err(Error::Layout(_))));
    assert!(matches!(launch.load(Gpa(0), &[1], PageKind::Zero), Err(Error::Layout(_))));
    launch.zero(range(0, 4)).unwrap();
    launch.set_vcpu(0, &state()).unwrap();
    assert_eq!(launch.seal().unwrap().loads.len(), 2);
}

#[test]
fn every_vcpu_has_one_state_to_start_from() {
    let mut launch = launch();
    assert!(matches!(launch.set_vcpu(1, &state()), Err(Error::VcpuState { vcpu: 1, .. })));
    launch.set_vcpu(0, &state()).unwrap();
    assert!(matches!(launch.set_vcpu(0, &state()), Err(Error::VcpuState { vcpu: 0, .. })));
    assert!(matches!(super::tests::launch().seal(), Err(Error::VcpuState { vcpu: 0, .. })));
}

#[test]
fn a_loader_that_fails_says_at_which_step_and_page_and_the_launch_is_over() {
    let mut launch = launch();
    launch.loader.fail = true;
    let error = launch.zero(range(2, 1)).unwrap_err();
    assert_eq!(error.to_string(), "failed to load pages for 0x2000..0x3000");
    assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "told to fail");
    launch.loader.fail = false;
    assert!(matches!(launch.zero(range(3, 1)), Err(Error::LaunchFailed)));
    assert!(matches!(launch.set_vcpu(0, &state()), Err(Error::LaunchFailed)));
    assert!(matches!(launch.seal(), Err(Error::LaunchFailed)));

    let mut launch = super::tests::launch();
    launch.loader.fail = true;
    assert!(matches!(launch.set_vcpu(0, &state()), Err(Error::Backend { .. })));
    assert!(matches!(launch.seal(), Err(Error::LaunchFailed)));

    let mut launch = super::tests::launch();
    launch.set_vcpu(0, &state()).unwrap();
    launch.loader.fail = true;
    assert!(matches!(launch.seal(), Err(Error::Backend { step: "seal the vm", .. })));
}

#[test]
#[cfg_attr(target_endian = "big", ignore = "reads the boot page in memory as guests do, which are little-endian")]
fn the_boot_page_says_what_the_launch_is() {
    let mut launch = launch();
    launch.load_boot_page(Gpa(0x1000), [1, 2, 3, 4]).unwrap();
    let (_, contents, kind) = &launch.loader.loads[0];
    let (page, rest) = BootPage::read_from_prefix(contents).unwrap();
    assert!(page.magic == boot::MAGIC && rest.iter().all(|byte| *byte == 0));
    assert_eq!((*kind, page.vcpus, page.argument), (PageKind::Measured, 1, [1, 2, 3, 4]));
    assert_eq!((page.doorbell(), page.transport()), (Some(Doorbell::Port), Some(Transport::Doorbell)));
    assert_eq!(page.memory[2], MemoryRange { start: 64 * PAGE_SIZE, len: 16 * PAGE_SIZE });
    assert_eq!(page.memory[3], MemoryRange::default());
    assert_eq!((page.accepted, page.fresh_memory()), (boot::ALL_ACCEPTED, Some(FreshMemory::Zero)));
    assert_eq!(page.config, launch.config().digest(launch.interface()).0);
}

#[test]
fn every_field_of_the_configuration_changes_the_boot_page() {
    let loaded = |config: &VmConfig| {
        let mut launch = Launch::new(Keeper::default(), config.clone(), Transport::Doorbell).unwrap();
        launch.load_boot_page(Gpa(0x1000), [0; 4]).unwrap();
        launch.loader.loads.remove(0).1
    };
    let base = VmConfig::new(16 * PAGE_SIZE, 1).unwrap();
    let limit = std::num::NonZeroU32::MIN;
    let configs = [
        base.clone(),
        VmConfig { memory: vec![range(0, 8), range(8, 8)], ..base.clone() },
        VmConfig { vcpus: 2, ..base.clone() },
        VmConfig { interrupts: base.interrupts.accept(0x41).unwrap(), ..base.clone() },
        VmConfig { interrupts: base.interrupts.accept_level(0x41).unwrap(), ..base.clone() },
        VmConfig { interrupts: base.interrupts.limit(limit), ..base.clone() },
        VmConfig { interrupt_controller: InterruptController::Apic, ..base.clone() },
        VmConfig { policy: Policy::NO_SMT, ..base.clone() },
        VmConfig { doorbell: Doorbell::Msr, ..base },
    ];
    let pages: std::collections::BTreeSet<_> = configs.iter().map(loaded).collect();
    assert_eq!(pages.len(), configs.len());
}

#[test]
#[cfg_attr(target_endian = "big", ignore = "reads the boot page in memory as guests do, which are little-endian")]
fn a_guest_that_has_to_accept_memory_is_told_from_where_on_and_what_lies_below_is_loaded() {
    let mut config = VmConfig::new(16 * PAGE_SIZE, 1).unwrap();
    config.memory = vec![range(0, 16), range(16, 1100)];
    let mut launch = Launch::new(Keeper::default(), config, INTERFACE).unwrap();
    launch.load(Gpa(15 * PAGE_SIZE), &[1; 2 * PAGE_SIZE as usize], PageKind::Measured).unwrap();
    launch.load_boot_page(Gpa(PAGE_SIZE), [0; 4]).unwrap();
    let (_, contents, _) = &launch.loader.loads[2];
    let (page, _) = BootPage::read_from_prefix(contents).unwrap();
    assert_eq!((page.exits(), page.transport()), (Some(Exits::Ghcb), Some(Transport::PageState)));
    assert_eq!((page.shared_at, page.accepted), (x86::SHARED_AT, 2 << 20));
    assert_eq!((page.secrets, page.cpuid), (2 * PAGE_SIZE, 3 * PAGE_SIZE));
    let vouched: Vec<_> = launch.loader.loads[3..].iter().map(|(range, _, kind)| (*range, *kind)).collect();
    assert_eq!(vouched, [(range(2, 1), PageKind::Secrets), (range(3, 1), PageKind::Cpuid)]);
    assert!(matches!(launch.load(Gpa(512 * PAGE_SIZE), &[1], PageKind::Measured), Err(Error::Layout(_))));
    launch.start_in_long_mode(Gpa(0), Gpa(0x10_0000), Gpa(PAGE_SIZE)).unwrap();
    let vm = launch.seal().unwrap();
    let zeros: Vec<_> =
        vm.loads.iter().filter(|(.., kind)| *kind == PageKind::Zero).map(|(range, ..)| *range).collect();
    let tables = 1 + 2 * 5;
    assert_eq!(zeros, [range(0, 1), range(4, 11), range(17, 256 - 17), range(256 + tables, 256 - tables)]);
    let root = vm.transcript.entries().iter().find_map(|entry| match entry {
        Entry::Vcpu { state, .. } => Some(state.cr3),
        _ => None,
    });
    assert_eq!(root, Some(0x10_0000 | 1 << 51));
}

#[test]
#[cfg_attr(target_endian = "big", ignore = "reads the boot page in memory as guests do, which are little-endian")]
fn a_guest_whose_fresh_memory_is_undefined_is_told_from_where_on_and_finds_zeros_below() {
    let interface = Interface { fresh_memory: FreshMemory::Undefined, ..Transport::Hypercall.into() };
    let mut launch = Launch::new(Keeper::default(), VmConfig::new(4 << 20, 1).unwrap(), interface).unwrap();
    launch.load_boot_page(Gpa(PAGE_SIZE), [0; 4]).unwrap();
    let (page, _) = BootPage::read_from_prefix(&launch.loader.loads[0].1).unwrap();
    assert_eq!((page.accepted, page.fresh_memory()), (2 << 20, Some(FreshMemory::Undefined)));
    assert!(matches!(launch.zero(range(512, 1)), Err(Error::Layout(_))));
    launch.set_vcpu(0, &state()).unwrap();
    let zeros = launch.seal().unwrap().loads.split_off(1);
    assert_eq!(zeros, [(range(0, 1), vec![], PageKind::Zero), (range(2, 510), vec![], PageKind::Zero)]);
}

proptest! {
    #[test]
    fn a_page_is_loaded_once_or_refused(loads in prop::collection::vec((0u64..90, 1u64..20), 1..30)) {
        let mut launch = launch();
        let mut loaded = [false; 128];
        let memory = |page: u64| page < 32 || (64..80).contains(&page);
        for (start, pages) in loads {
            let fresh = (start..start + pages).all(|page| memory(page) && !loaded[page as usize]);
            prop_assert_eq!(launch.zero(range(start, pages)).is_ok(), fresh);
            if fresh {
                loaded[start as usize..(start + pages) as usize].fill(true);
            }
        }
    }
}

#[cfg(all(feature = "linux", target_arch = "x86_64"))]
mod linux {
    use super::*;
    use crate::linux::{Kernel, LinuxImage};

    const BYTES: u64 = 4 << 20;

    fn image(bytes: u64, line: &str) -> LinuxImage {
        let kernel = Kernel::Raw { contents: &[1; 5000], gpa: Gpa(2 << 20) };
        LinuxImage::new(kernel, Some(&[2; 5000]), line, &[GpaRange::new(0, bytes).unwrap()]).unwrap()
    }

    fn launch(vcpus: u32) -> Launch<Keeper> {
        Launch::new(Keeper::default(), VmConfig::new(BYTES, vcpus).unwrap(), Transport::Doorbell).unwrap()
    }

    fn sealed(line: &str) -> Kept {
        let mut launch = launch(1);
        launch.load_linux(&image(BYTES, line)).unwrap();
        launch.seal().unwrap()
    }

    #[test]
    fn its_pages_are_loaded_measured_and_in_the_order_of_their_addresses() {
        let vm = sealed("quiet");
        assert!(vm.loads.windows(2).all(|pair| pair[0].0.end() <= pair[1].0.start()));
        let pages = vm.transcript.entries().iter().filter_map(|entry| match entry {
            Entry::Page { kind: PageKind::Measured, gpa, .. } => Some(gpa.0),
            _ => None,
        });
        let pages: Vec<_> = pages.collect();
        let tables = (0..6).map(|page| 0x9000 + page * PAGE_SIZE);
        let rest = [0x1_0000, 0x20_0000, 0x20_1000, 0x3f_e000, 0x3f_f000];
        assert_eq!(pages, [0x7000].into_iter().chain(tables).chain(rest).collect::<Vec<_>>());
        assert!(matches!(vm.transcript.entries().last(), Some(Entry::Vcpu { index: 0, .. })));
    }

    #[test]
    fn the_measurement_is_that_of_the_files_and_the_command_line() {
        assert_eq!(sealed("quiet").transcript, sealed("quiet").transcript);
        assert_ne!(sealed("quiet").transcript.measurement(), sealed("debug").transcript.measurement());
    }

    #[test]
    fn it_takes_one_vcpu_and_the_memory_that_it_was_laid_out_for() {
        assert!(matches!(launch(2).load_linux(&image(BYTES, "")), Err(Error::Config(_))));
        assert!(matches!(launch(1).load_linux(&image(2 * BYTES, "")), Err(Error::Layout(_))));
    }
}
