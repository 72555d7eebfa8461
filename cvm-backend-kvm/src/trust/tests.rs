use super::*;

const USER: u32 = 1000;

/// An unprivileged VMM whose vault nobody can reach.
fn closed() -> Facts {
    Facts {
        unknown: None,
        uids: BTreeSet::from([USER]),
        capabilities: CapabilitySet::empty(),
        initial_namespace: true,
        yama: 0,
        related: false,
        start: Start::Apart { uid: 2000, closed: true },
    }
}

const CHILD: Start = Start::Child { unreadable: false };
const NOBODY: &[Party] = &[];
const PEERS: &[Party] = &[Party::SameUser];
const BOTH: &[Party] = &[Party::VmmProcess, Party::SameUser];

#[test]
fn the_parties_that_reach_a_vault_follow_from_the_facts() {
    let with = |capabilities| Facts { capabilities, ..closed() };
    let child = |yama, related| Facts { yama, related, start: CHILD, ..closed() };
    let root = BTreeSet::from([0]);
    let table = [
        ("a vault of its own user", closed(), NOBODY),
        ("a child that the user cannot read", Facts { start: Start::Child { unreadable: true }, ..closed() }, NOBODY),
        ("a child", child(0, false), PEERS),
        ("a child under Yama", child(1, false), NOBODY),
        ("a child under Yama, started from the user's shell", child(1, true), PEERS),
        ("a child under a stricter Yama, started from the user's shell", child(2, true), NOBODY),
        ("a child where nobody may trace", child(3, true), NOBODY),
        ("root", Facts { uids: root.clone(), ..closed() }, BOTH),
        ("a saved user ID of root", Facts { uids: BTreeSet::from([0, USER]), ..closed() }, BOTH),
        ("root, whatever Yama says", Facts { uids: root, ..child(3, false) }, BOTH),
        (
            "credentials that cannot be read",
            Facts { unknown: Some("no /proc".into()), uids: BTreeSet::new(), ..closed() },
            BOTH,
        ),
        ("CAP_SYS_PTRACE", with(CapabilitySet::SYS_PTRACE), BOTH),
        ("CAP_SYS_ADMIN", with(CapabilitySet::SYS_ADMIN), BOTH),
        ("CAP_SETUID", with(CapabilitySet::SETUID), BOTH),
        ("CAP_DAC_OVERRIDE", with(CapabilitySet::DAC_OVERRIDE), BOTH),
        ("a capability that this library does not know", with(CapabilitySet::from_bits_retain(1 << 60)), BOTH),
        ("CAP_NET_ADMIN, as VMMs have it for taps", with(CapabilitySet::NET_ADMIN), NOBODY),
        ("another user namespace", Facts { initial_namespace: false, ..closed() }, PEERS),
        ("a vault of the VMM's user", Facts { start: Start::Apart { uid: USER, closed: true }, ..closed() }, PEERS),
        (
            "a vault that the VMM can look at",
            Facts { start: Start::Apart { uid: 2000, closed: false }, ..closed() },
            BOTH,
        ),
    ];
    for (name, facts, expected) in table {
        let findings = facts.findings();
        for isolation in [Isolation::None, Isolation::GuestMemfd] {
            let model = model(&findings, isolation);
            for party in [Party::VmmProcess, Party::SameUser] {
                for asset in Asset::ALL {
                    let powers = if expected.contains(&party) { held_by(isolation, asset) } else { Powers::empty() };
                    assert_eq!(model.powers(party, asset), powers, "{name}: {party:?}, {asset:?}, {isolation:?}");
                }
            }
            assert_eq!(model.powers(Party::OtherVms, Asset::PrivateMemory), Powers::empty(), "{name}");
            assert_eq!(model.powers(Party::Root, Asset::PrivateMemory), Powers::all(), "{name}");
        }
        assert_eq!(findings.is_empty(), expected.is_empty(), "{name}: {findings:?}");
        for Finding { way, .. } in findings {
            assert!(way.what.contains(' ') && way.remedy.contains(' '), "{name}: {way:?}");
            assert!(!way.what.contains("  ") && !way.remedy.contains("  "), "{name}: {way:?}");
        }
    }
}

#[test]
fn who_traces_a_vault_reads_files_and_not_a_guest_memfd() {
    let read = Powers::READ | Powers::WRITE;
    assert!(held_by(Isolation::None, Asset::PrivateMemory).contains(read));
    assert!(!held_by(Isolation::GuestMemfd, Asset::PrivateMemory).intersects(read));
    assert!(held_by(Isolation::GuestMemfd, Asset::PrivateMemory).contains(Powers::STEER | Powers::REMAP));
    assert!(held_by(Isolation::GuestMemfd, Asset::Registers).contains(read));
}

#[test]
fn capabilities_are_named_in_the_finding() {
    let capabilities = CapabilitySet::SYS_PTRACE | CapabilitySet::NET_RAW | CapabilitySet::from_bits_retain(1 << 60);
    let findings = Facts { capabilities, ..closed() }.findings();
    assert!(findings[0].way.what.ends_with(": CAP_SYS_PTRACE, 0x1000000000000000"), "{findings:?}");
}

#[test]
fn a_status_is_read_or_counts_as_unknown() {
    let text = "Name:\tvmm\nPPid:\t7\nUid:\t1\t2\t3\t4\nCapPrm:\t0000000000080000\n";
    let status = Status { uids: [1, 2, 3, 4], permitted: CapabilitySet::SYS_PTRACE, parent: 7 };
    assert_eq!(Status::parse(text), Some(status));
    for broken in ["", "Uid:\t1\t2\t3\nPPid:\t7\nCapPrm:\t0\n", "PPid:\t7\nUid:\t1\t2\t3\t4\nCapPrm:\tx\n"] {
        assert_eq!(Status::parse(broken), None, "{broken:?}");
    }
}

#[test]
fn a_process_may_look_at_itself_and_at_nothing_that_is_not_there() {
    assert!(!is_closed(std::process::id().cast_signed()));
    assert!(!is_closed(0) && !is_closed(-1));
}

#[test]
fn the_facts_of_this_process_are_its_own() {
    let facts = Facts::read(&Program::This, None);
    assert!(facts.uids.contains(&rustix::process::geteuid().as_raw()), "{facts:?}");
    let readable = fs::File::open("/proc/self/exe").is_ok();
    assert_eq!(facts.start, Start::Child { unreadable: !readable });
}
