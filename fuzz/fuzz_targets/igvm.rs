//! An IGVM file from anywhere: it is refused, or measured and loaded, and then as what it was measured as.

#![no_main]

use cvm_backend_sev::{igvm, snp};
use cvm_core::doorbell::Transport;
use cvm_core::igvm::IgvmImage;
use cvm_core::{Launch, VmConfig};
use libfuzzer_sys::fuzz_target;

/// All that a file's pages lie in, or they are refused: enough for short files.
const MEMORY: u64 = 1 << 20;

fuzz_target!(|file: &[u8]| {
    let config = VmConfig::new(MEMORY, 1).unwrap();
    if let Ok(image) = IgvmImage::native(file) {
        let mut launch = Launch::rehearse(config.clone(), Transport::Doorbell).unwrap();
        let _ = launch.load_igvm(&image, "quiet");
    }
    let Ok(file) = igvm::parse(file) else { return };
    if let Ok(Some((block, auth))) = igvm::id_block(&file) {
        let _ = auth.verify(&block);
    }
    let (measurement, features) = (igvm::measurement(&file), igvm::features(&file));
    let (Ok(image), Ok(features)) = (igvm::image(file), features) else { return };
    let mut launch = Launch::rehearse(config, snp::interface(51)).unwrap();
    if launch.load_igvm(&image, "quiet").is_ok()
        && let Ok(transcript) = launch.transcript()
    {
        assert_eq!(measurement, Ok(snp::of_transcript(&transcript, features)));
    }
});
