use super::fake::{Fake, Frontend};
use super::*;
use crate::tests::{Engine, ask, assert_shared, engine, range};
use cvm_core::{Answer, PAGE_SIZE};
use std::sync::Arc;

fn world(slots: Option<u64>) -> (Engine, Arc<Fake>, Arc<VhostUser<Frontend>>) {
    let (engine, fake) = (engine(), Fake::new(slots.unwrap_or(0)));
    let acked = match slots {
        Some(_) => VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
        None => VhostUserProtocolFeatures::empty(),
    };
    let vhost = Arc::new(VhostUser::new("disk", Frontend(Arc::clone(&fake)), engine.memory(), acked).unwrap());
    engine.add_listener(Arc::clone(&vhost) as _);
    (engine, fake, vhost)
}

fn share(engine: &Engine, start: u64, pages: u64) {
    assert_eq!(ask(engine, start, pages, Side::Shared).answer(), Answer::Done);
}

#[test]
fn a_table_has_a_region_for_each_run_of_shared_pages_in_a_slot() {
    let (engine, fake, _) = world(None);
    for (start, pages) in [(0, 2), (2, 2), (10, 1), (38, 4)] {
        share(&engine, start, pages);
    }
    assert_eq!(fake.regions(), [range(0, 4), range(10, 1), range(38, 2), range(40, 2)], "a slot begins at page 40");
    assert_eq!(ask(&engine, 1, 1, Side::Private).answer(), Answer::Done);
    assert_shared(&engine, &fake.regions());
}

#[test]
fn more_runs_than_memory_slots_are_refused_and_both_numbers_are_named() {
    for (slots, numbers) in [(None, ["9 runs", "8 memory slots"]), (Some(8), ["9 runs", "8 memory slots"])] {
        let (engine, fake, _) = world(slots);
        for page in 0..8 {
            share(&engine, 2 * page, 1);
        }
        let refused = ask(&engine, 20, 1, Side::Shared);
        assert_eq!(refused.answer(), Answer::Invalid);
        let text = refused.cause().unwrap().to_string();
        assert!(numbers.iter().all(|number| text.contains(number)), "{text}");
        assert_shared(&engine, &fake.regions());
        assert_eq!(ask(&engine, 2, 1, Side::Private).answer(), Answer::Done);
        share(&engine, 20, 1);
        assert_shared(&engine, &fake.regions());
    }
}

#[test]
fn a_page_that_closes_a_gap_is_welcome_when_the_table_is_full() {
    for slots in [None, Some(8)] {
        let (engine, fake, _) = world(slots);
        for page in 0..8 {
            share(&engine, 2 * page, 1);
        }
        share(&engine, 1, 1);
        assert_eq!(fake.regions().len(), 7);
    }
}

#[test]
fn who_may_need_the_last_slot_has_it_until_his_conversion_is_done_or_not() {
    for slots in [None, Some(8)] {
        let (engine, fake, vhost) = world(slots);
        for page in 0..7 {
            share(&engine, 2 * page, 1);
        }
        vhost.prepare(range(20, 1), Side::Shared).unwrap();
        assert!(matches!(vhost.prepare(range(22, 1), Side::Shared), Err(Objection::Wait(_))));
        vhost.aborted(range(20, 1), Side::Shared);
        share(&engine, 22, 1);
        assert_shared(&engine, &fake.regions());
    }
}

#[test]
fn the_last_region_of_a_table_stays() {
    let (engine, fake, _) = world(None);
    share(&engine, 4, 4);
    assert_eq!(ask(&engine, 4, 4, Side::Private).answer(), Answer::Invalid);
    assert_shared(&engine, &fake.regions());
    let (engine, fake, _) = world(Some(8));
    share(&engine, 4, 4);
    assert_eq!(ask(&engine, 4, 4, Side::Private).answer(), Answer::Done, "slots can all be empty");
    assert!(fake.regions().is_empty());
}

