//! A hostile VMM: what it can do through the contract, and what it finds in its own process.

use crate::find;
use crate::guest::{Command, Keeper, SECRET, SECRET_LEN, SIDE_PAGE};
use crate::outcome::Observed;
use crate::sys;
use cvm::interrupt::InterruptController;
use cvm::kvm::{KvmPlatform, KvmVm};
use cvm::memory::{PageState, ViewError};
use cvm::{Answer, Conversion, ConversionRequest, Error, Event, PAGE_SIZE, Side, Vcpu, Vm};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryError};

/// One attack: each has a guest of its own.
pub type Attack = fn(&KvmPlatform, &mut Keeper) -> Observed;

pub const ATTACKS: &[(&str, Attack)] = &[
    ("view-read", |_, keeper| {
        let mut page = [0; SECRET_LEN];
        let read = keeper.vm.memory().memory().read_slice(&mut page, GuestAddress(SECRET));
        through_view(read)
    }),
    ("view-write", |_, keeper| through_view(keeper.vm.memory().memory().write_obj(0u8, GuestAddress(SECRET)))),
    ("view-straddle", view_straddle),
    ("convert-unasked", |_, keeper| made_up(keeper, ConversionRequest::from_guest(0, SECRET, 1, Side::Shared))),
    ("convert-other", |_, keeper| {
        if keeper.ask(Command::Share).is_err() {
            return Observed::Absent("the guest did not ask".into());
        }
        let observed = made_up(keeper, ConversionRequest::from_guest(0, SECRET, 1, Side::Shared));
        let refused = keeper.vcpu.refuse_conversion().and_then(|()| keeper.finish().map(drop));
        refused.map_or_else(failed, |()| observed)
    }),
    ("convert-vcpu", |_, keeper| {
        let Ok(request) = keeper.ask(Command::Share) else { return Observed::Absent("the guest did not ask".into()) };
        let other = ConversionRequest::from_guest(1, request.gpa().0, request.pages(), request.to());
        let observed = made_up(keeper, other);
        let refused = keeper.vcpu.refuse_conversion().and_then(|()| keeper.finish().map(drop));
        refused.map_or_else(failed, |()| observed)
    }),
    ("convert-again", |_, keeper| {
        let Ok(request) = keeper.ask(Command::Share) else { return Observed::Absent("the guest did not ask".into()) };
        let first = keeper.vm.convert(&request);
        let observed = made_up(keeper, request);
        let answered = keeper.vcpu.answer_conversion(first).and_then(|()| keeper.finish().map(drop));
        answered.map_or_else(failed, |()| observed)
    }),
    ("answer-other", |platform, keeper| {
        let mut other = match Keeper::new(platform, keeper.nonce ^ 1) {
            Ok(other) => other,
            Err(error) => return failed(error),
        };
        let asked = other.ask(Command::Unshare).and_then(|foreign| Ok((foreign, keeper.ask(Command::Share)?)));
        let (foreign, own) = match asked {
            Ok(asked) => asked,
            Err(error) => return failed(error),
        };
        let observed = match keeper.vcpu.answer_conversion(other.vm.convert(&foreign)) {
            Ok(()) => Observed::Got("the guest hears an answer to something else".into()),
            Err(error) => Observed::Refused(kind(&error)),
        };
        let well = keeper.vm.convert(&own);
        let answered = keeper.vcpu.answer_conversion(well).and_then(|()| keeper.finish().map(drop));
        answered.map_or_else(failed, |()| observed)
    }),
    ("answer-foreign", |platform, keeper| {
        // The guest of another VM asks for the same, gets it, and its answer goes to this one.
        let foreign = Keeper::new(platform, keeper.nonce ^ 1).and_then(|mut other| {
            other.command(Command::Share)?;
            let request = other.ask(Command::Unshare)?;
            Ok(other.vm.convert(&request))
        });
        foreign.and_then(|foreign| false_answer(keeper, foreign)).unwrap_or_else(failed)
    }),
    ("answer-stale", |_, keeper| {
        let stale = stale(keeper);
        stale.and_then(|stale| false_answer(keeper, stale)).unwrap_or_else(failed)
    }),
    ("run-unanswered", |_, keeper| match keeper.vcpu.run() {
        Ok(exit) => Observed::Got(format!("{exit:?}")),
        Err(error) => Observed::Refused(kind(&error)),
    }),
    ("inject", inject),
    ("interrupt-fd", |platform, _| interrupt_fd(platform).unwrap_or_else(failed)),
    ("inject-accepted", |platform, keeper| inject_accepted(platform, keeper).unwrap_or_else(failed)),
    ("own-files", |_, keeper| {
        let Ok(open) = find::descriptors(Path::new("/proc/self")) else {
            return Observed::Absent("/proc cannot be read".into());
        };
        let memory = || open.iter().filter(|(_, name)| find::is_memory(name));
        let found = memory().find(|(fd, _)| {
            let own = sys::duplicate(*fd).is_ok_and(|file| find::in_file(&File::from(file), keeper.nonce));
            own || File::open(format!("/proc/self/fd/{fd}")).is_ok_and(|file| find::in_file(&file, keeper.nonce))
        });
        match found {
            Some((_, name)) => Observed::Got(format!("the secret, in {name}")),
            None if memory().next().is_some() => Observed::Refused("not found".into()),
            None => Observed::Absent("there is no file of memory".into()),
        }
    }),
    ("own-mappings", |_, keeper| in_own_memory(keeper, |_| true)),
    ("own-core", |_, keeper| {
        let dumped = dumped();
        in_own_memory(keeper, |mapping| dumped.contains(&mapping.start))
    }),
];

