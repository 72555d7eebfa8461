//! Chapter 1: whom guests have to trust, and whether that is so.

use crate::Bench;
use crate::clause::{Clause, Verdict};
use crate::guest::{DATA, MEMORY};
use crate::quality;
use cvm_core::interrupt::Guarding;
use cvm_core::platform::{Asset, Party, Powers};
use cvm_core::x86::Register;
use cvm_core::{PAGE_SIZE, Platform, RegisterRead, Side, Vcpu, Vm};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

const ASSETS: [Asset; 3] = [Asset::PrivateMemory, Asset::Registers, Asset::Interrupts];

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("1.3", "the trust model answers for every party and asset and for no other VM", answers),
        Clause::new("1.4", "a VMM sees no register where the trust model says so", registers),
        Clause::new("1.5", "private memory is not in a VMM that cannot read it by the trust model", memory).alone(),
        Clause::new("1.6", "interrupts are guarded by whom the trust model says", interrupts),
    ]
}

fn answers<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let (model, again) = (bench.platform.trust_model(), bench.platform.trust_model());
    for asset in ASSETS {
        for party in Party::ALL {
            let powers = model.powers(party, asset);
            assert_eq!(powers, again.powers(party, asset), "{party:?}, {asset:?}: another answer to the same question");
            assert_eq!(powers, Powers::from_bits_truncate(powers.bits()), "{party:?}, {asset:?}: unknown powers");
        }
        assert_eq!(model.powers(Party::OtherVms, asset), Powers::empty(), "{asset:?}");
        let at_least = [
            (Party::SameUser, Party::Root),
            (Party::VmmProcess, Party::Root),
            (Party::Root, Party::HostKernel),
            (Party::HostKernel, Party::Hypervisor),
        ];
        for (party, stronger) in at_least {
            let (less, more) = (model.powers(party, asset), model.powers(stronger, asset));
            assert!(more.contains(less), "{asset:?}: {party:?} can do {less:?}, {stronger:?} only {more:?}");
        }
    }
    for party in Party::ALL {
        let registers = model.powers(party, Asset::Registers);
        let memory = model.powers(party, Asset::PrivateMemory);
        if registers.contains(Powers::READ | Powers::WRITE) {
            let reaches = memory.intersects(Powers::STEER) || memory.contains(Powers::READ | Powers::WRITE);
            assert!(reaches, "{party:?} sets registers at will, and so has the guest read its memory: {memory:?}");
        }
    }
    Verdict::Met
}

/// What the VMM can do to `asset`.
fn of_vmm<P: Platform>(bench: &Bench<'_, P>, asset: Asset) -> Powers {
    bench.platform.trust_model().powers(Party::VmmProcess, asset)
}

fn registers<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const SECRET: u64 = 0x5ec2_e75e_c2e7_5ec2;
    let mut guest = bench.guest(bench.config(1), |a| {
        a.mov(r9, SECRET)?;
        a.mov(eax, 0x77u32)?;
        a.report()?;
        a.end(0)
    });
    let read = |guest: &crate::Guest<_>| -> Vec<_> {
        let vcpus: &[<crate::VmOf<P> as Vm>::Vcpu] = &guest.vcpus;
        let read = |register| vcpus[0].register(register).unwrap_or_else(|error| panic!("{}", quality::told(&error)));
        Register::ALL.into_iter().map(|register| (register, read(register))).collect()
    };
    let before = read(&guest);
    let sees = before.iter().all(|(_, value)| matches!(value, RegisterRead::Visible(_)));
    assert!(!sees || of_vmm(bench, Asset::Registers).contains(Powers::READ), "registers are shown against the model");
    assert_eq!(guest.report(), 0x77);
    let at_exit = read(&guest);
    guest.end();
    for (register, value) in [before, at_exit.clone(), read(&guest)].into_iter().flatten() {
        assert_eq!(matches!(value, RegisterRead::Visible(_)), sees, "{register:?} is {value:?}");
        let told = matches!(value, RegisterRead::Visible(SECRET) | RegisterRead::Exposed(SECRET));
        assert!(sees || !told, "{register:?} has what no exit exposes");
    }
    let secret = at_exit.iter().find(|(register, _)| *register == Register::R9).expect("a register").1;
    assert_eq!(secret, if sees { RegisterRead::Visible(SECRET) } else { RegisterRead::Hidden });
    Verdict::Met
}

