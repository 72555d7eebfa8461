//! Chapter 2: where vCPUs start, and what they are told.

use super::{guest_of, with_slots};
use crate::clause::{Clause, Verdict};
use crate::guest::{BOOT_PAGE, CODE, DATA, EXTRA, MEMORY, REPORT, TABLES};
use crate::{Bench, Guest, quality};
use cvm_core::boot::{self, BootPage, MemoryRange};
use cvm_core::doorbell::{Doorbell, Transport};
use cvm_core::x86::{self, VcpuState};
use cvm_core::{Error, Exit, Gpa, PAGE_SIZE, PageKind, PageState, Platform, Side, Vcpu, Vm, VmConfig};
use iced_x86::code_asm::*;
use zerocopy::FromBytes;

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("2.8", "each vCPU starts from the state that it was given", states),
        Clause::new("2.9", "the boot page tells the guest what its launch is", boot_page),
        Clause::new("2.10", "each transport is offered or refused and one is taken without a wish", transports),
        Clause::new("2.11", "the guest rings by the doorbell of its configuration", doorbells),
    ]
}

fn states<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut launch = bench.platform.launch(bench.config(3)).expect("a sound configuration");
    let private_bit = launch.interface().private_bit;
    let tables = x86::identity_map(Gpa(TABLES), MEMORY, private_bit).expect("sound tables");
    launch.load(Gpa(TABLES), &tables, PageKind::Measured).expect("memory for tables");
    let root = TABLES | private_bit.map_or(0, |bit| 1 << bit);
    let at = |index: u32| CODE + u64::from(index) * 4 * PAGE_SIZE;
    let stack = |index: u32| DATA + u64::from(index + 1) * PAGE_SIZE;
    // The last one first: the order of submission is that of the transcript, and of nothing else.
    for index in [2, 0, 1] {
        let code = bench.assemble(&launch, at(index), |a| {
            // Before anything that clobbers what is looked at.
            a.mov(r8, rsp)?;
            a.mov(r9, rsi)?;
            a.pushfq()?;
            a.pop(r10)?;
            a.mov(r11, cr3)?;
            // Each has code of its own.
            a.mov(r12, at(index))?;
            a.begin()?;
            let halves = |a: &mut crate::guest::Assembler, register| {
                a.mov(rax, register)?;
                a.report()?;
                a.mov(rax, register)?;
                a.shr(rax, 32)?;
                a.report()
            };
            for register in [rdi, r8, r9, r10, r11, r12] {
                halves(a, register)?;
            }
            a.end(0)
        });
        assert!(code.len() < 4 * PAGE_SIZE as usize);
        launch.load(Gpa(at(index)), &code, PageKind::Measured).expect("memory for code");
        let state = VcpuState {
            rip: at(index),
            rsp: stack(index),
            rdi: index.into(),
            rsi: u64::MAX - u64::from(index),
            cr3: root,
            ..VcpuState::LONG_MODE
        };
        launch.set_vcpu(index, &state).expect("a state for a vcpu");
    }
    // What a guest needs that has to accept memory.
    launch.load_boot_page(Gpa(BOOT_PAGE), [0; 4]).expect("memory for the boot page");
    let mut guest = guest_of::<P>(Ok(launch));
    for index in [1, 2, 0] {
        let mut number = || u64::from(guest.report_of(index)) | u64::from(guest.report_of(index)) << 32;
        let [number_of_it, stack_of_it, argument, flags, tables, entry] = [(); 6].map(|()| number());
        let index = index as u32;
        assert_eq!(number_of_it, u64::from(index), "vcpu {index}: rdi");
        assert_eq!(stack_of_it, stack(index), "vcpu {index}: rsp");
        assert_eq!(argument, u64::MAX - u64::from(index), "vcpu {index}: rsi");
        // Interrupts, the direction of strings, and what is always one (AMD64 APM volume 2, section 3.1.6).
        assert_eq!(flags & (1 << 9 | 1 << 10 | 2), 2, "vcpu {index}: flags {flags:#x}");
        assert_eq!(tables, root, "vcpu {index}: cr3");
        assert_eq!(entry, at(index), "vcpu {index}: it started elsewhere");
    }
    guest.end();
    Verdict::Met
}

