//! The launch configuration as bytes, and their digest.

use super::VmConfig;
use crate::boot::{FreshMemory, Interface};
use sha2::{Digest, Sha384};
use std::fmt;
use std::num::NonZeroU32;

/// What an encoding begins with. Another layout gets another text.
const MAGIC: &[u8; 8] = b"CVMCONF1";

/// What an encoding has in place of the private bit where the guest's page tables have none.
const NO_PRIVATE_BIT: u32 = u32::MAX;

/// The bits of the flags.
const ACCEPTANCE: u32 = 1;
const VOUCHED_PAGES: u32 = 1 << 1;
const FRESH_MEMORY_IS_UNDEFINED: u32 = 1 << 2;

/// The SHA-384 of a launch configuration's [encoding](VmConfig::encode).
///
/// The guest finds it in its [boot page](crate::boot::BootPage::config), which is measured. Where the hardware has a field for
/// data that the host chooses at the launch and that reports show, backends put it there too: all 48 bytes, or as many as the
/// field has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConfigDigest(pub [u8; 48]);

impl fmt::Display for ConfigDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl VmConfig {
    /// The whole configuration as bytes, with what the platform has made of it.
    ///
    /// All numbers are little endian, on hosts of either byte order:
    ///
    /// | offset | bytes | contents |
    /// |---|---|---|
    /// | 0 | 8 | the ASCII text `CVMCONF1` |
    /// | 8 | 4 | number of vCPUs |
    /// | 12 | 4 | [`Doorbell`](crate::doorbell::Doorbell) |
    /// | 16 | 4 | [`Transport`](crate::doorbell::Transport) that the platform has chosen |
    /// | 20 | 4 | [`Exits`](crate::boot::Exits) |
    /// | 24 | 4 | private bit of page-table entries; 0xffff_ffff if there is none |
    /// | 28 | 4 | flags: bit 0, the guest accepts memory; bit 1, the trusted entity fills pages; bit 2, fresh memory is undefined |
    /// | 32 | 8 | [`Policy`](crate::Policy) |
    /// | 40 | 8 | [`InterruptController`](crate::InterruptController) |
    /// | 48 | 32 | accepted vectors, one bit each, vector 0 first |
    /// | 80 | 32 | those of them that are levels |
    /// | 112 | 4 | most interrupts in a second on each vCPU; 0 for no limit |
    /// | 116 | 4 | number of memory slots |
    /// | 120 | 16 each | memory slots in the order of the configuration: first address (8 bytes), length in bytes (8 bytes) |
    ///
    /// The transport that was wished for is not in it: a wish and no wish that lead to the same transport are the same launch.
    pub fn encode(&self, interface: &Interface) -> Vec<u8> {
        // No `..` here: a field that is added has to be encoded too.
        let Self { memory, vcpus, interrupts, interrupt_controller, policy, doorbell, transport: _ } = self;
        let Interface { transport, exits, private_bit, acceptance, fresh_memory, vouched_pages } = *interface;
        let flag = |is_set: bool, bit: u32| if is_set { bit } else { 0 };
        let flags = flag(acceptance, ACCEPTANCE)
            | flag(vouched_pages, VOUCHED_PAGES)
            | flag(fresh_memory == FreshMemory::Undefined, FRESH_MEMORY_IS_UNDEFINED);
        let (accepted, levels, most_per_second) = interrupts.parts();
        let most_per_second = most_per_second.map_or(0, NonZeroU32::get);

        let mut bytes = MAGIC.to_vec();
        let mut put = |number: &[u8]| bytes.extend_from_slice(number);
        put(&vcpus.to_le_bytes());
        put(&(*doorbell as u32).to_le_bytes());
        put(&(transport as u32).to_le_bytes());
        put(&(exits as u32).to_le_bytes());
        put(&private_bit.map_or(NO_PRIVATE_BIT, u32::from).to_le_bytes());
        put(&flags.to_le_bytes());
        put(&policy.bits().to_le_bytes());
        put(&(*interrupt_controller as u64).to_le_bytes());
        accepted.iter().chain(&levels).for_each(|word| put(&word.to_le_bytes()));
        put(&most_per_second.to_le_bytes());
        put(&(memory.len() as u32).to_le_bytes());
        for slot in memory {
            put(&slot.start().0.to_le_bytes());
            put(&slot.len().to_le_bytes());
        }
        bytes
    }

