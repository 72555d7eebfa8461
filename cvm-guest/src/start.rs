//! How a guest begins.

/// Defines `start`, where every vCPU begins, for the linker script to name: its index in RDI, the boot page in RSI, no
/// stack. A vCPU below `$vcpus` gets a stack of `$stack` bytes, a multiple of 16, and calls `$main`, an
/// `extern "C" fn(u64, *const BootPage)`; one that is not, or whose `$main` returns, halts for good. A halt reaches the host by
/// itself under every protection.
///
/// After a reset the processor looks for exception handlers at address 0, in a page that the host may have chosen. So
/// each vCPU first loads an empty table, with which an exception ends the guest at once, and then
/// [`VcpuTables`](crate::VcpuTables) of its own, whose handlers end it with a reason.
///
/// The guest must be linked to the addresses that it is loaded at, with `.text.start` first. Each vCPU must be started
/// with an index of its own: it decides which stack is used.
///
/// What is named as `$main` has to have this signature:
/// ```compile_fail,E0308
/// extern "C" fn main(index: u64) {}
/// cvm_guest::entry!(main, vcpus: 1, stack: 4096);
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! entry {
    ($main:path, vcpus: $vcpus:expr, stack: $stack:expr) => {
        // Names that no argument has: constants in a macro are not hygienic.
        const _: () = {
            const __ENTRY_MAIN: extern "C" fn(u64, *const $crate::BootPage) = $main;
            const __ENTRY_VCPUS: usize = $vcpus as usize;
            const __ENTRY_STACK: usize = $stack;
            assert!(__ENTRY_STACK > 0 && __ENTRY_STACK % 16 == 0 && __ENTRY_STACK <= i32::MAX as usize);
            assert!(__ENTRY_VCPUS > 0 && __ENTRY_VCPUS <= i32::MAX as usize);

            /// A stack for each vCPU; they grow down.
            #[repr(C, align(4096))]
            struct Stacks([[u8; __ENTRY_STACK]; __ENTRY_VCPUS]);

            static mut STACKS: Stacks = Stacks([[0; __ENTRY_STACK]; __ENTRY_VCPUS]);
            static mut TABLES: [$crate::VcpuTables; __ENTRY_VCPUS] =
                [const { $crate::VcpuTables::new() }; __ENTRY_VCPUS];

            extern "C" fn call_main(index: u64, boot: *const $crate::BootPage) {
                __ENTRY_MAIN(index, boot)
            }

            #[unsafe(naked)]
            #[unsafe(no_mangle)]
            #[unsafe(link_section = ".text.start")]
            extern "C" fn start() -> ! {
                ::core::arch::naked_asm!(
                    // The limit is 0. It lies beside the instruction, so that it is in a page that is there.
                    "lidt [rip + 3f]",
                    "cmp rdi, {max}",
                    "jae 2f",
                    "lea rax, [rdi + 1]",
                    "imul rax, rax, {len}",
                    "lea rsp, [rip + {stacks}]",
                    "add rsp, rax",
                    "xor ebp, ebp",
                    "cld",
                    "push rdi",
                    "push rsi",
                    "imul rax, rdi, {tables_len}",
                    "lea rdi, [rip + {tables}]",
                    "add rdi, rax",
                    "call {load}",
                    "pop rsi",
                    "pop rdi",
                    "call {main}",
                    "2:",
                    "cli",
                    "hlt",
                    "jmp 2b",
                    "3:",
                    ".zero 10",
                    max = const __ENTRY_VCPUS,
                    len = const __ENTRY_STACK,
                    stacks = sym STACKS,
                    tables_len = const ::core::mem::size_of::<$crate::VcpuTables>(),
                    tables = sym TABLES,
                    load = sym $crate::VcpuTables::load,
                    main = sym call_main,
                )
            }
        };
    };
}
