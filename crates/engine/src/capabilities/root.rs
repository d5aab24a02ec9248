//! The root: the image's base, in the way that the policy chose for this VM.
//!
//! ```text
//! pmem, block   root.erofs, as it is
//! virtiofs      the base's tree, read-only, by a virtiofsd of the VM's own
//! copy          root.ext4 in the VM's folder, made from the tree on the first start
//! ```

use std::sync::Arc;

use async_trait::async_trait;
use offshoot_agent_proto::v1::configure_request::Root;
use offshoot_model::{ErrorKind, Explain, Progress, VmName};
use offshoot_rootfs::base::{BaseError, BaseStore, TreeError};
use offshoot_rootfs::copy::make_copy;
use offshoot_rootfs::policy::{RootKind, UnknownRootKind};
use offshoot_vmm::plan::{DiskPlan, PmemPlan, SharePlan};
use offshoot_vmm::virtiofsd::{ShareCache, ShareConfig, Virtiofsd};

use super::disk;
use crate::capability::{Capability, CapabilityError, VmPlan};
use crate::definition::VmRecord;
use crate::paths::VmPaths;
use crate::run::Run;

/// The name under which the guest finds its root: a disk's serial or a share's tag.
const NAME: &str = "root";

/// Shows the root to the guest.
pub struct RootCapability {
    /// All bases.
    pub bases: Arc<BaseStore>,
    /// Serves a tree.
    pub virtiofsd: Arc<Virtiofsd>,
}

/// The root cannot be shown.
#[derive(Debug, thiserror::Error)]
enum RootError {
    #[error("the base of VM `{name}` cannot be used")]
    Base {
        name: VmName,
        image: String,
        #[source]
        source: BaseError,
    },
    #[error("the tree of VM `{name}` cannot be made")]
    Tree {
        name: VmName,
        #[source]
        source: TreeError,
    },
    #[error("VM `{name}` was made by another version")]
    Kind {
        name: VmName,
        #[source]
        source: UnknownRootKind,
    },
}

impl Explain for RootError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Base { .. } | Self::Kind { .. } => ErrorKind::NotPossible,
            Self::Tree { source, .. } => source.kind(),
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Base { image, .. } => vec![format!(
                "make it again with `offshoot image prepare --force {image}`"
            )],
            Self::Tree { source, .. } => source.hints(),
            Self::Kind { .. } => vec!["start the VM with the offshootd that made it".into()],
        }
    }
}

/// The back end that was chosen for a VM.
pub(super) fn kind_of(vm: &VmRecord) -> Result<RootKind, CapabilityError> {
    vm.definition.root.chosen.parse().map_err(|source| {
        Box::new(RootError::Kind {
            name: vm.name.clone(),
            source,
        }) as CapabilityError
    })
}

impl RootCapability {
    fn base(&self, vm: &VmRecord) -> Result<offshoot_rootfs::base::Base, CapabilityError> {
        self.bases.get(&vm.base_id).map_err(|source| {
            Box::new(RootError::Base {
                name: vm.name.clone(),
                image: vm.definition.config.image.clone(),
                source,
            }) as CapabilityError
        })
    }

    async fn tree(&self, run: &Run) -> Result<std::path::PathBuf, CapabilityError> {
        let tree = self.bases.ensure_tree(&run.vm.base_id, &Progress::silent()).await;
        tree.map_err(|source| {
            Box::new(RootError::Tree {
                name: run.vm.name.clone(),
                source,
            }) as CapabilityError
        })
    }
}

#[async_trait]
impl Capability for RootCapability {
    fn name(&self) -> &'static str {
        "root"
    }

    fn plan(&self, vm: &VmRecord, paths: &VmPaths, plan: &mut VmPlan) -> Result<(), CapabilityError> {
        let kind = kind_of(vm)?;
        plan.guest.root = Some(match kind {
            RootKind::Pmem => {
                let base = self.base(vm)?;
                plan.launch.pmems.push(PmemPlan {
                    path: base.root_erofs(),
                    size: base.manifest.root.size,
                    read_only: true,
                });
                Root::RootPmemIndex(u32::try_from(plan.launch.pmems.len() - 1).unwrap_or(u32::MAX))
            }
            RootKind::Block => {
                plan.launch.disks.push(DiskPlan {
                    serial: NAME.to_owned(),
                    path: self.bases.locate(&vm.base_id).root_erofs(),
                    read_only: true,
                });
                Root::RootBlockSerial(NAME.to_owned())
            }
            RootKind::Virtiofs => {
                plan.launch.shares.push(SharePlan {
                    tag: NAME.to_owned(),
                    socket: paths.share_socket(NAME),
                });
                Root::RootVirtiofsTag(NAME.to_owned())
            }
            RootKind::Copy => {
                plan.launch.disks.push(DiskPlan {
                    serial: NAME.to_owned(),
                    path: paths.root_copy(),
                    read_only: false,
                });
                Root::RootCopySerial(NAME.to_owned())
            }
        });
        Ok(())
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        let base = self.base(&run.vm)?;
        match kind_of(&run.vm)? {
            RootKind::Pmem | RootKind::Block => Ok(()),
            RootKind::Virtiofs => {
                let share = ShareConfig {
                    tag: NAME.to_owned(),
                    source: self.tree(run).await?,
                    read_only: true,
                    cache: ShareCache::Always,
                    socket: run.paths.share_socket(NAME),
                    socket_owner: (run.vm.uid, run.vm.uid),
                    log: run.paths.virtiofsd_log(),
                };
                run.shares.serve(run, &self.virtiofsd, &share, "its root").await
            }
            RootKind::Copy if run.paths.root_copy().exists() => Ok(()),
            RootKind::Copy => {
                let tree = self.tree(run).await?;
                let size = run.vm.definition.config.disk;
                drop(base);
                disk::ensure(run.paths.root_copy(), run.vm.uid, move |path| {
                    make_copy(&tree, path, size)
                })
                .await
            }
        }
    }

    async fn adopt(&self, run: &Run) -> Result<(), CapabilityError> {
        if kind_of(&run.vm)? == RootKind::Virtiofs {
            run.shares.adopt(run, NAME, "its root");
        }
        Ok(())
    }

    async fn stop(&self, run: &Run) -> Result<(), CapabilityError> {
        run.shares.end(NAME).await
    }

    async fn reset(&self, _: &VmRecord, paths: &VmPaths) -> Result<(), CapabilityError> {
        disk::remove(paths.root_copy())
    }
}
