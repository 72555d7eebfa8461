//! VMs of so few pages that many of them can be launched, one after the other.

use crate::Bench;
use crate::guest::{self, Assembler};
use crate::subject::Places;
use cvm_core::{Error, Gpa, GpaRange, Launch, PAGE_SIZE, Platform, VmConfig};
use iced_x86::IcedError;

/// All memory is below the end of the pages by which vCPUs talk to their host.
const START: u64 = 0x3c_0000;
const END: u64 = guest::GHCB + guest::MAX_GHCBS * PAGE_SIZE;

/// The boot page is followed by two that a trusted entity fills.
const PLACES: Places = Places { boot_page: Gpa(START), tables: Gpa(START + 0x4000), code: Gpa(START + 0x1_4000) };

/// Pages that no launch loads.
pub(crate) const DATA: u64 = START + 0x1_8000;

/// Its only memory.
pub(crate) fn memory() -> GpaRange {
    GpaRange::new(START, END - START).expect("whole pages")
}

/// Such a VM.
pub(crate) fn config<P: Platform>(bench: &Bench<'_, P>, vcpus: u32) -> VmConfig {
    VmConfig { memory: vec![memory()], ..bench.config(vcpus) }
}

/// Loads all that a guest needs: each vCPU starts at the code that `write` has written.
pub(crate) fn load<P: Platform>(
    bench: &Bench<'_, P>,
    config: VmConfig,
    write: impl FnOnce(&mut Assembler) -> Result<(), IcedError>,
) -> Result<Launch<P::Loader>, Error> {
    bench.load_at(&PLACES, config, |_, _| Ok(()), write)
}
