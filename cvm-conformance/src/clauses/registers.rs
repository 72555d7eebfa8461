//! Chapter 6: registers.

use super::exits::UNKNOWN_MSR;
use crate::clause::{Clause, Verdict};
use crate::guest::{Assembler, BOOT_PAGE, CODE, DATA, REPORT, TABLES};
use crate::quality;
use crate::{Bench, Guest, VmOf};
use cvm_core::boot::{Exits, Interface};
use cvm_core::doorbell::{Doorbell, MSR_BASE, PORT_BASE, Transport, control};
use cvm_core::platform::{Asset, Party, Powers};
use cvm_core::x86::Register;
use cvm_core::{Exit, PAGE_SIZE, Platform, RegisterRead, Side, Vcpu, Vm, VmConfig};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

pub(super) fn clauses<P: Platform>() -> Vec<Clause<P>> {
    vec![
        Clause::new("6.1", "registers are visible where the trust model says so and nowhere else", as_trusted),
        Clause::new("6.2", "a vCPU that has not run shows its first state or nothing", before_the_first_run),
        Clause::new("6.3", "an exit exposes its operands and nothing else", operands_alone),
        Clause::new("6.4", "what one exit has exposed the next exit hides again", hidden_again),
        Clause::new("6.5", "what registers hold besides is in no exit and in no error", no_secret_in_texts),
    ]
}

/// What a guest keeps in registers that it never hands to anybody.
const SECRET: u64 = 0x5ec2_e75e_c2e7_5ed3;
/// Where, and what of its first state may be forgotten: [`Assembler`] uses the others.
const HOLDERS: [(Register, AsmRegister64); 6] = [
    (Register::Rbp, rbp),
    (Register::Rsp, rsp),
    (Register::R8, r8),
    (Register::R9, r9),
    (Register::R10, r10),
    (Register::R12, r12),
];

fn keep_secret(a: &mut Assembler) -> Result<(), IcedError> {
    HOLDERS.into_iter().try_for_each(|(_, register)| a.mov(register, SECRET))
}

/// Whether the VMM of this guest is shown registers, as the trust model must admit then.
fn sees<P: Platform>(bench: &Bench<'_, P>, guest: &Guest<VmOf<P>>) -> bool {
    let shown = matches!(guest.vcpus[0].register(Register::Rip), Ok(RegisterRead::Visible(_)));
    let powers = bench.platform.trust_model().powers(Party::VmmProcess, Asset::Registers);
    assert!(!shown || powers.contains(Powers::READ), "registers are shown, and the vmm's powers are {powers:?}");
    shown
}

/// What the VMM of the first vCPU can see of each register.
fn look<V: Vm>(guest: &Guest<V>) -> Vec<(Register, RegisterRead)> {
    let read = |register| guest.vcpus[0].register(register).unwrap_or_else(|error| panic!("{}", quality::told(&error)));
    Register::ALL.into_iter().map(|register| (register, read(register))).collect()
}

/// What is not hidden.
fn exposed<V: Vm>(guest: &Guest<V>) -> Vec<(Register, RegisterRead)> {
    look(guest).into_iter().filter(|(_, read)| *read != RegisterRead::Hidden).collect()
}

/// Loads a guest, and says how it finds the platform.
fn start<P: Platform>(
    bench: &Bench<'_, P>,
    config: VmConfig,
    write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
) -> (Guest<VmOf<P>>, Interface) {
    let launch = bench.load(config, write).unwrap_or_else(|error| panic!("{}", quality::told(&error)));
    let interface = *launch.interface();
    (Guest::from_launch(launch), interface)
}

fn as_trusted<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let (mut guest, interface) = start(bench, bench.config(1), |a| {
        keep_secret(a)?;
        a.mov(eax, 0x77u32)?;
        a.report()?;
        a.end(0)
    });
    assert_eq!(guest.report(), 0x77);
    let tables = TABLES | interface.private_bit.map_or(0, |bit| 1 << bit);
    let sees = sees(bench, &guest);
    for (register, read) in look(&guest) {
        match read {
            RegisterRead::Visible(value) if sees => match register {
                Register::Cr3 => assert_eq!(value, tables),
                Register::Rip => assert_eq!(value & !(PAGE_SIZE - 1), CODE),
                Register::Rsi => assert_eq!(value, BOOT_PAGE),
                _ if HOLDERS.iter().any(|(holder, _)| *holder == register) => {
                    assert_eq!(value, SECRET, "{register:?} is another one");
                }
                _ => {}
            },
            RegisterRead::Hidden | RegisterRead::Exposed(_) if !sees => {}
            other => panic!("{register:?} is {other:?}, which is not how other registers are"),
        }
    }
    guest.end();
    Verdict::Met
}

