//! The state of a vCPU as AMD's processors keep it for SEV-ES and SEV-SNP guests: a page, the VM save area (AMD64 APM volume 2,
//! table B-4).

use super::{Segment, VcpuState};
use crate::PAGE_SIZE;

/// A save area.
pub type SaveArea = [u8; PAGE_SIZE as usize];

/// Offsets in the save area.
#[allow(missing_docs, reason = "they have the names that the architecture gives them")]
pub mod at {
    pub const ES: usize = 0x000;
    pub const CS: usize = 0x010;
    pub const SS: usize = 0x020;
    pub const DS: usize = 0x030;
    pub const FS: usize = 0x040;
    pub const GS: usize = 0x050;
    pub const GDTR: usize = 0x060;
    pub const LDTR: usize = 0x070;
    pub const IDTR: usize = 0x080;
    pub const TR: usize = 0x090;
    pub const EFER: usize = 0x0d0;
    pub const CR4: usize = 0x148;
    pub const CR3: usize = 0x150;
    pub const CR0: usize = 0x158;
    pub const DR7: usize = 0x160;
    pub const DR6: usize = 0x168;
    pub const RFLAGS: usize = 0x170;
    pub const RIP: usize = 0x178;
    pub const RSP: usize = 0x1d8;
    pub const RAX: usize = 0x1f8;
    pub const G_PAT: usize = 0x268;
    pub const RCX: usize = 0x308;
    pub const RDX: usize = 0x310;
    pub const RBX: usize = 0x318;
    pub const RBP: usize = 0x328;
    pub const RSI: usize = 0x330;
    pub const RDI: usize = 0x338;
    pub const R8: usize = 0x340;
    pub const SEV_FEATURES: usize = 0x3b0;
    pub const XCR0: usize = 0x3e8;
    pub const MXCSR: usize = 0x408;
    pub const X87_FCW: usize = 0x410;
}

// Registers that a reset gives other values than zero (AMD64 APM volume 2, initial processor state), and what KVM adds to
// them: EFER.SVME, without which no processor takes the state, and CR4.MCE.
const EFER_SVME: u64 = 1 << 12;
const CR4_MCE: u64 = 1 << 6;
const CR0_ET: u64 = 1 << 4;
const DR6: u64 = 0xffff_0ff0;
const DR7: u64 = 0x400;
const RFLAGS: u64 = 1 << 1;
const PAT: u64 = 0x0007_0406_0007_0406;
const XCR0: u64 = 1;
const MXCSR: u64 = 0x1f80;
const FCW: u64 = 0x37f;

/// Sets eight bytes. `place` is one of [`at`], so that they lie within.
pub fn set(area: &mut SaveArea, place: usize, value: u64) {
    area[place..place + 8].copy_from_slice(&value.to_le_bytes());
}

/// Sets a segment register: selector, attributes (AMD64 APM volume 2, `VMRUN`), limit and base.
pub fn set_segment(area: &mut SaveArea, place: usize, (selector, attributes, limit, base): (u16, u16, u32, u64)) {
    set(area, place, u64::from(selector) | u64::from(attributes) << 16 | u64::from(limit) << 32);
    set(area, place + 8, base);
}

/// Sets the control words of floating-point units as after a reset.
pub fn set_floating_point(area: &mut SaveArea) {
    set(area, at::MXCSR, MXCSR);
    set(area, at::X87_FCW, FCW);
}

/// Makes `area` what a reset leaves, but for code, data and task segments and floating point. `sev_features` are its
/// SEV_FEATURES.
pub fn reset(area: &mut SaveArea, sev_features: u64) {
    area.fill(0);
    set_segment(area, at::GDTR, (0, 0, 0xffff, 0));
    set_segment(area, at::IDTR, (0, 0, 0xffff, 0));
    set_segment(area, at::LDTR, (0, 0x82, 0xffff, 0));
    for (place, value) in [
        (at::EFER, EFER_SVME),
        (at::CR4, CR4_MCE),
        (at::CR0, CR0_ET),
        (at::DR7, DR7),
        (at::DR6, DR6),
        (at::RFLAGS, RFLAGS),
        (at::G_PAT, PAT),
        (at::SEV_FEATURES, sev_features),
        (at::XCR0, XCR0),
    ] {
        set(area, place, value);
    }
}

