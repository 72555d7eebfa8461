//! Orders of a hostile VMM on the socket.

use crate::common::{BOOT_PAGE, CODE, DATA, MEMORY, TABLES, assemble, config, load, range};
use crate::guests::{SAYS_SECRET, witness};
use crate::hostile_vmm::{Heard, Loading, Vault, create, file, kick_sockets, sealed_file};
use crate::{PATIENCE, vaults};
use cvm_backend_kvm::vault::protocol::{Given, Message, Order, Report};
use cvm_core::doorbell::{Doorbell, Transport, device_base};
use cvm_core::interrupt::InterruptController;
use cvm_core::x86::identity_map;
use cvm_core::{Gpa, GpaRange, PAGE_SIZE, PageKind, Policy, Trigger, Vm};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{SealFlags, fcntl_add_seals};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use std::fs::{self, File};
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use zerocopy::IntoBytes;

#[test]
fn orders_before_or_after_their_time_are_refused() {
    let Some(_vaults) = vaults() else { return };
    let load = Order::Load { range: range(DATA, 1), kind: PageKind::Measured };
    let slot = Order::Slot(range(0, MEMORY / PAGE_SIZE));
    let accept = Order::Accept { trigger: Trigger::Edge, vectors: [0; 4], most_per_second: None };

    let mut vault = Vault::start();
    for early in [&load, &Loading::state(0), &Order::Seal, &Order::Count] {
        vault.refused(early);
    }
    vault.refused(&Order::Accept { trigger: Trigger::Edge, vectors: [1 << 14, 0, 0, 0], most_per_second: None });
    // There is no memory yet; and there is no second try.
    vault.refused(&create(1));
    for late in [&slot, &accept, &create(1), &load, &Order::Seal, &Order::Count] {
        vault.refused(late);
    }

    let mut loading = Loading::start(1);
    for wrong in [&slot, &accept, &create(1), &Order::Count] {
        loading.vault.refused(wrong);
    }
    loading.load_all(witness);
    let (mut guest, _) = loading.seal();
    for late in [&slot, &accept, &create(1), &load, &Loading::state(0), &Order::Seal] {
        guest.vault.refused(late);
    }
    assert!(matches!(guest.vault.order(&Order::Count), Report::Memory { shared: 0, .. }));
    assert_eq!(guest.run(Given::Nothing), SAYS_SECRET);
}

#[test]
fn orders_that_repeat_or_jump_are_refused() {
    let Some(_vaults) = vaults() else { return };
    let mut vault = Vault::start();
    let accept = Order::Accept { trigger: Trigger::Edge, vectors: [0; 4], most_per_second: None };
    vault.done(&accept);
    for sequence in [1, 0, u32::MAX, 5, 5, 4] {
        vault.send(&Vault::packet(&accept, sequence), &[]);
        assert!(matches!(vault.hear(), Heard::Report(Report::Failed(_))), "{sequence}");
    }
    vault.sequence = 4;
    vault.done(&accept);
}

#[test]
fn packets_that_are_no_orders_are_refused_or_end_the_vault() {
    let Some(_vaults) = vaults() else { return };
    let mut vault = Vault::start();
    for (sequence, kind) in (1..).zip([0, 1, 0x11, 0x30, 0x1ff, 0x201, 0xffff]) {
        vault.send(Message { sequence, kind, ..Message::default() }.as_bytes(), &[]);
        assert!(matches!(vault.hear(), Heard::Report(Report::Failed(_))), "kind {kind:#x}");
    }
    let packet = Vault::packet(&Order::Count, 1);
    let lying = Message { sequence: 1, kind: 0x107, text: 9, ..Message::default() };
    for (what, packet) in [
        ("empty", vec![]),
        ("short", packet[..55].to_vec()),
        ("one byte", vec![0]),
        ("with bytes that it does not declare", [&packet[..], b"x"].concat()),
        ("without the text that it declares", lying.as_bytes().to_vec()),
        ("long", [&packet[..], &[b'x'; 257]].concat()),
        ("huge", vec![0; 100_000]),
    ] {
        let mut vault = Vault::start();
        vault.send(&packet, &[]);
        assert!(matches!(vault.hear(), Heard::Gone), "{what}");
        vault.end(PATIENCE);
    }
    // That somebody else's vault has ended is no matter of this one.
    vault.sequence = 7;
    vault.done(&Order::Slot(range(0, 1)));
}