fn before_the_first_run<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let (mut guest, interface) = start(bench, bench.config(2), |a| a.end(0));
    // The second one, whose index is not zero.
    guest.vcpus.remove(0);
    let tables = TABLES | interface.private_bit.map_or(0, |bit| 1 << bit);
    let sees = sees(bench, &guest);
    for (register, read) in look(&guest) {
        if !sees {
            assert_eq!(read, RegisterRead::Hidden, "{register:?} before there was any exit");
            continue;
        }
        let RegisterRead::Visible(value) = read else { panic!("{register:?} is {read:?}") };
        match register {
            Register::Rip => assert_eq!(value, CODE),
            Register::Rdi => assert_eq!(value, 1),
            Register::Rsi => assert_eq!(value, BOOT_PAGE),
            Register::Cr3 => assert_eq!(value, tables),
            Register::Rsp | Register::Rbx | Register::R15 => assert_eq!(value, 0, "{register:?}"),
            _ => {}
        }
    }
    assert_eq!(guest.run(), Exit::Ended { code: 0 });
    Verdict::Met
}

/// The operands of an exit: what a guest had to put into registers for it, and so meant the host to see.
fn operands(exit: &Exit, doorbell: Doorbell, interface: &Interface) -> Vec<(Register, u64)> {
    // A port is an operand where the instruction itself exits, and above 255, where DX alone can name it.
    let port = |port: u16| {
        let by_register = interface.exits == Exits::Direct && port > 0xff;
        by_register.then_some((Register::Rdx, u64::from(port)))
    };
    let ring = |register: u16, value: Option<u32>| {
        let value = value.map(u64::from);
        let mut operands: Vec<_> = value.map(|value| (Register::Rax, value)).into_iter().collect();
        match doorbell {
            Doorbell::Port => operands.extend(port(PORT_BASE + register)),
            Doorbell::Msr => {
                operands.push((Register::Rcx, (MSR_BASE + u32::from(register)).into()));
                operands.extend(value.map(|_| (Register::Rdx, 0)));
            }
        }
        operands
    };
    match exit {
        Exit::Console(byte) => ring(control::CONSOLE, Some(u32::from(*byte))),
        Exit::Ended { code } => ring(control::END, Some(*code)),
        Exit::DoorbellWrite { register, value } => ring(*register, Some(*value)),
        Exit::DoorbellRead { register } => ring(*register, None),
        Exit::PortWrite { port: number, value, .. } => {
            [(Register::Rax, u64::from(*value))].into_iter().chain(port(*number)).collect()
        }
        Exit::PortRead { port: number, .. } => port(*number).into_iter().collect(),
        Exit::MsrWrite { index, value } => {
            vec![(Register::Rcx, (*index).into()), (Register::Rax, value & 0xffff_ffff), (Register::Rdx, value >> 32)]
        }
        Exit::MsrRead { index } => vec![(Register::Rcx, (*index).into())],
        Exit::Conversion(request) => match interface.transport {
            Transport::Doorbell => ring(control::CONVERT, Some(request.to() as u32)),
            // Its number, and bit 4 of the attributes is "encrypted" (Linux Documentation/virt/kvm/x86/hypercalls.rst).
            Transport::Hypercall => vec![
                (Register::Rax, 12),
                (Register::Rbx, request.gpa().0),
                (Register::Rcx, request.pages()),
                (Register::Rdx, if request.to() == Side::Private { 1 << 4 } else { 0 }),
            ],
            // They are in a page, not in registers.
            Transport::PageState => vec![],
        },
        Exit::Halted | Exit::Kicked => vec![],
        other => panic!("{other:?}"),
    }
}

/// That of a vCPU nothing is exposed but the operands of the exit that it has stopped for.
fn assert_exposed<P: Platform>(
    bench: &Bench<'_, P>,
    guest: &Guest<VmOf<P>>,
    exit: &Exit,
    doorbell: Doorbell,
    interface: &Interface,
) {
    if sees(bench, guest) {
        let hidden: Vec<_> = look(guest).into_iter().filter(|(_, read)| !is_visible(read)).collect();
        assert_eq!(hidden, [], "at {exit:?}");
        return;
    }
    let operands = operands(exit, doorbell, interface).into_iter();
    let operands = operands.map(|(register, value)| (register, RegisterRead::Exposed(value)));
    let mut expected: Vec<_> = operands.collect();
    let position = |register: Register| Register::ALL.iter().position(|other| *other == register);
    expected.sort_by_key(|(register, _)| position(*register));
    assert_eq!(exposed(guest), expected, "at {exit:?} by {doorbell:?}");
}

fn is_visible(read: &RegisterRead) -> bool {
    matches!(read, RegisterRead::Visible(_))
}

