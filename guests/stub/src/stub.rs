#![allow(unsafe_code, reason = "it starts without a stack and accesses memory by address")]

use core::arch::{asm, naked_asm};
use core::panic::PanicInfo;
use cvm_core::doorbell::{PORT_BASE, control};
use sha2::{Digest, Sha384};

const PAGE: usize = 4096;
const STACK_LEN: usize = 32 << 10;

#[repr(C, align(4096))]
struct Stack([u8; STACK_LEN]);

static mut STACK: Stack = Stack([0; STACK_LEN]);

/// The entry: RDI is where to copy to, RSI where from, RDX how many pages, RCX where the digests go.
#[unsafe(naked)]
#[unsafe(no_mangle)]
#[unsafe(link_section = ".text.start")]
extern "C" fn start() -> ! {
    naked_asm!(
        // No table of exception handlers, in place of one at address 0, where the reset leaves it.
        "lidt [rip + 3f]",
        "lea rsp, [rip + {stack} + {len}]",
        "xor ebp, ebp",
        "cld",
        "call {main}",
        "mov edx, {end}",
        "2:",
        "out dx, eax",
        "jmp 2b",
        "3:",
        ".zero 10",
        stack = sym STACK,
        len = const STACK_LEN,
        main = sym main,
        end = const PORT_BASE + control::END,
    )
}

extern "C" fn main(to: *mut [u8; PAGE], from: *const [u8; PAGE], pages: usize, digests: *mut [u8; 48]) {
    for page in 0..pages {
        // SAFETY: the host gives addresses of mapped pages that do not overlap; if it lies, the guest it launches is
        // its own loss.
        unsafe {
            let (to, from) = (to.add(page), from.add(page));
            asm!("rep movsq", inout("rcx") PAGE / 8 => _, inout("rdi") to => _, inout("rsi") from => _,
                 options(nostack, preserves_flags));
            digests.add(page).write(Sha384::digest(to.read()).into());
        }
    }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {
        // SAFETY: without an interrupt descriptor table this ends the guest, and so the launch.
        unsafe { asm!("ud2") };
    }
}
