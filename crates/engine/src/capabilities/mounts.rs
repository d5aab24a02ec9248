//! Folders of the host that a VM shares (`-v`): a virtiofsd each, whatever the root is.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use offshoot_agent_proto::v1;
use offshoot_model::{ErrorKind, Explain, Finding, Mount, Severity};
use offshoot_vmm::plan::SharePlan;
use offshoot_vmm::virtiofsd::{ShareCache, ShareConfig, Virtiofsd};

use super::finding;
use crate::capability::{Capability, CapabilityError, VmPlan};
use crate::definition::VmRecord;
use crate::paths::VmPaths;
use crate::run::Run;

/// Shares the host's folders.
pub struct MountsCapability {
    /// Serves them.
    pub virtiofsd: Arc<Virtiofsd>,
}

/// A folder cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// There is nothing.
    #[error("cannot share `{}`: there is no such folder on this host", source_path.display())]
    Missing {
        /// What was asked for.
        source_path: PathBuf,
    },
    /// It is no folder.
    #[error("cannot share `{}`: it is not a folder", source_path.display())]
    NotAFolder {
        /// What was asked for.
        source_path: PathBuf,
    },
    /// It cannot be looked at.
    #[error("cannot share `{}`", source_path.display())]
    Unreadable {
        /// What was asked for.
        source_path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

impl Explain for MountError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidRequest
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Missing { source_path } => {
                vec![format!("make it with `mkdir -p {}`", source_path.display())]
            }
            Self::NotAFolder { .. } => {
                vec!["share the folder that it lies in, or copy it in with `offshoot cp`".into()]
            }
            Self::Unreadable { .. } => vec!["look at it as root".into()],
        }
    }
}

/// Refuses a mount whose source is no folder now.
pub fn check_source(mount: &Mount) -> Result<(), MountError> {
    let source_path = mount.source.clone();
    match std::fs::metadata(&mount.source) {
        Ok(meta) if meta.is_dir() => Ok(()),
        Ok(_) => Err(MountError::NotAFolder { source_path }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(MountError::Missing { source_path })
        }
        Err(source) => Err(MountError::Unreadable { source_path, source }),
    }
}

/// The VM's mounts with their tags, outer targets before inner ones, so that an inner one is not covered.
fn tagged(vm: &VmRecord) -> Vec<(String, &Mount)> {
    let mut mounts: Vec<_> = vm.definition.config.mounts.iter().collect();
    mounts.sort_by_key(|mount| mount.target.components().count());
    let tag = |n| format!("share{n}");
    mounts
        .into_iter()
        .enumerate()
        .map(|(n, mount)| (tag(n), mount))
        .collect()
}

fn words(mount: &Mount) -> String {
    format!("the share on {}", mount.target.display())
}

#[async_trait]
impl Capability for MountsCapability {
    fn name(&self) -> &'static str {
        "mounts"
    }

    async fn check(&self) -> Vec<Finding> {
        vec![match self.virtiofsd.probe().await {
            Ok(facts) => finding(
                self.name(),
                Severity::Ok,
                format!("virtiofsd {} at {}", facts.version, facts.program.display()),
                "",
            ),
            Err(error) => finding(
                self.name(),
                Severity::Warning,
                format!("{error}: no `-v` and no `--root virtiofs`"),
                error.hints().into_iter().next().unwrap_or_default(),
            ),
        }]
    }

    fn plan(&self, vm: &VmRecord, paths: &VmPaths, plan: &mut VmPlan) -> Result<(), CapabilityError> {
        for (tag, mount) in tagged(vm) {
            plan.launch.shares.push(SharePlan {
                socket: paths.share_socket(&tag),
                tag: tag.clone(),
            });
            plan.guest.mounts.push(v1::SharedMount {
                tag,
                target: mount.target.display().to_string(),
                read_only: mount.read_only,
            });
        }
        Ok(())
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        for (tag, mount) in tagged(&run.vm) {
            check_source(mount).map_err(|error| Box::new(error) as CapabilityError)?;
            let share = ShareConfig {
                source: mount.source.clone(),
                read_only: mount.read_only,
                cache: ShareCache::Auto,
                socket: run.paths.share_socket(&tag),
                socket_owner: (run.vm.uid, run.vm.uid),
                log: run.paths.virtiofsd_log(),
                tag,
            };
            run.shares
                .serve(run, &self.virtiofsd, &share, &words(mount))
                .await?;
        }
        Ok(())
    }

    async fn adopt(&self, run: &Run) -> Result<(), CapabilityError> {
        for (tag, mount) in tagged(&run.vm) {
            run.shares.adopt(run, &tag, &words(mount));
        }
        Ok(())
    }

    async fn stop(&self, run: &Run) -> Result<(), CapabilityError> {
        for (tag, _) in tagged(&run.vm).into_iter().rev() {
            run.shares.end(&tag).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_folder_that_is_there_can_be_shared() {
        let dir = tempfile::tempdir().unwrap();
        let mount = |source: PathBuf| Mount {
            source,
            target: "/t".into(),
            read_only: false,
        };
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(check_source(&mount(dir.path().to_owned())).is_ok());
        assert!(matches!(
            check_source(&mount(dir.path().join("file"))),
            Err(MountError::NotAFolder { .. })
        ));
        assert!(matches!(
            check_source(&mount(dir.path().join("none"))),
            Err(MountError::Missing { .. })
        ));
        assert!(matches!(
            check_source(&mount(dir.path().join("file/below"))),
            Err(MountError::Unreadable { .. })
        ));
    }
}
