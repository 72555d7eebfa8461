//! vCPUs that an SEV-SNP guest starts by itself, with states as the guest library makes them.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::*;
use cvm_backend_sev::{SevFeatures, Vmsa};
use cvm_core::x86::VcpuState;
use cvm_core::{Exit, Gpa, PageKind, Protection};
use cvm_guest::sev::StatePage;
use iced_x86::code_asm::*;

/// The exit that starts a vCPU at once (AMD publication 56421, section 4.1.9).
const CREATE_VCPU: u64 = 0x8000_0013;
const AT_ONCE: u64 = 1;

/// Where the state is, and what it starts at.
const STATE: u64 = DATA;
const ENTRY: u64 = DATA + 0x1000;

const STARTED: VcpuState =
    VcpuState { rsp: 0x1234_5678, ..VcpuState::long_mode(Gpa(ENTRY), Gpa(1 << 51 | TABLES), 7, Gpa(BOOT_PAGE)) };

#[test]
fn a_vcpu_that_the_guest_starts_begins_as_one_that_the_launch_starts() {
    for features in [SevFeatures::SNP_ACTIVE, SevFeatures::SNP_ACTIVE | SevFeatures::DEBUG_SWAP] {
        let mut page = StatePage::new();
        page.fill(&STARTED, features.bits());
        assert!(page.as_bytes() == Vmsa::of(&STARTED, features).as_bytes());
    }
}

#[test]
fn a_guest_starts_its_second_vcpu_anew_from_a_state_that_it_made() {
    let Some(host) = host(Protection::SevSnp) else { return };
    let features = host.platform.features().bits();
    let write = |a: &mut Assembler| {
        let (mut first, mut again) = (a.create_label(), a.create_label());
        a.test(rdi, rdi)?;
        a.jz(first)?;
        a.set_label(&mut again)?;
        a.jmp(again)?;
        a.set_label(&mut first)?;
        // Other features than those of the launch, a vCPU that is not there, and what can be done.
        for (apic_id, features) in [(1, features | 1 << 1), (2, features), (1, features)] {
            a.exit_by_page(CREATE_VCPU, [apic_id << 32 | AT_ONCE, STATE], &[(Field::Rax, features)])?;
            a.load_field(Field::ExitInfo1)?;
            a.report()?;
        }
        a.end(0)
    };
    let mut launch = host.bench().load(config(2), write).unwrap();
    let anew = host.assemble(&launch, ENTRY, |a| {
        a.mov(eax, edi)?;
        a.report()?;
        a.mov(rax, rsp)?;
        a.report()?;
        a.end(0)
    });
    let tables = TABLES | 1 << launch.interface().private_bit.unwrap();
    let mut page = StatePage::new();
    page.fill(&VcpuState { cr3: tables, ..STARTED }, features);
    launch.load(Gpa(STATE), page.as_bytes(), PageKind::Measured).unwrap();
    launch.load(Gpa(ENTRY), &anew, PageKind::Measured).unwrap();
    let mut guest = Guest::from_launch(launch);
    assert_eq!([guest.report(), guest.report(), guest.report()], [2, 2, 0]);
    for expected in [7, 0x1234_5678] {
        assert_eq!(guest.report_of(1), expected);
    }
    assert_eq!(guest.try_run(1).unwrap(), Exit::Ended { code: 0 });
}
