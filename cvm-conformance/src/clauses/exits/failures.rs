//! What guests do wrong: it ends one vCPU, and no other notices.

use super::values::DOORBELLS;
use crate::Bench;
use crate::clause::Verdict;
use crate::guest::{Assembler, CODE, DATA, MEMORY, REPORT};
use crate::quality;
use cvm_core::boot::Exits;
use cvm_core::doorbell::{Access, Doorbell, MSR_BASE, PORT_BASE, SPACE, control};
use cvm_core::{Error, PAGE_SIZE, Platform, Side, Vcpu, VmConfig};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// What a vCPU does wrong.
pub(in super::super) type Wrong<'a> = &'a dyn Fn(&mut Assembler) -> Result<(), IcedError>;

/// A guest with a vCPU more than there are `wrongs`: the second and those behind it do one of them each, and fail by it. The
/// first must not notice, and those that failed are over. Returns what they failed with.
pub(in super::super) fn fail_alone<P: Platform>(
    bench: &Bench<'_, P>,
    doorbell: Doorbell,
    wrongs: &[Wrong<'_>],
) -> Vec<Error> {
    let config = VmConfig { doorbell, ..bench.config(wrongs.len() as u32 + 1) };
    let mut guest = bench.guest(config, |a| {
        for (vcpu, wrong) in (1..).zip(wrongs) {
            let mut next = a.create_label();
            a.cmp(edi, vcpu)?;
            a.jne(next)?;
            wrong(a)?;
            a.end(0)?;
            a.set_label(&mut next)?;
        }
        for value in 0..wrongs.len() as u32 {
            a.mov(eax, value)?;
            a.report()?;
        }
        a.end(0)
    });
    let failed = (1..=wrongs.len()).map(|vcpu| {
        let error = match guest.try_run(vcpu) {
            Err(error) => error,
            Ok(exit) => panic!("wrong {vcpu} is an exit: {exit:?}, overdue: {}", guest.is_overdue()),
        };
        for _ in 0..2 {
            let again = guest.try_run(vcpu);
            let is_over = matches!(again, Err(Error::Protocol { vcpu: named, .. }) if named as usize == vcpu);
            assert!(is_over, "wrong {vcpu}: it went on after: {error}; {again:?}");
        }
        let answered = guest.vcpus[vcpu].answer_read(0);
        assert!(matches!(answered, Err(Error::Protocol { .. })), "wrong {vcpu} takes an answer: {answered:?}");
        assert_eq!(guest.report() as usize, vcpu - 1, "the first vcpu noticed wrong {vcpu}");
        quality::assert_good(&error);
        error
    });
    let failed = failed.collect();
    guest.end();
    failed
}

/// That each of `errors` is about the doorbell register that `expected` has at its place.
#[track_caller]
fn assert_unknown(errors: Vec<Error>, expected: &[(u16, Access)]) {
    assert_eq!(errors.len(), expected.len());
    for (index, (error, (register, access))) in (1..).zip(errors.into_iter().zip(expected)) {
        match error {
            Error::UnknownDoorbell { vcpu, register: named, access: how } => {
                assert_eq!((vcpu, named, how), (index, *register, *access));
            }
            other => panic!("register {register:#x} by {access:?}: {other}"),
        }
    }
}

pub(super) fn unknown_doorbells<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    // Between two registers, one that nobody has, the last byte, and known ones used the wrong way around.
    let expected = [
        (control::END + 1, Access::Read),
        (REPORT + 2, Access::Read),
        (0x1fc, Access::Read),
        (SPACE - 1, Access::Read),
        (control::END, Access::Read),
        (control::CONSOLE, Access::Write(0x100)),
        (control::CONVERT, Access::Write(2)),
        (0x1fc, Access::Write(0)),
        (REPORT + 1, Access::Write(7)),
    ];
    let wrongs = expected.map(|(register, access)| {
        move |a: &mut Assembler| match access {
            Access::Read => a.listen(register),
            Access::Write(value) => a.mov(eax, value).and_then(|()| a.ring(register)),
        }
    });
    let wrongs: Vec<Wrong<'_>> = wrongs.iter().map(|wrong| wrong as Wrong<'_>).collect();
    for doorbell in DOORBELLS {
        assert_unknown(fail_alone(bench, doorbell, &wrongs), &expected);
    }
    Verdict::Met
}

pub(super) fn widths<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const PORT: u16 = PORT_BASE + control::CONSOLE;
    let write = |width: u8| move |a: &mut Assembler| a.mov(eax, 0x4433_6665u32).and_then(|()| a.port_out(PORT, width));
    let read = |width: u8| move |a: &mut Assembler| a.port_in(PORT_BASE + REPORT, width);
    let narrow = fail_alone(bench, Doorbell::Port, &[&write(1), &write(2), &read(1), &read(2)]);
    let expected = [
        (control::CONSOLE, Access::Write(0x65)),
        (control::CONSOLE, Access::Write(0x6665)),
        (REPORT, Access::Read),
        (REPORT, Access::Read),
    ];
    assert_unknown(narrow, &expected);
    let write = |register: u16, upper: u32| {
        move |a: &mut Assembler| {
            a.mov(eax, 0x65u32)?;
            a.mov(edx, upper)?;
            a.msr_out(MSR_BASE + u32::from(register))
        }
    };
    let wide = fail_alone(bench, Doorbell::Msr, &[&write(control::CONSOLE, 1), &write(REPORT, 1 << 31)]);
    assert_unknown(wide, &[(control::CONSOLE, Access::Write(0x65)), (REPORT, Access::Write(0x65))]);
    Verdict::Met
}

