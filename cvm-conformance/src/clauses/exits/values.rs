//! What exits show.

use super::UNKNOWN_MSR;
use crate::Bench;
use crate::clause::Verdict;
use crate::guest::REPORT;
use cvm_core::doorbell::{DEVICE_SPACE, Doorbell, MAX_DEVICES, MSR_BASE, PORT_BASE, SPACE, control, device_base};
use cvm_core::{Exit, InterruptController, Platform, Vcpu, VmConfig};
use iced_x86::code_asm::*;

/// What reads are answered with: each byte is another one.
const ANSWER: u64 = 0x8877_6655_4433_2211;

/// Both doorbells.
pub(super) const DOORBELLS: [Doorbell; 2] = [Doorbell::Port, Doorbell::Msr];

pub(super) fn console<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const TEXT: &[u8] = b"hi\0\x80\xff\n";
    for doorbell in DOORBELLS {
        let mut guest = bench.guest(VmConfig { doorbell, ..bench.config(1) }, |a| {
            for byte in TEXT {
                a.mov(eax, u32::from(*byte))?;
                a.ring(control::CONSOLE)?;
            }
            a.end(0)
        });
        for byte in TEXT {
            assert_eq!(guest.run(), Exit::Console(*byte), "{doorbell:?}");
        }
        guest.end();
    }
    Verdict::Met
}

pub(super) fn end<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const CODES: [u32; 4] = [0, 42, 0x8000_0000, u32::MAX];
    // Each vCPU ends for itself.
    let mut guest = bench.guest(bench.config(CODES.len() as u32), |a| {
        for (vcpu, code) in (0..).zip(CODES) {
            let mut next = a.create_label();
            a.cmp(edi, vcpu)?;
            a.jne(next)?;
            a.end(code)?;
            a.set_label(&mut next)?;
        }
        a.nop()
    });
    for (vcpu, code) in CODES.into_iter().enumerate() {
        assert_eq!(guest.try_run(vcpu).unwrap(), Exit::Ended { code }, "vcpu {vcpu}");
    }
    Verdict::Met
}

pub(super) fn registers_of_32_bits<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    const LAST: u16 = device_base(MAX_DEVICES - 1) + DEVICE_SPACE - 4;
    for doorbell in DOORBELLS {
        let mut guest = bench.guest(VmConfig { doorbell, ..bench.config(1) }, |a| {
            for register in [REPORT, LAST] {
                a.mov(rax, u64::MAX)?;
                a.ring(register)?;
            }
            for register in [REPORT, LAST] {
                a.mov(rax, u64::MAX)?;
                a.mov(rdx, u64::MAX)?;
                a.listen(register)?;
                if a.is_by_port() {
                    // Like the upper half of an MSR.
                    a.mov(rdx, rax)?;
                    a.shr(rdx, 32)?;
                }
                a.msr_out(UNKNOWN_MSR)?;
            }
            a.end(0)
        });
        for register in [REPORT, LAST] {
            assert_eq!(guest.run(), Exit::DoorbellWrite { register, value: u32::MAX }, "{doorbell:?}");
        }
        for register in [REPORT, LAST] {
            assert_eq!(guest.run(), Exit::DoorbellRead { register }, "{doorbell:?}");
            guest.vcpus[0].answer_read(ANSWER).unwrap();
            let read = Exit::MsrWrite { index: UNKNOWN_MSR, value: ANSWER & 0xffff_ffff };
            assert_eq!(guest.run(), read, "the guest read more than there is of {register:#x} by {doorbell:?}");
        }
        guest.end();
    }
    Verdict::Met
}

pub(super) fn ports<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    // One that PCs have behind a controller, one in the wild, and next to the doorbells on both sides.
    let ports = [0x61, 0x1230, PORT_BASE - 4, PORT_BASE + SPACE];
    let mut guest = bench.guest(bench.config(1), |a| {
        for port in ports {
            for width in [1, 2, 4] {
                a.mov(rax, u64::MAX)?;
                a.port_in(port, width)?;
                a.mov(r12, rax)?;
                a.port_out(port, width)?;
                a.mov(rax, r12)?;
                a.report()?;
                a.mov(rax, r12)?;
                a.shr(rax, 32)?;
                a.report()?;
            }
        }
        a.end(0)
    });
    for port in ports {
        for (width, value, whole) in [
            (1, 0x11, 0xffff_ffff_ffff_ff11u64),
            (2, 0x2211, 0xffff_ffff_ffff_2211),
            // 32-bit results clear the upper half.
            (4, 0x4433_2211, 0x0000_0000_4433_2211),
        ] {
            assert_eq!(guest.run(), Exit::PortRead { port, width });
            guest.vcpus[0].answer_read(ANSWER).unwrap();
            assert_eq!(guest.run(), Exit::PortWrite { port, width, value });
            let read = [guest.report(), guest.report()];
            assert_eq!(read, [whole as u32, (whole >> 32) as u32], "{width} bytes from port {port:#x}");
        }
    }
    guest.end();
    Verdict::Met
}

pub(super) fn msrs<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    let msrs = [UNKNOWN_MSR, MSR_BASE - 1, MSR_BASE + u32::from(SPACE)];
    let mut guest = bench.guest(bench.config(1), |a| {
        for index in msrs {
            a.msr_in(index)?;
            a.msr_out(index)?;
        }
        a.end(0)
    });
    for index in msrs {
        assert_eq!(guest.run(), Exit::MsrRead { index });
        guest.vcpus[0].answer_read(ANSWER).unwrap();
        assert_eq!(guest.run(), Exit::MsrWrite { index, value: ANSWER });
    }
    guest.end();
    Verdict::Met
}

pub(super) fn nobody_elses_ports<P: Platform>(bench: &Bench<'_, P>) -> Verdict {
    // Interrupt controllers, timer, speaker, clock, the I/O delay, a serial port, an ELCR, PCI's configuration.
    const PORTS: [u16; 10] = [0x20, 0x40, 0x43, 0x61, 0x70, 0x80, 0xa1, 0x3f8, 0x4d0, 0xcf8];
    // Kernels that emulate local APICs may offer to emulate these too.
    let config = VmConfig { interrupt_controller: InterruptController::Apic, ..bench.config(1) };
    let mut guest = bench.guest(config, |a| {
        for port in PORTS {
            a.mov(eax, u32::from(port) & 0xff)?;
            a.port_out(port, 1)?;
            a.port_in(port, 1)?;
        }
        a.end(0)
    });
    for port in PORTS {
        assert_eq!(guest.run(), Exit::PortWrite { port, width: 1, value: u32::from(port) & 0xff });
        assert_eq!(guest.run(), Exit::PortRead { port, width: 1 });
        guest.vcpus[0].answer_read(0).unwrap();
    }
    guest.end();
    Verdict::Met
}
