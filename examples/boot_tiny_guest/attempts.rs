//! What a VMM that holds a VM can try to get at the guest's secret, and what each attempt gives.

use crate::program::chain;
use cvm::platform::{Asset, Party, Powers};
use cvm::x86::Register;
use cvm::{ConversionRequest, Event, RegisterRead, Side, TrustModel, Vcpu, Vm};
use serde::Serialize;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use tiny_guest::{SECRET_LEN, SECRET_STREAM, pattern};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// One attempt.
#[derive(Debug, Serialize)]
pub struct Attempt {
    /// What was tried.
    pub what: &'static str,
    /// What came of it.
    pub result: String,
    /// Whether the VMM got what the guest keeps from it.
    pub reached: bool,
    /// Whether that is what the contract and the trust model say.
    pub expected: bool,
}

/// What the VMM knows when it tries.
#[derive(Debug)]
pub struct Observer {
    /// What it should be able to get at.
    pub trust: TrustModel,
    /// What the secret follows from.
    pub nonce: u64,
}

/// What is there where a model stands in for the secure processor, which leaves the memory of SEV and SEV-ES as it is.
const MODEL: &str = "/proc/fakepsp";

/// Whether `page` is the secret. It is compared with what the nonce says byte by byte, so that this process never has a
/// copy of its own to find.
fn is_secret(page: &[u8], nonce: u64) -> bool {
    page.len() == SECRET_LEN
        && page.iter().enumerate().all(|(index, byte)| *byte == pattern(nonce, SECRET_STREAM, index))
}

/// Tries everything. `secret` is where the guest says that it is.
pub fn all<V: Vm>(vm: &V, vcpu: &mut V::Vcpu, observer: &Observer, secret: u64) -> Vec<Attempt> {
    let nonce = observer.nonce;
    let can_read = |asset| observer.trust.powers(Party::VmmProcess, asset).contains(Powers::READ);
    // Through the contract nothing is ever reached; around it, what the trust model admits.
    let through = |what, (reached, result): (bool, String)| Attempt { what, result, reached, expected: !reached };
    let around = |what, asset, (reached, mut result): (bool, String)| {
        // Whoever could trace a vault need not find anything in its own process.
        let mut expected = !reached || can_read(asset);
        if reached && !expected && asset == Asset::PrivateMemory && Path::new(MODEL).exists() {
            result.push_str("; hardware would have encrypted it, and the model of the secure processor does not");
            expected = true;
        }
        Attempt { what, result, reached, expected }
    };
    vec![
        through("read it through the shared view", by_view(vm, secret, nonce)),
        through("write to it through the shared view", by_writing(vm, secret)),
        through("convert it to shared without being asked", by_converting(vm, vcpu, secret)),
        through("inject an exception", by_injecting(vcpu, Event::Interrupt(14))),
        through("inject an interrupt that the guest does not accept", by_injecting(vcpu, Event::Interrupt(0x40))),
        around("read a register", Asset::Registers, by_register(vcpu)),
        around("read every open file of this process", Asset::PrivateMemory, by_files(nonce)),
        around("read every mapping of this process", Asset::PrivateMemory, by_mappings(secret, nonce)),
    ]
}

fn by_view<V: Vm>(vm: &V, secret: u64, nonce: u64) -> (bool, String) {
    let mut page = [0; SECRET_LEN];
    match vm.memory().memory().read_slice(&mut page, GuestAddress(secret)) {
        Err(error) => (false, chain(&error)),
        Ok(()) if is_secret(&page, nonce) => (true, "the secret".into()),
        Ok(()) => (true, "bytes of a private page".into()),
    }
}

fn by_writing<V: Vm>(vm: &V, secret: u64) -> (bool, String) {
    match vm.memory().memory().write_obj(0u8, GuestAddress(secret)) {
        Err(error) => (false, chain(&error)),
        Ok(()) => (true, "a byte of a private page was changed".into()),
    }
}

