//! How a guest begins.

/// Defines `start`, where every vCPU begins, for the linker script to name: its index in RDI, the boot page in RSI, no
/// stack. A vCPU below `$vcpus` gets a stack of `$stack` bytes and calls `$main`, an
/// `extern "C" fn(u64, *const BootPage)`; one that is not, or whose `$main` returns, halts for good. A halt reaches the host by
/// itself under every protection.
///
/// The guest must be linked to the addresses that it is loaded at, with `.text.start` first.
#[macro_export]
macro_rules! entry {
    ($main:path, vcpus: $vcpus:expr, stack: $stack:expr) => {
        /// A stack for each vCPU; they grow down.
        #[repr(C, align(4096))]
        struct Stacks([[u8; $stack]; $vcpus as usize]);

        static mut STACKS: Stacks = Stacks([[0; $stack]; $vcpus as usize]);

        #[unsafe(naked)]
        #[unsafe(no_mangle)]
        #[unsafe(link_section = ".text.start")]
        extern "C" fn start() -> ! {
            ::core::arch::naked_asm!(
                "cmp rdi, {max}",
                "jae 2f",
                "lea rax, [rdi + 1]",
                "imul rax, rax, {len}",
                "lea rsp, [rip + {stacks}]",
                "add rsp, rax",
                "xor ebp, ebp",
                "call {main}",
                "2:",
                "cli",
                "hlt",
                "jmp 2b",
                max = const $vcpus,
                len = const $stack,
                stacks = sym STACKS,
                main = sym $main,
            )
        }
    };
}