pub fn failed(error: Error) -> Observed {
    Observed::Absent(format!("the attempt itself failed: {error}"))
}

fn through_view(result: Result<(), GuestMemoryError>) -> Observed {
    match result {
        Ok(()) => Observed::Got("a byte of a private page".into()),
        Err(error) => match ViewError::of(&error) {
            Some(ViewError::Private(_)) => Observed::Refused("ViewError::Private".into()),
            _ => Observed::Refused(error.to_string()),
        },
    }
}

/// The variant of an error.
pub fn kind(error: &Error) -> String {
    let text = format!("{error:?}");
    text.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_owned()
}

fn made_up(keeper: &Keeper, request: ConversionRequest) -> Observed {
    let conversion = keeper.vm.convert(&request);
    match conversion.cause() {
        Some(cause) => Observed::Refused(kind(cause)),
        None => Observed::Got("the page is converted".into()),
    }
}

/// A read that begins on a shared page and ends on a private one.
fn view_straddle(_: &KvmPlatform, keeper: &mut Keeper) -> Observed {
    if let Err(error) = keeper.command(Command::Share) {
        return failed(error);
    }
    let mut bytes = [0xee; 64];
    let border = GuestAddress(SIDE_PAGE + PAGE_SIZE - 32);
    let observed = through_view(keeper.vm.memory().memory().read_slice(&mut bytes, border));
    if bytes.iter().any(|byte| *byte != 0xee) { Observed::Got("a part of it".into()) } else { observed }
}

/// A conversion that was carried out, and whose answer the guest did not hear: it was told that it is refused.
fn stale(keeper: &mut Keeper) -> Result<Conversion, Error> {
    keeper.command(Command::Share)?;
    let request = keeper.ask(Command::Unshare)?;
    let stale = keeper.vm.convert(&request);
    keeper.vcpu.refuse_conversion()?;
    keeper.finish()?;
    Ok(stale)
}

/// Gives the guest an answer for a conversion that does not take place now.
fn false_answer(keeper: &mut Keeper, answer: Conversion) -> Result<Observed, Error> {
    keeper.command(Command::Share)?;
    let request = keeper.ask(Command::Unshare)?;
    if let Err(error) = keeper.vcpu.answer_conversion(answer) {
        keeper.vcpu.refuse_conversion()?;
        keeper.finish()?;
        return Ok(Observed::Refused(kind(&error)));
    }
    let heard = keeper.finish()?.answer;
    let state = keeper.vm.memory().map().get(request.gpa());
    Ok(match (heard, state) {
        (Some(answer), Some(PageState::Shared)) if answer == Answer::Done as u32 => {
            Observed::Got("the guest believes that a shared page is private".into())
        }
        other => Observed::Refused(format!("{other:?}")),
    })
}

