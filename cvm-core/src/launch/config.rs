//! What a VM shall be.

use crate::boot;
use crate::doorbell::{Doorbell, Transport};
use crate::interrupt::{InterruptController, InterruptPolicy, Refusal};
use crate::memory::Slots;
use crate::{Error, Gpa, GpaRange, PAGE_SIZE, Policy};

/// The most vCPUs that a VM can have. KVM on x86 allows 1024 (`KVM_CAP_MAX_VCPUS`), and hosts may allow fewer.
pub const MAX_VCPUS: u32 = 1024;

/// The most memory that a VM can have, in bytes: what the doorbell's 32-bit page frame number can name.
pub const MAX_MEMORY: u64 = PAGE_SIZE << 32;

/// The page of the local APIC (Intel SDM, volume 3, section 12.4.1). No access to it is emulated, but KVM may use it.
pub const APIC_PAGE: Gpa = Gpa(0xfee0_0000);

/// What a VM shall be.
#[derive(Debug, Clone)]
pub struct VmConfig {
    /// Where memory is: one slot each.
    pub memory: Vec<GpaRange>,
    /// How many vCPUs there are.
    pub vcpus: u32,
    /// Which interrupts the guest accepts.
    pub interrupts: InterruptPolicy,
    /// Who hands them to it.
    pub interrupt_controller: InterruptController,
    /// What it demands of its host besides isolation.
    pub policy: Policy,
    /// Which instructions ring the doorbell.
    pub doorbell: Doorbell,
    /// How the guest asks for conversions. `None` is the platform's default, the same on every host: the transport is measured.
    pub transport: Option<Transport>,
}

impl VmConfig {
    /// A VM with `bytes` of memory from address 0, `vcpus` vCPUs, and the defaults for the rest.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Layout`] as [`VmConfig::check`].
    pub fn new(bytes: u64, vcpus: u32) -> Result<Self, Error> {
        let memory = GpaRange::new(0, bytes).map_err(|error| Error::Layout(error.to_string()))?;
        let config = Self {
            memory: vec![memory],
            vcpus,
            interrupts: InterruptPolicy::default(),
            interrupt_controller: InterruptController::None,
            policy: Policy::empty(),
            doorbell: Doorbell::Port,
            transport: None,
        };
        config.check()?;
        Ok(config)
    }

    /// Whether it makes sense, on whatever platform.
    ///
    /// # Errors
    /// [`Error::Config`] for a number of vCPUs that is 0 or above [`MAX_VCPUS`]; [`Error::Layout`] for no memory, more
    /// than [`MAX_MEMORY`] or [`boot::MAX_RANGES`] slots of it, or slots that overlap. With an
    /// [`InterruptController::Apic`] also [`Error::Config`] for level-triggered vectors, and [`Error::Layout`] for memory
    /// at [`APIC_PAGE`].
    pub fn check(&self) -> Result<(), Error> {
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(Error::Config(format!("{} vcpus; it takes 1 to {MAX_VCPUS}", self.vcpus)));
        }
        if self.memory.len() > boot::MAX_RANGES {
            return Err(Error::Layout(format!("more than {} ranges of memory", boot::MAX_RANGES)));
        }
        if let Some(range) = self.memory.iter().find(|range| range.end().0 > MAX_MEMORY) {
            return Err(Error::Layout(format!("{range} ends above {MAX_MEMORY:#x}")));
        }
        let slots = Slots::new(&self.memory)?;
        if self.interrupt_controller == InterruptController::Apic {
            if self.interrupts.level_bits() != [0; 4] {
                return Err(Error::Config(Refusal::EdgesOnly.to_string()));
            }
            if slots.find(APIC_PAGE).is_some() {
                return Err(Error::Layout(format!("there is memory at {APIC_PAGE}, where the local apic is")));
            }
        }
        Ok(())
    }
}
