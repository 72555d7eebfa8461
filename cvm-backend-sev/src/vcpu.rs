//! vCPU models, of which the initial state of a vCPU has the signature.

use crate::Error;
use std::fmt;
use std::str::FromStr;

/// What CPUID leaf 1 has in EAX, and a vCPU after reset in EDX: family, model and stepping (AMD64 APM volume 3, CPUID
/// Fn0000_0001_EAX).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CpuSignature(pub u32);

impl CpuSignature {
    /// That of a family, with its extended part added, of a model, likewise, and of a stepping of 0 to 15.
    pub const fn new(family: u8, model: u8, stepping: u8) -> Self {
        let (base, extended) = if family > 0xf { (0xf, family - 0xf) } else { (family, 0) };
        let families = (extended as u32) << 20 | (base as u32) << 8;
        let models = ((model >> 4) as u32) << 16 | ((model & 0xf) as u32) << 4;
        Self(families | models | (stepping & 0xf) as u32)
    }
}

const NAPLES: CpuSignature = CpuSignature::new(23, 1, 2);
const ROME: CpuSignature = CpuSignature::new(23, 49, 0);
const MILAN: CpuSignature = CpuSignature::new(25, 1, 1);
const GENOA: CpuSignature = CpuSignature::new(25, 17, 0);
const TURIN: CpuSignature = CpuSignature::new(26, 0, 0);

/// QEMU's models of EPYC processors and their signatures (`target/i386/cpu.c`, QEMU 10.1).
pub const MODELS: [(&str, CpuSignature); 22] = [
    ("EPYC", NAPLES),
    ("EPYC-IBPB", NAPLES),
    ("EPYC-v1", NAPLES),
    ("EPYC-v2", NAPLES),
    ("EPYC-v3", NAPLES),
    ("EPYC-v4", NAPLES),
    ("EPYC-v5", NAPLES),
    ("EPYC-Rome", ROME),
    ("EPYC-Rome-v1", ROME),
    ("EPYC-Rome-v2", ROME),
    ("EPYC-Rome-v3", ROME),
    ("EPYC-Rome-v4", ROME),
    ("EPYC-Rome-v5", ROME),
    ("EPYC-Milan", MILAN),
    ("EPYC-Milan-v1", MILAN),
    ("EPYC-Milan-v2", MILAN),
    ("EPYC-Milan-v3", MILAN),
    ("EPYC-Genoa", GENOA),
    ("EPYC-Genoa-v1", GENOA),
    ("EPYC-Genoa-v2", GENOA),
    ("EPYC-Turin", TURIN),
    ("EPYC-Turin-v1", TURIN),
];

/// The names of [`MODELS`], for messages.
pub(crate) fn names() -> String {
    MODELS.map(|(name, _)| name).join(", ")
}

impl FromStr for CpuSignature {
    type Err = Error;

    /// The signature of a model of QEMU's, by its name.
    fn from_str(name: &str) -> Result<Self, Error> {
        let model = MODELS.iter().find(|(model, _)| *model == name);
        model.map(|(_, signature)| *signature).ok_or_else(|| Error::VcpuModel { name: name.to_owned() })
    }
}

impl fmt::Display for CpuSignature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_have_the_signatures_of_their_processors() {
        for (name, signature) in [("EPYC-v4", 0x80_0f12), ("EPYC-Milan", 0xa0_0f11), ("EPYC-Genoa-v2", 0xa1_0f10)] {
            assert_eq!(name.parse(), Ok(CpuSignature(signature)), "{name}");
        }
        let error = "EPYC-Naples".parse::<CpuSignature>().unwrap_err().to_string();
        assert!(error.contains("EPYC-Naples") && error.contains("EPYC-Turin"), "{error}");
    }
}
