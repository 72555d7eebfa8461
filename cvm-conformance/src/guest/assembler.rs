use super::{REPORT, ghcb};
use cvm_core::boot::{Exits, FreshMemory, Interface};
use cvm_core::doorbell::{Doorbell, MSR_BASE, PORT_BASE, Transport, control};
use cvm_core::x86::Register;
use cvm_core::{PAGE_SIZE, Side, x86};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::ops::{Deref, DerefMut};

/// The hypercall for conversions, and what is private in its attributes (Linux Documentation/virt/kvm/x86/hypercalls.rst,
/// `KVM_HC_MAP_GPA_RANGE`).
const MAP_GPA_RANGE: u32 = 12;
const ENCRYPTED: u64 = 1 << 4;

/// An assembler that knows how guests reach their VMM. What it adds to the instructions of `iced_x86` clobbers RAX, RBX, RCX,
/// RDX, R13, R14, R15 and the flags; RDI has to be the vCPU's index, as at the start.
pub struct Assembler {
    pub(super) code: CodeAssembler,
    doorbell: Doorbell,
    pub(super) interface: Interface,
}

impl Deref for Assembler {
    type Target = CodeAssembler;

    fn deref(&self) -> &CodeAssembler {
        &self.code
    }
}

impl DerefMut for Assembler {
    fn deref_mut(&mut self) -> &mut CodeAssembler {
        &mut self.code
    }
}

impl Assembler {
    /// For a guest with this doorbell and interface.
    pub fn new(doorbell: Doorbell, interface: Interface) -> Self {
        let code = CodeAssembler::new(64).expect("64 is a number of bits");
        Self { code, doorbell, interface }
    }

    /// Whether exits go by the page between guest and host.
    pub fn is_by_ghcb(&self) -> bool {
        self.interface.exits == Exits::Ghcb
    }

    /// How the guest and its host work together.
    pub fn interface(&self) -> Interface {
        self.interface
    }

    /// How conversions are asked for.
    pub fn transport(&self) -> Transport {
        self.interface.transport
    }

    /// Whether the guest has to accept memory that was not loaded.
    pub fn accepts(&self) -> bool {
        self.interface.acceptance
    }

    /// Whether memory that was not loaded is usable as it is, and zero.
    pub fn is_all_accepted(&self) -> bool {
        self.interface.is_all_accepted()
    }

    /// What private memory contains that nobody has written to since it became private.
    pub fn fresh_memory(&self) -> FreshMemory {
        self.interface.fresh_memory
    }

    /// Whether the doorbell is a port, so that it has no upper half.
    pub fn is_by_port(&self) -> bool {
        self.doorbell == Doorbell::Port
    }

    /// What a vCPU does first: it makes its way to the host. What [`Bench::load`](crate::Bench::load) loads begins so.
    pub fn begin(&mut self) -> Result<(), IcedError> {
        match (self.interface.exits, self.interface.transport) {
            (Exits::Ghcb, Transport::PageState) => self.make_ghcb(),
            _ => Ok(()),
        }
    }

    /// Writes the low `width` bytes (1, 2 or 4) of EAX to a port.
    pub fn port_out(&mut self, port: u16, width: u8) -> Result<(), IcedError> {
        if self.is_by_ghcb() {
            return self.port_by_ghcb(port, width, false);
        }
        self.mov(edx, u32::from(port))?;
        match width {
            1 => self.out(dx, al),
            2 => self.out(dx, ax),
            _ => self.out(dx, eax),
        }
    }

    /// Reads `width` bytes (1, 2 or 4) from a port into as much of RAX as the instruction would.
    pub fn port_in(&mut self, port: u16, width: u8) -> Result<(), IcedError> {
        if self.is_by_ghcb() {
            return self.port_by_ghcb(port, width, true);
        }
        self.mov(edx, u32::from(port))?;
        match width {
            1 => self.in_(al, dx),
            2 => self.in_(ax, dx),
            _ => self.in_(eax, dx),
        }
    }

    /// Writes EDX and EAX to an MSR that the host answers for.
    pub fn msr_out(&mut self, index: u32) -> Result<(), IcedError> {
        if self.is_by_ghcb() {
            return self.msr_by_ghcb(index, false);
        }
        self.mov(ecx, index)?;
        self.wrmsr()
    }

