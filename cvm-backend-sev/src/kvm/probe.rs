//! What this host offers of AMD's protection.

use super::Resources;
use super::command::{Attribute, attribute, vm_type};
use super::cpuid;
use cvm_backend_kvm::backend::{Host, no_device, no_vm_type};
use cvm_core::Protection;
use cvm_core::platform::{Missing, Offer};
use std::fs::OpenOptions;
use std::path::Path;

/// The kinds of protection, each with the parameter of `kvm_amd` that it is turned off by.
const KINDS: [(Protection, &str); 3] =
    [(Protection::Sev, "sev"), (Protection::SevEs, "sev_es"), (Protection::SevSnp, "sev_snp")];

/// What lacks for each kind, as far as both devices and the kernel's files tell.
pub(super) fn offers(kvm: &Path, firmware: &Path) -> Vec<Offer> {
    let host = Host::open(kvm);
    KINDS
        .map(|(protection, parameter)| match &host {
            Ok(host) => offer_of(host, firmware, protection, parameter),
            Err(error) => Offer { protection, missing: vec![no_device(error)], notes: Vec::new() },
        })
        .into()
}

/// What lacks for this kind on `host`; nothing if it is none of AMD's.
pub(super) fn offer(host: &Host, firmware: &Path, protection: Protection) -> Option<Offer> {
    let (_, parameter) = KINDS.into_iter().find(|(kind, _)| *kind == protection)?;
    Some(offer_of(host, firmware, protection, parameter))
}

fn offer_of(host: &Host, firmware: &Path, protection: Protection, parameter: &str) -> Offer {
    let mut lacks = Vec::new();
    if !host.is_amd() {
        lacks.push(Missing::new("the processor is not AMD's", "an AMD EPYC processor"));
    } else if !host.has_vm_type(vm_type(protection)) {
        lacks.push(no_vm_type("kvm_amd", parameter, "SME and SEV-SNP", "sev"));
    } else if let Err(error) = OpenOptions::new().read(true).write(true).open(firmware) {
        let what = format!("{} cannot be opened: {error}", firmware.display());
        lacks.push(Missing::new(what, "load the module ccp, and run with access to it"));
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
    const COHERENT: u32 = 1 << 10;
    cpuid::encryption(host).is_some_and(|leaf| leaf.eax & COHERENT != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_cannot_be_opened_is_reported_with_its_name_and_cause() {
        for offer in offers(Path::new("/nonexistent/kvm"), Path::new("/nonexistent/sev")) {
            let [missing] = &offer.missing[..] else { panic!("{offer:?}") };
            assert!(missing.what.starts_with("/nonexistent/kvm cannot be opened: No such file"), "{missing:?}");
            assert!(missing.remedy.starts_with("load kvm_intel or kvm_amd"), "{missing:?}");
        }
    }
}
