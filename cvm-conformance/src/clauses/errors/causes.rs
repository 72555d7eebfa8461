//! What a VMM asks for, and does not get.

use super::assert_says;
use crate::Bench;
use crate::clause::Verdict;
use crate::guest::{DATA, MEMORY, REPORT};
use crate::vmm::range;
use cvm_core::doorbell::control;
use cvm_core::interrupt::Refusal;
use cvm_core::{
    Answer, ConversionListener, ConversionRequest, Error, Event, Exit, GpaRange, InterruptController, Objection,
    PAGE_SIZE, Platform, Side, Vcpu, Vm, VmConfig,
};
use std::error::Error as _;
use std::sync::{Arc, Mutex};
use vm_memory::GuestAddressSpace;

/// Objects as it is told to, once.
#[derive(Default)]
struct Objector(Mutex<Option<Objection>>);

impl ConversionListener for Objector {
    fn name(&self) -> &str {
        "the objector"
    }

    fn prepare(&self, _range: GpaRange, _to: Side) -> Result<(), Objection> {
        self.0.lock().unwrap().take().map_or(Ok(()), Err)
    }

    fn committed(&self, _range: GpaRange, _to: Side) {}

    fn aborted(&self, _range: GpaRange, _to: Side) {}

    fn poisoned(&self, _range: GpaRange) {}
}

pub(super) fn conversions<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(1), |a| {
        // Nothing is there that could be given up.
        a.ask(MEMORY, 1, Side::Shared)?;
        for _ in 0..3 {
            a.convert(DATA, 1, Side::Shared)?;
        }
        for _ in 0..2 {
            a.convert(DATA, 1, Side::Private)?;
        }
        a.end(0)
    });
    let objector = Arc::new(Objector::default());
    guest.vm.add_listener(Arc::clone(&objector) as _);
    let object = |objection| *objector.0.lock().unwrap() = Some(objection);
    // Runs the guest up to its request, and says why that is not carried out.
    let refused = |guest: &mut crate::Guest<crate::VmOf<P>>, answer: Answer, words: &[&str], is: fn(&Error) -> bool| {
        let request = guest.request();
        let conversion = guest.vm.convert(&request);
        let error = conversion.cause().expect("a reason");
        let words: Vec<_> = words.iter().map(ToString::to_string).collect();
        assert_says(error, &words);
        assert!(is(error), "{error:?}");
        assert_eq!((conversion.answer(), conversion.pages()), (answer, 0), "{error}");
        guest.vcpus[0].answer_conversion(conversion).unwrap();
    };
    const RANGE: &str = "0x300000..0x301000";
    assert_eq!(range(DATA, 1).to_string(), RANGE);

    let conversion = guest.vm.convert(&ConversionRequest::from_guest(0, DATA, 1, Side::Shared));
    let error = conversion.cause().expect("a reason");
    assert!(matches!(error, Error::NotAsked { vcpu: 0, gpa } if gpa.0 == DATA), "{error:?}");
    assert_says(error, &["vcpu 0 ".into(), format!("{DATA:#x}")]);

    refused(
        &mut guest,
        Answer::Invalid,
        &["0x400000"],
        |error| matches!(error, Error::OutsideMemory { gpa } if gpa.0 == MEMORY),
    );
    object(Objection::Refuse("it does not like it".into()));
    refused(
        &mut guest,
        Answer::Invalid,
        &["the objector", RANGE, "it does not like it"],
        |error| matches!(error, Error::ListenerRefuses { range, .. } if range.start().0 == DATA && range.pages() == 1),
    );
    object(Objection::Wait("it is busy".into()));
    refused(
        &mut guest,
        Answer::Retry,
        &["the objector", RANGE, "it is busy"],
        |error| matches!(error, Error::ListenerWaits { range, .. } if range.start().0 == DATA && range.pages() == 1),
    );
    assert_eq!(guest.convert().answer, Answer::Done);
    let view = guest.vm.memory().named("the device");
    let pinned = view.memory();
    refused(
        &mut guest,
        Answer::Retry,
        &["the device", RANGE],
        |error| matches!(error, Error::Pinned { range, .. } if range.start().0 == DATA && range.pages() == 1),
    );
    drop(pinned);
    assert_eq!(guest.convert().answer, Answer::Done);
    guest.end();
    Verdict::Met
}

