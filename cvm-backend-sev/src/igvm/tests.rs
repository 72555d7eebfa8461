//! Against the crate `igvm`, which writes the files here and measures them too.

use super::*;
use crate::snp::{interface, of_transcript};
use cvm_core::launch::Rehearsal;
use cvm_core::x86::VcpuState;
use cvm_core::{Gpa, Launch, VmConfig};
use igvm::measurement::generate_snp_measurement;
use igvm::snp_defs::SevVmsa;
use igvm::{IgvmDirectiveHeader, IgvmFile, IgvmInitializationHeader, IgvmPlatformHeader, IgvmRevision};
use igvm_defs::{
    IGVM_VHS_PARAMETER_INSERT, IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY, IGVM_VHS_SNP_ID_BLOCK_SIGNATURE,
    IGVM_VHS_SUPPORTED_PLATFORM, IgvmPageDataFlags, IgvmPageDataType, IgvmPlatformType,
};
use proptest::prelude::*;
use std::sync::LazyLock;
use zerocopy::FromBytes;

/// The bits of SEV-SNP and of another platform.
const SNP: u32 = 2;
const OTHER: u32 = 1;

fn page(
    gpa: u64,
    mask: u32,
    flags: IgvmPageDataFlags,
    data_type: IgvmPageDataType,
    data: &[u8],
) -> IgvmDirectiveHeader {
    IgvmDirectiveHeader::PageData { gpa, compatibility_mask: mask, flags, data_type, data: data.to_vec() }
}

const POLICY: u64 = 0x3_0000;

/// A vCPU that starts as the contract has it.
fn vmsa(index: u16) -> Box<SevVmsa> {
    let state = VcpuState::long_mode(Gpa(0x1000), Gpa(1 << 51 | 0x3000), index.into(), Gpa(0x2000));
    let vmsa = Vmsa::of(&state, SevFeatures::SNP_ACTIVE);
    Box::new(SevVmsa::read_from_bytes(vmsa.as_bytes()).unwrap())
}

fn vcpu(gpa: Gpa, index: u16, vmsa: Box<SevVmsa>) -> IgvmDirectiveHeader {
    IgvmDirectiveHeader::SnpVpContext { gpa: gpa.0, compatibility_mask: SNP, vp_index: index, vmsa }
}

/// What is measured, of each kind, but for what no launch can start.
fn directives() -> Vec<IgvmDirectiveHeader> {
    let none = IgvmPageDataFlags::new();
    vec![
        IgvmDirectiveHeader::ParameterArea { number_of_bytes: 0x2000, parameter_area_index: 3, initial_data: vec![] },
        page(0x1000, SNP | OTHER, none, IgvmPageDataType::NORMAL, &[7; 4096]),
        page(0x2000, SNP, none, IgvmPageDataType::NORMAL, &[9; 100]),
        page(0x3000, SNP, none, IgvmPageDataType::NORMAL, &[]),
        page(0x4000, OTHER, none, IgvmPageDataType::NORMAL, &[1; 4096]),
        page(0x5000, SNP, none.with_unmeasured(true), IgvmPageDataType::NORMAL, &[2; 4096]),
        page(0x7000, SNP, none, IgvmPageDataType::SECRETS, &[]),
        page(0x8000, SNP, none, IgvmPageDataType::CPUID_DATA, &[]),
        IgvmDirectiveHeader::ParameterInsert(IGVM_VHS_PARAMETER_INSERT {
            gpa: 0xa000,
            compatibility_mask: SNP,
            parameter_area_index: 3,
        }),
        vcpu(VMSA_GPA, 0, vmsa(0)),
        vcpu(VMSA_GPA, 1, vmsa(1)),
    ]
}

