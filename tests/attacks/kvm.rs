//! A hostile VMM that goes around the library: KVM's ioctls on every descriptor that it finds in its own process.

use crate::common::MEMORY;
use crate::find;
use crate::guest::{COUNT, Command, KERNEL_GS_BASE, Keeper, Registers, SECRET, SECRET_LEN, is_secret};
use crate::outcome::Observed;
use crate::sys::{self, Ioctl};
use crate::vmm::{Attack, failed, with_apic};
use cvm::kvm::KvmPlatform;
use cvm::{PAGE_SIZE, Vcpu};
use kvm_bindings::*;
use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

// Linux include/uapi/linux/kvm.h
const RUN: Ioctl<()> = Ioctl::none(0x80);
pub const GET_REGS: Ioctl<kvm_regs> = Ioctl::read(0x81);
const SET_REGS: Ioctl<kvm_regs> = Ioctl::write(0x82);
const GET_SREGS: Ioctl<kvm_sregs> = Ioctl::read(0x83);
const INTERRUPT: Ioctl<kvm_interrupt> = Ioctl::write(0x86);
const GET_MSRS: Ioctl<Msrs> = Ioctl::with_header(0x88, 8);
const GET_FPU: Ioctl<kvm_fpu> = Ioctl::read(0x8c);
const GET_LAPIC: Ioctl<kvm_lapic_state> = Ioctl::read(0x8e);
const NMI: Ioctl<()> = Ioctl::none(0x9a);
const SMI: Ioctl<()> = Ioctl::none(0xb7);
const SET_GUEST_DEBUG: Ioctl<kvm_guest_debug> = Ioctl::write(0x9b);
const GET_VCPU_EVENTS: Ioctl<kvm_vcpu_events> = Ioctl::read(0x9f);
const GET_DEBUGREGS: Ioctl<kvm_debugregs> = Ioctl::read(0xa1);
const GET_XSAVE: Ioctl<[u8; 4096]> = Ioctl::read(0xa4);
const GET_DIRTY_LOG: Ioctl<kvm_dirty_log> = Ioctl::write(0x42);
const SIGNAL_MSI: Ioctl<kvm_msi> = Ioctl::write(0xa5);
const SET_GSI_ROUTING: Ioctl<Routes> = Ioctl::write_header(0x6a, 8);
const SET_USER_MEMORY_REGION: Ioctl<kvm_userspace_memory_region> = Ioctl::write(0x46);
const SET_USER_MEMORY_REGION2: Ioctl<kvm_userspace_memory_region2> = Ioctl::write(0x49);
const SET_MEMORY_ATTRIBUTES: Ioctl<kvm_memory_attributes> = Ioctl::write(0xd2);

/// Where an MSI for the first vCPU goes (Intel SDM, volume 3, section 12.11.1).
const MSI_ADDRESS: u32 = 0xfee0_0000;

/// `kvm_irq_routing` with one entry.
#[derive(Default)]
#[repr(C)]
struct Routes {
    count: u32,
    flags: u32,
    entry: kvm_irq_routing_entry,
}

/// `kvm_msrs` with one entry.
#[derive(Default)]
#[repr(C)]
struct Msrs {
    count: u32,
    padding: u32,
    entry: kvm_msr_entry,
}

