//! Whether hypercalls work here: some hosts advertise them and never complete one.

use crate::Error;
use crate::host::{HC_MAP_GPA_RANGE, Host};
use crate::local::{Backing, FilesMemory, Kicker, Layout};
use cvm_core::{BoxError, GpaRange, Kick, PAGE_SIZE, Watchdog};
use kvm_bindings::{KVM_CAP_EXIT_HYPERCALL, KVM_X86_DEFAULT_VM, kvm_enable_cap};
use kvm_ioctls::{VcpuExit, VmFd};
use std::sync::Arc;
use std::time::Duration;

/// How long a round of the trial takes. A working hypercall takes microseconds, or a few milliseconds under an emulated
/// processor.
const PATIENCE: Duration = Duration::from_millis(100);

/// How many rounds the guest may take to come to its hypercall.
const ROUNDS: u32 = 50;

/// After how many rounds in a row that end at the hypercall the guest does not get past it.
const STUCK: u32 = 2;

/// The address of the hypercall in the code.
const CALL_AT: u64 = 24;

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

/// Whether a guest's conversion hypercall arrives in user space, as a guest of two dozen bytes finds by trying.
///
/// # Errors
/// [`Error::HypercallUnknown`] when the trial itself failed: that says nothing about hypercalls.
pub(crate) fn works(host: &Host) -> Result<bool, Error> {
    if !host.offers_hypercall() {
        return Ok(false);
    }
    try_one(host).map_err(|source| Error::HypercallUnknown { source })
}

/// The outcome of one round of the trial.
enum Round {
    /// KVM returned with the hypercall.
    Arrived,
    /// KVM returned with something else.
    Other,
    /// The vCPU was still at this address when the time was over.
    Late(u64),
}

/// Whether hypercalls work by what the rounds came to; nothing when there are not enough of them.
///
/// A guest that is late somewhere else has not had the processor, which says nothing about the host's KVM.
fn judge(rounds: impl IntoIterator<Item = Result<Round, BoxError>>) -> Result<Option<bool>, BoxError> {
    let mut stuck = 0;
    for round in rounds {
        match round? {
            Round::Arrived => return Ok(Some(true)),
            Round::Other => return Ok(Some(false)),
            Round::Late(CALL_AT) if stuck + 1 == STUCK => return Ok(Some(false)),
            Round::Late(CALL_AT) => stuck += 1,
            Round::Late(_) => stuck = 0,
        }
    }
    Ok(None)
}

fn try_one(host: &Host) -> Result<bool, BoxError> {
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
    let mut round = || -> Result<Round, BoxError> {
        let watchdog = Watchdog::new(PATIENCE, vec![Arc::clone(&kicker) as Arc<dyn Kick>])?;
        loop {
            let _entered = kicker.enter();
            match vcpu.run() {
                Ok(VcpuExit::Hypercall(call)) if call.nr == u64::from(HC_MAP_GPA_RANGE) => return Ok(Round::Arrived),
                Ok(_) => return Ok(Round::Other),
                Err(error) if error.errno() == libc::EINTR && watchdog.fired() => break,
                // A signal of somebody else's.
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Round::Late(vcpu.get_regs()?.rip))
    };
    let verdict = judge((0..ROUNDS).map(|_| round()))?;
    verdict.ok_or_else(|| format!("the guest has not come to its hypercall in {:?}", PATIENCE * ROUNDS).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(rounds: Vec<Result<Round, BoxError>>) -> Result<Option<bool>, String> {
        judge(rounds).map_err(|error| error.to_string())
    }

    #[test]
    fn only_a_guest_that_stays_at_the_hypercall_shows_that_it_does_not_work() {
        let late = |at| Ok(Round::Late(at));
        assert_eq!(verdict(vec![Ok(Round::Arrived)]), Ok(Some(true)));
        assert_eq!(verdict(vec![late(0), late(0), late(CALL_AT), Ok(Round::Arrived)]), Ok(Some(true)));
        assert_eq!(verdict(vec![Ok(Round::Other)]), Ok(Some(false)));
        assert_eq!(verdict(vec![late(0), late(CALL_AT), late(CALL_AT)]), Ok(Some(false)));
    }

    #[test]
    fn a_trial_that_fails_or_is_slow_says_nothing_about_hypercalls() {
        let late = |at| Ok(Round::Late(at));
        assert_eq!(verdict(vec![late(0), late(0), late(0), late(0)]), Ok(None));
        assert_eq!(verdict(vec![late(CALL_AT), late(0), late(CALL_AT)]), Ok(None));
        assert_eq!(verdict(vec![Err("no memory".into()), Ok(Round::Arrived)]), Err("no memory".into()));
    }
}