fn operands_alone<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    for doorbell in [Doorbell::Port, Doorbell::Msr] {
        let (mut guest, interface) = start(bench, VmConfig { doorbell, ..bench.config(1) }, |a| {
            keep_secret(a)?;
            for (port, width) in [(0x1230, 1), (0x1230, 2), (0x1230, 4), (0x80, 1)] {
                a.mov(rax, SECRET)?;
                a.port_out(port, width)?;
                a.mov(rax, SECRET)?;
                a.port_in(port, width)?;
            }
            a.mov(rax, SECRET)?;
            a.mov(rdx, SECRET)?;
            a.msr_out(UNKNOWN_MSR)?;
            a.msr_in(UNKNOWN_MSR)?;
            a.mov(rax, SECRET)?;
            a.report()?;
            a.mov(rax, SECRET)?;
            a.mov(rdx, SECRET)?;
            a.listen(REPORT)?;
            a.mov(eax, 0x41u32)?;
            a.ring(control::CONSOLE)?;
            for side in [Side::Shared, Side::Private] {
                a.convert(DATA, 1, side)?;
            }
            a.end(0x33)
        });
        let (mut seen, mut conversions) = (0, 0);
        loop {
            let exit = guest.run();
            assert_exposed(bench, &guest, &exit, doorbell, &interface);
            seen += 1;
            match exit {
                Exit::PortRead { .. } | Exit::MsrRead { .. } | Exit::DoorbellRead { .. } => {
                    guest.vcpus[0].answer_read(SECRET).unwrap();
                }
                Exit::Conversion(request) => {
                    let conversion = guest.vm.convert(&request);
                    guest.vcpus[0].answer_conversion(conversion).unwrap();
                    conversions += 1;
                }
                Exit::PortWrite { width, value, .. } => {
                    assert_eq!(u64::from(value), SECRET & (u64::MAX >> (64 - 8 * u32::from(width))));
                }
                Exit::Ended { code: 0x33 } => break,
                _ => {}
            }
            // What the host answers it knows already, and what it sees of the guest does not change by it.
            assert_exposed(bench, &guest, &exit, doorbell, &interface);
        }
        assert_eq!((seen, conversions), (16, 2), "exits are missing");
    }
    Verdict::Met
}

fn hidden_again<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let (mut guest, interface) = start(bench, bench.config(1), |a| {
        for _ in 0..2 {
            a.mov(rax, SECRET)?;
            a.report()?;
        }
        a.listen(REPORT)?;
        a.cli()?;
        a.hlt()
    });
    let kicker = guest.vcpus[0].kicker();
    let exit = guest.run();
    assert_eq!(exit, Exit::DoorbellWrite { register: REPORT, value: SECRET as u32 });
    assert_exposed(bench, &guest, &exit, Doorbell::Port, &interface);
    for expected in [
        Exit::Kicked,
        Exit::DoorbellWrite { register: REPORT, value: SECRET as u32 },
        Exit::DoorbellRead { register: REPORT },
        Exit::Kicked,
        Exit::Halted,
        Exit::Kicked,
        Exit::Halted,
    ] {
        if expected == Exit::Kicked {
            kicker.kick();
        }
        let exit = guest.run();
        assert_eq!(exit, expected);
        assert_exposed(bench, &guest, &exit, Doorbell::Port, &interface);
        if let Exit::DoorbellRead { .. } = exit {
            guest.vcpus[0].answer_read(SECRET).unwrap();
        }
    }
    Verdict::Met
}

fn no_secret_in_texts<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let (mut guest, _) = start(bench, bench.config(2), |a| {
        keep_secret(a)?;
        a.mov(rax, SECRET)?;
        a.port_out(0x1230, 1)?;
        a.mov(rax, SECRET)?;
        a.port_in(0x1230, 4)?;
        a.mov(rdx, SECRET)?;
        a.msr_in(UNKNOWN_MSR)?;
        a.convert(DATA, 1, Side::Shared)?;
        a.mov(eax, 0x41u32)?;
        a.report()?;
        a.mov(rax, SECRET)?;
        let mut second = a.create_label();
        a.test(edi, edi)?;
        a.jne(second)?;
        a.ud2()?;
        a.set_label(&mut second)?;
        a.port_in(PORT_BASE + control::END, 1)
    });
    let sees = sees(bench, &guest);
    for vcpu in [0, 1] {
        let error = loop {
            match guest.try_run(vcpu) {
                Ok(exit) => {
                    quality::assert_keeps(&format!("{exit:?}; {exit:x?}"), SECRET);
                    match exit {
                        Exit::PortRead { .. } | Exit::MsrRead { .. } => guest.vcpus[vcpu].answer_read(0).unwrap(),
                        Exit::Conversion(_) => guest.vcpus[vcpu].refuse_conversion().unwrap(),
                        Exit::PortWrite { .. } | Exit::DoorbellWrite { .. } => {}
                        other => panic!("{other:?}"),
                    }
                }
                Err(error) => break error,
            }
        };
        quality::assert_keeps(&format!("{}; {error:?}; {error:x?}", quality::told(&error)), SECRET);
        if !sees {
            // Whatever it failed with, its registers are still the guest's.
            let values = Register::ALL.map(|register| guest.vcpus[vcpu].register(register));
            for value in values.into_iter().flatten() {
                let tells = matches!(value, RegisterRead::Visible(_) | RegisterRead::Exposed(SECRET));
                assert!(!tells, "vcpu {vcpu} shows {value:?} after it has failed");
            }
        }
    }
    Verdict::Met
}