pub const ATTACKS: &[(&str, Attack)] = &[
    ("get-regs", |_, keeper| {
        read(&GET_REGS, kvm_regs::default(), |regs| {
            [regs.r12, regs.r13, regs.r14, regs.r15] == Registers::new(keeper.nonce).general
        })
    }),
    ("get-sregs", |_, _| read(&GET_SREGS, kvm_sregs::default(), |sregs| sregs.cr3 == crate::common::TABLES)),
    ("get-fpu", |_, keeper| {
        let float = Registers::new(keeper.nonce).float.to_le_bytes();
        read(&GET_FPU, kvm_fpu::default(), |fpu| fpu.fpr.iter().any(|register| register[..8] == float))
    }),
    ("get-xsave", |_, keeper| {
        let float = Registers::new(keeper.nonce).float.to_le_bytes();
        read(&GET_XSAVE, [0; 4096], |area| area.as_chunks::<8>().0.contains(&float))
    }),
    ("get-msrs", |_, keeper| {
        let entry = kvm_msr_entry { index: KERNEL_GS_BASE, ..Default::default() };
        let msr = Registers::new(keeper.nonce).msr;
        read(&GET_MSRS, Msrs { count: 1, entry, ..Default::default() }, |msrs| msrs.entry.data == msr)
    }),
    // The guest has none; reading DR7 as the processor sets it shows that its breakpoints could be read.
    ("get-debugregs", |_, _| read(&GET_DEBUGREGS, kvm_debugregs::default(), |debug| debug.dr7 & 0x400 != 0)),
    ("get-lapic", |_, _| read(&GET_LAPIC, kvm_lapic_state::default(), |_| true)),
    ("get-events", |_, _| read(&GET_VCPU_EVENTS, kvm_vcpu_events::default(), |_| true)),
    ("set-regs", |_, keeper| on(VCPU, |vcpu| set_regs(keeper, vcpu))),
    ("single-step", |_, keeper| on(VCPU, |vcpu| single_step(keeper, vcpu))),
    ("raw-interrupt", |_, _| {
        on(VCPU, |vcpu| {
            INTERRUPT.call(vcpu, &mut kvm_interrupt { irq: 0x40 })?;
            Ok(Observed::Got("it arrives when the guest allows interrupts".into()))
        })
    }),
    ("raw-nmi", |_, _| {
        on(VCPU, |vcpu| {
            NMI.call(vcpu, &mut ())?;
            Ok(Observed::Got("it arrives".into()))
        })
    }),
    ("raw-smi", |_, _| {
        on(VCPU, |vcpu| {
            Ok(match SMI.call(vcpu, &mut ()) {
                Ok(_) => Observed::Got("it arrives".into()),
                // KVM without system management mode.
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => Observed::Unable(sys::name(&error)),
                Err(error) => return Err(error),
            })
        })
    }),
    ("raw-msi", |platform, _| {
        with_apic_vm(platform, |vm| {
            SIGNAL_MSI.call(vm, &mut kvm_msi { address_lo: MSI_ADDRESS, data: 0x42, ..Default::default() })
        })
    }),
    ("gsi-routing", |platform, _| {
        with_apic_vm(platform, |vm| {
            let mut routes = Routes { count: 1, ..Default::default() };
            routes.entry.type_ = KVM_IRQ_ROUTING_MSI;
            routes.entry.u.msi = kvm_irq_routing_msi { address_lo: MSI_ADDRESS, data: 0x42, ..Default::default() };
            SET_GSI_ROUTING.call(vm, &mut routes)
        })
    }),
    ("slot-overlap", |_, _| {
        on(VM, |vm| {
            let own = own_memory()?;
            set_slot(vm, Slot { number: 7, at: SECRET, len: PAGE_SIZE, address: address(&own), ..Slot::default() })?;
            Ok(Observed::Got("the guest's page is another one now".into()))
        })
    }),
    ("slot-alias", |_, keeper| on(VM, |vm| slot_alias(keeper, vm))),
    ("slot-remap", |_, keeper| on(VM, |vm| slot_remap(keeper, vm))),
    ("slot-read-only", |_, keeper| on(VM, |vm| slot_read_only(keeper, vm))),
    ("dirty-log", |_, keeper| on(VM, |vm| dirty_log(keeper, vm))),
];

/// Makes a VM whose vCPU has an APIC, and a call on each descriptor of a VM until one succeeds.
fn with_apic_vm(platform: &KvmPlatform, call: impl Fn(&OwnedFd) -> io::Result<i32>) -> Observed {
    let vm = match with_apic(platform) {
        Ok(vm) => vm,
        Err(error) => return failed(error),
    };
    let descriptors = find::all_own(VM);
    let observed = match descriptors.iter().map(call).collect::<Vec<_>>() {
        results if results.is_empty() => Observed::Absent("there is no such descriptor".into()),
        results if results.iter().any(Result::is_ok) => Observed::Got("a vector that the guest does not accept".into()),
        results => Observed::Refused(results.iter().flat_map(|result| result.as_ref().err()).map(sys::name).collect()),
    };
    drop(vm);
    observed
}

const VCPU: &str = "anon_inode:kvm-vcpu";
const VM: &str = "anon_inode:kvm-vm";

/// Attacks the first descriptor whose name begins so.
fn on(name: &str, attack: impl FnOnce(&OwnedFd) -> io::Result<Observed>) -> Observed {
    match find::own(name).as_ref().map(attack) {
        Some(Ok(observed)) => observed,
        Some(Err(error)) => Observed::Refused(sys::name(&error)),
        None => Observed::Absent("there is no such descriptor".into()),
    }
}

fn read<T>(what: &Ioctl<T>, mut into: T, is_the_guests: impl FnOnce(&T) -> bool) -> Observed {
    on(VCPU, |vcpu| {
        what.call(vcpu, &mut into)?;
        Ok(match is_the_guests(&into) {
            true => Observed::Got("the guest's".into()),
            false => Observed::Refused("not the guest's".into()),
        })
    })
}

