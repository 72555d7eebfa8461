//! Chapter 2: what the trusted entity reports of a launch.

use super::measurement::{Twist, config, submit};
use crate::clause::{Clause, Verdict};
use crate::entity::{Rehearsed, Report, TrustedEntity};
use crate::{Bench, quality};
use cvm_core::boot::Interface;
use cvm_core::doorbell::{Doorbell, Transport};
use cvm_core::interrupt::InterruptPolicy;
use cvm_core::{Error, InterruptController, Platform, Policy, VmConfig};
use std::num::NonZeroU32;

/// No launch may be sealed between one and the question for it, so each of them has the process for itself.
pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("2.14", "the trusted entity reports what a rehearsal predicts", predicted).alone(),
        Clause::new("2.15", "other contents change what the trusted entity reports", contents).alone(),
        Clause::new("2.16", "another address of a page changes what the trusted entity reports", address).alone(),
        Clause::new("2.17", "another initial vCPU state changes what the trusted entity reports", state).alone(),
        Clause::new("2.18", "every field of the configuration changes what the trusted entity reports", fields).alone(),
    ]
}

const NOBODY: &str = "nobody but the library in the vmm's process measures a launch, or the suite cannot ask who does";

/// What guests would run: the same bytes whatever the configuration, so that nothing but that differs. No guest runs here.
const CODE: [u8; 64] = [0xf4; 64];

/// Launches with this configuration and twist, and what the trusted entity reports then. It is compared with what a rehearsal
/// predicts each time.
fn report<P: Platform>(
    bench: &Bench<'_, P>,
    entity: &dyn TrustedEntity<P>,
    config: VmConfig,
    twist: Twist,
) -> Result<(Report, Interface), Error> {
    let mut launch = bench.platform.launch(config.clone())?;
    let interface = *launch.interface();
    submit(&mut launch, &CODE, twist)?;
    let vm = launch.seal()?;
    let reported = entity.reported(&vm).unwrap_or_else(|error| panic!("the trusted entity cannot be asked: {error}"));
    let rehearsed = Rehearsed::new(config, interface, |launch| submit(launch, &CODE, twist));
    let predicted = entity.predicted(bench.platform, &rehearsed).unwrap_or_else(|error| panic!("{twist:?}: {error}"));
    assert_eq!(reported, predicted, "{twist:?}: what is reported, and what was predicted");
    Ok((reported, interface))
}

fn told(error: &Error) -> String {
    quality::told(error)
}

fn predicted<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let Some(entity) = bench.trusted_entity else { return Verdict::NotOffered(NOBODY.into()) };
    let launch =
        || report(bench, entity, config(bench), Twist::State).unwrap_or_else(|error| panic!("{}", told(&error)));
    let (first, interface) = launch();
    assert_eq!(launch().0, first, "the same launch is measured otherwise");
    // A rehearsal of something else does not predict it.
    let other = Rehearsed::new(config(bench), interface, |launch| submit(launch, &CODE, Twist::Contents));
    let other = entity.predicted(bench.platform, &other).expect("a launch like the other");
    assert_ne!(other.measurement, first.measurement);
    assert_eq!(other.host_data, first.host_data);
    Verdict::Met
}

/// Compares the measurements of launches with these twists.
fn twisted<P: Platform>(bench: &Bench<'_, P>, twists: &[Twist]) -> Verdict {
    let Some(entity) = bench.trusted_entity else { return Verdict::NotOffered(NOBODY.into()) };
    let mut measured: Vec<(Twist, String)> = Vec::new();
    for twist in twists {
        match report(bench, entity, config(bench), *twist) {
            Ok((report, _)) => measured.push((*twist, report.measurement)),
            // 2.7 has what is said of it.
            Err(Error::Backend { .. }) if *twist == Twist::Unmeasured => {}
            Err(error) => panic!("{twist:?}: {}", told(&error)),
        }
    }
    for (index, (twist, measurement)) in measured.iter().enumerate() {
        if let Some((other, _)) = measured[..index].iter().find(|(_, earlier)| earlier == measurement) {
            return Verdict::NotOffered(format!("these launches are measured alike: {twist:?}, and {other:?}"));
        }
    }
    Verdict::Met
}

fn contents<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    use Twist::{Argument, Contents, LastByte, LessZeros, NoZeros, Order, Unmeasured};
    twisted(bench, &[Twist::None, Contents, LastByte, Order, Unmeasured, LessZeros, NoZeros, Argument])
}

fn address<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    twisted(bench, &[Twist::None, Twist::Address])
}

fn state<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    // Both load the page tables themselves, so that they differ in the state alone.
    twisted(bench, &[Twist::StateOrder, Twist::State])
}

