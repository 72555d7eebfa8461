//! What SEV-SNP guests exit for and plain ones do not, and what can be done with them.

#![allow(unsafe_code, reason = "what an exit says is in a union")]

use super::certificates::{self, Served};
use cvm_backend_kvm::backend::Traits;
use cvm_core::{Error, Lifecycle, LifecycleAnswer, SharedMemory};
use kvm_bindings::{KVM_EXIT_SYSTEM_EVENT, KVM_SYSTEM_EVENT_SEV_TERM, kvm_run};
use std::any::Any;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

/// A guest asks for certificates (Linux include/uapi/linux/kvm.h).
const EXIT_SNP_REQ_CERTS: u32 = 43;

/// What such an exit says and is answered by: where the guest's pages are, how many there are, and 0 or an error number.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct CertificateRequest {
    gpa: u64,
    pages: u64,
    answer: u64,
}

/// The low bits of what a guest asks by the MSR of the GHCB, and the request for its end among it; above them are a set of
/// reasons in 4 bits and a reason in 8 (AMD publication 56421, section 2.3.1).
const REQUEST_MASK: u64 = 0xfff;
const TERMINATION: u64 = 0x100;

/// Traits of SEV-SNP guests.
#[derive(Debug)]
pub(super) struct SnpTraits {
    pub(super) certificates: Option<PathBuf>,
    /// KVM passes the guest's requests on by the descriptor of `/dev/sev` that the launch was started with, as long as that is
    /// open, whatever became of the platform.
    pub(super) _device: Arc<File>,
}

/// What the guest gives as the reason of its end, by the MSR; nothing if it has asked by the GHCB's page, of which KVM passes
/// on just the address.
fn reason(msr: u64) -> Option<(u8, u8)> {
    (msr & REQUEST_MASK == TERMINATION).then_some(((msr >> 12) as u8 & 0xf, (msr >> 16) as u8))
}

/// What an exit of any other kind says of the guest of `vcpu`, which cannot go on: it has asked for its end, perhaps.
pub(super) fn ended(vcpu: u32, run: &kvm_run) -> Error {
    if run.exit_reason != KVM_EXIT_SYSTEM_EVENT {
        return Error::Crashed {
            vcpu,
            reason: format!("it left by exit {}, which is not known here", run.exit_reason),
        };
    }
    // SAFETY: every bit pattern is valid, and the exit reason says that this is what was written.
    let event = unsafe { run.__bindgen_anon_1.system_event };
    // SAFETY: as above; all members of the union inside are 64-bit numbers.
    let msr = unsafe { event.__bindgen_anon_1.data[0] };
    if event.type_ == KVM_SYSTEM_EVENT_SEV_TERM {
        return Error::Terminated { vcpu, reason: reason(msr) };
    }
    Error::Crashed { vcpu, reason: format!("it left by system event {}", event.type_) }
}

impl Traits for SnpTraits {
    fn hides_registers(&self) -> bool {
        true
    }

    fn lifecycle(&self, what: Lifecycle) -> Option<LifecycleAnswer> {
        Some(LifecycleAnswer::No(match what {
            Lifecycle::Migrate | Lifecycle::StopAndCopy => "kvm has no migration of sev-snp guests",
            Lifecycle::Snapshot => "neither private memory nor registers can leave the guest",
            Lifecycle::Dump => "the host sees nothing of private memory and registers",
            Lifecycle::Swap | Lifecycle::Reset | Lifecycle::Hotplug | Lifecycle::AssignDevice => return None,
        }))
    }

    fn exit(&self, vcpu: u32, run: &mut kvm_run, memory: &SharedMemory) -> Result<Option<Box<dyn Any>>, Error> {
        match run.exit_reason {
            EXIT_SNP_REQ_CERTS => {
                // SAFETY: the union has room for three numbers (256 bytes of padding), is aligned for them, and every bit
                // pattern is valid.
                let request = unsafe { &mut *(&raw mut run.__bindgen_anon_1).cast::<CertificateRequest>() };
                let Some(path) = &self.certificates else {
                    return Err(Error::Crashed {
                        vcpu,
                        reason: "it asked for certificates, which it was not offered".into(),
                    });
                };
                match certificates::serve(path, memory, request.gpa, request.pages) {
                    Served::Done(locked) => {
                        request.answer = 0;
                        return Ok(Some(Box::new(locked)));
                    }
                    Served::TooFew(pages) => (request.pages, request.answer) = (pages, libc::ENOSPC as u64),
                    Served::Later => request.answer = libc::EAGAIN as u64,
                    Served::Failed => request.answer = libc::EIO as u64,
                }
                Ok(None)
            }
            _ => Err(ended(vcpu, run)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn a_reason_is_read_from_the_msr_and_from_nothing_else() {
        assert_eq!(reason(0x0000_0000_0012_3100), Some((3, 0x12)));
        assert_eq!(reason(0xff_0100), Some((0, 0xff)));
        assert_eq!(reason(0x1234_5000), None);
    }

    #[test]
    fn a_certificate_request_lies_where_the_kernel_puts_it() {
        assert_eq!(offset_of!(kvm_run, __bindgen_anon_1), 32);
        assert_eq!(offset_of!(CertificateRequest, answer), 16);
        let room = size_of_val(&kvm_run::default().__bindgen_anon_1);
        assert!(room >= size_of::<CertificateRequest>());
    }
}