/// A file, and what `igvm` measures it as.
fn file(directives: Vec<IgvmDirectiveHeader>) -> (Vec<u8>, Measurement) {
    let platform = |mask, platform_type| {
        IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
            compatibility_mask: mask,
            highest_vtl: 0,
            platform_type,
            platform_version: 1,
            shared_gpa_boundary: 0,
        })
    };
    let policy = IgvmInitializationHeader::GuestPolicy { policy: POLICY, compatibility_mask: SNP };
    let expected = generate_snp_measurement(std::slice::from_ref(&policy), &directives, SNP).unwrap();
    let platforms = vec![platform(OTHER, IgvmPlatformType::VSM_ISOLATION), platform(SNP, IgvmPlatformType::SEV_SNP)];
    let mut bytes = Vec::new();
    IgvmFile::new(IgvmRevision::V1, platforms, vec![policy], directives).unwrap().serialize(&mut bytes).unwrap();
    (bytes, Measurement(expected))
}

#[test]
fn a_file_is_measured_as_the_crate_igvm_does() {
    let mut all = directives();
    // Shared memory, a state that no launch here has, and pages behind it.
    let none = IgvmPageDataFlags::new();
    all.push(page(0x6000, SNP, none.with_shared(true), IgvmPageDataType::NORMAL, &[]));
    let mut vmsa = vmsa(2);
    (vmsa.rip, vmsa.cr0) = (0x1234, 0x11);
    all.push(vcpu(Gpa(0xb000), 2, vmsa));
    all.push(page(0xc000, SNP, none, IgvmPageDataType::NORMAL, &[3; 4096]));
    let (file, expected) = file(all);
    let igvm = parse(&file).unwrap();
    assert_eq!(policy(&igvm).unwrap().bits(), POLICY);
    assert_eq!(measurement(&igvm), Ok(expected));
    assert!(image(igvm).is_err());
}

/// The digest of a launch of a file that succeeds.
fn launched(file: &[u8]) -> Measurement {
    let igvm = parse(file).unwrap();
    let features = features(&igvm).unwrap();
    let mut launch: Launch<Rehearsal> = Launch::rehearse(VmConfig::new(0x10000, 2).unwrap(), interface(51)).unwrap();
    launch.load_igvm(&image(igvm).unwrap(), "").unwrap();
    of_transcript(&launch.transcript().unwrap(), features)
}

#[test]
fn a_launch_of_a_file_is_measured_as_the_file_says() {
    let (file, expected) = file(directives());
    assert_eq!(launched(&file), expected);
}

#[test]
fn what_kvm_would_measure_otherwise_is_not_launched() {
    let at = directives().len();
    let changed = |change: &dyn Fn(&mut Vec<IgvmDirectiveHeader>)| {
        let mut all = directives();
        change(&mut all);
        let (file, _) = file(all);
        image(parse(&file).unwrap()).unwrap_err()
    };
    let last = |gpa, index, vmsa| changed(&|all| all[at - 1] = vcpu(gpa, index, Clone::clone(&vmsa)));
    let none = IgvmPageDataFlags::new();
    let behind = changed(&|all| all.push(page(0x9000, SNP, none, IgvmPageDataType::NORMAL, &[])));
    let shared = changed(&|all| {
        all.insert(1, page(0x9000, SNP, none.with_shared(true), IgvmPageDataType::NORMAL, &[]));
    });
    for (error, problem) in [
        (last(Gpa(0x9000), 1, vmsa(1)), "0xfffffffff000"),
        (last(VMSA_GPA, 2, vmsa(2)), "vcpu 2 where vcpu 1"),
        (behind, "behind vcpus"),
        (shared, "shared"),
        (changed(&|all| all.truncate(at - 2)), "no vcpus"),
    ] {
        assert!(error.to_string().contains(problem), "{error}, not {problem}");
    }
}