pub(super) fn notifications<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(2), |a| a.end(0));
    for (event, why) in [
        (Event::Interrupt(0x41), Refusal::NotAccepted),
        (Event::Interrupt(13), Refusal::Reserved),
        (Event::Line { vector: 0x41, asserted: true }, Refusal::NotAccepted),
    ] {
        let error = guest.vcpus[1].inject(event).unwrap_err();
        let said = matches!(&error, Error::InjectionRefused { vcpu: 1, event: named, reason } if (*named, *reason) == (event, why));
        assert!(said, "{event}: {error:?}");
        assert_says(&error, &["vcpu 1: ".into(), event.to_string(), why.to_string()]);
    }
    for error in [
        guest.vm.doorbell_fd(control::END).unwrap_err(),
        guest.vm.doorbell_fd(REPORT + 1).unwrap_err(),
        guest.vm.interrupt_fd(0, 0x41).unwrap_err(),
        guest.vm.interrupt_fd(2, 0x41).unwrap_err(),
    ] {
        assert!(matches!(error, Error::NoDescriptor(_) | Error::InjectionRefused { .. }), "{error:?}");
        assert_says(&error, &[]);
    }
    guest.end();
    let interrupt_controller = InterruptController::Apic;
    let mut guest = bench.guest(VmConfig { interrupt_controller, ..bench.config(1) }, |a| a.end(0));
    let error = guest.vm.interrupt_fd(0, 0x41).unwrap_err();
    let said = matches!(error, Error::InjectionRefused { vcpu: 0, event: Event::Interrupt(0x41), .. });
    assert!(said, "{error:?}");
    assert_says(&error, &["vcpu 0: ".into(), Refusal::NotAccepted.to_string()]);
    guest.end();
    Verdict::Met
}

pub(super) fn out_of_order<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(2), |a| {
        a.listen(REPORT)?;
        a.convert(DATA, 1, Side::Shared)?;
        a.ud2()
    });
    let mut said = Vec::new();
    let mut judge = |result: Result<(), Error>| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Protocol { vcpu: 1, problem } if !problem.is_empty()), "{error:?}");
        assert_says(&error, &["vcpu 1: ".into()]);
        assert!(error.source().is_none(), "{error:?}");
        said.push(error.to_string());
    };
    let forged = |vm: &crate::VmOf<P>| vm.convert(&ConversionRequest::from_guest(1, DATA + PAGE_SIZE, 1, Side::Shared));
    judge(guest.vcpus[1].answer_read(0));
    judge(guest.vcpus[1].refuse_conversion());
    assert_eq!(guest.try_run(1).unwrap(), Exit::DoorbellRead { register: REPORT });
    judge(guest.try_run(1).map(drop));
    judge(guest.vcpus[1].refuse_conversion());
    judge(guest.vcpus[1].answer_conversion(forged(&guest.vm)));
    guest.vcpus[1].answer_read(0).unwrap();
    let Exit::Conversion(_) = guest.try_run(1).unwrap() else { panic!("no conversion") };
    judge(guest.vcpus[1].answer_read(0));
    judge(guest.vcpus[1].answer_conversion(forged(&guest.vm)));
    guest.vcpus[1].refuse_conversion().unwrap();
    assert!(matches!(guest.try_run(1), Err(Error::Crashed { vcpu: 1, .. })));
    judge(guest.try_run(1).map(drop));
    // A vCPU that waits for an answer is told from one that is over, and a wrong answer from one too many.
    let different = |one: usize, other: usize| assert_ne!(said[one], said[other]);
    different(2, 7);
    different(0, 5);
    different(4, 6);
    Verdict::Met
}
