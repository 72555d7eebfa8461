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

/// QEMU's models of EPYC processors and their signatures (`target/i386/cpu.c`). The versions of a model, which follow its name
/// as in `EPYC-v4`, have its signature.
pub const MODELS: [(&str, CpuSignature); 5] =
    [("EPYC", NAPLES), ("EPYC-Rome", ROME), ("EPYC-Milan", MILAN), ("EPYC-Genoa", GENOA), ("EPYC-Turin", TURIN)];

/// Another name of `EPYC-v2`.
const IBPB: &str = "EPYC-IBPB";

/// The names of [`MODELS`], for messages.
pub(crate) fn names() -> String {
    MODELS.map(|(name, _)| name).join(", ")
}

/// The name of a model without its version, if it has one.
fn without_version(name: &str) -> &str {
    let is_number = |version: &&str| !version.is_empty() && version.bytes().all(|byte| byte.is_ascii_digit());
    name.rsplit_once("-v").filter(|(_, version)| is_number(version)).map_or(name, |(model, _)| model)
}

impl FromStr for CpuSignature {
    type Err = Error;

    /// The signature of a model of QEMU's, by its name.
    fn from_str(name: &str) -> Result<Self, Error> {
        if name == IBPB {
            return Ok(NAPLES);
        }
        let model = MODELS.iter().find(|(model, _)| *model == without_version(name));
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
        for (name, signature) in [
            ("EPYC-v4", 0x80_0f12),
            ("EPYC-IBPB", 0x80_0f12),
            ("EPYC-Rome-v5", 0x83_0f10),
            ("EPYC-Milan", 0xa0_0f11),
            ("EPYC-Milan-v4", 0xa0_0f11),
            ("EPYC-Genoa-v3", 0xa1_0f10),
            ("EPYC-Turin-v2", 0xb0_0f00),
            ("EPYC-Turin-v30", 0xb0_0f00),
        ] {
            assert_eq!(name.parse(), Ok(CpuSignature(signature)), "{name}");
        }
        for name in ["EPYC-Naples", "EPYC-v", "EPYC-v4x", "EPYC-v1-v1", "EPYC-Milan-4", "-v1", ""] {
            let error = name.parse::<CpuSignature>().unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("EPYC-Turin"), "{error}");
        }
    }
}