#[test]
fn a_state_that_no_vcpu_starts_from_is_refused_by_its_field() {
    let refused = |change: fn(&mut SevVmsa), field, at| {
        let mut state = vmsa(1);
        change(&mut state);
        let mut all = directives();
        let last = all.len() - 1;
        all[last] = vcpu(VMSA_GPA, 1, state);
        let (file, _) = file(all);
        let error = image(parse(&file).unwrap()).unwrap_err();
        assert_eq!(error, Error::Igvm(IgvmError::State { vcpu: 1, field, at }));
    };
    refused(|vmsa| vmsa.cr0 |= 1 << 29, "cr0", 0x158);
    refused(|vmsa| vmsa.cr4 = 1 << 5, "cr4", 0x148);
    refused(|vmsa| vmsa.efer &= !(1 << 12), "efer", 0xd1);
    refused(|vmsa| vmsa.cr0 = 0x11, "efer", 0xd0);
    refused(|vmsa| vmsa.cs.attrib = 0x69b, "code attributes", 0x10);
    refused(|vmsa| vmsa.cs.attrib |= 0x1000, "cs", 0x13);
    refused(|vmsa| vmsa.es.base = 1, "es", 0x8);
    refused(|vmsa| vmsa.gdtr.limit = 1 << 16, "gdtr", 0x66);
    refused(|vmsa| vmsa.cr2 = 1, "cr2", 0x240);
    refused(|vmsa| vmsa.virtual_tom = 1 << 47, "virtual_tom", 0x3cd);
    refused(|vmsa| vmsa.vmsa_padding[0] = 1, "reserved field", 0x670);
    // The features are those of the first vCPU.
    refused(|vmsa| vmsa.sev_features.set_debug_swap(true), "sev_features", 0x3b0);
}

#[test]
fn a_vcpu_starts_from_the_state_in_the_file_and_is_measured_with_it() {
    let mut all = directives();
    let last = all.len() - 1;
    let mut state = vmsa(1);
    (state.rax, state.rcx, state.rdx, state.rbx, state.rbp, state.r8, state.r15) = (1, 2, 3, 4, 5, 6, 7);
    (state.cr0, state.efer, state.rflags, state.gs.base) = (0x8000_0031, 0x1d00, 0x402, 0x5000);
    (state.gdtr.base, state.gdtr.limit, state.idtr.limit) = (0x6000, 0x17, 0);
    state.cs.selector = 0x18;
    all[last] = vcpu(VMSA_GPA, 1, state);
    let (file, expected) = file(all);
    assert_eq!(launched(&file), expected);
    let started = image(parse(&file).unwrap()).unwrap().states()[&1];
    let registers = (started.rax_to_rbx, started.rbp, started.r8_to_r15[0], started.r8_to_r15[7]);
    assert_eq!(registers, ([1, 2, 3, 4], 5, 6, 7));
    assert_eq!((started.cr0, started.efer, started.rflags, started.gs_base), (0x8000_0031, 0xd00, 0x402, 0x5000));
}

#[test]
fn a_state_has_its_fields_where_the_table_says() {
    assert!(vmsa::FIELDS.windows(2).all(|pair| pair[0].0 < pair[1].0));
    let place = |name| vmsa::FIELDS.iter().find(|(_, field)| *field == name).unwrap().0;
    for (name, offset) in [
        ("vmpl", std::mem::offset_of!(SevVmsa, vmpl)),
        ("xss", std::mem::offset_of!(SevVmsa, xss)),
        ("dr0 to dr3", std::mem::offset_of!(SevVmsa, dr0)),
        ("masks of dr0 to dr3", std::mem::offset_of!(SevVmsa, dr0_addr_mask)),
        ("s_cet", std::mem::offset_of!(SevVmsa, s_cet)),
        ("kernel_gs_base", std::mem::offset_of!(SevVmsa, kernel_gs_base)),
        ("g_pat", std::mem::offset_of!(SevVmsa, pat)),
        ("spec_ctrl", std::mem::offset_of!(SevVmsa, spec_ctrl)),
        ("rcx", std::mem::offset_of!(SevVmsa, rcx)),
        ("r8 to r15", std::mem::offset_of!(SevVmsa, r8)),
        ("guest exit field", std::mem::offset_of!(SevVmsa, exit_info1)),
        ("sev_features", std::mem::offset_of!(SevVmsa, sev_features)),
        ("virtual_tom", std::mem::offset_of!(SevVmsa, virtual_tom)),
        ("xcr0", std::mem::offset_of!(SevVmsa, xcr0)),
    ] {
        assert_eq!(place(name), offset, "{name}");
    }
}