#[test]
fn descriptors_that_do_not_belong_are_refused() {
    let Some(_vaults) = vaults() else { return };
    let mut vault = Vault::start();
    let null = File::open("/dev/null").unwrap();
    // Only root can look into a vault.
    let is_root = rustix::process::geteuid().is_root();
    let held = |vault: &Vault| fs::read_dir(format!("/proc/{}/fd", vault.process.id())).map(Iterator::count);
    let before = is_root.then(|| held(&vault).unwrap());
    for _ in 0..4 {
        let heard = vault.order_with(&Order::Slot(range(0, 1)), &[null.as_fd()]);
        assert!(matches!(heard, Heard::Report(Report::Failed(_))), "{heard:?}");
    }
    match before {
        Some(before) => assert_eq!(held(&vault).unwrap(), before, "the vault has kept a descriptor that it refused"),
        None => eprintln!("SKIPPED: whether the vault keeps a descriptor that it refused, which only root can see"),
    }
}

#[test]
fn a_launch_begins_with_two_files_of_fixed_and_right_sizes_a_socket_and_nothing_else() {
    let Some(_vaults) = vaults() else { return };
    let (good, good_pages) = (sealed_file(MEMORY), sealed_file(PAGE_SIZE));
    let (small, large) = (sealed_file(MEMORY - PAGE_SIZE), sealed_file(MEMORY + PAGE_SIZE));
    let (unsealed, can_grow) = (file(MEMORY), file(MEMORY));
    fcntl_add_seals(&can_grow, SealFlags::SHRINK).unwrap();
    let unsealed_pages = file(PAGE_SIZE);
    let null = File::open("/dev/null").unwrap();
    let root = File::open("/").unwrap();
    let on_disk = tempfile::tempfile().unwrap();
    on_disk.set_len(MEMORY).unwrap();
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let shared: [(&str, BorrowedFd<'_>); 8] = [
        ("too small", small.as_fd()),
        ("too large", large.as_fd()),
        ("unsealed", unsealed.as_fd()),
        ("can grow", can_grow.as_fd()),
        ("a device", null.as_fd()),
        ("a directory", root.as_fd()),
        ("a file on a disk", on_disk.as_fd()),
        ("an eventfd", event.as_fd()),
    ];
    let (_ours, kicks) = kick_sockets();
    let (good, good_pages, kicks) = (good.as_fd(), good_pages.as_fd(), kicks.as_fd());
    let mut cases: Vec<_> = shared.map(|(what, shared)| (what, vec![shared, good_pages, kicks])).into();
    cases.extend([
        ("no pages", vec![good, kicks]),
        ("nothing", vec![]),
        ("the wrong way round", vec![good_pages, good, kicks]),
        ("pages unsealed", vec![good, unsealed_pages.as_fd(), kicks]),
        ("pages of another size", vec![good, good, kicks]),
        ("no kicks", vec![good, good_pages]),
        ("kicks by an eventfd", vec![good, good_pages, event.as_fd()]),
        ("kicks by a device", vec![good, good_pages, null.as_fd()]),
        ("too many", vec![good, good_pages, kicks, good]),
    ]);
    for (what, descriptors) in cases {
        let mut vault = Vault::start();
        vault.done(&Order::Slot(range(0, MEMORY / PAGE_SIZE)));
        let heard = vault.order_with(&create(1), &descriptors);
        assert!(matches!(heard, Heard::Report(Report::Failed(_)) | Heard::Gone), "{what}: {heard:?}");
    }
}

#[test]
fn notifications_take_one_eventfd_and_nothing_else() {
    let Some(_vaults) = vaults() else { return };
    let mut vault = Vault::start();
    vault.done(&Order::Slot(range(0, MEMORY / PAGE_SIZE)));
    // With a limit the vault itself polls and reads the eventfds of interrupts.
    let accept = Order::Accept {
        trigger: Trigger::Edge,
        vectors: [0, 0b110, 0, 0],
        most_per_second: std::num::NonZeroU32::new(1000),
    };
    vault.done(&accept);
    let (shared, pages, (_kicks, theirs)) = (sealed_file(MEMORY), sealed_file(PAGE_SIZE), kick_sockets());
    let Order::Create { vcpus, policy, doorbell, transport, .. } = create(1) else { panic!("it is no such order") };
    let create = Order::Create { vcpus, policy, doorbell, transport, interrupt_controller: InterruptController::Apic };
    let created = vault.order_with(&create, &[shared.as_fd(), pages.as_fd(), theirs.as_fd()]);
    assert!(matches!(created, Heard::Report(Report::Done)), "{created:?}");
    vault.done(&Loading::state(0));
    assert!(matches!(vault.order(&Order::Seal), Report::Sealed(_)));

    let (event, null) = (eventfd(0, EventfdFlags::CLOEXEC).unwrap(), File::open("/dev/null").unwrap());
    let (reader, _writer) = std::io::pipe().unwrap();
    let (event, file, pipe) = (event.as_fd(), shared.as_fd(), reader.as_fd());
    for order in [Order::DoorbellFd(device_base(1)), Order::InterruptFd { vcpu: 0, vector: 0x41 }] {
        for (what, descriptors) in [
            ("nothing", vec![]),
            ("two", vec![event, event]),
            ("a device", vec![null.as_fd()]),
            ("a file", vec![file]),
            ("a pipe", vec![pipe]),
            ("a socket", vec![theirs.as_fd()]),
        ] {
            let heard = vault.order_with(&order, &descriptors);
            assert!(matches!(heard, Heard::Report(Report::Failed(_))), "{order:?} with {what}: {heard:?}");
        }
        let heard = vault.order_with(&order, &[event]);
        assert!(matches!(heard, Heard::Report(Report::Done)), "{order:?}: {heard:?}");
        let heard = vault.order_with(&order, &[event]);
        assert!(matches!(heard, Heard::Report(Report::NoDescriptor(_))), "{order:?} again: {heard:?}");
    }
}

#[test]
fn configurations_that_make_no_sense_are_refused() {
    let Some(_vaults) = vaults() else { return };
    let create_with = |slots: &[GpaRange], order: &Order| {
        let mut vault = Vault::start();
        slots.iter().for_each(|slot| vault.done(&Order::Slot(*slot)));
        let bytes = slots.iter().map(GpaRange::len).sum();
        let Order::Create { vcpus, .. } = order else { panic!("{order:?}") };
        let (shared, pages) = (sealed_file(bytes), sealed_file(u64::from((*vcpus).min(9)) * PAGE_SIZE));
        let (_ours, kicks) = kick_sockets();
        match vault.order_with(order, &[shared.as_fd(), pages.as_fd(), kicks.as_fd()]) {
            Heard::Report(Report::Failed(reason)) => reason,
            heard => panic!("{order:?} with {slots:?}: {heard:?}"),
        }
    };
    let all = [range(0, MEMORY / PAGE_SIZE)];
    create_with(&[range(0, 16), range(0x8000, 16)], &create(1));
    create_with(&[range(0, 16), range(0, 16)], &create(1));
    create_with(&[range(1 << 51, 16)], &create(1));
    for vcpus in [0, 1025, u32::MAX] {
        create_with(&all, &create(vcpus));
    }
    for bit in [5, 17, 63] {
        let policy = Policy::from_bits_retain(1 << bit);
        let demanding = Order::Create {
            vcpus: 1,
            policy,
            doorbell: Doorbell::Port,
            transport: Transport::Doorbell,
            interrupt_controller: InterruptController::None,
        };
        let reason = create_with(&all, &demanding);
        assert!(reason.contains("policy"), "{reason}");
    }

    let mut vault = Vault::start();
    let slots = (0u64..).map(|slot| Order::Slot(range(2 * slot * PAGE_SIZE, 1)));
    let (most, too_many) = slots
        .enumerate()
        .map(|(count, slot)| (count, vault.order(&slot)))
        .find(|(_, report)| *report != Report::Done)
        .unwrap();
    assert_eq!(most, cvm_core::boot::MAX_RANGES);
    assert!(matches!(too_many, Report::Failed(_)), "{too_many:?}");
}

#[test]
fn what_is_refused_while_loading_is_neither_loaded_nor_measured() {
    let Some(vaults) = vaults() else { return };
    let honest = load(&vaults.platform, config(1), witness).seal().unwrap().transcript().measurement();

    let mut loading = Loading::start(1);
    let code = assemble(&config(1), CODE, witness);
    loading.load(CODE, &code);
    loading.shared.write_all_at(&[0xcc; 64], CODE).unwrap();
    let measured = |start, pages| Order::Load { range: range(start, pages), kind: PageKind::Measured };
    for (what, order) in [
        ("outside memory", measured(MEMORY, 1)),
        ("partly outside", measured(MEMORY - PAGE_SIZE, 2)),
        ("far outside", measured(1 << 40, 1)),
        ("twice", measured(CODE, 1)),
        ("partly twice", measured(CODE - PAGE_SIZE, 2)),
        ("twice, zero", Order::Load { range: range(CODE, 1), kind: PageKind::Zero }),
        ("too much", measured(0, 513)),
        ("zero outside", Order::Load { range: range(MEMORY, 1), kind: PageKind::Zero }),
        ("no such vcpu", Loading::state(1)),
    ] {
        let reason = loading.vault.refused(&order);
        assert!(!reason.is_empty(), "{what}");
    }
    // As the honest launch goes on.
    loading.load(TABLES, &identity_map(Gpa(TABLES), MEMORY, None).unwrap());
    loading.give_state(0);
    loading.vault.refused(&Loading::state(0));
    loading.load(BOOT_PAGE, &honest_boot_page());
    let (mut guest, measurement) = loading.seal();
    assert_eq!(measurement, honest);
    assert_eq!(guest.run(Given::Nothing), SAYS_SECRET);
}

/// The boot page of `load`.
fn honest_boot_page() -> Vec<u8> {
    let config = config(1);
    let mut page = cvm_core::boot::BootPage {
        magic: cvm_core::boot::MAGIC,
        vcpus: 1,
        doorbell: config.doorbell as u32,
        transport: Transport::Doorbell as u32,
        accepted: cvm_core::boot::ALL_ACCEPTED,
        ..zerocopy::FromZeros::new_zeroed()
    };
    page.memory[0].len = MEMORY;
    page.config = config.digest(&Transport::Doorbell.into()).0;
    page.to_bytes().to_vec()
}

#[test]
fn a_vm_whose_vcpus_have_no_state_is_not_sealed() {
    let Some(_vaults) = vaults() else { return };
    let mut loading = Loading::start(2);
    loading.give_state(1);
    loading.vault.refused(&Order::Seal);
    loading.vault.refused(&Loading::state(0));
    loading.vault.refused(&Order::Seal);
}

#[test]
fn a_vmm_that_never_fetches_its_reports_stops_nobody_but_itself() {
    let Some(_vaults) = vaults() else { return };
    let mut vault = Vault::start();
    for sequence in 1..100_000 {
        let packet = Vault::packet(&Order::Count, sequence);
        let empty = &mut SendAncillaryBuffer::default();
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match sendmsg(vault.socket(), &[IoSlice::new(&packet)], empty, flags) {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(_) => break,
        }
    }
    vault.end(PATIENCE);
}
