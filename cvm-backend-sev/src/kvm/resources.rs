//! How many guests of each kind the host can have: each takes an address space identifier, of which there are few.

use super::cpuid::ENCRYPTION_LEAF;
use cvm_backend_kvm::backend::setting;
use cvm_core::Protection;
use std::arch::x86_64::__cpuid;
use std::fmt;
use std::path::Path;

/// Where the kernel counts identifiers (Linux Documentation/admin-guide/cgroup-v2.rst, "Misc").
const CGROUPS: &str = "/sys/fs/cgroup";

/// The leaf that says in EAX which is the last of its kind.
const EXTENDED_LEAVES: u32 = 0x8000_0000;

/// The identifiers of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asids {
    /// How many there are on this host, if it says.
    pub capacity: Option<u64>,
    /// How many are taken, if the host says. SEV-ES and SEV-SNP are counted together.
    pub in_use: Option<u64>,
    /// How many this process may take now, if the host says: its control group may allow fewer than there are.
    pub free: Option<u64>,
}

impl fmt::Display for Asids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counting = "the misc controller of control groups counts them, where it is on";
        match (self.capacity, self.in_use, self.free) {
            (Some(capacity), Some(in_use), Some(free)) => {
                write!(f, "of {capacity} identifiers {in_use} are in use and {free} free")
            }
            (Some(capacity), ..) => write!(f, "nobody says how many of {capacity} identifiers are in use: {counting}"),
            _ => write!(f, "nobody says how many identifiers there are: {counting}"),
        }
    }
}

/// What the host has of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resources {
    /// For plain SEV.
    pub sev: Asids,
    /// For SEV-ES.
    pub sev_es: Asids,
    /// For SEV-SNP: of those for SEV-ES, unless ciphertext hiding keeps some apart.
    pub sev_snp: Asids,
    /// How many identifiers are kept for SEV-SNP guests whose ciphertext is hidden from the host
    /// (`kvm_amd.ciphertext_hiding_asids`), if that is on.
    pub ciphertext_hiding: Option<u64>,
}

/// One resource as the files of control groups count it.
#[derive(Debug, Clone, Copy, Default)]
struct Counted {
    capacity: Option<u64>,
    in_use: Option<u64>,
    /// What is left of it below the limits of this process's groups.
    allowed: Option<u64>,
}

/// The number that stands behind `key` in a file of a control group; `max` is no number.
fn value(text: &str, key: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.find(|(name, _)| *name == key)?.1.trim().parse().ok()
}

fn counted(root: &Path, own: &str, key: &str) -> Counted {
    let read = |directory: &Path, file: &str| value(&setting(directory.join(file).to_str()?)?, key);
    let mut counted =
        Counted { capacity: read(root, "misc.capacity"), in_use: read(root, "misc.current"), allowed: None };
    let mut group = root.join(own.trim_start_matches('/'));
    while group != root && group.starts_with(root) {
        if let (Some(most), Some(current)) = (read(&group, "misc.max"), read(&group, "misc.current")) {
            let left = most.saturating_sub(current);
            counted.allowed = Some(counted.allowed.map_or(left, |least: u64| least.min(left)));
        }
        group.pop();
    }
    counted
}

/// What is free of `capacity` and allowed.
fn asids(capacity: Option<u64>, counted: Counted) -> Asids {
    let left = capacity.zip(counted.in_use).map(|(capacity, in_use)| capacity.saturating_sub(in_use));
    let free = left.map(|left| counted.allowed.map_or(left, |allowed| allowed.min(left)));
    Asids { capacity, in_use: counted.in_use, free }
}

impl Resources {
    /// What this host has now.
    pub fn of_host() -> Self {
        // A processor answers for a leaf that it does not have too.
        let has_leaf = __cpuid(EXTENDED_LEAVES).eax >= ENCRYPTION_LEAF;
        let processor = has_leaf.then(|| __cpuid(ENCRYPTION_LEAF));
        // In ECX how many identifiers there are, in EDX the first one for plain SEV.
        let numbers = processor.map_or((0, 0), |leaf| (u64::from(leaf.ecx), u64::from(leaf.edx)));
        let own = setting("/proc/self/cgroup").unwrap_or_default();
        let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
        let hiding = setting("/sys/module/kvm_amd/parameters/ciphertext_hiding_asids");
        let hiding = hiding.and_then(|count| count.parse().ok());
        Self::from_parts(Path::new(CGROUPS), own, numbers, hiding)
    }