    /// The digest of the whole configuration on a platform with this interface.
    pub fn digest(&self, interface: &Interface) -> ConfigDigest {
        ConfigDigest(Sha384::digest(self.encode(interface)).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::Exits;
    use crate::doorbell::{Doorbell, Transport};
    use crate::launch::tests::INTERFACE;
    use crate::{GpaRange, InterruptController, InterruptPolicy, Policy};
    use std::collections::BTreeSet;

    fn config() -> VmConfig {
        let interrupts = InterruptPolicy::default().accept(0x41).and_then(|it| it.accept_level(0xff)).unwrap();
        VmConfig {
            memory: vec![GpaRange::new(0x10_0000, 0x3000).unwrap(), GpaRange::new(0, 0x1000).unwrap()],
            vcpus: 0x102,
            interrupts: interrupts.limit(NonZeroU32::new(0x0506_0708).unwrap()),
            interrupt_controller: InterruptController::None,
            policy: Policy::NO_SMT | Policy::NO_DEBUG,
            doorbell: Doorbell::Msr,
            transport: None,
        }
    }

    /// Written by hand from the table at [`VmConfig::encode`].
    #[rustfmt::skip]
    const ENCODED: [u8; 152] = [
        b'C', b'V', b'M', b'C', b'O', b'N', b'F', b'1',
        2, 1, 0, 0,  1, 0, 0, 0,  2, 0, 0, 0,  1, 0, 0, 0,  51, 0, 0, 0,  7, 0, 0, 0,
        9, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0,  2, 0, 0, 0, 0, 0, 0, 0,  0, 0, 0, 0, 0, 0, 0, 0,  0, 0, 0, 0, 0, 0, 0, 0x80,
        0, 0, 0, 0, 0, 0, 0, 0,  0, 0, 0, 0, 0, 0, 0, 0,  0, 0, 0, 0, 0, 0, 0, 0,  0, 0, 0, 0, 0, 0, 0, 0x80,
        8, 7, 6, 5,
        2, 0, 0, 0,
        0, 0, 0x10, 0, 0, 0, 0, 0,  0, 0x30, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0,  0, 0x10, 0, 0, 0, 0, 0, 0,
    ];

    /// Of the bytes above, by coreutils' `sha384sum`.
    const DIGEST: &str =
        "0da12372c2066dbecea782b8fca32460109f86f9c6fac0de8596034a6a625fe99a020f3596e7781b033c1a67ccfe8566";

    #[test]
    fn a_configuration_is_encoded_as_documented_and_has_the_digest_that_others_compute() {
        assert_eq!(config().encode(&INTERFACE), ENCODED);
        assert_eq!(config().digest(&INTERFACE).to_string(), DIGEST);
    }

    #[test]
    fn every_field_of_the_configuration_and_of_the_interface_changes_the_digest() {
        let interrupts = config().interrupts;
        let configs = [
            config(),
            VmConfig { memory: config().memory.into_iter().rev().collect(), ..config() },
            VmConfig { memory: config().memory[..1].to_vec(), ..config() },
            VmConfig { vcpus: 0x103, ..config() },
            VmConfig { interrupts: interrupts.accept(0x42).unwrap(), ..config() },
            VmConfig { interrupts: interrupts.accept_level(0x42).unwrap(), ..config() },
            VmConfig { interrupts: interrupts.limit(NonZeroU32::MIN), ..config() },
            VmConfig { interrupt_controller: InterruptController::Apic, ..config() },
            VmConfig { policy: Policy::NO_SMT, ..config() },
            VmConfig { doorbell: Doorbell::Port, ..config() },
        ];
        let interfaces = [
            Interface { transport: Transport::Hypercall, ..INTERFACE },
            Interface { exits: Exits::Direct, ..INTERFACE },
            Interface { private_bit: None, ..INTERFACE },
            Interface { private_bit: Some(47), ..INTERFACE },
            Interface { acceptance: false, ..INTERFACE },
            Interface { fresh_memory: FreshMemory::Zero, ..INTERFACE },
            Interface { vouched_pages: false, ..INTERFACE },
        ];
        let of_configs = configs.iter().map(|config| config.digest(&INTERFACE).0);
        let of_interfaces = interfaces.iter().map(|interface| config().digest(interface).0);
        let digests: BTreeSet<_> = of_configs.chain(of_interfaces).collect();
        assert_eq!(digests.len(), configs.len() + interfaces.len());
    }

    #[test]
    fn a_wish_for_the_transport_that_is_chosen_anyway_changes_nothing() {
        let wish = VmConfig { transport: Some(Transport::PageState), ..config() };
        assert_eq!(wish.digest(&INTERFACE), config().digest(&INTERFACE));
    }
}
