//! Levels, which only VMs without an interrupt controller have.

use super::guest::{LEVEL, allow, assert_refused, config, halt, interruptible, levels, report_came};
use crate::clause::Verdict;
use crate::subject::Bench;
use cvm_core::interrupt::Refusal;
use cvm_core::{Event, Exit, Platform, Vcpu};
use std::num::NonZeroU32;

const RAISED: Event = Event::Line { vector: LEVEL, asserted: true };
const LOWERED: Event = Event::Line { vector: LEVEL, asserted: false };

pub(super) fn until_lowered<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = interruptible(bench, config(bench, 1, levels()), |a| {
        halt(a)?;
        allow(a)?;
        report_came(a)?;
        allow(a)?;
        report_came(a)?;
        a.end(0)
    });
    assert_eq!(guest.run(), Exit::Halted);
    guest.vcpus[0].inject(RAISED).unwrap();
    // The handler reports each time.
    for came in [0x62, 0x6262, 0x62_6262] {
        assert_eq!(guest.report(), came);
    }
    guest.vcpus[0].inject(LOWERED).unwrap();
    assert_eq!(guest.report(), 0x62_6262, "it came after it was lowered");
    guest.vcpus[0].inject(RAISED).unwrap();
    assert_eq!(guest.report(), 0x6262_6262, "it cannot be raised again");
    guest.vcpus[0].inject(LOWERED).unwrap();
    assert_eq!(guest.report(), 0x6262_6262);
    guest.end();
    Verdict::Met
}

pub(super) fn lowered_before<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = interruptible(bench, config(bench, 1, levels()), |a| {
        report_came(a)?;
        allow(a)?;
        report_came(a)?;
        a.end(0)
    });
    guest.vcpus[0].inject(RAISED).unwrap();
    assert_eq!(guest.report(), 0, "interrupts are off");
    guest.vcpus[0].inject(LOWERED).unwrap();
    assert_eq!(guest.report(), 0);
    guest.end();
    Verdict::Met
}

pub(super) fn limit<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let most = NonZeroU32::new(1).unwrap();
    let mut guest = interruptible(bench, config(bench, 1, levels().limit(most)), |a| {
        allow(a)?;
        report_came(a)?;
        a.end(0)
    });
    let vcpu = &mut guest.vcpus[0];
    // A slow host may have a new second in between.
    let refused = (0..1000).find_map(|_| {
        vcpu.inject(LOWERED).expect("to lower it does not count");
        vcpu.inject(RAISED).err()
    });
    assert_refused::<()>(Err(refused.expect("it never refuses")), 0, RAISED, Refusal::TooMany { most });
    vcpu.inject(LOWERED).expect("it can be lowered whatever the limit");
    assert_eq!(guest.report(), 0);
    guest.end();
    Verdict::Met
}