    /// `processor` is what the leaf says: how many identifiers there are, and the first one for plain SEV; zeros where it
    /// says nothing.
    fn from_parts(root: &Path, own: &str, processor: (u64, u64), hiding: Option<u64>) -> Self {
        let (sev, sev_es) = (counted(root, own, "sev"), counted(root, own, "sev_es"));
        let (count, first) = processor;
        let known = |counted: Counted, number: u64| counted.capacity.or_else(|| (count != 0).then_some(number));
        let of_sev = known(sev, (count + 1).saturating_sub(first));
        let encrypted = known(sev_es, first.saturating_sub(1));
        let hiding = hiding.filter(|hidden| *hidden > 0);
        // With ciphertext hiding the lowest identifiers are for SEV-SNP alone, and it gets no others.
        let (of_es, of_snp) = match hiding {
            Some(hidden) => (encrypted.map(|all| all.saturating_sub(hidden)), encrypted.map(|all| all.min(hidden))),
            None => (encrypted, encrypted),
        };
        Self {
            sev: asids(of_sev, sev),
            sev_es: asids(of_es, sev_es),
            sev_snp: asids(of_snp, sev_es),
            ciphertext_hiding: hiding,
        }
    }

    /// Those of a kind of protection; nothing if it is none of AMD's.
    pub fn of(&self, protection: Protection) -> Option<Asids> {
        match protection {
            Protection::Sev => Some(self.sev),
            Protection::SevEs => Some(self.sev_es),
            Protection::SevSnp => Some(self.sev_snp),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn groups() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("vms/one")).unwrap();
        for (file, text) in [
            ("misc.capacity", "sev 410\nsev_es 99\n"),
            ("misc.current", "sev 3\nsev_es 90\n"),
            ("vms/misc.max", "sev max\nsev_es 5\n"),
            ("vms/misc.current", "sev 0\nsev_es 3\n"),
            ("vms/one/misc.max", "sev max\nsev_es max\n"),
            ("vms/one/misc.current", "sev 0\nsev_es 0\n"),
        ] {
            fs::write(root.path().join(file), text).unwrap();
        }
        root
    }

    #[test]
    fn what_is_free_is_what_every_group_above_still_allows() {
        let root = groups();
        let of = |own| Resources::from_parts(root.path(), own, (0, 0), None);
        assert_eq!(of("/").sev_snp, Asids { capacity: Some(99), in_use: Some(90), free: Some(9) });
        assert_eq!(of("/vms/one").sev_snp.free, Some(2));
        assert_eq!(of("/vms/one").sev_snp.to_string(), "of 99 identifiers 90 are in use and 2 free");
        assert_eq!(of("/vms/one").sev, Asids { capacity: Some(410), in_use: Some(3), free: Some(407) });
        assert_eq!(of("/../..").sev_es.free, Some(9));
    }

    #[test]
    fn ciphertext_hiding_keeps_identifiers_apart() {
        let root = groups();
        let resources = Resources::from_parts(root.path(), "/", (0, 0), Some(95));
        assert_eq!((resources.sev_es.capacity, resources.sev_snp.capacity), (Some(4), Some(95)));
        assert_eq!((resources.sev_es.free, resources.sev_snp.free), (Some(0), Some(5)));
        assert_eq!(Resources::from_parts(root.path(), "/", (0, 0), Some(0)).ciphertext_hiding, None);
    }

    #[test]
    fn without_control_groups_the_processor_says_how_many_there_are() {
        let nowhere = tempfile::tempdir().unwrap();
        let resources = Resources::from_parts(nowhere.path(), "/", (509, 100), None);
        assert_eq!((resources.sev.capacity, resources.sev_es.capacity), (Some(410), Some(99)));
        assert_eq!((resources.sev.free, resources.sev.in_use), (None, None));
        assert!(resources.sev.to_string().contains("of 410 identifiers are in use: the misc controller"));
        let nothing = Resources::from_parts(nowhere.path(), "/", (0, 0), None);
        assert_eq!(nothing.sev_snp, Asids { capacity: None, in_use: None, free: None });
    }
}
