//! The measurement of SEV-SNP launches: of this project's own, and of firmware as other VMMs load it.

use crate::digest::LaunchDigest;
use crate::ovmf::{Firmware, SectionKind};
use crate::vmsa::RESET_VECTOR;
use crate::{CpuSignature, Error, KernelHashes, PageType, SevFeatures, Vmm, Vmsa};
use cvm_core::boot::{Exits, FreshMemory, Interface};
use cvm_core::doorbell::Transport;
use cvm_core::launch::{ConfigDigest, Entry, MAX_VCPUS, PageKind};
use cvm_core::{Measurement, PAGE_SIZE, Transcript};
use std::collections::BTreeMap;

/// What the vCPUs of a guest start as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vcpus {
    /// How many there are.
    pub count: u32,
    /// What they say they are; nothing to VMMs other than QEMU.
    pub signature: CpuSignature,
    /// Who makes their state.
    pub vmm: Vmm,
    /// What is active in the guest.
    pub features: SevFeatures,
}

impl Vcpus {
    /// Their states: the first starts at the reset vector, the others, if there are any, where the firmware says.
    ///
    /// # Errors
    /// [`Error::Vcpus`] for none or more than [`MAX_VCPUS`]; as [`Firmware::reset_vector`].
    pub(crate) fn with_states<T>(
        &self,
        firmware: &Firmware<'_>,
        then: impl FnOnce(States<'_>) -> T,
    ) -> Result<T, Error> {
        if !(1..=MAX_VCPUS).contains(&self.count) {
            return Err(Error::Vcpus { vcpus: self.count });
        }
        let state = |start| Vmsa::reset(self.vmm, start, self.signature, self.features);
        let others = if self.count == 1 { RESET_VECTOR } else { firmware.reset_vector()? };
        let (first, others) = (state(RESET_VECTOR), state(others));
        Ok(then(States { first: Some(&first), others: &others, left: self.count - 1 }))
    }
}

/// The states of vCPUs, of which all but the first are alike.
pub(crate) struct States<'a> {
    first: Option<&'a Vmsa>,
    others: &'a Vmsa,
    left: u32,
}

impl<'a> Iterator for States<'a> {
    type Item = &'a Vmsa;

    fn next(&mut self) -> Option<&'a Vmsa> {
        self.first.take().or_else(|| {
            self.left = self.left.checked_sub(1)?;
            Some(self.others)
        })
    }
}

/// What a launch has in HOST_DATA, 32 bytes that the firmware does not interpret and that every report of the guest shows
/// (AMD publication 56860, `SNP_LAUNCH_FINISH` and `ATTESTATION_REPORT`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HostData {
    /// The first 32 of the 48 bytes of the launch configuration's [`ConfigDigest`]. So a report binds the configuration of
    /// every guest, also of one without a boot page, such as firmware or an IGVM file.
    #[default]
    ConfigDigest,
    /// These bytes. A report then binds the configuration by the measurement alone, and only of a guest with a boot page.
    Custom([u8; 32]),
}

impl HostData {
    /// The bytes in a report of a guest with this configuration.
    pub fn bytes(&self, config: &ConfigDigest) -> [u8; 32] {
        match self {
            Self::ConfigDigest => std::array::from_fn(|index| config.0[index]),
            Self::Custom(bytes) => *bytes,
        }
    }
}

/// What a guest of SEV-SNP has to know of the platform, on a processor on which this bit of page-table entries makes memory
/// private: CPUID leaf 0x8000001f, EBX, the low six bits.
pub const fn interface(private_bit: u8) -> Interface {
    Interface {
        transport: Transport::PageState,
        exits: Exits::Ghcb,
        private_bit: Some(private_bit),
        acceptance: true,
        fresh_memory: FreshMemory::Undefined,
        vouched_pages: true,
    }
}

/// The expected measurement of a launch through this project's contract: pages in the order in which they were loaded, then
/// the vCPUs in that of their indices, as KVM makes their states.
///
/// The launch configuration is in it by the boot page, which has its digest. A guest without a boot page is bound to its
/// configuration by [`HostData`] alone, which a report has beside the measurement.
pub fn of_transcript(transcript: &Transcript, features: SevFeatures) -> Measurement {
    let mut digest = LaunchDigest::new();
    let mut vcpus = BTreeMap::new();
    for entry in transcript.entries() {
        match entry {
            // It is in the boot page and in HOST_DATA.
            Entry::Config(_) => {}
            Entry::Page { kind, gpa, contents } => digest.extend(page_type(*kind), *gpa, contents),
            Entry::Zero { range } => digest.without_contents(PageType::Zero, *range),
            Entry::Vcpu { index, state } => _ = vcpus.insert(*index, Vmsa::of(state, features)),
        }
    }
    digest.vcpus(vcpus.values());
    digest.measurement()
}

pub(crate) fn page_type(kind: PageKind) -> PageType {
    match kind {
        PageKind::Measured => PageType::Normal,
        PageKind::Zero => PageType::Zero,
        PageKind::Unmeasured => PageType::Unmeasured,
        PageKind::Secrets => PageType::Secrets,
        PageKind::Cpuid => PageType::Cpuid,
    }
}

/// The expected measurement of a launch of OVMF, as the VMM of `vcpus` makes it: the image, the sections of its metadata, the
/// vCPUs. With a kernel its hashes are in the page that the firmware has for them, which is otherwise zero.
///
/// # Errors
/// [`Error::Vcpus`]; [`Error::FirmwareLacks`] when it does not say where vCPUs other than the first start, or does not check a
/// kernel; as [`Firmware::sections`].
pub fn of_firmware(
    firmware: &Firmware<'_>,
    vcpus: &Vcpus,
    kernel: Option<&KernelHashes>,
) -> Result<Measurement, Error> {
    let mut digest = LaunchDigest::new();
    digest.normal(firmware.range().start(), firmware.image())?;
    let mut sections = firmware.sections()?;
    if vcpus.vmm == Vmm::Ec2 {
        // It prepares what the firmware is told about the processor last.
        sections.sort_by_key(|section| section.kind == SectionKind::Cpuid);
    }
    let mut kernel_is_in = kernel.is_none();
    for section in sections {
        match (section.kind, vcpus.vmm, kernel) {
            (SectionKind::KernelHashes, _, Some(kernel)) => {
                let table = firmware.hash_table()?.0;
                let offset = table.checked_sub(section.range.start().0).filter(|offset| *offset < PAGE_SIZE);
                let page = offset.and_then(|offset| kernel.page(offset as usize));
                let lacks = "has the hashes of a kernel elsewhere than in the page for them";
                digest.normal(section.range.start(), &page.ok_or(Error::FirmwareLacks { lacks })?)?;
                kernel_is_in = true;
            }
            (SectionKind::Memory, Vmm::Gce, _) => digest.without_contents(PageType::Unmeasured, section.range),
            (kind, _, _) => digest.without_contents(kind.page_type(), section.range),
        }
    }
    if !kernel_is_in {
        return Err(Error::FirmwareLacks { lacks: "has no page for the hashes of a kernel: it would not check them" });
    }
    vcpus.with_states(firmware, |states| digest.vcpus(states))?;
    Ok(digest.measurement())
}

#[cfg(test)]
mod tests;
