//! The overlay disk: a private ext4 that takes every write to `/`.

use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use offshoot_model::{ByteSize, ErrorKind, Explain, Finding};
use offshoot_rootfs::base::BaseStore;
use offshoot_rootfs::seed::{SeedError, clone_seed};
use offshoot_vmm::LaunchPlan;
use offshoot_vmm::plan::DiskPlan;

use crate::capability::{Capability, CapabilityError};
use crate::definition::VmRecord;
use crate::paths::VmPaths;
use crate::run::Run;

/// The serial under which the guest finds its overlay disk.
pub(super) const OVERLAY_SERIAL: &str = "overlay";

/// Clones the base's overlay seed on the first start.
pub struct OverlayCapability {
    /// All bases.
    pub bases: Arc<BaseStore>,
}

/// The disk could not be made.
#[derive(Debug, thiserror::Error)]
enum OverlayError {
    #[error("cannot make the overlay disk {}", path.display())]
    Clone {
        path: PathBuf,
        #[source]
        source: SeedError,
    },
    #[error("cannot give the overlay disk {} to the VMM", path.display())]
    Owner {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

impl Explain for OverlayError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Clone { source, .. } => source.kind(),
            Self::Owner { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Clone { source, .. } => source.hints(),
            Self::Owner { .. } => vec!["run `offshoot doctor`".into()],
        }
    }
}

/// Makes the disk unless it is there. It gets its name only when it is whole, so that a crash leaves none or all of it.
fn ensure(seed: &Path, disk: &Path, size: ByteSize, uid: u32) -> Result<(), OverlayError> {
    if disk.exists() {
        return Ok(());
    }
    let unfinished = disk.with_extension("new");
    let owner = |source| OverlayError::Owner {
        path: disk.to_owned(),
        source,
    };
    let _ = std::fs::remove_file(&unfinished);
    clone_seed(seed, &unfinished, size).map_err(|source| OverlayError::Clone {
        path: disk.to_owned(),
        source,
    })?;
    chown(&unfinished, Some(uid), Some(uid)).map_err(owner)?;
    std::fs::rename(&unfinished, disk).map_err(owner)
}

#[async_trait]
impl Capability for OverlayCapability {
    fn name(&self) -> &'static str {
        "overlay"
    }

    async fn check(&self) -> Vec<Finding> {
        Vec::new()
    }

    fn plan(&self, _: &VmRecord, paths: &VmPaths, plan: &mut LaunchPlan) -> Result<(), CapabilityError> {
        plan.disks.push(DiskPlan {
            serial: OVERLAY_SERIAL.to_owned(),
            path: paths.overlay(),
            read_only: false,
        });
        Ok(())
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        let seed = self.bases.locate(&run.vm.base_id).overlay_seed();
        let (disk, size, uid) = (run.paths.overlay(), run.vm.definition.config.disk, run.vm.uid);
        let made = tokio::task::spawn_blocking(move || ensure(&seed, &disk, size, uid)).await;
        match made {
            Ok(result) => result.map_err(|error| Box::new(error) as CapabilityError),
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
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
