//! Whether hypercalls work here: some hosts advertise them and never complete one.

use crate::Error;
use crate::host::{HC_MAP_GPA_RANGE, Host};
use crate::local::{Backing, FilesMemory, Kicker, Layout};
use cvm_core::{GpaRange, Kick, PAGE_SIZE, Watchdog};
use kvm_bindings::{KVM_CAP_EXIT_HYPERCALL, KVM_X86_DEFAULT_VM, kvm_enable_cap};
use kvm_ioctls::{VcpuExit, VmFd};
use std::sync::Arc;
use std::time::Duration;

/// How long the hypercall of an empty guest may take. A working one takes microseconds, or under an emulated processor
/// a few milliseconds.
const PATIENCE: Duration = Duration::from_millis(200);

/// 16-bit code that asks to share the page at address 0, for Intel.
const VMCALL: [u8; 28] = code([0x0f, 0x01, 0xc1]);
/// The same for AMD.
const VMMCALL: [u8; 28] = code([0x0f, 0x01, 0xd9]);

const fn code(call: [u8; 3]) -> [u8; 28] {
    [
        0x66,
        0xb8,
        HC_MAP_GPA_RANGE as u8,
        0,
        0,
        0, // mov eax, KVM_HC_MAP_GPA_RANGE
        0x66,
        0xbb,
        0,
        0,
        0,
        0, // mov ebx, 0
        0x66,
        0xb9,
        1,
        0,
        0,
        0, // mov ecx, 1
        0x66,
        0xba,
        0,
        0,
        0,
        0, // mov edx, 0
        call[0],
        call[1],
        call[2], // vmcall or vmmcall
        0xf4,    // hlt
    ]
}

/// Makes KVM hand conversion hypercalls of `vm` to user space.
pub(crate) fn enable(vm: &VmFd) -> Result<(), Error> {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_EXIT_HYPERCALL, ..Default::default() };
    cap.args[0] = 1 << HC_MAP_GPA_RANGE;
    vm.enable_cap(&cap).map_err(Error::kvm("enable hypercall exits"))
}

/// Whether a guest's conversion hypercall arrives in user space, found out by letting a guest of two dozen bytes try.
pub(crate) fn works(host: &Host) -> bool {
    host.offers_hypercall() && try_one(host).unwrap_or(false)
}

fn try_one(host: &Host) -> Result<bool, Box<dyn std::error::Error>> {
    let vm = host.create_vm(KVM_X86_DEFAULT_VM)?;
    enable(&vm)?;
    let page = GpaRange::new(0, PAGE_SIZE)?;
    let shared = Backing::new("cvm-shared", PAGE_SIZE)?;
    let memory = FilesMemory::new(Layout::new(&[page])?, shared, host.most_runs)?;
    let code = if host.is_amd() { VMMCALL } else { VMCALL };
    memory.write_private(page, &code)?;
    memory.attach(&vm)?;

    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (0, 2);
    vcpu.set_regs(&regs)?;

    let kicker = Kicker::new(&vcpu)?;
    let watchdog = Watchdog::new(PATIENCE, vec![Arc::clone(&kicker) as Arc<dyn Kick>])?;
    loop {
        let _entered = kicker.enter();
        match vcpu.run() {
            Ok(VcpuExit::Hypercall(call)) => return Ok(call.nr == u64::from(HC_MAP_GPA_RANGE)),
            Ok(_) => return Ok(false),
            // A signal of somebody else's.
            Err(error) if error.errno() == libc::EINTR && !watchdog.fired() => {}
            Err(_) => return Ok(false),
        }
    }
}
