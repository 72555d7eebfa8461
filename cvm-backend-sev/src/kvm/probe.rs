//! What this host offers of AMD's protection.

use super::Resources;
use super::command::{Attribute, attribute};
use cvm_backend_kvm::backend::{Host, setting};
use cvm_core::Protection;
use cvm_core::platform::{Missing, Offer};
use kvm_bindings::{KVM_X86_SEV_ES_VM, KVM_X86_SEV_VM, KVM_X86_SNP_VM};
use std::fs::OpenOptions;
use std::path::Path;

/// The kinds of protection, each with the type of its VMs and the parameter of `kvm_amd` that it is turned off by.
const KINDS: [(Protection, u32, &str); 3] = [
    (Protection::Sev, KVM_X86_SEV_VM, "sev"),
    (Protection::SevEs, KVM_X86_SEV_ES_VM, "sev_es"),
    (Protection::SevSnp, KVM_X86_SNP_VM, "sev_snp"),
];

fn missing(what: impl Into<String>, remedy: impl Into<String>) -> Missing {
    Missing { what: what.into(), remedy: remedy.into() }
}

/// What lacks for each kind, as far as both devices and the kernel's files tell.
pub(super) fn offers(kvm: &Path, firmware: &Path) -> Vec<Offer> {
    let host = Host::open(kvm);
    KINDS
        .map(|(protection, vm_type, parameter)| match &host {
            Ok(host) => offer_of(host, firmware, protection, vm_type, parameter),
            Err(error) => {
                let lack = missing(error.to_string(), "access to a KVM device");
                Offer { protection, missing: vec![lack], notes: Vec::new() }
            }
        })
        .into()
}

/// What lacks for this kind on `host`; nothing if it is none of AMD's.
pub(super) fn offer(host: &Host, firmware: &Path, protection: Protection) -> Option<Offer> {
    let (_, vm_type, parameter) = KINDS.into_iter().find(|(kind, ..)| *kind == protection)?;
    Some(offer_of(host, firmware, protection, vm_type, parameter))
}

fn offer_of(host: &Host, firmware: &Path, protection: Protection, vm_type: u32, parameter: &str) -> Offer {
    let mut lacks = Vec::new();
    match host.is_amd() {
        Err(error) => lacks.push(missing(error.to_string(), "a KVM device that works")),
        Ok(false) => lacks.push(missing("the processor is not AMD's", "an AMD EPYC processor")),
        Ok(true) if !host.has_vm_type(vm_type) => lacks.push(no_vm_type(parameter)),
        Ok(true) => {
            if let Err(error) = OpenOptions::new().read(true).write(true).open(firmware) {
                let what = format!("{} cannot be opened: {error}", firmware.display());
                lacks.push(missing(what, "load the module ccp, and run with access to it"));
            }
        }
    }
    let mut notes = Vec::new();
    if lacks.is_empty() {
        let resources = Resources::of_host();
        notes.extend(resources.of(protection).map(|asids| asids.to_string()));
        if let Some(count) = resources.ciphertext_hiding.filter(|_| protection == Protection::SevSnp) {
            notes.push(format!("the ciphertext of {count} guests can be hidden from the host"));
        }
        if protection != Protection::SevSnp && !is_coherent(host) {
            notes.push("guests have to flush from the caches what they convert".into());
        }
        if protection == Protection::SevSnp {
            let certificates = attribute(host.kvm(), Attribute::SnpReqCerts) == Some(1);
            notes.push(format!("certificates {} with reports", if certificates { "can go" } else { "cannot go" }));
        }
    }
    Offer { protection, missing: lacks, notes }
}

/// Whether the processor's caches have a line once, whether it was written encrypted or not (AMD64 APM volume 3, section
/// E.4.17). Where they may have two, what one side writes to a page can be overwritten later by what the other wrote before.
fn is_coherent(host: &Host) -> bool {
    const ENCRYPTION_LEAF: u32 = 0x8000_001f;
    const COHERENT: u32 = 1 << 10;
    let cpuid = host.supported_cpuid();
    cpuid.is_ok_and(|cpuid| {
        cpuid.as_slice().iter().any(|leaf| leaf.function == ENCRYPTION_LEAF && leaf.eax & COHERENT != 0)
    })
}

/// Why a VM type is not there, as far as the module's parameter tells.
fn no_vm_type(parameter: &str) -> Missing {
    match setting(&format!("/sys/module/kvm_amd/parameters/{parameter}")).as_deref() {
        Some("Y" | "1") => missing(
            format!("kvm has no VM type for it, although kvm_amd.{parameter} is on"),
            "what the kernel says of it when it starts: `dmesg | grep -i sev`",
        ),
        Some(_) => missing(
            format!("kvm has no VM type for it, and kvm_amd.{parameter} is off"),
            format!("enable SME and SEV-SNP in the firmware, and load kvm_amd with {parameter}=1"),
        ),
        None => missing(
            format!("kvm has no VM type for it, and no parameter kvm_amd.{parameter}"),
            "a kernel with support for it, in kvm_amd",
        ),
    }
}