/// Every event that the guest does not accept.
fn inject(_: &KvmPlatform, keeper: &mut Keeper) -> Observed {
    let line = |vector| Event::Line { vector, asserted: true };
    for event in (0..=255).flat_map(|vector| [Event::Interrupt(vector), line(vector)]) {
        match keeper.vcpu.inject(event) {
            Err(Error::InjectionRefused { .. }) => {}
            Err(error) => return Observed::Refused(format!("{event}: {}", kind(&error))),
            Ok(()) => return Observed::Got(format!("{event} is accepted")),
        }
    }
    Observed::Refused("InjectionRefused".into())
}

/// Every vector, to a guest that accepts three.
fn inject_accepted(platform: &KvmPlatform, _: &mut Keeper) -> Result<Observed, Error> {
    use crate::common::{config, load};
    const ACCEPTED: [u8; 3] = [32, 0x41, 255];
    let mut interrupts = cvm::InterruptPolicy::default();
    for vector in ACCEPTED {
        let accepted = interrupts.accept(vector);
        interrupts = accepted.map_err(|source| Error::Config(source.to_string()))?;
    }
    let mut vm = load(platform, cvm::VmConfig { interrupts, ..config(1) }, |a| a.end(0)).seal()?;
    let mut vcpu = vm.take_vcpus().remove(0);
    let passed: Vec<u8> = (0..=255).filter(|vector| vcpu.inject(Event::Interrupt(*vector)).is_ok()).collect();
    Ok(match passed == ACCEPTED {
        true => Observed::Got("just these".into()),
        false => Observed::Refused(format!("{passed:?}")),
    })
}

/// A descriptor for every vector, of a guest that accepts one.
fn interrupt_fd(platform: &KvmPlatform) -> Result<Observed, Error> {
    let vm = with_apic(platform)?;
    let passed: Vec<u8> = (0..=255).filter(|vector| vm.interrupt_fd(0, *vector).is_ok()).collect();
    Ok(match passed == [ACCEPTED] {
        true => Observed::Got("just that".into()),
        false => Observed::Refused(format!("{passed:?}")),
    })
}

/// The vector that a guest with an APIC accepts.
const ACCEPTED: u8 = 0x41;

/// A VM whose vCPUs have APICs.
pub fn with_apic(platform: &KvmPlatform) -> Result<KvmVm, Error> {
    use crate::common::{config, load};
    let interrupts = cvm::InterruptPolicy::default().accept(ACCEPTED);
    let interrupts = interrupts.map_err(|source| Error::Config(source.to_string()))?;
    let interrupt_controller = InterruptController::Apic;
    load(platform, cvm::VmConfig { interrupts, interrupt_controller, ..config(1) }, |a| a.end(0)).seal()
}

fn in_own_memory(keeper: &Keeper, which: impl Fn(&find::Mapping) -> bool) -> Observed {
    let (Ok(mut mappings), Ok(memory)) = (find::mappings(Path::new("/proc/self")), File::open("/proc/self/mem")) else {
        return Observed::Absent("/proc cannot be read".into());
    };
    mappings.retain(which);
    match find::in_mappings(&mappings, keeper.nonce, |page, at| memory.read_at(page, at)) {
        Some(name) => Observed::Got(format!("the secret, in {name}")),
        None => Observed::Refused("not found".into()),
    }
}

/// Where the mappings begin whose contents a core dump of this process has (core(5), "Controlling which mappings are
/// written").
fn dumped() -> Vec<u64> {
    let filter = fs::read_to_string("/proc/self/coredump_filter").unwrap_or_default();
    let filter = u32::from_str_radix(filter.trim(), 16).unwrap_or(u32::MAX);
    let Ok(text) = fs::read_to_string("/proc/self/smaps") else { return Vec::new() };
    let (mut start, mut starts) = (0, Vec::new());
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
            // Bit 0 is for private mappings, bit 1 for shared ones of anonymous files.
            if !has("dd") && filter >> u32::from(has("sh")) & 1 == 1 {
                starts.push(start);
            }
        } else if let Some(first) = line.split_once('-').and_then(|(first, _)| u64::from_str_radix(first, 16).ok()) {
            start = first;
        }
    }
    starts
}
