//! Exits that wait for an answer.

use super::UNKNOWN_MSR;
use crate::Bench;
use crate::clause::Verdict;
use crate::guest::{DATA, REPORT};
use cvm_core::{Answer, ConversionRequest, Error, Exit, PAGE_SIZE, Platform, Side, Vcpu, Vm};
use iced_x86::code_asm::*;

pub(super) fn each_for_itself<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(3), |a| {
        a.listen(REPORT)?;
        a.add(eax, edi)?;
        a.report()?;
        a.end(0)
    });
    assert!(guest.vm.take_vcpus().is_empty(), "vcpus are handed out twice");
    for (index, vcpu) in (0..).zip(&guest.vcpus) {
        assert_eq!(vcpu.index(), index);
    }
    // All wait at the same time, and hear in another order than they asked in.
    for index in [1, 0, 2] {
        assert_eq!(guest.try_run(index).unwrap(), Exit::DoorbellRead { register: REPORT });
    }
    for index in [2, 1, 0] {
        guest.vcpus[index].answer_read(100 * (index as u64 + 1)).unwrap();
    }
    assert_eq!([2, 0, 1].map(|index| guest.report_of(index)), [302, 100, 201]);
    for index in 0..3 {
        assert_eq!(guest.try_run(index).unwrap(), Exit::Ended { code: 0 });
    }
    Verdict::Met
}

#[track_caller]
pub(super) fn out_of_order<T: std::fmt::Debug>(result: Result<T, Error>) {
    assert!(matches!(result, Err(Error::Protocol { vcpu: 0, .. })), "{result:?}");
}

pub(super) fn once_and_in_kind<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let mut guest = bench.guest(bench.config(1), |a| {
        a.report()?;
        a.listen(REPORT)?;
        a.report()?;
        a.convert(DATA, 1, Side::Shared)?;
        a.report()?;
        // The page is shared already, so there is nothing to give up.
        a.ask(DATA, 1, Side::Shared)?;
        a.report()?;
        for _ in 0..2 {
            a.msr_in(UNKNOWN_MSR)?;
            a.report()?;
            a.port_in(0x1230, 2)?;
        }
        a.end(0)
    });
    // What a conversion that nobody asked for comes to: the wrong answer to everything.
    macro_rules! forged {
        () => {
            guest.vm.convert(&ConversionRequest::from_guest(0, DATA + PAGE_SIZE, 1, Side::Shared))
        };
    }
    macro_rules! nothing_to_answer {
        () => {
            out_of_order(guest.vcpus[0].answer_read(1));
            out_of_order(guest.vcpus[0].answer_conversion(forged!()));
            out_of_order(guest.vcpus[0].refuse_conversion());
        };
    }
    macro_rules! a_value_alone {
        () => {
            out_of_order(guest.try_run(0));
            out_of_order(guest.vcpus[0].answer_conversion(forged!()));
            out_of_order(guest.vcpus[0].refuse_conversion());
            out_of_order(guest.try_run(0));
        };
    }
    nothing_to_answer!();
    guest.report();
    nothing_to_answer!();

    assert_eq!(guest.run(), Exit::DoorbellRead { register: REPORT });
    a_value_alone!();
    guest.vcpus[0].answer_read(5).unwrap();
    nothing_to_answer!();
    assert_eq!(guest.report(), 5, "the first answer is not what the guest read");
    nothing_to_answer!();

    let request = guest.request();
    out_of_order(guest.try_run(0));
    out_of_order(guest.vcpus[0].answer_read(8));
    out_of_order(guest.vcpus[0].answer_conversion(forged!()));
    out_of_order(guest.try_run(0));
    let conversion = guest.vm.convert(&request);
    assert_eq!(conversion.answer(), Answer::Done);
    out_of_order(guest.try_run(0));
    guest.vcpus[0].answer_conversion(conversion).unwrap();
    nothing_to_answer!();
    out_of_order(guest.vcpus[0].answer_conversion(guest.vm.convert(&request)));
    assert_eq!(guest.report(), 0);

    guest.request();
    guest.vcpus[0].refuse_conversion().unwrap();
    nothing_to_answer!();
    assert_ne!(guest.report(), 0, "the guest was told that it is done");

    for answer in [9, 10] {
        assert_eq!(guest.run(), Exit::MsrRead { index: UNKNOWN_MSR });
        a_value_alone!();
        guest.vcpus[0].answer_read(answer).unwrap();
        nothing_to_answer!();
        assert_eq!(u64::from(guest.report()), answer);
        assert_eq!(guest.run(), Exit::PortRead { port: 0x1230, width: 2 });
        a_value_alone!();
        guest.vcpus[0].answer_read(answer).unwrap();
        nothing_to_answer!();
    }
    guest.end();
    Verdict::Met
}