/// Other configurations than `base`, by the field that differs.
fn others(base: &VmConfig) -> Vec<(&'static str, Vec<VmConfig>)> {
    // No `..` here: a field that is added has to be tried too.
    let VmConfig { memory, vcpus, interrupts, interrupt_controller: _, policy: _, doorbell: _, transport: _ } = base;
    let with_interrupts = |interrupts| VmConfig { interrupts, ..base.clone() };
    let accepting = |vector| interrupts.accept(vector).expect("no exception's vector");
    let level = InterruptPolicy::default().accept_level(0x41).expect("no exception's vector");
    let less = memory.iter().filter(|slot| **slot != super::range(super::BORDER, 4)).copied();
    vec![
        (
            "memory",
            vec![
                VmConfig { memory: memory.iter().rev().copied().collect(), ..base.clone() },
                VmConfig { memory: less.chain([super::range(super::BORDER, 5)]).collect(), ..base.clone() },
            ],
        ),
        ("vcpus", vec![VmConfig { vcpus: vcpus + 1, ..base.clone() }]),
        (
            "interrupts",
            vec![
                with_interrupts(InterruptPolicy::default()),
                with_interrupts(accepting(0x42)),
                with_interrupts(interrupts.limit(NonZeroU32::MIN)),
                with_interrupts(level),
            ],
        ),
        ("interrupt_controller", vec![VmConfig { interrupt_controller: InterruptController::Apic, ..base.clone() }]),
        ("policy", Policy::all().iter().map(|policy| VmConfig { policy, ..base.clone() }).collect()),
        ("doorbell", vec![VmConfig { doorbell: Doorbell::Port, ..base.clone() }]),
        (
            "transport",
            [Transport::Doorbell, Transport::Hypercall, Transport::PageState]
                .map(|wish| VmConfig { transport: Some(wish), ..base.clone() })
                .to_vec(),
        ),
    ]
}

fn fields<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let Some(entity) = bench.trusted_entity else { return Verdict::NotOffered(NOBODY.into()) };
    let base = config(bench);
    let (first, interface) =
        report(bench, entity, base.clone(), Twist::None).unwrap_or_else(|error| panic!("{}", told(&error)));
    let mut reports = vec![("nothing".to_owned(), first)];
    for (field, configs) in others(&base) {
        let mut tried = 0;
        for other in configs {
            // A wish for what the platform chooses anyway is no other launch.
            if other.transport == Some(interface.transport) {
                continue;
            }
            let what = format!("{field}: {other:?}");
            match report(bench, entity, other, Twist::None) {
                Ok((report, _)) => reports.push((what, report)),
                // What no guest can have here is nothing that could be hidden from its owner.
                Err(Error::Config(_)) => continue,
                Err(error) => panic!("{what}: {}", told(&error)),
            }
            tried += 1;
        }
        let is_optional = matches!(field, "interrupt_controller" | "policy" | "transport");
        assert!(tried > 0 || is_optional, "no other {field} was tried");
    }
    for (index, (what, report)) in reports.iter().enumerate() {
        for (other, earlier) in &reports[..index] {
            assert_ne!(report.measurement, earlier.measurement, "these are measured alike: {what}, and {other}");
            let differs = report.host_data.is_none() || report.host_data != earlier.host_data;
            assert!(differs, "these have the same host data: {what}, and {other}");
        }
    }
    Verdict::Met
}

#[cfg(test)]
mod tests {
    use super::*;
    use cvm_core::{Gpa, Launch, PAGE_SIZE, PageKind};

    #[test]
    fn what_is_recorded_has_the_transcript_of_a_rehearsal_and_the_contents_of_its_pages() {
        let config = VmConfig::new(16 * PAGE_SIZE, 1).unwrap();
        let interface = Interface::from(Transport::Doorbell);
        let recorded = Rehearsed::new(config.clone(), interface, |launch| {
            launch.load(Gpa(0x1000), &[7; 5], PageKind::Measured)?;
            launch.start_in_long_mode(Gpa(0x1000), Gpa(0x4000), Gpa(0x2000))
        });
        let mut rehearsed = Launch::rehearse(config, interface).unwrap();
        rehearsed.load(Gpa(0x1000), &[7; 5], PageKind::Measured).unwrap();
        rehearsed.start_in_long_mode(Gpa(0x1000), Gpa(0x4000), Gpa(0x2000)).unwrap();
        assert_eq!(recorded.transcript, rehearsed.transcript().unwrap());
        assert_eq!(recorded.page(Gpa(0x1000)).unwrap()[..6], [7, 7, 7, 7, 7, 0]);
        assert!(recorded.page(Gpa(0)).is_none());
    }
}
