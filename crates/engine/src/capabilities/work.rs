//! The work disk: a private ext4 mounted at `/root`, with what the image has there. It outlives a reset.

use std::sync::Arc;

use async_trait::async_trait;
use offshoot_model::Finding;
use offshoot_rootfs::base::BaseStore;
use offshoot_vmm::plan::DiskPlan;

use super::{blocking, disk, host_disk};
use crate::capability::{Capability, CapabilityError, VmPlan};
use crate::definition::VmRecord;
use crate::paths::VmPaths;
use crate::run::Run;

const NAME: &str = "work";
/// The serial under which the guest finds its work disk.
const SERIAL: &str = "work";

/// Clones the base's work seed on the first start, or builds the disk where the base has none.
pub struct WorkCapability {
    /// All bases.
    pub bases: Arc<BaseStore>,
}

#[async_trait]
impl Capability for WorkCapability {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn check(&self) -> Vec<Finding> {
        let bases = Arc::clone(&self.bases);
        blocking(move || {
            let cost =
                "no VM gets a work disk that is smaller than its image's seed (`--work`, mostly 10GiB)";
            let tool = host_disk::e2fs_tool(NAME, "resize2fs", cost);
            host_disk::lack_of_room(NAME, &bases)
                .into_iter()
                .chain([tool])
                .collect()
        })
        .await
    }

    fn plan(&self, _: &VmRecord, paths: &VmPaths, plan: &mut VmPlan) -> Result<(), CapabilityError> {
        plan.launch.disks.push(DiskPlan {
            serial: SERIAL.to_owned(),
            path: paths.work(),
            read_only: false,
        });
        SERIAL.clone_into(&mut plan.guest.work_serial);
        Ok(())
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        let (bases, base) = (Arc::clone(&self.bases), run.vm.base_id.clone());
        let size = run.vm.definition.config.work;
        if run.is_warm() {
            return disk::lengthen(run.paths.work(), size);
        }
        disk::ensure(run.paths.work(), run.vm.uid, move |path| {
            bases.make_work_disk(&base, path, size).map(drop)
        })
        .await
    }
}
