//! An ID block with its signatures from anywhere: it is refused, or comes back as it was.

#![no_main]

use cvm_backend_sev::id_block::{AUTH_BYTES, BLOCK_BYTES, IdAuth, IdBlock};
use cvm_backend_sev::{SevPolicy, SnpPolicy};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let (mut block, mut auth) = ([0; BLOCK_BYTES], [0; AUTH_BYTES]);
    let places = block.iter_mut().chain(&mut auth);
    places.zip(bytes).for_each(|(place, byte)| *place = *byte);
    if let Some(policy) = bytes.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)) {
        assert!(SnpPolicy::from_bits(policy).map_or(true, |parsed| parsed.bits() == policy));
        assert!(SevPolicy::from_bits(policy as u32).map_or(true, |parsed| parsed.bits() == policy as u32));
    }
    let Ok(parsed) = IdBlock::from_bytes(&block) else { return };
    assert_eq!(parsed.to_bytes(), block);
    let _ = IdAuth::from_bytes(&auth).verify(&parsed);
});
