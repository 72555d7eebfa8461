//! All that a vCPU is, where the host sees it: to go on from there in another VM.

#![allow(unsafe_code, reason = "KVM reads as much of the floating-point state as features say that there is")]

use super::LocalVcpu;
use super::pending::Pending;
use crate::Error;
use crate::error::failed;
use cvm_core::doorbell::Registers;
use cvm_core::{Error as CoreError, InterruptController, InterruptGuard};
use kvm_bindings::{Msrs, kvm_debugregs, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave};
use kvm_ioctls::VmFd;
use std::sync::Arc;

/// MSRs that a 64-bit guest can have set, but for those in other registers (AMD64 APM volume 2, appendix A): the calls of
/// system services, page attributes, and the base that `swapgs` swaps in.
const MSRS: [u32; 9] = [0x174, 0x175, 0x176, 0x277, 0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0102];

/// The state of a vCPU that does not run.
#[derive(Debug)]
pub struct VcpuSnapshot {
    general: kvm_regs,
    system: kvm_sregs,
    floating_point: kvm_xsave,
    extended: kvm_xcrs,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    msrs: Vec<kvm_msr_entry>,
    doorbell: Registers,
    guard: InterruptGuard,
    halted: bool,
    pending: Pending,
}

impl LocalVcpu {
    /// The VM that it is of.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.shared.vm
    }

    /// For vCPUs whose guest goes on elsewhere: it does not run again.
    pub fn retire(&mut self) {
        self.questions.fail();
    }

    /// What it is now: after its last exit, which KVM completes otherwise only when the guest goes on.
    ///
    /// # Errors
    /// [`CoreError::Protocol`] if its last exit waits for an answer; [`CoreError::Config`] where registers are hidden, or part
    /// of the state is in the kernel's APIC, which is not read yet; [`CoreError::Backend`].
    pub fn snapshot(&mut self) -> Result<VcpuSnapshot, CoreError> {
        self.check_visible()?;
        self.complete()?;
        let mut msrs = Msrs::from_entries(&MSRS.map(|index| kvm_msr_entry { index, ..Default::default() }))
            .map_err(|error| fail_text(&error))?;
        match self.fd.get_msrs(&mut msrs) {
            Ok(count) if count == MSRS.len() => {}
            Ok(count) => return Err(failed("read the msrs")(format!("kvm does not know {:#x}", MSRS[count]))),
            Err(error) => return Err(failed("read the msrs")(Error::kvm("read the msrs")(error))),
        }
        let fail = failed("read a vcpu");
        Ok(VcpuSnapshot {
            general: self.fd.get_regs().map_err(&fail)?,
            system: self.fd.get_sregs().map_err(&fail)?,
            floating_point: self.fd.get_xsave().map_err(&fail)?,
            extended: self.fd.get_xcrs().map_err(&fail)?,
            debug: self.fd.get_debug_regs().map_err(&fail)?,
            events: self.fd.get_vcpu_events().map_err(&fail)?,
            msrs: msrs.as_slice().to_vec(),
            doorbell: self.doorbell.clone(),
            guard: self.shared.interrupts.guard(self.index)?,
            halted: self.halted,
            pending: self.pending,
        })
    }

    /// Makes it what a vCPU of the same index was in another VM of the same configuration.
    ///
    /// # Errors
    /// As [`LocalVcpu::snapshot`].
    pub fn restore(&mut self, snapshot: &VcpuSnapshot) -> Result<(), CoreError> {
        self.check_visible()?;
        let fail = failed("set a vcpu");
        self.fd.set_sregs(&snapshot.system).map_err(&fail)?;
        self.fd.set_regs(&snapshot.general).map_err(&fail)?;
        self.fd.set_xcrs(&snapshot.extended).map_err(&fail)?;
        // SAFETY: KVM reads what the guest's features take, which KVM_GET_XSAVE has given for the same features; features
        // that take more than this have to be asked for (Linux Documentation/virt/kvm/api.rst, section 4.43).
        unsafe { self.fd.set_xsave(&snapshot.floating_point) }.map_err(&fail)?;
        let msrs = Msrs::from_entries(&snapshot.msrs).map_err(|error| fail_text(&error))?;
        match self.fd.set_msrs(&msrs) {
            Ok(count) if count == snapshot.msrs.len() => {}
            Ok(count) => return Err(failed("set the msrs")(format!("kvm refuses {:#x}", MSRS[count]))),
            Err(error) => return Err(fail(error)),
        }
        self.fd.set_debug_regs(&snapshot.debug).map_err(&fail)?;
        self.fd.set_vcpu_events(&snapshot.events).map_err(&fail)?;
        self.shared.interrupts.set_guard(self.index, snapshot.guard.clone())?;
        self.doorbell = snapshot.doorbell.clone();
        (self.halted, self.pending) = (snapshot.halted, snapshot.pending);
        Ok(())
    }

    fn check_visible(&self) -> Result<(), CoreError> {
        if self.questions.is_open() {
            return Err(CoreError::Protocol { vcpu: self.index, problem: "its last exit waits for an answer" });
        }
        if self.shared.traits.hides_registers() {
            return Err(CoreError::Config("the registers of its vcpus are hidden".into()));
        }
        match self.shared.interrupts.controller() {
            InterruptController::None => Ok(()),
            InterruptController::Apic => {
                Err(CoreError::Config("the state of the kernel's apic is not read yet".into()))
            }
        }
    }
}

fn fail_text(error: &impl std::fmt::Debug) -> CoreError {
    failed("list msrs")(format!("{error:?}"))
}
