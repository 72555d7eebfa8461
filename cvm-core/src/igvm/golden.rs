//! A file and bytes that are the same on machines of either byte order; the other tests' files are written by a crate that has the
//! byte order of the machine in them.

use super::IgvmImage;
use crate::doorbell::Transport;
use crate::launch::{Entry, Rehearsal, Transcript, digest};
use crate::x86::VcpuState;
use crate::{Gpa, Launch, PageKind, VmConfig};

/// Of the format's own layout for x86-64, with the values that this library starts vCPUs from.
const FILE: &[u8] = include_bytes!("data/native-own-values.igvm");

#[test]
fn a_file_is_read_the_same_on_a_machine_of_either_byte_order() {
    let config = VmConfig::new(16 << 20, 1).unwrap();
    let mut launch: Launch<Rehearsal> = Launch::rehearse(config, Transport::Doorbell).unwrap();
    launch.load_igvm(&IgvmImage::native(FILE).unwrap(), "").unwrap();
    let transcript = launch.transcript().unwrap();
    let [_, pages @ .., vcpu] = transcript.entries() else { panic!("there are no pages: {transcript:?}") };
    // Machine checks are off in it.
    let state = VcpuState { rsp: 0x8000, cr4: 1 << 5, ..VcpuState::long_mode(Gpa(0x1000), Gpa(0x3000), 0, Gpa(0)) };
    assert_eq!(*vcpu, Entry::Vcpu { index: 0, state });
    let pages = pages.iter().map(|page| match page {
        Entry::Page { kind: PageKind::Measured, gpa, .. } => *gpa,
        other => panic!("not a measured page: {other:?}"),
    });
    assert_eq!(pages.collect::<Vec<_>>(), [0x1000, 0x3000, 0x4000, 0x5000].map(Gpa));
}

#[test]
fn the_measurement_of_a_state_is_of_its_fields_in_little_endian() {
    let mut numbers = [0; VcpuState::WORDS];
    numbers[..5].copy_from_slice(&[0x0102, 3, 4, 5, 6]);
    let state = VcpuState::from_words(&numbers).unwrap();
    assert_eq!((state.rip, state.rsp, state.rdi, state.rsi, state.cr3), (0x0102, 3, 4, 5, 6));
    let transcript: Transcript = [Entry::Vcpu { index: 1, state }].into_iter().collect();
    let fields = *b"\x02\x01\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0";
    let fields = [&fields[..], &[0; 8 * (VcpuState::WORDS - 5)]].concat();
    let link = [&Transcript::default().measurement().0[..], b"\x11\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0", &digest(&fields)];
    assert_eq!(transcript.measurement().0, digest(&link.concat()));
}
