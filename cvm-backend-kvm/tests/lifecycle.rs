//! What can be done with VMs besides running them.

mod common;

use common::{Guest, config, isolation, kvm};
use cvm_core::{Lifecycle, LifecycleAnswer, Protection, Vm};

#[test]
fn private_memory_is_swapped_just_where_the_kernel_can_count_it() {
    let Some(platform) = kvm() else { return };
    let guest = Guest::from_launch(load(&platform, config(1), |a| a.end(0)));
    // Asked of whoever holds the memory: the kernel counts what is behind a file, and not what is behind a guest_memfd.
    let is_file = guest.vm.allocated().unwrap().private.is_some();
    assert_eq!(guest.vm.lifecycle(Lifecycle::Swap) == LifecycleAnswer::Yes, is_file);
    match isolation() {
        Protection::None => assert!(is_file),
        Protection::GuestMemfd => assert!(!is_file),
        // It has whichever of the two there is.
        _ => {}
    }
}

#[test]
fn nothing_else_can_be_done_with_a_vm_and_each_answer_says_why() {
    let Some(platform) = kvm() else { return };
    let guest = Guest::from_launch(load(&platform, config(1), |a| a.end(0)));
    for what in Lifecycle::ALL.into_iter().filter(|what| *what != Lifecycle::Swap) {
        assert!(matches!(guest.vm.lifecycle(what), LifecycleAnswer::No(reason) if reason.len() > 20), "{what:?}");
    }
}
