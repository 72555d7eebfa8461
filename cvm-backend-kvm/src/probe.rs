//! What this host offers of each kind of protection.

use crate::Remedied;
use crate::error::chain;
use crate::host::{Host, setting};
use crate::hypercall;
use crate::trust::{Facts, Finding};
use crate::vault::{self, Program};
use cvm_core::platform::{Missing, Offer, Party, Protection};
use kvm_bindings::{KVM_CAP_GUEST_MEMFD, KVM_X86_SW_PROTECTED_VM, KVM_X86_TDX_VM};
use kvm_ioctls::Cap;
use std::fs;
use std::path::Path;

fn offer(protection: Protection, missing: Vec<Missing>) -> Offer {
    Offer { protection, missing, notes: Vec::new() }
}

/// Every kind of protection, as far as the KVM device at `path` and the kernel's files tell.
pub(crate) fn offers(path: &Path) -> Vec<Offer> {
    let host = match Host::open(path) {
        Ok(host) => host,
        Err(error) => {
            let missing = no_device(&error);
            return ALL.map(|protection| offer(protection, vec![missing.clone()])).into();
        }
    };
    let secure_execution =
        Missing::new("this is an x86-64 host", "an IBM z15 or LinuxONE III or later, with prot_virt=1");
    vec![
        none(&host),
        guest_memfd(&host),
        of_vault(&host),
        tdx(&host),
        offer(Protection::SecureExecution, vec![secure_execution]),
    ]
}

/// What is missing on a host whose KVM device gave `error` when it was opened.
pub fn no_device(error: &crate::Error) -> Missing {
    match error {
        crate::Error::Open { path, source: Remedied { cause, remedy } } => {
            Missing::new(format!("{} cannot be opened: {cause}", path.display()), *remedy)
        }
        crate::Error::Kvm { source, .. } => Missing::new(format!("{error}: {source}"), "a kvm that answers"),
        _ => Missing::new(error.to_string(), "a kernel whose kvm speaks version 12"),
    }
}

const ALL: [Protection; 5] =
    [Protection::None, Protection::GuestMemfd, Protection::Vault, Protection::Tdx, Protection::SecureExecution];

/// What every VM on KVM needs and this one does not have.
fn missing(host: &Host) -> Vec<Missing> {
    let needs = [
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "a newer kernel"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "Linux 4.12 or later"),
        (Cap::X86UserSpaceMsr, "KVM_CAP_X86_USER_SPACE_MSR", "Linux 5.10 or later"),
    ];
    let missing = needs.into_iter().filter(|(cap, ..)| !host.kvm.check_extension(*cap));
    missing.map(|(_, what, remedy)| Missing::new(format!("kvm has no {what}"), remedy)).collect()
}

fn none(host: &Host) -> Offer {
    let hypercalls = if !host.offers_hypercall() {
        "guests ask for conversions by doorbell: kvm has no KVM_CAP_EXIT_HYPERCALL for KVM_HC_MAP_GPA_RANGE".into()
    } else {
        match hypercall::works(host) {
            Ok(true) => "guests ask for conversions by doorbell, or by hypercall where the vmm says so".into(),
            Ok(false) => {
                "guests ask for conversions by doorbell: kvm advertises KVM_HC_MAP_GPA_RANGE, but a guest does \
                          not get past the hypercall"
                    .into()
            }
            Err(error) => chain(&error),
        }
    };
    Offer { protection: Protection::None, missing: missing(host), notes: vec![hypercalls] }
}

/// This library's own gap, where a host offers what no backend uses yet.
fn no_backend() -> Missing {
    Missing::new("this version of cvm has no backend for it", "a later version of cvm")
}

pub(crate) fn guest_memfd(host: &Host) -> Offer {
    let mut lacks = Vec::new();
    if !host.has_vm_type(KVM_X86_SW_PROTECTED_VM) {
        lacks.push(Missing::new(
            "kvm has no VM type KVM_X86_SW_PROTECTED_VM",
            "Linux 6.8 or later with CONFIG_KVM_SW_PROTECTED_VM=y and kvm.tdp_mmu=1",
        ));
    }
    if host.capability(KVM_CAP_GUEST_MEMFD) == 0 {
        lacks.push(Missing::new("kvm has no KVM_CAP_GUEST_MEMFD", "Linux 6.8 or later with CONFIG_KVM_PRIVATE_MEM"));
    }
    offer(Protection::GuestMemfd, lacks)
}

fn of_vault(host: &Host) -> Offer {
    let mut missing = missing(host);
    let mut peer = None;
    let found = Program::find().and_then(|mut program| {
        peer = vault::try_out(&mut program)?;
        Ok(program)
    });
    let program = match found {
        Ok(program) => Some(program),
        Err(crate::Error::NotOffered { what, .. }) => {
            missing.push(Missing::new(what, "a program that can be a vault, or one beside it"));
            None
        }
        Err(error) => {
            missing.push(Missing::new(chain(&error), "a cvm-vault that listens there and takes this user"));
            None
        }
    };
    let memory = if guest_memfd(host).missing.is_empty() {
        "its private memory is a guest_memfd, which the vault itself cannot read"
    } else {
        "its private memory is a file of the vault"
    };
    let ways = program.map(|program| Facts::read(&program, peer).findings()).unwrap_or_default();
    let ways = ways.into_iter().map(|Finding { parties, way: Missing { what, remedy } }| {
        let from = if parties.contains(&Party::VmmProcess) { "the vmm itself" } else { "other processes of its user" };
        format!("it does not protect from {from}: {what}; {remedy}")
    });
    let notes = std::iter::once(memory.to_owned()).chain(ways).collect();
    Offer { protection: Protection::Vault, missing, notes }
}

/// Why KVM has no VM type for a protection that `module` turns on by the parameter `name`, as far as that tells: `firmware`
/// has to be on too, and the kernel's messages about it have the word `word`.
pub fn no_vm_type(module: &str, name: &str, firmware: &str, word: &str) -> Missing {
    match setting(&format!("/sys/module/{module}/parameters/{name}")).as_deref() {
        Some("Y" | "1") => Missing::new(
            format!("kvm has no VM type for it, although {module}.{name} is on"),
            format!("what the kernel says of it when it starts: `dmesg | grep -i {word}`"),
        ),
        Some(_) => Missing::new(
            format!("kvm has no VM type for it, and {module}.{name} is off"),
            format!("enable {firmware} in the firmware, and load {module} with {name}=1"),
        ),
        None => Missing::new(
            format!("kvm has no VM type for it, and no parameter {module}.{name}"),
            format!("a kernel with support for it, in {module}"),
        ),
    }
}

/// Whether this processor's first `/proc/cpuinfo` entry lists a vendor.
fn vendor_is(names: &[&str]) -> bool {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let vendor = text.lines().find_map(|line| line.strip_prefix("vendor_id"));
    vendor.is_some_and(|vendor| names.iter().any(|name| vendor.contains(name)))
}

fn tdx(host: &Host) -> Offer {
    let mut lacks = Vec::new();
    if !vendor_is(&["GenuineIntel"]) {
        lacks.push(Missing::new("the processor is not Intel's", "an Intel Xeon of the 5th generation or later"));
    } else if !host.has_vm_type(KVM_X86_TDX_VM) {
        lacks.push(no_vm_type("kvm_intel", "tdx", "TDX", "tdx"));
    }
    lacks.push(no_backend());
    offer(Protection::Tdx, lacks)
}