fn by_converting<V: Vm>(vm: &V, vcpu: &V::Vcpu, secret: u64) -> (bool, String) {
    let outcome = vm.convert(&ConversionRequest::from_guest(vcpu.index(), secret, 1, Side::Shared));
    match outcome.cause() {
        Some(cause) => (false, chain(cause)),
        None => (true, "the page is shared now".into()),
    }
}

fn by_injecting<V: Vcpu>(vcpu: &mut V, event: Event) -> (bool, String) {
    match vcpu.inject(event) {
        Err(error) => (false, chain(&error)),
        Ok(()) => (true, "it will arrive".into()),
    }
}

fn by_register<V: Vcpu>(vcpu: &V) -> (bool, String) {
    match vcpu.register(Register::Rsp) {
        Ok(RegisterRead::Visible(value)) => (true, format!("rsp is {value:#x}")),
        Ok(RegisterRead::Exposed(value)) => (false, format!("rsp is {value:#x}, which this exit exposes")),
        Ok(RegisterRead::Hidden) => (false, "it is hidden".into()),
        Err(error) => (false, chain(&error)),
    }
}

/// Reads what is in the anonymous files that this process has open, page by page where they have data.
fn by_files(nonce: u64) -> (bool, String) {
    let search = || -> io::Result<(usize, Option<String>)> {
        let mut searched = 0;
        for entry in fs::read_dir("/proc/self/fd")? {
            let path = entry?.path();
            let Ok(name) = fs::read_link(&path) else { continue };
            let name = name.to_string_lossy().into_owned();
            if !name.starts_with("/memfd:") && !name.contains("guest_memfd") && !name.contains("kvm-gmem") {
                continue;
            }
            searched += 1;
            let Ok(file) = File::open(&path) else { continue };
            let mut page = [0; SECRET_LEN];
            for offset in (0..file.metadata()?.len()).step_by(SECRET_LEN) {
                // Reading a hole of such a file does not fill it.
                if file.read_exact_at(&mut page, offset).is_ok() && is_secret(&page, nonce) {
                    return Ok((searched, Some(format!("the secret, in {name} at {offset:#x}"))));
                }
            }
        }
        Ok((searched, None))
    };
    match search() {
        Ok((_, Some(found))) => (true, found),
        Ok((searched, None)) => (false, format!("not in {searched} files of memory, as far as they can be read")),
        Err(error) => (false, chain(&error)),
    }
}

/// Reads the page of the secret in every mapping of an anonymous file. Memory is one slot at 0, so that an offset in
/// the file is the address in the guest.
fn by_mappings(secret: u64, nonce: u64) -> (bool, String) {
    let search = || -> io::Result<(usize, Option<String>)> {
        let memory = File::open("/proc/self/mem")?;
        let mut searched = 0;
        for line in fs::read_to_string("/proc/self/maps")?.lines().filter(|line| line.contains("/memfd:")) {
            // "start-end permissions offset device inode name", the numbers in hexadecimal (proc_pid_maps(5)).
            let mut words = line.split_whitespace();
            let range = words.next().and_then(|range| range.split_once('-'));
            let hex = |text: &str| u64::from_str_radix(text, 16).ok();
            let numbers = range.and_then(|(start, end)| Some((hex(start)?, hex(end)?, hex(words.nth(1)?)?)));
            let Some((start, end, offset)) = numbers else { continue };
            let into = secret.checked_sub(offset);
            let Some(into) = into.filter(|into| into.saturating_add(SECRET_LEN as u64) <= end.saturating_sub(start))
            else {
                continue;
            };
            searched += 1;
            let mut page = [0; SECRET_LEN];
            if memory.read_exact_at(&mut page, start + into).is_ok() && is_secret(&page, nonce) {
                return Ok((searched, Some(format!("the secret, at {:#x} of this process", start + into))));
            }
        }
        Ok((searched, None))
    };
    match search() {
        Ok((_, Some(found))) => (true, found),
        Ok((searched, None)) => (false, format!("not in the {searched} mappings that could show it")),
        Err(error) => (false, chain(&error)),
    }
}