#[test]
fn a_file_without_a_sound_policy_is_measured_and_not_launched() {
    let (mut file, expected) = file(directives());
    // The bit of the policy that has to be one.
    let place = file.windows(8).position(|bytes| bytes == POLICY.to_le_bytes()).unwrap();
    file[place + 2] = 0;
    let igvm = parse(&file).unwrap();
    assert!(matches!(policy(&igvm), Err(Error::Policy { .. })));
    assert_eq!(measurement(&igvm), Ok(expected));
    file[place + 8] = OTHER as u8;
    let igvm = parse(&file).unwrap();
    assert!(policy(&igvm).unwrap_err().to_string().contains("no policy"));
    assert_eq!(measurement(&igvm), Ok(expected));
}

#[test]
fn an_id_block_of_a_file_is_the_one_that_was_signed() {
    let (id, author) = crate::id_block::tests::keys();
    let (_, digest) = file(directives());
    let policy = SnpPolicy::from_bits(POLICY).unwrap();
    let block = IdBlock { digest, family: [1; 16], image: [2; 16], svn: 3, policy };
    for author in [None, Some(&author)] {
        let auth = IdAuth::sign(&block, &id, author);
        let bytes = auth.as_bytes();
        let number = |at: usize| <[u8; 72]>::try_from(&bytes[at..at + 72]).unwrap();
        let signature =
            |at: usize| Box::new(IGVM_VHS_SNP_ID_BLOCK_SIGNATURE { r_comp: number(at), s_comp: number(at + 72) });
        let key = |at: usize| {
            let curve = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            Box::new(IGVM_VHS_SNP_ID_BLOCK_PUBLIC_KEY { curve, reserved: 0, qx: number(at + 4), qy: number(at + 76) })
        };
        let header = IgvmDirectiveHeader::SnpIdBlock {
            compatibility_mask: SNP,
            author_key_enabled: author.is_some().into(),
            reserved: [0; 3],
            ld: digest.0,
            family_id: block.family,
            image_id: block.image,
            version: 1,
            guest_svn: block.svn,
            id_key_algorithm: 1,
            author_key_algorithm: author.is_some().into(),
            id_key_signature: signature(0x40),
            id_public_key: key(0x240),
            author_key_signature: signature(0x680),
            author_public_key: key(0x880),
        };
        let (file, measured) = file([directives(), vec![header]].concat());
        let igvm = parse(&file).unwrap();
        let given = id_block(&igvm).unwrap().unwrap();
        assert_eq!((&given.0, &given.1, measured), (&block, &auth, digest));
        given.1.verify(&given.0).unwrap();
    }
    assert_eq!(id_block(&parse(&file(directives()).0).unwrap()).unwrap(), None);
}

/// Written once.
static FILE: LazyLock<Vec<u8>> = LazyLock::new(|| file(directives()).0);

proptest! {
    #[test]
    fn changed_and_cut_files_do_not_panic(
        changes in proptest::collection::vec((0..0x240usize, any::<u8>()), 0..4),
        cut in 0..0x240usize,
    ) {
        let mut file = FILE.clone();
        for (at, byte) in changes {
            file[at] = byte;
        }
        if let Ok(igvm) = parse(&file) {
            let _ = (measurement(&igvm), id_block(&igvm), image(igvm));
        }
        file.truncate(cut);
        prop_assert!(parse(&file).is_err());
    }
}
