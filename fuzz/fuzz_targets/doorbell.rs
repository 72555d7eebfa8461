//! What a guest writes to and reads from its doorbell registers, against what it has to come to.

#![no_main]

use cvm_core::doorbell::{Access, Registers, Ring, SPACE, control, device_of};
use cvm_core::{Answer, ConversionRequest, Error, Exit, Gpa, PAGE_SIZE, Side, Trigger};
use libfuzzer_sys::fuzz_target;

const VCPU: u32 = 5;
const ANSWERS: [Answer; 3] = [Answer::Done, Answer::Invalid, Answer::Retry];

fuzz_target!(|bytes: &[u8]| {
    let mut registers = Registers::new(VCPU);
    let (mut frame, mut pages, mut answer) = (0u32, 0u32, Answer::Invalid);
    for step in bytes.as_chunks::<7>().0 {
        let [what, a, b, value @ ..] = *step;
        let (register, value) = (u16::from_le_bytes([a, b]), u32::from_le_bytes(value));
        if let Some(given) = ANSWERS.get(usize::from(what >> 1)) {
            answer = *given;
            // Some pages on, or what is no place on the way.
            let reached = u64::from(frame).wrapping_add(value.cast_signed() as u64);
            registers.answer(answer, Gpa(reached.wrapping_mul(PAGE_SIZE)));
            let done = (reached.wrapping_mul(PAGE_SIZE) / PAGE_SIZE).checked_sub(frame.into());
            if let Some(done) = done.filter(|done| answer == Answer::Retry && *done < u64::from(pages))
                && let Some(next) = u64::from(frame).checked_add(done).and_then(|next| u32::try_from(next).ok())
            {
                (frame, pages) = (next, pages - done as u32);
            }
        }
        let access = if what & 1 == 0 { Access::Read } else { Access::Write(value) };
        let is_device = register < SPACE && register.is_multiple_of(4) && device_of(register).is_some();
        match (registers.access(register, access), access) {
            (Err(Error::UnknownDoorbell { vcpu: VCPU, register: named, access: tried }), _) => {
                assert!(!is_device && (named, tried) == (register, access));
            }
            (Ok(Ring::Exit(Exit::DoorbellRead { register: named })), Access::Read) => {
                assert!(is_device && named == register);
            }
            (Ok(Ring::Exit(Exit::DoorbellWrite { register: named, value: written })), Access::Write(_)) => {
                assert!(is_device && (named, written) == (register, value));
            }
            (Ok(Ring::Value(read)), Access::Read) => {
                assert_eq!((register, read), (control::CONVERT, answer as u32));
            }
            (Ok(Ring::Latched), Access::Write(_)) => match register {
                control::CONVERT_FRAME => frame = value,
                control::CONVERT_PAGES => pages = value,
                other => panic!("{other:#x} is latched"),
            },
            (Ok(Ring::Accept(vector, trigger)), Access::Write(_)) => {
                let level = if trigger == Trigger::Level { control::ACCEPT_LEVEL } else { 0 };
                assert!(register == control::ACCEPT && u32::from(vector) | level == value && vector >= 32);
            }
            (Ok(Ring::Exit(Exit::Conversion(request))), Access::Write(_)) => {
                let to = Side::from_u32(value).expect("there is such a side");
                let asked = ConversionRequest::from_guest(VCPU, u64::from(frame) * PAGE_SIZE, pages.into(), to);
                assert_eq!((register, request), (control::CONVERT, asked));
            }
            (Ok(Ring::Exit(Exit::Console(byte))), Access::Write(_)) => {
                assert_eq!((register, u32::from(byte)), (control::CONSOLE, value));
            }
            (Ok(Ring::Exit(Exit::Ended { code })), Access::Write(_)) => {
                assert_eq!((register, code), (control::END, value));
            }
            (outcome, access) => panic!("{access:?} of {register:#x}: {outcome:?}"),
        }
    }
});
