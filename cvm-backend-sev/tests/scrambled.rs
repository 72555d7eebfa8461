//! What the host sees of SEV and SEV-ES memory after a launch, where the faked secure processor really changes what it encrypts:
//! as with real encryption, but that no guest can run then.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod common;

use common::*;
use cvm_conformance::guest::EXTRA;
use cvm_core::boot::{self, FreshMemory};
use cvm_core::{Gpa, PAGE_SIZE, PageKind, Platform, Vm, VmConfig};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Behind all that is loaded, and from the start of a large page on.
const UPPER: u64 = 8 << 20;

const PAGE: usize = PAGE_SIZE as usize;

/// A page as this process finds it in memory.
fn seen(vm: &impl Vm, gpa: u64) -> [u8; PAGE] {
    let backing = vm.memory().backing(range(gpa, 1)).expect("a page in a slot");
    let process = File::open("/proc/self/mem").unwrap();
    let mut bytes = [0; PAGE];
    process.read_exact_at(&mut bytes, backing.address).unwrap();
    bytes
}

#[test]
fn what_a_launch_loads_is_encrypted_zeros_too_and_what_it_does_not_load_is_not() {
    for protection in BOTH {
        let Some(host) = host(protection) else { return };
        let Some(_scrambling) = processor::Scrambling::new() else {
            skip("this secure processor is no faked one, whose memory can be looked at");
            return;
        };
        let config = VmConfig { memory: vec![range(0, MEMORY / PAGE_SIZE), range(UPPER, 2)], ..config(1) };
        let mut launch = host.platform.launch(config).unwrap();
        assert_eq!(launch.interface().fresh_memory, FreshMemory::Undefined);
        launch.load(Gpa(EXTRA), &[0x5e; PAGE], PageKind::Measured).unwrap();
        launch.start_in_long_mode(Gpa(EXTRA), Gpa(TABLES), Gpa(BOOT_PAGE)).unwrap();
        launch.load_boot_page(Gpa(BOOT_PAGE), [0; 4]).unwrap();
        let vm = launch.seal().unwrap();

        assert_ne!(seen(&vm, EXTRA), [0x5e; PAGE], "{protection}: loaded contents are in plain sight");
        assert_ne!(
            seen(&vm, BOOT_PAGE)[..8],
            boot::MAGIC.to_le_bytes(),
            "{protection}: the boot page is in plain sight"
        );
        // The guest decrypts these to zeros, since somebody has encrypted zeros there.
        for gpa in [0, EXTRA + PAGE_SIZE, MEMORY / 2 - PAGE_SIZE] {
            assert_ne!(
                seen(&vm, gpa),
                [0; PAGE],
                "{protection}: {gpa:#x} was not loaded, and the guest was told that it is zero"
            );
        }
        // Here the guest would decrypt the host's zeros, and was told to write first.
        for gpa in [UPPER, UPPER + PAGE_SIZE] {
            assert_eq!(seen(&vm, gpa), [0; PAGE], "{protection}: {gpa:#x}");
        }
    }
}