/// By how much each word is to be more than the one before, in pages that guests fill: another number each time, so that nothing
/// of an earlier guest is taken for this one's. Nobody but guests makes such words.
fn new_step() -> u64 {
    static MADE: AtomicU64 = AtomicU64::new(0);
    0x9e37_79b9_7f4a_7c15u64.wrapping_mul(2 * MADE.fetch_add(1, Ordering::Relaxed) + 1)
}

/// How many words in a row are no coincidence.
const RUN: usize = 8;

/// Fills the page at `gpa`.
fn fill(a: &mut crate::guest::Assembler, gpa: u64, side: Side, step: u64) -> Result<(), IcedError> {
    let address = a.address(gpa, side);
    a.mov(rbx, address)?;
    a.mov(rcx, step)?;
    a.mov(eax, 1u32)?;
    a.mov(r8d, (PAGE_SIZE / 8) as u32)?;
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.mov(qword_ptr(rbx), rax)?;
    a.add(rax, rcx)?;
    a.add(rbx, 8)?;
    a.dec(r8d)?;
    a.jne(again)
}

/// Whether the first words of any page of this process are such; what is mapped from programs cannot be.
fn has_words(step: u64) -> io::Result<bool> {
    let memory = File::open("/proc/self/mem")?;
    let mut chunk = vec![0; 1 << 16];
    for line in fs::read_to_string("/proc/self/maps")?.lines() {
        let Some((bounds, rest)) = line.split_once(' ') else { continue };
        let is_of_program = matches!(rest.as_bytes(), [_, b'-', _, b'p', ..]) && rest.contains('/');
        let number = |text| u64::from_str_radix(text, 16).ok();
        let bounds = bounds.split_once('-').and_then(|(start, end)| number(start).zip(number(end)));
        let Some((mut next, end)) = bounds.filter(|_| rest.starts_with('r') && !is_of_program) else { continue };
        while next < end {
            let len = chunk.len().min((end - next) as usize);
            // What nobody can read is left out, page by page.
            let read = memory.read_at(&mut chunk[..len], next).unwrap_or_default();
            if chunk[..read].chunks(PAGE_SIZE as usize).any(|page| are_words(page, step)) {
                return Ok(true);
            }
            next += if read == 0 { PAGE_SIZE } else { read as u64 };
        }
    }
    Ok(false)
}

/// Whether a page begins with words like that: it may be a copy that lies elsewhere in its page.
fn are_words(page: &[u8], step: u64) -> bool {
    let mut words = page.chunks_exact(8).take(RUN).filter_map(|word| word.try_into().ok().map(u64::from_ne_bytes));
    let Some(mut last) = words.next() else { return false };
    words.all(|word| word == std::mem::replace(&mut last, word).wrapping_add(step))
}

fn memory<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const PAGES: u64 = 16;
    let (private, shared) = (new_step(), new_step());
    let mut guest = bench.guest(bench.config(1), |a| {
        for page in 0..PAGES {
            fill(a, DATA + page * PAGE_SIZE, Side::Private, private)?;
        }
        a.convert(DATA + PAGES * PAGE_SIZE, 1, Side::Shared)?;
        fill(a, DATA + PAGES * PAGE_SIZE, Side::Shared, shared)?;
        a.report()?;
        a.end(0)
    });
    const { assert!(DATA + (PAGES + 1) * PAGE_SIZE <= MEMORY) };
    assert_eq!(guest.convert().pages, 1);
    guest.report();
    assert!(has_words(shared).unwrap(), "what is shared is not in the process, or the search finds nothing");
    if !of_vmm(bench, Asset::PrivateMemory).contains(Powers::READ) {
        assert!(!has_words(private).unwrap(), "private memory is in the process that cannot read it");
    }
    guest.end();
    Verdict::Met
}

fn interrupts<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let guest = bench.guest(bench.config(1), |a| a.end(0));
    let harmless = !of_vmm(bench, Asset::Interrupts).intersects(Powers::WRITE | Powers::REMAP | Powers::REPLAY);
    let expected = if harmless { Guarding::Enforced } else { Guarding::Library };
    assert_eq!(guest.vm.guarding(), expected, "the vmm's powers: {:?}", of_vmm(bench, Asset::Interrupts));
    Verdict::Met
}
