//! The overlay disk: a private ext4 that takes every write to `/`. A root that is a copy takes them itself.

use std::sync::Arc;

use async_trait::async_trait;
use offshoot_rootfs::base::BaseStore;
use offshoot_rootfs::policy::RootKind;
use offshoot_rootfs::seed::clone_seed;
use offshoot_vmm::plan::DiskPlan;

use super::{disk, root};
use crate::capability::{Capability, CapabilityError, VmPlan};
use crate::definition::VmRecord;
use crate::paths::VmPaths;
use crate::run::Run;

/// The serial under which the guest finds its overlay disk.
const SERIAL: &str = "overlay";

/// Clones the base's overlay seed on the first start.
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
        "overlay"
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
        let seed = self.bases.locate(&run.vm.base_id).overlay_seed();
        let size = run.vm.definition.config.disk;
        disk::ensure(run.paths.overlay(), run.vm.uid, move |path| {
            clone_seed(&seed, path, size).map(drop)
        })
        .await
    }

    async fn reset(&self, _: &VmRecord, paths: &VmPaths) -> Result<(), CapabilityError> {
        disk::remove(paths.overlay())
    }
}
