//! A vhost-user backend in memory.

use cvm_core::GpaRange;
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserShMemConfig, VhostUserSharedMsg,
};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{
    Error, Result, VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionBase, VhostUserMemoryRegionInfo,
    VringConfigData,
};
use vmm_sys_util::eventfd::EventFd;

/// What a backend knows, and how its next calls go.
#[derive(Debug, Default)]
pub(crate) struct Fake {
    pub(crate) slots: u64,
    /// By start.
    pub(crate) regions: Mutex<BTreeMap<u64, GpaRange>>,
    pub(crate) failures: Mutex<VecDeque<bool>>,
    /// What a real backend would have refused.
    pub(crate) refused: Mutex<Vec<String>>,
}

impl Fake {
    pub(crate) fn new(slots: u64) -> Arc<Self> {
        Arc::new(Self { slots, ..Self::default() })
    }

    pub(crate) fn regions(&self) -> Vec<GpaRange> {
        self.regions.lock().unwrap().values().copied().collect()
    }

    pub(crate) fn reaches(&self, range: GpaRange) -> bool {
        self.regions().iter().any(|region| region.intersection(&range).is_some())
    }

    fn begin(&self) -> Result<()> {
        match self.failures.lock().unwrap().pop_front() {
            Some(true) => Err(Error::InvalidOperation),
            _ => Ok(()),
        }
    }

    fn refuse<T>(&self, why: String) -> Result<T> {
        self.refused.lock().unwrap().push(why);
        Err(Error::InvalidGuestMemoryRegion)
    }
}

fn range(region: &VhostUserMemoryRegionInfo) -> GpaRange {
    GpaRange::new(region.guest_phys_addr, region.memory_size).unwrap()
}

/// Another end of a [`Fake`].
#[derive(Debug)]
pub(crate) struct Frontend(pub(crate) Arc<Fake>);

impl VhostBackend for Frontend {
    fn get_features(&self) -> Result<u64> {
        Ok(0)
    }

    fn set_mem_table(&self, regions: &[VhostUserMemoryRegionInfo]) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.0.begin()?;
        if regions.is_empty() || regions.len() > 8 {
            return self.0.refuse(format!("{} regions", regions.len()));
        }
        *self.0.regions.lock().unwrap() = regions.iter().map(|info| (info.guest_phys_addr, range(info))).collect();
        Ok(None)
    }

    fn set_features(&self, _: u64) -> Result<()> {
        Err(Error::InvalidOperation)
    }
    fn set_owner(&self) -> Result<()> {
        Err(Error::InvalidOperation)
    }
    fn reset_owner(&self) -> Result<()> {
        Err(Error::InvalidOperation)
    }
    fn set_log_base(&self, _: u64, _: Option<VhostUserDirtyLogRegion>) -> Result<()> {
        Err(Error::InvalidOperation)
    }
    fn set_log_fd(&self, _: RawFd) -> Result<()> {
        Err(Error::InvalidOperation)
    }
    fn set_vring_num(&self, _: usize, _: u16) -> Result<()> {
        Err(Error::InvalidOperation)
    }
    fn set_vring_addr(&self, _: usize, _: &VringConfigData) -> Result<()> {
        Err(Error::InvalidOperation)
    }
    fn set_vring_base(&self, _: usize, _: u16) -> Result<()> {
        Err(Error::InvalidOperation)
    }
    fn get_vring_base(&self, _: usize) -> Result<u32> {
        Err(Error::InvalidOperation)
    }
    fn set_vring_call(&self, _: usize, _: &EventFd) -> Result<()> {
        Err(Error::InvalidOperation)
    }
    fn set_vring_kick(&self, _: usize, _: &EventFd) -> Result<()> {
        Err(Error::InvalidOperation)
    }
    fn set_vring_err(&self, _: usize, _: &EventFd) -> Result<()> {
        Err(Error::InvalidOperation)
    }
}

impl VhostUserFrontend for Frontend {
    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(self.0.slots)
    }

    fn add_mem_region(&mut self, info: &VhostUserMemoryRegionInfo) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.0.begin()?;
        let range = range(info);
        if self.0.reaches(range) {
            return self.0.refuse(format!("{range} overlaps a region"));
        }
        if self.0.regions().len() as u64 >= self.0.slots {
            return self.0.refuse(format!("{range} is one too many"));
        }
        self.0.regions.lock().unwrap().insert(range.start().0, range);
        Ok(None)
    }

    fn remove_mem_region(&mut self, info: &VhostUserMemoryRegionInfo) -> Result<()> {
        self.0.begin()?;
        let range = range(info);
        let mut regions = self.0.regions.lock().unwrap();
        if regions.get(&range.start().0) != Some(&range) {
            return self.0.refuse(format!("{range} is no region"));
        }
        regions.remove(&range.start().0);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Err(Error::InvalidOperation)
    }
    fn set_protocol_features(&mut self, _: VhostUserProtocolFeatures) -> Result<()> {
        Err(Error::InvalidOperation)
    }
    fn get_queue_num(&mut self) -> Result<u64> {
        Err(Error::InvalidOperation)
    }
    fn reset_device(&mut self) -> Result<()> {
        Err(Error::InvalidOperation)
    }
    fn set_vring_enable(&mut self, _: usize, _: bool) -> Result<()> {
        Err(Error::InvalidOperation)
    }
    fn get_config(
        &mut self,
        _: u32,
        _: u32,
        _: VhostUserConfigFlags,
        _: &[u8],
    ) -> Result<(vhost::vhost_user::message::VhostUserConfig, Vec<u8>)> {
        Err(Error::InvalidOperation)
    }
    fn set_config(&mut self, _: u32, _: VhostUserConfigFlags, _: &[u8]) -> Result<()> {
        Err(Error::InvalidOperation)
    }
    fn set_backend_request_fd(&mut self, _: &dyn AsRawFd) -> Result<()> {
        Err(Error::InvalidOperation)
    }
    fn get_shared_object(&mut self, _: &VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation)
    }
    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation)
    }
    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: RawFd) -> Result<()> {
        Err(Error::InvalidOperation)
    }
    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation)
    }
    fn set_device_state_fd(
        &self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: OwnedFd,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation)
    }
    fn check_device_state(&self) -> Result<()> {
        Err(Error::InvalidOperation)
    }
}
