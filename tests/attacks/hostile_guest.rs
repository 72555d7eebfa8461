//! A hostile guest: what it can do to its VMM, while a guest beside it must notice nothing.

use crate::common::{Assembler, DATA, MEMORY, REPORT};
use crate::guest::{Guest, fail_unless_equal};
use crate::outcome::Observed;
use crate::vmm::kind;
use cvm::doorbell::{DEVICE_SPACE, MSR_BASE, PORT_BASE, SPACE};
use cvm::kvm::KvmPlatform;
use cvm::memory::ViewError;
use cvm::{Answer, Exit, PAGE_SIZE, Side, Vcpu, Vm};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use virtio_bindings::virtio_ring::VRING_DESC_F_NEXT;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// How much a run tries.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// How often a page goes to the other side and back.
    pub conversions: u32,
    /// How many random programs there are.
    pub programs: u64,
}

type Attack = fn(&KvmPlatform, Effort) -> Observed;

pub const ATTACKS: &[(&str, Attack)] = &[
    ("doorbell-garbage", doorbell_garbage),
    ("many-conversions", many_conversions),
    ("conversion-garbage", conversion_garbage),
    ("device-race", device_race),
    ("private-ring", |platform, _| ring(platform, &[], PRIVATE_RING)),
    ("straddling-ring", |platform, _| ring(platform, &[], SHARED_END - 16)),
    ("private-buffer", |platform, _| ring(platform, &[(DATA, 16, 0, 0)], RING)),
    ("straddling-buffer", |platform, _| ring(platform, &[(SHARED_END - 8, 16, 0, 0)], RING)),
    ("endless-buffer", |platform, _| ring(platform, &[(RING, u32::MAX, 0, 0)], RING)),
    ("chain-loop", |platform, _| {
        let next = VRING_DESC_F_NEXT as u16;
        ring(platform, &[(RING, 16, next, 1), (RING, 16, next, 0)], RING)
    }),
    ("spin", |platform, _| {
        ends(platform, SPIN, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.jmp(again)
        })
    }),
    ("triple-fault", |platform, _| ends(platform, SOON, |a| a.ud2())),
    ("halt", |platform, _| ends(platform, SOON, |a| a.hlt())),
    ("outside-memory", |platform, _| ends(platform, SOON, |a| a.store(MEMORY + PAGE_SIZE, Side::Private, 1))),
];

/// When a guest that comes to an end counts as one that hangs, and a device. Only what fails takes so long.
const SOON: Duration = Duration::from_secs(120);
const PATIENCE: Duration = Duration::from_secs(60);

/// How much longer for each conversion.
const EACH: Duration = Duration::from_millis(100);

/// How long a guest runs that does not come to an end.
const SPIN: Duration = Duration::from_millis(500);

/// How a guest ends that does just this.
fn ends(
    platform: &KvmPlatform,
    limit: Duration,
    write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
) -> Observed {
    let mut guest = Guest::new(platform, limit, write);
    match guest.run() {
        Ok(exit) => Observed::Refused(format!("{exit:?}")),
        Err(error) => Observed::Refused(kind(&error)),
    }
}

/// A generator of numbers that look random (xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Accesses to the doorbell space and a bit beyond, with registers and values that make no sense.
fn garbage(a: &mut Assembler, numbers: &mut Numbers) -> Result<(), IcedError> {
    for _ in 0..24 {
        let value = match numbers.below(3) {
            0 => numbers.next() as u32,
            1 => numbers.below(256) as u32,
            _ => numbers.below(4) as u32,
        };
        let register = match numbers.below(4) {
            // Control registers, which exist, so that a program comes further than its first access.
            0 | 1 => 4 * numbers.below(7) as u16,
            2 => DEVICE_SPACE + 4 * numbers.below(u64::from(SPACE - DEVICE_SPACE) / 4) as u16,
            _ => numbers.below(u64::from(SPACE) + 0x100) as u16,
        };
        a.mov(eax, value)?;
        match numbers.below(10) {
            0..4 => a.ring(register.min(SPACE - 1))?,
            4..6 => a.listen(register.min(SPACE - 1))?,
            kind => {
                a.mov(edx, u32::from(PORT_BASE + register))?;
                a.mov(ecx, MSR_BASE + u32::from(register))?;
                match kind {
                    6 => a.out(dx, al)?,
                    7 => a.in_(ax, dx)?,
                    8 => a.wrmsr()?,
                    _ => a.rdmsr()?,
                }
            }
        }
    }
    a.end(0)
}