    /// Reads an MSR that the host answers for into EDX and EAX.
    pub fn msr_in(&mut self, index: u32) -> Result<(), IcedError> {
        if self.is_by_ghcb() {
            return self.msr_by_ghcb(index, true);
        }
        self.mov(ecx, index)?;
        self.rdmsr()
    }

    /// Writes EAX to a doorbell register.
    pub fn ring(&mut self, register: u16) -> Result<(), IcedError> {
        match self.doorbell {
            Doorbell::Port => self.port_out(PORT_BASE + register, 4),
            Doorbell::Msr => {
                self.xor(edx, edx)?;
                self.msr_out(MSR_BASE + u32::from(register))
            }
        }
    }

    /// Reads a doorbell register into EAX.
    pub fn listen(&mut self, register: u16) -> Result<(), IcedError> {
        match self.doorbell {
            Doorbell::Port => self.port_in(PORT_BASE + register, 4),
            Doorbell::Msr => self.msr_in(MSR_BASE + u32::from(register)),
        }
    }

    /// Tells the VMM what is in EAX.
    pub fn report(&mut self) -> Result<(), IcedError> {
        self.ring(REPORT)
    }

    /// Ends the guest with this code.
    pub fn end(&mut self, code: u32) -> Result<(), IcedError> {
        self.mov(eax, code)?;
        self.ring(control::END)
    }

    /// The address by which the guest reaches `gpa` on this side.
    pub fn address(&self, gpa: u64, side: Side) -> u64 {
        match (side, self.interface.private_bit) {
            (Side::Shared, Some(_)) => x86::SHARED_AT + gpa,
            _ => gpa,
        }
    }

    /// Stores a number at `gpa`, on this side.
    pub fn store(&mut self, gpa: u64, side: Side, value: u32) -> Result<(), IcedError> {
        let address = self.address(gpa, side);
        self.mov(rbx, address)?;
        self.mov(dword_ptr(rbx), value)
    }

    /// Loads EAX from `gpa`, on this side.
    pub fn load(&mut self, gpa: u64, side: Side) -> Result<(), IcedError> {
        let address = self.address(gpa, side);
        self.mov(rbx, address)?;
        self.mov(eax, dword_ptr(rbx))
    }

    /// Asks for a conversion of `pages` pages from `gpa` on. EAX is 0 if it was done.
    pub fn convert(&mut self, gpa: u64, pages: u64, to: Side) -> Result<(), IcedError> {
        self.mov(rbx, gpa / PAGE_SIZE)?;
        self.convert_frame(pages, to)
    }

    /// Asks for a conversion of `pages` pages from the page frame in RBX on. EAX is 0 if it was done.
    pub fn convert_frame(&mut self, pages: u64, to: Side) -> Result<(), IcedError> {
        if !self.accepts() {
            return self.ask_frame(pages, to);
        }
        // A page is not valid while it is shared, and guests have no stack before a clause gives them one.
        self.mov(r13, rbx)?;
        if to == Side::Shared {
            self.validate(pages, false)?;
        }
        self.ask_frame(pages, to)?;
        // What is private now, or has stayed so because it was refused, is to be used as such.
        let mut out = self.create_label();
        self.test(eax, eax)?;
        if to == Side::Shared {
            self.je(out)?;
        } else {
            self.jne(out)?;
        }
        self.mov(rbx, r13)?;
        self.validate(pages, true)?;
        self.mov(eax, u32::from(to == Side::Shared))?;
        self.set_label(&mut out)?;
        // A label needs an instruction.
        self.nop()
    }

    /// Asks for a conversion, and does nothing else: the guest gives up no page beforehand and accepts none afterwards, so it
    /// touches those pages only if it sees to that. EAX is 0 if it was done.
    pub fn ask(&mut self, gpa: u64, pages: u64, to: Side) -> Result<(), IcedError> {
        self.mov(rbx, gpa / PAGE_SIZE)?;
        self.ask_frame(pages, to)
    }

    /// Gives up `pages` pages from `gpa` on before they are [asked](Assembler::ask) to be shared.
    pub fn rescind(&mut self, gpa: u64, pages: u64) -> Result<(), IcedError> {
        self.mov(rbx, gpa / PAGE_SIZE)?;
        self.validate(pages, false)
    }

