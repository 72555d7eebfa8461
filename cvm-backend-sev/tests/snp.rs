//! SEV-SNP guests on Linux KVM: launches, exits and failures.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::*;
use cvm_backend_sev::snp::of_transcript;
use cvm_backend_sev::{SevFeatures, Vmsa};
use cvm_core::doorbell::{Doorbell, PORT_BASE};
use cvm_core::x86::{Register, VcpuState};
use cvm_core::{
    Answer, Error, Exit, Gpa, Lifecycle, LifecycleAnswer, PageKind, Platform, Protection, RegisterRead, Side, Vcpu, Vm,
    VmConfig,
};
use iced_x86::code_asm::*;
use std::fs;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

#[test]
fn the_firmware_measures_what_is_predicted_whatever_is_loaded() {
    let _alone = alone();
    let Some(platform) = platform(Protection::SevSnp) else { return };
    for vcpus in 1..=4 {
        let mut launch = load(&platform, config(vcpus), |asm| asm.end()).unwrap_or_else(|error| panic!("{error:?}"));
        launch.load(Gpa(DATA), &[7; 0x3000], PageKind::Measured).unwrap_err();
        let mut launch = {
            drop(launch);
            let mut launch = platform.launch(config(vcpus)).unwrap();
            launch.load(Gpa(CODE), &assemble(|asm| asm.end()), PageKind::Measured).unwrap();
            launch.load(Gpa(DATA), &[7; 0x3010], PageKind::Measured).unwrap();
            launch.load(Gpa(DATA + 0x8000), &[9; 0x1001], PageKind::Unmeasured).unwrap();
            launch.zero(range(DATA + 0x1_0000, 5)).unwrap();
            launch.start_in_long_mode(Gpa(CODE), Gpa(TABLES), Gpa(BOOT_PAGE)).unwrap();
            launch
        };
        launch.load_boot_page(Gpa(BOOT_PAGE), [1, 2, 3, 4]).unwrap();
        let mut guest = Guest::from_launch(launch);
        let predicted = of_transcript(guest.vm.transcript(), platform.features());
        if is_faked() {
            let line = format!("ld={predicted} ");
            let log = firmware_log();
            assert!(log.contains(&line), "{vcpus} vcpus: {predicted} is not in the firmware's log:\n{log}");
            assert!(log.contains(&format!("vmsas={vcpus} ")), "{log}");
        }
        guest.end();
    }
}