/// A segment's attributes as the save area has them: without the bits of the limit.
fn packed(attributes: u16) -> u16 {
    attributes & 0xff | attributes >> 4 & 0xf00
}

/// And back.
fn unpacked(attributes: u16) -> u16 {
    attributes & 0xff | (attributes & 0xf00) << 4
}

/// Makes `area` what KVM makes of `state`, at VMPL 0.
pub fn fill(area: &mut SaveArea, state: &VcpuState, sev_features: u64) {
    reset(area, sev_features);
    let Segment { base, limit, selector, attributes } = state.code;
    set_segment(area, at::CS, (selector, packed(attributes), limit, base));
    let Segment { base, limit, selector, attributes } = state.data;
    for place in [at::ES, at::SS, at::DS, at::FS] {
        set_segment(area, place, (selector, packed(attributes), limit, base));
    }
    set_segment(area, at::GS, (selector, packed(attributes), limit, state.gs_base));
    set_segment(area, at::GDTR, (0, 0, state.gdt_limit.into(), state.gdt_base));
    set_segment(area, at::IDTR, (0, 0, state.idt_limit.into(), state.idt_base));
    // KVM's own: a busy 16-bit task.
    set_segment(area, at::TR, (0, 0x83, 0xffff, 0));
    let [rax, rcx, rdx, rbx] = state.rax_to_rbx;
    for (place, value) in [
        (at::EFER, EFER_SVME | state.efer),
        (at::CR4, CR4_MCE | state.cr4),
        (at::CR0, state.cr0),
        (at::CR3, state.cr3),
        (at::RFLAGS, state.rflags),
        (at::RIP, state.rip),
        (at::RSP, state.rsp),
        (at::RAX, rax),
        (at::RCX, rcx),
        (at::RDX, rdx),
        (at::RBX, rbx),
        (at::RBP, state.rbp),
        (at::RSI, state.rsi),
        (at::RDI, state.rdi),
    ] {
        set(area, place, value);
    }
    for (place, value) in (at::R8..).step_by(8).zip(state.r8_to_r15) {
        set(area, place, value);
    }
    set_floating_point(area);
}

fn get(area: &SaveArea, place: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&area[place..place + 8]);
    u64::from_le_bytes(bytes)
}

/// The state that [`fill`] made `area` of, if it was made by that; whoever wants to know compares.
pub fn state(area: &SaveArea) -> VcpuState {
    let number = |place| get(area, place);
    let segment = |place| {
        let attributes = unpacked((number(place) >> 16) as u16);
        Segment {
            base: number(place + 8),
            limit: (number(place) >> 32) as u32,
            selector: number(place) as u16,
            attributes,
        }
    };
    VcpuState {
        rip: number(at::RIP),
        rsp: number(at::RSP),
        rdi: number(at::RDI),
        rsi: number(at::RSI),
        cr3: number(at::CR3),
        rax_to_rbx: [at::RAX, at::RCX, at::RDX, at::RBX].map(number),
        rbp: number(at::RBP),
        r8_to_r15: core::array::from_fn(|index| number(at::R8 + 8 * index)),
        rflags: number(at::RFLAGS),
        cr0: number(at::CR0),
        cr4: number(at::CR4),
        efer: number(at::EFER) & !EFER_SVME,
        gs_base: number(at::GS + 8),
        gdt_base: number(at::GDTR + 8),
        gdt_limit: (number(at::GDTR) >> 32) as u16,
        idt_base: number(at::IDTR + 8),
        idt_limit: (number(at::IDTR) >> 32) as u16,
        code: segment(at::CS),
        data: segment(at::DS),
    }
}
