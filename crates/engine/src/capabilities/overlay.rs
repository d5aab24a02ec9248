//! The overlay disk: a private ext4 that takes every write to `/`. A root that is a copy takes them itself.

use std::sync::Arc;

use async_trait::async_trait;
use offshoot_model::Finding;
use offshoot_rootfs::base::BaseStore;
use offshoot_rootfs::policy::RootKind;
use offshoot_vmm::plan::DiskPlan;

use super::{blocking, disk, host_disk, root};
use crate::capability::{Capability, CapabilityError, VmPlan};
use crate::definition::VmRecord;
use crate::paths::VmPaths;
use crate::run::Run;

const NAME: &str = "overlay";
/// The serial under which the guest finds its overlay disk.
const SERIAL: &str = "overlay";

/// Clones the base's overlay seed on the first start, or makes the disk where the base has none.
pub struct OverlayCapability {
    /// All bases.
    pub bases: Arc<BaseStore>,
}

fn needed(vm: &VmRecord) -> Result<bool, CapabilityError> {
    Ok(root::kind_of(vm)? != RootKind::Copy)
}

#[async_trait]
impl Capability for OverlayCapability {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn check(&self) -> Vec<Finding> {
        let bases = Arc::clone(&self.bases);
        blocking(move || {
            let cost =
                "no image can be prepared, and no VM gets an overlay disk of less than 10GiB (`--disk`)";
            let tool = host_disk::e2fs_tool(NAME, "mke2fs", cost);
            host_disk::lack_of_room(NAME, &bases)
                .into_iter()
                .chain([tool])
                .collect()
        })
        .await
    }

    fn plan(&self, vm: &VmRecord, paths: &VmPaths, plan: &mut VmPlan) -> Result<(), CapabilityError> {
        if needed(vm)? {
            plan.launch.disks.push(DiskPlan {
                serial: SERIAL.to_owned(),
                path: paths.overlay(),
                read_only: false,
            });
            SERIAL.clone_into(&mut plan.guest.overlay_serial);
        }
        Ok(())
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        if !needed(&run.vm)? {
            return Ok(());
        }
        let (bases, base) = (Arc::clone(&self.bases), run.vm.base_id.clone());
        let size = run.vm.definition.config.disk;
        if run.is_warm() {
            return disk::lengthen(run.paths.overlay(), size);
        }
        disk::ensure(run.paths.overlay(), run.vm.uid, move |path| {
            bases.make_overlay_disk(&base, path, size).map(drop)
        })
        .await
    }

    async fn reset(&self, _: &VmRecord, paths: &VmPaths) -> Result<(), CapabilityError> {
        disk::remove(paths.overlay())
    }
}
