//! An IGVM file from anywhere: it is refused or measured.

#![no_main]

use cvm_backend_sev::Igvm;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    if let Ok(igvm) = Igvm::parse(file) {
        let _ = igvm.measurement();
    }
});
