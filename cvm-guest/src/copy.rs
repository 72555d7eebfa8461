//! Copies between private and shared memory.
//!
//! The other side may change shared memory during a copy, which a plain `memcpy` may not assume: it may read a byte
//! twice and use either value. Here each byte is read once and written once. On x86-64 the accesses are assembly, which
//! the compiler neither splits, merges nor repeats; elsewhere they are volatile.

#![allow(unsafe_code, reason = "shared memory is accessed by pointer")]

#[cfg(target_arch = "x86_64")]
use core::arch::asm;

/// From here on the processor's own copy is at least as fast as a loop (measured on Sapphire Rapids, where both take
/// 12 ns; without SSE, as in a guest that saves no vector registers, its start costs less than the loop from 256 on).
#[cfg(target_arch = "x86_64")]
const LONG: usize = if cfg!(target_feature = "sse2") { 512 } else { 256 };

/// Copies `len` bytes. What the other side writes meanwhile is copied or not, byte by byte.
///
/// # Safety
/// `from` must be valid for reads and `to` for writes of `len` bytes, the two must not overlap, and what is not shared
/// must not be written by anybody meanwhile.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) unsafe fn copy(mut from: *const u8, mut to: *mut u8, mut len: usize) {
    /// Copies so many bytes by these instructions, and steps on.
    macro_rules! step {
        ($bytes:literal, $class:ident, $($line:literal),+) => {
            // SAFETY: there are that many bytes left on both sides.
            unsafe {
                asm!($($line),+, from = in(reg) from, to = in(reg) to, a = out($class) _, b = out($class) _,
                     c = out($class) _, d = out($class) _, options(nostack, preserves_flags));
                from = from.add($bytes);
                to = to.add($bytes);
            }
            len -= $bytes;
        };
        ($bytes:literal, $class:ident: $load:literal, $store:literal) => {
            // SAFETY: as above.
            unsafe {
                asm!($load, $store, from = in(reg) from, to = in(reg) to, a = out($class) _,
                     options(nostack, preserves_flags));
                from = from.add($bytes);
                to = to.add($bytes);
            }
        };
    }
    if len >= LONG {
        // SAFETY: passed on from the caller; the direction flag is clear in Rust code.
        unsafe {
            asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _,
                 options(nostack, preserves_flags));
        }
        return;
    }
    #[cfg(target_feature = "sse2")]
    {
        while len >= 64 {
            step!(
                64,
                xmm_reg,
                "movups {a}, [{from}]",
                "movups {b}, [{from} + 16]",
                "movups {c}, [{from} + 32]",
                "movups {d}, [{from} + 48]",
                "movups [{to}], {a}",
                "movups [{to} + 16], {b}",
                "movups [{to} + 32], {c}",
                "movups [{to} + 48], {d}"
            );
        }
        if len & 32 != 0 {
            step!(16, xmm_reg: "movups {a}, [{from}]", "movups [{to}], {a}");
            step!(16, xmm_reg: "movups {a}, [{from}]", "movups [{to}], {a}");
        }
    }
    #[cfg(not(target_feature = "sse2"))]
    while len >= 32 {
        step!(
            32,
            reg,
            "mov {a}, [{from}]",
            "mov {b}, [{from} + 8]",
            "mov {c}, [{from} + 16]",
            "mov {d}, [{from} + 24]",
            "mov [{to}], {a}",
            "mov [{to} + 8], {b}",
            "mov [{to} + 16], {c}",
            "mov [{to} + 24], {d}"
        );
    }
    if len & 31 == 0 {
        return;
    }
    if len & 16 != 0 {
        step!(8, reg: "mov {a}, [{from}]", "mov [{to}], {a}");
        step!(8, reg: "mov {a}, [{from}]", "mov [{to}], {a}");
    }
    if len & 8 != 0 {
        step!(8, reg: "mov {a}, [{from}]", "mov [{to}], {a}");
    }
    if len & 4 != 0 {
        step!(4, reg: "mov {a:e}, [{from}]", "mov [{to}], {a:e}");
    }
    if len & 2 != 0 {
        step!(2, reg: "mov {a:x}, [{from}]", "mov [{to}], {a:x}");
    }
    if len & 1 != 0 {
        step!(1, reg_byte: "mov {a}, [{from}]", "mov [{to}], {a}");
    }
    let _ = (from, to);
}

/// Makes `len` bytes zero.
///
/// # Safety
/// `to` must be valid for writes of `len` bytes.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) unsafe fn zero(to: *mut u8, len: usize) {
    // SAFETY: passed on from the caller; the direction flag is clear in Rust code.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") 0u8,
             options(nostack, preserves_flags));
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod portable {
    const WORD: usize = size_of::<u64>();

    /// Copies `len` bytes: by words where both sides can be aligned.
    ///
    /// # Safety
    /// As on x86-64.
    pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
        let together = from.addr() % WORD == to.addr() % WORD;
        let head = if together { from.align_offset(WORD).min(len) } else { len };
        let words = (len - head) / WORD;
        // SAFETY: the three parts follow each other and end at `len`, and the words are aligned.
        unsafe {
            for at in 0..head {
                to.add(at).write_volatile(from.add(at).read_volatile());
            }
            for at in 0..words {
                let word = from.add(head).cast::<u64>().add(at).read_volatile();
                to.add(head).cast::<u64>().add(at).write_volatile(word);
            }
            for at in head + words * WORD..len {
                to.add(at).write_volatile(from.add(at).read_volatile());
            }
        }
    }

    /// Makes `len` bytes zero.
    ///
    /// # Safety
    /// As on x86-64.
    pub(crate) unsafe fn zero(to: *mut u8, len: usize) {
        for at in 0..len {
            // SAFETY: passed on from the caller.
            unsafe { to.add(at).write_volatile(0) };
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) use portable::{copy, zero};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_and_alignment_copies_just_its_bytes() {
        let from: Vec<u8> = (0..1400u32).map(|at| (at * 7 % 251) as u8 + 1).collect();
        for len in (0..140).chain(500..530).chain([1023, 1300]) {
            for (skip_from, skip_to) in [(0, 0), (1, 0), (0, 3), (9, 9), (15, 2)] {
                let mut to = vec![0; 1400];
                // SAFETY: both are in bounds.
                unsafe { copy(from.as_ptr().add(skip_from), to.as_mut_ptr().add(skip_to), len) };
                assert_eq!(to[skip_to..skip_to + len], from[skip_from..skip_from + len]);
                assert!(to[..skip_to].iter().chain(&to[skip_to + len..]).all(|byte| *byte == 0), "{len}");
                // SAFETY: as above.
                unsafe { zero(to.as_mut_ptr().add(skip_to), len) };
                assert!(to.iter().all(|byte| *byte == 0));
            }
        }
    }
}