/// Has the guest report a word of its secret, by the register in which it has the address of what it reports.
fn set_regs(keeper: &mut Keeper, vcpu: &OwnedFd) -> io::Result<Observed> {
    let mut regs = kvm_regs::default();
    GET_REGS.call(vcpu, &mut regs)?;
    regs.rsi = SECRET;
    SET_REGS.call(vcpu, &mut regs)?;
    let told = keeper.command(Command::Count).map_err(io::Error::other)?;
    let mut page = [0; SECRET_LEN];
    regs.rsi = COUNT;
    for (at, word) in (SECRET..).step_by(4).zip(page.as_chunks_mut::<4>().0) {
        GET_REGS.call(vcpu, &mut regs)?;
        regs.rsi = at;
        SET_REGS.call(vcpu, &mut regs)?;
        *word = keeper.command(Command::Count).map_err(io::Error::other)?.count.to_le_bytes();
    }
    Ok(match is_secret(&page, keeper.nonce) {
        true => Observed::Got("the guest tells its whole secret".into()),
        false => Observed::Refused(format!("the guest tells {:#x}", told.count)),
    })
}

/// Runs one instruction of the guest.
fn single_step(keeper: &mut Keeper, vcpu: &OwnedFd) -> io::Result<Observed> {
    keeper.vcpu.answer_read(0).map_err(io::Error::other)?;
    let control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
    SET_GUEST_DEBUG.call(vcpu, &mut kvm_guest_debug { control, ..Default::default() })?;
    RUN.call(vcpu, &mut ())?;
    // The library has mapped what the vCPU shares with KVM.
    let page = find::mappings(Path::new("/proc/self"))?.into_iter().find(|mapping| mapping.name.starts_with(VCPU));
    let page = page.ok_or(io::ErrorKind::NotFound)?.start;
    let mut reason = [0; 4];
    File::open("/proc/self/mem")?.read_exact_at(&mut reason, page + offset_of!(kvm_run, exit_reason) as u64)?;
    Ok(match u32::from_ne_bytes(reason) {
        KVM_EXIT_DEBUG => Observed::Got("one instruction at a time".into()),
        other => Observed::Unable(format!("kvm stops for exit {other} instead")),
    })
}

/// A slot as KVM takes it.
#[derive(Default)]
struct Slot {
    number: u32,
    flags: u32,
    at: u64,
    len: u64,
    address: u64,
    private: Option<i32>,
}

fn set_slot(vm: &OwnedFd, slot: Slot) -> io::Result<()> {
    let Slot { number: slot, flags, at: guest_phys_addr, len: memory_size, address: userspace_addr, private } = slot;
    match private {
        None => SET_USER_MEMORY_REGION
            .call(vm, &mut kvm_userspace_memory_region { slot, flags, guest_phys_addr, memory_size, userspace_addr }),
        Some(fd) => SET_USER_MEMORY_REGION2.call(
            vm,
            &mut kvm_userspace_memory_region2 {
                slot,
                flags: flags | KVM_MEM_GUEST_MEMFD,
                guest_phys_addr,
                memory_size,
                userspace_addr,
                guest_memfd: fd as u32,
                ..Default::default()
            },
        ),
    }
    .map(drop)
}

/// As much memory of the attacker's own as the guest has.
fn own_memory() -> io::Result<MmapRegion> {
    MmapRegion::new(MEMORY as usize).map_err(io::Error::other)
}

fn address(region: &MmapRegion) -> u64 {
    region.as_ptr() as u64
}

/// What this process has of the guest's private memory: a file of its own, or one that only KVM can use.
enum Private {
    File(File),
    Gmem(OwnedFd),
}

fn private() -> io::Result<Private> {
    // The kernel has called it both.
    if let Some(gmem) = ["kvm-gmem", "guest_memfd"].into_iter().find_map(find::own) {
        return Ok(Private::Gmem(gmem));
    }
    let file = find::own("/memfd:cvm-private").ok_or(io::ErrorKind::NotFound)?;
    Ok(Private::File(file.into()))
}

/// The guest's memory at a second address.
fn slot_alias(_: &mut Keeper, vm: &OwnedFd) -> io::Result<Observed> {
    let (number, at, len) = (7, 1 << 32, MEMORY);
    match private()? {
        Private::File(file) => {
            let alias = MmapRegion::from_file(FileOffset::new(file, 0), MEMORY as usize).map_err(io::Error::other)?;
            set_slot(vm, Slot { number, at, len, address: address(&alias), ..Slot::default() })?;
        }
        Private::Gmem(gmem) => {
            let own = own_memory()?;
            let private = Some(gmem.as_raw_fd());
            set_slot(vm, Slot { number, at, len, address: address(&own), private, ..Slot::default() })?;
        }
    }
    Ok(Observed::Got("each page has two addresses".into()))
}

