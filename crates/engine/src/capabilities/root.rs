//! The root: the image's base, shared with every VM made from it.

use std::sync::Arc;

use async_trait::async_trait;
use offshoot_model::{ErrorKind, Explain, Finding, VmName};
use offshoot_rootfs::base::BaseStore;
use offshoot_vmm::LaunchPlan;
use offshoot_vmm::plan::DiskPlan;

use crate::capability::{Capability, CapabilityError};
use crate::definition::VmRecord;
use crate::paths::VmPaths;
use crate::run::Run;

/// The serial under which the guest finds its root.
pub(super) const ROOT_SERIAL: &str = "root";

/// Shows `root.erofs` to the guest.
pub struct RootCapability {
    /// All bases.
    pub bases: Arc<BaseStore>,
}

/// The base is gone or damaged.
#[derive(Debug, thiserror::Error)]
#[error("the base of VM `{name}` cannot be used")]
struct RootError {
    name: VmName,
    image: String,
    #[source]
    source: offshoot_rootfs::base::BaseError,
}

impl Explain for RootError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::NotPossible
    }

    fn hints(&self) -> Vec<String> {
        vec![format!(
            "make it again with `offshoot image prepare {}`",
            self.image
        )]
    }
}

#[async_trait]
impl Capability for RootCapability {
    fn name(&self) -> &'static str {
        "root"
    }

    async fn check(&self) -> Vec<Finding> {
        Vec::new()
    }

    fn plan(&self, vm: &VmRecord, _: &VmPaths, plan: &mut LaunchPlan) -> Result<(), CapabilityError> {
        plan.disks.push(DiskPlan {
            serial: ROOT_SERIAL.to_owned(),
            path: self.bases.locate(&vm.base_id).root_erofs(),
            read_only: true,
        });
        Ok(())
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        match self.bases.get(&run.vm.base_id) {
            Ok(_) => Ok(()),
            Err(source) => Err(Box::new(RootError {
                name: run.vm.name.clone(),
                image: run.vm.definition.config.image.clone(),
                source,
            })),
        }
    }

    async fn after_boot(&self, _: &Run) -> Result<(), CapabilityError> {
        Ok(())
    }

    async fn adopt(&self, _: &Run) -> Result<(), CapabilityError> {
        Ok(())
    }

    async fn stop(&self, _: &Run) -> Result<(), CapabilityError> {
        Ok(())
    }

    async fn clean_up(&self, _: &VmRecord, _: &VmPaths) -> Result<(), CapabilityError> {
        Ok(())
    }
}