fn boot_page<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const ARGUMENT: [u64; 4] = [1, 0x2222_0000_0000_0000, 3, u64::MAX];
    // The pages that a trusted entity fills lie behind it, and what was loaded last ends here.
    const AT: u64 = EXTRA + 5 * PAGE_SIZE;
    const LAST: u64 = MEMORY - PAGE_SIZE;
    let config = with_slots(bench, 3);
    let mut launch = bench.platform.launch(config.clone()).expect("a sound configuration");
    let code = bench.assemble(&launch, CODE, |a| {
        a.begin()?;
        let mut again = a.create_label();
        a.xor(r8d, r8d)?;
        a.set_label(&mut again)?;
        a.mov(eax, dword_ptr(rsi + r8))?;
        a.report()?;
        a.add(r8d, 4)?;
        a.cmp(r8d, size_of::<BootPage>() as u32)?;
        a.jne(again)?;
        a.mov(eax, edi)?;
        a.report()?;
        a.end(0)
    });
    launch.load(Gpa(LAST), &[1], PageKind::Measured).expect("memory");
    launch.load(Gpa(CODE), &code, PageKind::Measured).expect("memory for code");
    launch.start_in_long_mode(Gpa(CODE), Gpa(TABLES), Gpa(AT)).expect("memory for tables");
    launch.load_boot_page(Gpa(AT), ARGUMENT).expect("memory for the boot page");
    let interface = *launch.interface();
    let mut guest = guest_of::<P>(Ok(launch));
    for index in [2, 0, 1] {
        let mut bytes = [0; size_of::<BootPage>()];
        bytes.chunks_mut(4).for_each(|word| word.copy_from_slice(&guest.report_of(index).to_le_bytes()));
        let page = BootPage::read_from_bytes(&bytes).expect("as many bytes as it has");
        assert_eq!((page.magic, page.vcpus), (boot::MAGIC, 3));
        assert_eq!(page.doorbell(), Some(config.doorbell));
        assert_eq!((page.transport(), page.exits()), (Some(interface.transport), Some(interface.exits)));
        assert_eq!(page.shared_at, interface.private_bit.map_or(0, |_| x86::SHARED_AT));
        assert_eq!(page.accepted, if interface.is_all_accepted() { boot::ALL_ACCEPTED } else { MEMORY });
        assert_eq!(page.fresh_memory(), Some(interface.fresh_memory));
        assert_eq!(page.config, config.digest(&interface).0);
        let vouched = if interface.vouched_pages { (AT + PAGE_SIZE, AT + 2 * PAGE_SIZE) } else { (0, 0) };
        assert_eq!((page.secrets, page.cpuid), vouched);
        let mut memory = [MemoryRange::default(); boot::MAX_RANGES];
        for (entry, slot) in memory.iter_mut().zip(&config.memory) {
            *entry = MemoryRange { start: slot.start().0, len: slot.len() };
        }
        assert_eq!((page.memory, page.argument), (memory, ARGUMENT));
        assert_eq!(guest.report_of(index), index as u32, "it was told of another vcpu");
    }
    Verdict::Met
}

fn transports<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut offered = Vec::new();
    for wish in [Transport::Doorbell, Transport::Hypercall, Transport::PageState] {
        let loaded = bench.load(VmConfig { transport: Some(wish), ..bench.config(1) }, |a| {
            a.convert(DATA, 1, Side::Shared)?;
            a.report()?;
            a.end(0)
        });
        let launch = match loaded {
            Err(Error::Config(reason)) => {
                assert!(reason.contains(' ') && !reason.ends_with('.'), "{wish:?} is refused: {reason:?}");
                continue;
            }
            loaded => loaded.unwrap_or_else(|error| panic!("{wish:?}: {}", quality::told(&error))),
        };
        assert_eq!((launch.transport(), launch.interface().transport), (wish, wish));
        offered.push(wish);
        let mut guest = Guest::from_launch(launch);
        assert_eq!(guest.convert().pages, 1, "{wish:?}");
        assert_eq!(guest.report(), 0, "{wish:?}");
        assert_eq!(guest.vm.memory().map().get(Gpa(DATA)), Some(PageState::Shared), "{wish:?}");
        guest.end();
    }
    let taken = bench.platform.launch(bench.config(1)).expect("a launch without a wish").transport();
    assert!(offered.contains(&taken), "{taken:?} is taken, and {offered:?} are offered");
    Verdict::Met
}

fn doorbells<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    for doorbell in [Doorbell::Port, Doorbell::Msr] {
        let mut guest = bench.guest(VmConfig { doorbell, ..bench.config(1) }, |a| {
            // As the boot page has it, whose fourth number this is.
            a.mov(eax, dword_ptr(rsi + 12))?;
            a.report()?;
            a.listen(REPORT)?;
            a.report()?;
            a.end(0)
        });
        assert_eq!(guest.report(), doorbell as u32);
        assert_eq!(guest.run(), Exit::DoorbellRead { register: REPORT });
        guest.vcpus[0].answer_read(0xabcd_1234).expect("an answer to a read");
        assert_eq!(guest.report(), 0xabcd_1234, "{doorbell:?}");
        guest.end();
    }
    Verdict::Met
}