fn doorbell_garbage(platform: &KvmPlatform, effort: Effort) -> Observed {
    let mut ends = BTreeSet::new();
    for program in 0..effort.programs {
        let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15 ^ program << 7);
        let mut guest = Guest::new(platform, SOON, |a| garbage(a, &mut numbers));
        loop {
            let answered = match guest.run() {
                Ok(Exit::Ended { .. }) => break,
                Ok(Exit::Kicked) if guest.overdue() => return Observed::Got("the vmm's time".into()),
                Ok(Exit::DoorbellRead { .. } | Exit::PortRead { .. } | Exit::MsrRead { .. }) => {
                    guest.vcpu.answer_read(u64::MAX)
                }
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = answered {
                ends.insert(kind(&error));
                break;
            }
        }
    }
    Observed::Refused(ends.into_iter().collect::<Vec<_>>().join(", "))
}

fn many_conversions(platform: &KvmPlatform, effort: Effort) -> Observed {
    let limit = SOON + EACH * effort.conversions;
    let mut guest = Guest::new(platform, limit, |a| {
        let mut again = a.create_label();
        a.mov(rsi, u64::from(effort.conversions.div_ceil(2)))?;
        a.set_label(&mut again)?;
        for to in [Side::Shared, Side::Private] {
            a.convert(DATA, 1, to)?;
            a.cmp(eax, Answer::Done as u32)?;
            fail_unless_equal(a)?;
        }
        a.dec(rsi)?;
        a.jne(again)?;
        a.end(0)
    });
    let before = guest.vm.allocated().map(|allocated| allocated.shared);
    let begin = Instant::now();
    let end = guest.run();
    let rate = guest.vm.conversions().requests as f64 / begin.elapsed().as_secs_f64();
    eprintln!("  {} conversions, {rate:.0} in a second", guest.vm.conversions().requests);
    match end {
        Ok(Exit::Ended { code: 0 }) if guest.vm.allocated().map(|allocated| allocated.shared).ok() == before.ok() => {
            Observed::Refused("Done".into())
        }
        other => Observed::Got(format!("{other:?}")),
    }
}

/// Conversions of what is no memory, or nothing, or too much.
fn conversion_garbage(platform: &KvmPlatform, _: Effort) -> Observed {
    let requests: [(u32, u32); 6] = [
        ((MEMORY / PAGE_SIZE) as u32, 1),
        ((MEMORY / PAGE_SIZE) as u32 - 1, 2),
        (u32::MAX, u32::MAX),
        (0, u32::MAX),
        (1, 0),
        (0xffff_ff00, 0x100),
    ];
    let mut guest = Guest::new(platform, SOON, |a| {
        for (frame, pages) in requests {
            for to in [Side::Shared, Side::Private] {
                a.mov(ebx, frame)?;
                a.convert_frame(pages.into(), to)?;
                a.cmp(eax, Answer::Invalid as u32)?;
                fail_unless_equal(a)?;
            }
        }
        a.end(0)
    });
    match guest.run() {
        Ok(Exit::Ended { code: 0 }) if guest.vm.conversions().to_shared == 0 => Observed::Refused("Invalid".into()),
        other => Observed::Got(format!("{other:?}")),
    }
}

/// What the guest writes to the page while it is private, while it is shared, and what the device writes.
const PRIVATE: u32 = 0x5ec2_e75e;
const SHARED: u32 = 0x0be7_0be7;
const DEVICE: u32 = 0xde71_ce00;

/// A device that reads and writes a page all the time, while the guest takes it away and gives it back.
fn device_race(platform: &KvmPlatform, effort: Effort) -> Observed {
    let rounds = effort.conversions.div_ceil(4).clamp(50, 2000);
    let mut guest = Guest::new(platform, SOON + EACH * rounds, |a| {
        let (mut again, mut wait) = (a.create_label(), a.create_label());
        a.mov(rsi, u64::from(rounds))?;
        a.set_label(&mut again)?;
        a.convert(DATA, 1, Side::Shared)?;
        a.store(DATA, Side::Shared, SHARED)?;
        a.mov(eax, Side::Shared as u32)?;
        a.report()?;
        // A retry is no failure: the device holds the page.
        let mut retry = a.create_label();
        a.set_label(&mut retry)?;
        a.convert(DATA, 1, Side::Private)?;
        a.cmp(eax, Answer::Retry as u32)?;
        a.je(retry)?;
        a.load(DATA, Side::Private)?;
        a.cmp(eax, 0)?;
        fail_unless_equal(a)?;
        a.store(DATA, Side::Private, PRIVATE)?;
        a.mov(eax, Side::Private as u32)?;
        a.report()?;
        a.mov(ecx, 2000u32)?;
        a.set_label(&mut wait)?;
        a.dec(ecx)?;
        a.jne(wait)?;
        a.load(DATA, Side::Private)?;
        a.cmp(eax, PRIVATE)?;
        fail_unless_equal(a)?;
        a.dec(rsi)?;
        a.jne(again)?;
        a.end(0)
    });
    let (over, leaked) = (AtomicBool::new(false), AtomicBool::new(false));
    let (shown, refused) = (AtomicU64::new(0), AtomicU64::new(0));
    let saw = |counter: &AtomicU64| counter.load(Ordering::Relaxed) > 0;
    let memory = guest.vm.memory().clone();
    let end = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let view = memory.memory();
                match view.read_obj::<u32>(GuestAddress(DATA)) {
                    Ok(PRIVATE) => leaked.store(true, Ordering::Relaxed),
                    Ok(_) => drop(shown.fetch_add(1, Ordering::Relaxed)),
                    Err(_) => drop(refused.fetch_add(1, Ordering::Relaxed)),
                }
                // Whether it is refused is seen by the guest: it looks for this in its private page.
                let _ = view.write_obj(DEVICE, GuestAddress(DATA));
            }
        });
        let end = loop {
            match guest.run() {
                Ok(Exit::DoorbellWrite { register: REPORT, value }) => {
                    // The device's thread may not have come so far yet.
                    let seen = if value == Side::Shared as u32 { &shown } else { &refused };
                    let begin = Instant::now();
                    while !saw(seen) && begin.elapsed() < PATIENCE {
                        std::thread::yield_now();
                    }
                }
                end => break end,
            }
        };
        over.store(true, Ordering::Relaxed);
        end
    });
    match end {
        _ if leaked.load(Ordering::Relaxed) => Observed::Got("private bytes".into()),
        Ok(Exit::Ended { code: 0 }) if saw(&shown) && saw(&refused) => {
            Observed::Refused("shared bytes or an error".into())
        }
        Ok(Exit::Ended { code: 0 }) => Observed::Absent("the device never met both sides".into()),
        other => Observed::Got(format!("{other:?}")),
    }
}