#[test]
fn a_backend_that_does_not_give_up_a_page_keeps_it_shared_until_it_is_detached() {
    for slots in [None, Some(8)] {
        let (engine, fake, vhost) = world(slots);
        share(&engine, 0, 4);
        share(&engine, 10, 4);
        *fake.failures.lock().unwrap() = vec![true; 100].into();
        assert_eq!(ask(&engine, 10, 4, Side::Private).answer(), Answer::Retry);
        assert_shared(&engine, &fake.regions());
        vhost.detach();
        assert_eq!(ask(&engine, 10, 4, Side::Private).answer(), Answer::Done);
    }
}

#[test]
fn a_backend_that_comes_late_is_told_of_what_is_shared_already_or_refused() {
    let engine = engine();
    for page in 0..9 {
        share(&engine, 2 * page, 1);
    }
    let late = |slots: Option<u64>| {
        let fake = Fake::new(slots.unwrap_or(0));
        let acked =
            slots.map_or(VhostUserProtocolFeatures::empty(), |_| VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
        VhostUser::new("late", Frontend(Arc::clone(&fake)), engine.memory(), acked).map(|_| fake)
    };
    assert!(matches!(late(None), Err(VhostUserError::TooFragmented { runs: 9, slots: 8 })));
    assert!(matches!(late(Some(5)), Err(VhostUserError::TooFragmented { runs: 9, slots: 5 })));
    assert_shared(&engine, &late(Some(9)).unwrap().regions());
}

/// The `vhost` crate's own ends, over a socket.
mod socket {
    use super::*;
    use std::collections::BTreeMap;
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;
    use std::sync::Mutex;
    use vhost::vhost_user::message::{
        VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserHeaderFlag,
        VhostUserInflight, VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
        VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
    };
    use vhost::vhost_user::{
        BackendReqHandler, Error, Frontend, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserFrontend,
    };
    use vhost::{VhostBackend, VhostUserMemoryRegionBase};
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    /// A backend that looks at memory through what it was given.
    #[derive(Default)]
    struct Backend {
        regions: BTreeMap<u64, (GpaRange, File, u64)>,
        tables: usize,
    }

    impl Backend {
        fn insert(&mut self, region: &VhostUserMemoryRegion, file: File) {
            let (start, len, offset) = (region.guest_phys_addr, region.memory_size, region.mmap_offset);
            self.regions.insert(start, (GpaRange::new(start, len).unwrap(), file, offset));
        }

        fn ranges(&self) -> Vec<GpaRange> {
            self.regions.values().map(|(range, ..)| *range).collect()
        }

        fn read(&self, gpa: u64) -> Option<u8> {
            let (range, file, offset) = self.regions.range(..=gpa).next_back()?.1;
            let mut byte = [0];
            file.read_exact_at(&mut byte, offset + gpa - range.start().0).unwrap();
            (gpa < range.end().0).then_some(byte[0])
        }
    }

    impl VhostUserBackendReqHandlerMut for Backend {
        fn set_owner(&mut self) -> Result<()> {
            Ok(())
        }
        fn get_features(&mut self) -> Result<u64> {
            Ok(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
        }
        fn set_features(&mut self, _: u64) -> Result<()> {
            Ok(())
        }
        fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
            Ok(VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
        }
        fn set_protocol_features(&mut self, _: u64) -> Result<()> {
            Ok(())
        }
        fn get_max_mem_slots(&mut self) -> Result<u64> {
            Ok(3)
        }
        fn set_mem_table(
            &mut self,
            regions: &[VhostUserMemoryRegion],
            files: Vec<File>,
            _: Option<bool>,
        ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
            self.regions.clear();
            self.tables += 1;
            regions.iter().zip(files).for_each(|(region, file)| self.insert(region, file));
            Ok(None)
        }
        fn add_mem_region(
            &mut self,
            region: &VhostUserSingleMemoryRegion,
            file: File,
            _: Option<bool>,
        ) -> Result<Option<VhostUserMemoryRegionBase>> {
            self.insert(region, file);
            Ok(None)
        }
        fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
            let start = region.guest_phys_addr;
            self.regions.remove(&start).map(drop).ok_or(Error::InvalidParam)
        }

        fn reset_owner(&mut self) -> Result<()> {
            Err(Error::InvalidParam)
        }
        fn reset_device(&mut self) -> Result<()> {
            Err(Error::InvalidParam)
        }
        fn set_vring_num(&mut self, _: u32, _: u32) -> Result<()> {
            Err(Error::InvalidParam)
        }
        fn set_vring_addr(&mut self, _: u32, _: VhostUserVringAddrFlags, _: u64, _: u64, _: u64, _: u64) -> Result<()> {
            Err(Error::InvalidParam)
        }
        fn set_vring_base(&mut self, _: u32, _: u32) -> Result<()> {
            Err(Error::InvalidParam)
        }
        fn get_vring_base(&mut self, _: u32) -> Result<VhostUserVringState> {
            Err(Error::InvalidParam)
        }
        fn set_vring_kick(&mut self, _: u8, _: Option<File>) -> Result<()> {
            Err(Error::InvalidParam)
        }
        fn set_vring_call(&mut self, _: u8, _: Option<File>) -> Result<()> {
            Err(Error::InvalidParam)
        }
        fn set_vring_err(&mut self, _: u8, _: Option<File>) -> Result<()> {
            Err(Error::InvalidParam)
        }
        fn get_queue_num(&mut self) -> Result<u64> {
            Err(Error::InvalidParam)
        }
        fn set_vring_enable(&mut self, _: u32, _: bool) -> Result<()> {
            Err(Error::InvalidParam)
        }
        fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
            Err(Error::InvalidParam)
        }
        fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
            Err(Error::InvalidParam)
        }
        fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
            Err(Error::InvalidParam)
        }
        fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
            Err(Error::InvalidParam)
        }
        fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
            Err(Error::InvalidParam)
        }
        fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
            Err(Error::InvalidParam)
        }
        fn set_device_state_fd(
            &mut self,
            _: VhostTransferStateDirection,
            _: VhostTransferStatePhase,
            _: File,
        ) -> Result<Option<File>> {
            Err(Error::InvalidParam)
        }
        fn check_device_state(&mut self) -> Result<()> {
            Err(Error::InvalidParam)
        }
        fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
            Err(Error::InvalidParam)
        }
        fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
            Err(Error::InvalidParam)
        }
    }

    #[test]
    fn a_backend_behind_a_socket_sees_what_is_shared_and_nothing_else() {
        let both = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        for acked in [both, VhostUserProtocolFeatures::REPLY_ACK, VhostUserProtocolFeatures::empty()] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let backend = Arc::new(Mutex::new(Backend::default()));
            let mut handler = BackendReqHandler::from_stream(theirs, Arc::clone(&backend));
            let thread = std::thread::spawn(move || while handler.handle_request().is_ok() {});

            let mut frontend = Frontend::from_stream(ours, 1);
            frontend.set_owner().unwrap();
            frontend.set_features(frontend.get_features().unwrap()).unwrap();
            let offered = frontend.get_protocol_features().unwrap();
            frontend.set_protocol_features(offered & acked).unwrap();
            if acked.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            }
            let engine = engine();
            let vhost = Arc::new(VhostUser::new("disk", frontend, engine.memory(), acked).unwrap());
            engine.add_listener(Arc::clone(&vhost) as _);

            let settled = || {
                // Without acknowledgements only removals are waited for.
                vhost.fence().unwrap();
                let backend = backend.lock().unwrap();
                assert_shared(&engine, &backend.ranges());
                backend.read(12 * PAGE_SIZE)
            };
            share(&engine, 10, 20);
            share(&engine, 50, 2);
            engine.memory().memory().write_obj(0x5au8, GuestAddress(12 * PAGE_SIZE)).unwrap();
            assert_eq!(settled(), Some(0x5a), "the backend does not see what was written");
            assert_eq!(ask(&engine, 12, 1, Side::Private).answer(), Answer::Done);
            assert_eq!(settled(), None);
            if acked.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
                assert_eq!(ask(&engine, 54, 1, Side::Shared).answer(), Answer::Invalid, "the backend has three slots");
                assert_eq!(backend.lock().unwrap().tables, 0);
            }
            drop((engine, vhost));
            thread.join().unwrap();
        }
    }
}