    /// Accepts `pages` pages from `gpa` on, as [`Assembler::accept_frame`].
    pub fn accept(&mut self, gpa: u64, pages: u64) -> Result<(), IcedError> {
        self.mov(rbx, gpa / PAGE_SIZE)?;
        self.accept_frame(pages)
    }

    /// Accepts `pages` pages from the page frame in RBX on: no launch has loaded anything in the large pages that they are in.
    pub fn accept_frame(&mut self, pages: u64) -> Result<(), IcedError> {
        self.validate(pages, true)
    }

    /// The same as [`Assembler::ask`] for the page frame in RBX.
    pub fn ask_frame(&mut self, pages: u64, to: Side) -> Result<(), IcedError> {
        match self.interface.transport {
            Transport::Doorbell => {
                // The registers have 32 bits.
                self.mov(eax, ebx)?;
                self.ring(control::CONVERT_FRAME)?;
                self.mov(eax, pages as u32)?;
                self.ring(control::CONVERT_PAGES)?;
                self.mov(eax, to as u32)?;
                self.ring(control::CONVERT)?;
                self.listen(control::CONVERT)
            }
            Transport::Hypercall => {
                self.shl(rbx, 12)?;
                self.map_gpa_range(pages, if to == Side::Private { ENCRYPTED } else { 0 })
            }
            Transport::PageState => self.page_state_by_ghcb(pages, to),
        }
    }

    /// Makes the hypercall for conversions, for the address in RBX. The answer is in RAX.
    pub fn map_gpa_range(&mut self, pages: u64, attributes: u64) -> Result<(), IcedError> {
        self.mov(eax, MAP_GPA_RANGE)?;
        self.mov(rcx, pages)?;
        self.mov(rdx, attributes)?;
        if self.is_by_ghcb() {
            self.hypercall_by_ghcb()
        } else if self.interface.private_bit.is_some() || ghcb::has_vmmcall() {
            self.vmmcall()
        } else {
            self.vmcall()
        }
    }

    /// Has in EAX what the processor says of itself in this register, one of RAX, RBX, RCX and RDX, of subleaf 0 of a leaf.
    pub fn cpuid_of(&mut self, leaf: u32, register: Register) -> Result<(), IcedError> {
        if self.is_by_ghcb() {
            return self.cpuid_by_msr(leaf, register);
        }
        self.mov(eax, leaf)?;
        self.xor(ecx, ecx)?;
        self.cpuid()?;
        match register {
            Register::Rbx => self.mov(eax, ebx),
            Register::Rcx => self.mov(eax, ecx),
            Register::Rdx => self.mov(eax, edx),
            _ => Ok(()),
        }
    }

    /// Reads a performance counter into EDX and EAX.
    pub fn read_counter(&mut self, index: u32) -> Result<(), IcedError> {
        if self.is_by_ghcb() {
            return self.counter_by_ghcb(index);
        }
        self.mov(ecx, index)?;
        self.rdpmc()
    }

    /// Has the processor take pages from the page frame in RBX on for valid, or not (AMD64 APM volume 3, PVALIDATE), if it looks
    /// at that.
    pub(super) fn validate(&mut self, pages: u64, valid: bool) -> Result<(), IcedError> {
        if !self.accepts() {
            return Ok(());
        }
        let mut again = self.create_label();
        self.mov(r14, rbx)?;
        self.shl(r14, 12)?;
        self.mov(r15d, pages as u32)?;
        self.set_label(&mut again)?;
        self.mov(rax, r14)?;
        self.xor(ecx, ecx)?;
        self.mov(edx, u32::from(valid))?;
        self.db(&[0xf2, 0x0f, 0x01, 0xff])?;
        self.add(r14, PAGE_SIZE as i32)?;
        self.dec(r15d)?;
        self.jne(again)
    }

    /// Moves `count` bytes between a port and memory by an instruction for strings: to `gpa` on the private side if it reads.
    /// Where exits go by the page between guest and host, it is moved to there or from there.
    pub fn string(&mut self, port: u16, count: u32, gpa: u64, read: bool) -> Result<(), IcedError> {
        if self.is_by_ghcb() {
            return self.string_by_ghcb(port, count, read);
        }
        self.mov(edx, u32::from(port))?;
        self.mov(ecx, count)?;
        self.mov(rsi, gpa)?;
        self.mov(rdi, gpa)?;
        if read { self.rep().insb() } else { self.rep().outsb() }
    }
}