/// The page of the secret, replaced by one of the attacker's; the guest's other pages stay.
fn slot_remap(keeper: &mut Keeper, vm: &OwnedFd) -> io::Result<Observed> {
    let own = own_memory()?;
    let slot = Slot { at: 0, len: MEMORY, address: address(&own), ..Slot::default() };
    let memory = own.get_slice(0, own.size()).map_err(io::Error::other)?;
    match private()? {
        Private::File(mut file) => {
            memory.read_exact_volatile_from(0, &mut file, own.size()).map_err(io::Error::other)?;
            set_slot(vm, Slot::default())?;
            set_slot(vm, slot)?;
        }
        Private::Gmem(gmem) => {
            set_slot(vm, Slot { private: Some(gmem.as_raw_fd()), ..Slot::default() })?;
            set_slot(vm, Slot { private: Some(gmem.as_raw_fd()), ..slot })?;
            let page = kvm_memory_attributes { address: SECRET, size: PAGE_SIZE, ..Default::default() };
            SET_MEMORY_ATTRIBUTES.call(vm, &mut { page })?;
        }
    }
    memory.write_slice(&[0x5a; SECRET_LEN], SECRET as usize).map_err(io::Error::other)?;
    let observed = match keeper.command(Command::Count) {
        Ok(_) if !keeper.is_well() => Observed::Got("the guest computes with a page of ours".into()),
        Ok(_) => Observed::Refused("the guest noticed nothing".into()),
        Err(error) => Observed::Refused(crate::vmm::kind(&error)),
    };
    // The guest may not run again: its memory ends here.
    Ok(observed)
}

/// The guest's memory where it can write nothing.
fn slot_read_only(keeper: &mut Keeper, vm: &OwnedFd) -> io::Result<Observed> {
    let slot = Slot { at: 0, len: MEMORY, flags: KVM_MEM_READONLY, ..Slot::default() };
    match private()? {
        Private::File(file) => {
            let alias = MmapRegion::from_file(FileOffset::new(file, 0), MEMORY as usize).map_err(io::Error::other)?;
            set_slot(vm, Slot::default())?;
            set_slot(vm, Slot { address: address(&alias), ..slot })?;
            if keeper.command(Command::Count).is_ok() {
                return Ok(Observed::Refused("the guest noticed nothing".into()));
            }
        }
        Private::Gmem(gmem) => {
            // Elsewhere first, so that a refusal leaves the guest its memory.
            let (own, private) = (own_memory()?, Some(gmem.as_raw_fd()));
            set_slot(vm, Slot { number: 7, at: 1 << 32, address: address(&own), private, ..slot })?;
        }
    }
    Ok(Observed::Got("the guest's writes come to the vmm instead".into()))
}

/// Which private pages the guest writes.
fn dirty_log(keeper: &mut Keeper, vm: &OwnedFd) -> io::Result<Observed> {
    let window = find::mappings(Path::new("/proc/self"))?
        .into_iter()
        .find(|mapping| mapping.offset == 0 && mapping.name.starts_with("/memfd:cvm-private"));
    let slot = Slot { at: 0, len: MEMORY, flags: KVM_MEM_LOG_DIRTY_PAGES, ..Slot::default() };
    match private()? {
        Private::File(_) => {
            set_slot(vm, Slot { address: window.ok_or(io::ErrorKind::NotFound)?.start, ..slot })?;
        }
        Private::Gmem(gmem) => set_slot(vm, Slot { private: Some(gmem.as_raw_fd()), ..slot })?,
    }
    keeper.command(Command::Count).map_err(io::Error::other)?;
    let pages = (MEMORY / PAGE_SIZE) as usize;
    let mut bitmap = vec![0u64; pages / 64];
    let dirty_bitmap = bitmap.as_mut_ptr().cast();
    let log = kvm_dirty_log__bindgen_ty_1 { dirty_bitmap };
    GET_DIRTY_LOG.call(vm, &mut kvm_dirty_log { slot: 0, padding1: 0, __bindgen_anon_1: log })?;
    let page = (COUNT / PAGE_SIZE) as usize;
    Ok(match bitmap[page / 64] >> (page % 64) & 1 {
        1 => Observed::Got("which pages the guest writes".into()),
        _ => Observed::Refused("nothing".into()),
    })
}
