//! How a guest ends that cannot go on: it has panicked, or an exception found no handler of the guest's.
//!
//! Guests of SEV-ES and SEV-SNP ask for their end by the GHCB MSR, with a [`Termination`] as the reason. Others ring the
//! doorbell with a code.

#![allow(unsafe_code, reason = "the way to the host is by instructions")]

use crate::sev::{Termination, Vmgexit, terminate};
use crate::x86::ring;
use core::sync::atomic::{AtomicU8, Ordering::Relaxed};
use cvm_core::boot::{BootPage, Exits};
use cvm_core::doorbell::{Doorbell, control};

/// The code with which a guest ends by its doorbell after exception 0; after others it is higher by their vector.
pub const EXCEPTION: u32 = 0x1_0000;

/// The vector of #VC, which only guests of SEV-ES and SEV-SNP have (AMD64 APM volume 2, section 8.2).
const VC: u8 = 29;

/// How exits of this guest reach its host; nothing that is known as long as no boot page was read.
static WAY: AtomicU8 = AtomicU8::new(UNKNOWN);
const UNKNOWN: u8 = 0;
const BY_PORT: u8 = 1;
const BY_MSR: u8 = 2;
const BY_GHCB: u8 = 3;

/// Takes from the boot page how exits reach the host.
pub(crate) fn learn(boot: &BootPage) {
    let way = match (boot.exits(), boot.doorbell()) {
        (Some(Exits::Ghcb), _) => BY_GHCB,
        (Some(Exits::Direct), Some(Doorbell::Port)) => BY_PORT,
        (Some(Exits::Direct), Some(Doorbell::Msr)) => BY_MSR,
        _ => UNKNOWN,
    };
    WAY.store(way, Relaxed);
}

/// Ends the guest, for the reason that fits its way to the host.
///
/// # Safety
/// As for [`end_after_panic`].
unsafe fn end(termination: Termination, code: u32) -> ! {
    let doorbells: &[Doorbell] = match WAY.load(Relaxed) {
        BY_GHCB => {
            // The vCPU's GHCB is not at hand, and need not be in order.
            // SAFETY: passed on to the caller; this vCPU does nothing else any more.
            terminate(&unsafe { Vmgexit::new() }, termination)
        }
        BY_PORT => &[Doorbell::Port],
        BY_MSR => &[Doorbell::Msr],
        _ => &[Doorbell::Port, Doorbell::Msr],
    };
    loop {
        for doorbell in doorbells {
            // SAFETY: passed on to the caller. The register changes no memory, and a host that does not know the doorbell
            // ends the guest all the same.
            unsafe { ring(*doorbell, control::END, code) };
        }
    }
}

/// Ends a guest that has panicked, with `code`. The message of the panic is not passed on: the console is the host's to
/// read.
///
/// # Safety
/// The code must run in a guest, in a ring as for [`Processor::new`](crate::Processor::new).
pub unsafe fn end_after_panic(code: u32) -> ! {
    // SAFETY: passed on to the caller.
    unsafe { end(Termination::Panic(u8::try_from(code).unwrap_or(u8::MAX)), code) }
}

/// Ends a guest that has no handler of its own for an exception. `error` is the exception's error code, if it has one.
///
/// # Safety
/// As for [`end_after_panic`], in ring 0.
pub(crate) unsafe fn end_after_exception(vector: u8, error: u64) -> ! {
    if vector == VC {
        WAY.store(BY_GHCB, Relaxed);
    }
    let termination = if vector == VC { Termination::Vc(error) } else { Termination::Exception(vector) };
    // SAFETY: passed on to the caller.
    unsafe { end(termination, EXCEPTION + u32::from(vector)) }
}