/// Two shared pages with a queue, and private pages on both sides of them.
const RING: u64 = DATA + 0x8000;
const SHARED_END: u64 = RING + 2 * PAGE_SIZE;
const PRIVATE_RING: u64 = SHARED_END + PAGE_SIZE;
const AVAILABLE: u64 = RING + 0x400;
const USED: u64 = RING + 0x800;
const QUEUE_SIZE: u16 = 16;

/// A queue whose descriptors, (address, length, flags, next), the guest puts at [`RING`], and a device that looks for
/// them at `table`: what the device comes to.
fn ring(platform: &KvmPlatform, descriptors: &[(u64, u32, u16, u16)], table: u64) -> Observed {
    let mut guest = Guest::new(platform, SOON, |a| {
        a.convert(RING, 2, Side::Shared)?;
        for (at, (address, len, flags, next)) in (RING..).step_by(16).zip(descriptors) {
            let rest = u64::from(*len) | u64::from(*flags) << 32 | u64::from(*next) << 48;
            for (at, word) in [(at, *address), (at + 8, rest)] {
                a.mov(rbx, at)?;
                a.mov(rax, word)?;
                a.mov(qword_ptr(rbx), rax)?;
            }
        }
        // No flags, and one available chain: that of descriptor 0.
        a.store(AVAILABLE, Side::Shared, 1 << 16)?;
        a.store(AVAILABLE + 4, Side::Shared, 0)?;
        a.report()
    });
    match guest.run() {
        Ok(Exit::DoorbellWrite { register: REPORT, .. }) => {}
        other => return Observed::Absent(format!("the guest did not get there: {other:?}")),
    }
    device(&guest, table).unwrap_or_else(|refused| Observed::Refused(refused.into()))
}

fn device(guest: &Guest, table: u64) -> Result<Observed, &'static str> {
    let mut queue = Queue::new(QUEUE_SIZE).map_err(|_| "no queue")?;
    queue.try_set_desc_table_address(GuestAddress(table)).map_err(|_| "the device refuses the address")?;
    queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).map_err(|_| "the device refuses the address")?;
    queue.try_set_used_ring_address(GuestAddress(USED)).map_err(|_| "the device refuses the address")?;
    queue.set_size(QUEUE_SIZE);
    queue.set_ready(true);
    let view = guest.vm.memory().memory();
    if !queue.is_valid(&*view) {
        return Err("the queue is not valid");
    }
    let chain = queue.pop_descriptor_chain(view.clone()).ok_or("there is no chain")?;
    let mut bytes = Vec::new();
    for (count, descriptor) in chain.enumerate() {
        if count > usize::from(QUEUE_SIZE) {
            return Ok(Observed::Got("the device's time".into()));
        }
        // As a device must: the length is the guest's word.
        bytes.resize((descriptor.len() as usize).min(1 << 20), 0);
        match view.read_slice(&mut bytes, descriptor.addr()) {
            Ok(()) => {}
            Err(error) if matches!(ViewError::of(&error), Some(ViewError::Private(_))) => {
                return Err("ViewError::Private");
            }
            Err(_) => return Err("another error"),
        }
    }
    Err(if bytes.is_empty() { "the chain is empty" } else { "the chain ends" })
}
