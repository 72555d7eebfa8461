//! What is plain KVM's own, beyond the contract: its hypercall, its device file, what of memory the
//! kernel swaps, what it takes by itself, and kernels as their makers build them.

mod common;

use common::*;
use cvm_backend_kvm::{Error as KvmError, KvmPlatform};
use cvm_core::doorbell::Transport;
use cvm_core::linux::{Kernel, LinuxImage};
use cvm_core::memory::ConversionTotals;
use cvm_core::{Error, Lifecycle, LifecycleAnswer, PAGE_SIZE, PageState, Platform, Protection, Vm, VmConfig};
use iced_x86::code_asm::*;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// A configuration with hypercalls, where they work; elsewhere it is checked that they are refused.
fn with_hypercalls() -> Option<VmConfig> {
    let platform = kvm()?;
    let config = VmConfig { transport: Some(Transport::Hypercall), ..config(1) };
    if platform.hypercalls_work().unwrap() {
        return Some(config);
    }
    skip("a guest's hypercall does not arrive on this kvm");
    assert!(matches!(platform.launch(config), Err(Error::Config(_))));
    None
}

#[test]
fn a_senseless_hypercall_is_refused_by_kvm_or_by_us() {
    let Some(platform) = kvm() else { return };
    let Some(config) = with_hypercalls() else { return };
    let by_kvm = [(DATA + 1, 1), (DATA, 0), (DATA, u64::MAX)];
    let by_us = [(MEMORY, 1), (DATA, 1 << 52)];
    let launch = load(&platform, config, |a| {
        for (gpa, pages) in by_kvm.into_iter().chain(by_us) {
            a.mov(rbx, gpa)?;
            a.map_gpa_range(pages, 0)?;
            a.report()?;
        }
        a.end(0)
    });
    let mut guest = Guest::from_launch(launch);
    // KVM's own error numbers are negative.
    for _ in by_kvm {
        assert_eq!(guest.report() as i32, -22);
    }
    let outside = guest.convert();
    assert!(outside.cause.starts_with("0x400000 lies outside"), "{outside:?}");
    assert_eq!(guest.report(), 22);
    let too_long = guest.convert();
    assert!(too_long.cause.contains("no page range"), "{too_long:?}");
    assert_eq!(guest.report(), 22);
    guest.end();
    assert_eq!(guest.vm.memory().map().count(PageState::Private), MEMORY / PAGE_SIZE);
}

#[test]
fn a_hypercall_with_reserved_attributes_is_refused_and_one_with_a_page_size_is_not() {
    let Some(platform) = kvm() else { return };
    let Some(config) = with_hypercalls() else { return };
    let launch = load(&platform, config, |a| {
        for attributes in [1 << 5, 1 << 63, 1 << 5 | 1 << 4, 1] {
            a.mov(rbx, DATA)?;
            a.map_gpa_range(1, attributes)?;
            a.report()?;
        }
        a.end(0)
    });
    let mut guest = Guest::from_launch(launch);
    for _ in 0..3 {
        assert_eq!(guest.report(), 22);
    }
    assert_eq!(guest.vm.conversions(), ConversionTotals::default());
    assert_eq!(guest.convert().pages, 1);
    assert_eq!(guest.report(), 0);
    guest.end();
}

#[test]
fn a_device_that_is_not_kvm_is_refused_with_a_remedy() {
    let missing = KvmPlatform::open(Path::new("/nonexistent/kvm"), None).unwrap_err();
    assert!(
        matches!(&missing, KvmError::Open { path, source }
            if path == Path::new("/nonexistent/kvm") && source.remedy.contains("load kvm_intel or kvm_amd")),
        "{missing}"
    );
    let null = KvmPlatform::open(Path::new("/dev/null"), None).unwrap_err();
    assert!(matches!(&null, KvmError::Open { path, .. } if path == Path::new("/dev/null")), "{null}");

    let file = tempfile::NamedTempFile::new().unwrap();
    fs::set_permissions(file.path(), Permissions::from_mode(0o000)).unwrap();
    if fs::File::open(file.path()).is_ok() {
        return skip("no file is forbidden to this user");
    }
    let forbidden = KvmPlatform::open(file.path(), None).unwrap_err();
    assert!(matches!(&forbidden, KvmError::Open { source, .. } if source.remedy.contains("group")), "{forbidden}");
}

/// An ELF file of one segment, at the address where it starts.
fn elf(entry: u64, code: &[u8]) -> Vec<u8> {
    let header: [&[u8]; 5] = [
        b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0",
        &entry.to_le_bytes(),
        &64u64.to_le_bytes(),
        &[0; 12],
        &[64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0],
    ];
    let len = code.len() as u64;
    let segment = [1 | 7 << 32, 64 + 56, entry, entry, len, len, PAGE_SIZE].map(u64::to_le_bytes);
    [header.concat(), segment.concat(), code.to_vec()].concat()
}

#[test]
fn an_image_that_starts_as_linux_does_finds_its_memory_command_line_and_ram_disk() {
    let Some(platform) = kvm() else { return };
    let config = config(1);
    let code = assemble(&config, CODE, |a| {
        // By the zero page in RSI: how many ranges of memory there are, how long the first is, and the first bytes of the
        // command line and of the RAM disk (Linux, Documentation/arch/x86/zero-page.rst and boot.rst).
        a.movzx(eax, byte_ptr(rsi + 0x1e8))?;
        a.report()?;
        a.mov(eax, dword_ptr(rsi + 0x2d0 + 8))?;
        a.report()?;
        for pointer in [0x228, 0x218] {
            a.mov(ebx, dword_ptr(rsi + pointer))?;
            a.mov(eax, dword_ptr(rbx))?;
            a.report()?;
        }
        a.end(0)
    });
    let image = LinuxImage::new(Kernel::Elf(&elf(CODE, &code)), Some(b"disk"), "quiet", &config.memory).unwrap();
    let mut launch = platform.launch(config).unwrap();
    launch.load_linux(&image).unwrap();
    let mut guest = Guest::from_launch(launch);
    // Below 1 MiB memory up to the legacy hole, and two reserved ranges, as SeaBIOS reports them; then the rest.
    assert_eq!(guest.report(), 4);
    assert_eq!(guest.report(), 0x9_fc00);
    assert_eq!(guest.report(), u32::from_le_bytes(*b"quie"));
    assert_eq!(guest.report(), u32::from_le_bytes(*b"disk"));
    guest.end();
}

#[test]
fn private_memory_is_swapped_just_where_the_kernel_can_count_it() {
    let Some(platform) = kvm() else { return };
    let guest = Guest::from_launch(load(&platform, config(1), |a| a.end(0)));
    // Asked of whoever holds the memory: the kernel counts what is behind a file, and not what is behind a guest_memfd.
    let is_file = guest.vm.allocated().unwrap().private.is_some();
    assert_eq!(guest.vm.lifecycle(Lifecycle::Swap) == LifecycleAnswer::Yes, is_file);
    match isolation() {
        Protection::None => assert!(is_file),
        Protection::GuestMemfd => assert!(!is_file),
        // It has whichever of the two there is.
        _ => {}
    }
}

#[test]
fn the_default_transport_is_the_doorbell_whatever_else_works() {
    let Some(platform) = kvm() else { return };
    let launch = load(&platform, VmConfig { transport: None, ..config(1) }, |a| a.end(0));
    assert_eq!(launch.transport(), Transport::Doorbell);
}