/// Ports, how many bytes, and whether they are read. Some of these are as many bytes as an access that is no string has.
const STRINGS: [(u16, u32, bool); 5] =
    [(0x1230, 2, true), (0x1230, 3, true), (0x1230, 4, true), (PORT_BASE + REPORT, 4, true), (PORT_BASE, 4, false)];

/// What comes of [`STRINGS`].
fn strings<P: Platform>(bench: &Bench<'_, P>) -> Vec<Error> {
    let wrongs = STRINGS.map(|(port, count, read)| {
        move |a: &mut Assembler| a.string(port, count, if read { DATA } else { CODE }, read)
    });
    let wrongs: Vec<Wrong<'_>> = wrongs.iter().map(|wrong| wrong as Wrong<'_>).collect();
    fail_alone(bench, Doorbell::Port, &wrongs)
}

pub(super) fn string_io<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    for (index, (error, (port, count, read))) in (1..).zip(strings(bench).into_iter().zip(STRINGS)) {
        match error {
            Error::Crashed { vcpu, .. } => assert_eq!(vcpu, index),
            // The bytes may come one by one, like so many instructions.
            Error::UnknownDoorbell { vcpu, access: Access::Write(0..256), .. } if !read => assert_eq!(vcpu, index),
            other => panic!("{count} bytes by port {port:#x}: {other}"),
        }
    }
    Verdict::Met
}

pub(super) fn string_io_by_name<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    for (error, (port, count, read)) in strings(bench).into_iter().zip(STRINGS) {
        match error {
            Error::Crashed { reason, .. } => {
                let is_named = reason.contains("string i/o") && reason.contains(&format!("{port:#x}"));
                assert!(is_named, "{count} bytes by port {port:#x}: {reason}");
            }
            Error::UnknownDoorbell { .. } if !read => {}
            other => panic!("{count} bytes by port {port:#x}: {other}"),
        }
    }
    Verdict::Met
}

/// Far outside memory, and right behind it.
const NOWHERE: [u64; 2] = [0xd000_0010, MEMORY];

/// What comes of reading, writing and jumping to where there is no memory.
fn accesses<P: Platform>(bench: &Bench<'_, P>) -> Vec<Error> {
    let read = |a: &mut Assembler| a.load(NOWHERE[0], Side::Private);
    let write = |a: &mut Assembler| a.store(NOWHERE[1], Side::Private, 1);
    let jump = |a: &mut Assembler| {
        let address = a.address(NOWHERE[1] + PAGE_SIZE, Side::Private);
        a.mov(rax, address)?;
        a.jmp(rax)
    };
    fail_alone(bench, Doorbell::Port, &[&read, &write, &jump])
}

pub(super) fn mmio<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    for (index, error) in (1..).zip(accesses(bench)) {
        match error {
            Error::Crashed { vcpu, .. } | Error::MmioRefused { vcpu, .. } => assert_eq!(vcpu, index),
            other => panic!("{other}"),
        }
    }
    Verdict::Met
}

pub(super) fn mmio_by_address<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let page = |gpa: u64| gpa / PAGE_SIZE;
    // Of a jump not every host says more than that the guest cannot go on.
    for (index, (error, nowhere)) in (1..).zip(accesses(bench).into_iter().zip(NOWHERE)) {
        match error {
            Error::MmioRefused { vcpu, gpa, write } => {
                assert_eq!((vcpu, page(gpa.0)), (index, page(nowhere)));
                assert!(!write || index == 2, "a read is taken for a write");
            }
            other => panic!("{nowhere:#x}: {other}"),
        }
    }
    Verdict::Met
}

pub(super) fn triple_fault<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    // An invalid instruction, a page that is not mapped, and a division by zero: there is no handler for any.
    let invalid = |a: &mut Assembler| a.ud2();
    let unmapped = |a: &mut Assembler| {
        a.mov(rbx, 1u64 << 46)?;
        a.mov(eax, dword_ptr(rbx))
    };
    let divided = |a: &mut Assembler| {
        a.xor(ecx, ecx)?;
        a.div(ecx)
    };
    for (index, error) in (1..).zip(fail_alone(bench, Doorbell::Port, &[&invalid, &unmapped, &divided])) {
        assert!(matches!(&error, Error::Crashed { vcpu, .. } if *vcpu == index), "vcpu {index}: {error}");
    }
    Verdict::Met
}

pub(super) fn terminated<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let launch = bench.platform.launch(bench.config(1)).unwrap_or_else(|error| panic!("{}", quality::told(&error)));
    let exits = launch.interface().exits;
    drop(launch);
    if exits == Exits::Direct {
        return Verdict::NotOffered("a guest whose exits are direct has no call to give up by".into());
    }
    let by_msr = |a: &mut Assembler| a.terminate(3, 0x42);
    let by_page = |a: &mut Assembler| a.terminate_by_page(3, 0x42);
    let errors = fail_alone(bench, Doorbell::Port, &[&by_msr, &by_page]);
    let said = errors.into_iter().map(|error| match error {
        Error::Terminated { vcpu, reason } => (vcpu, reason),
        other => panic!("{other}"),
    });
    let said: Vec<_> = said.collect();
    assert_eq!(said[0], (1, Some((3, 0x42))));
    // Not every host is told of what the page says.
    assert!([(2, None), (2, Some((3, 0x42)))].contains(&said[1]), "{said:?}");
    Verdict::Met
}
