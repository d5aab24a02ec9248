//! Folders of the host that a VM shares (`-v`): a virtiofsd each, whatever the root is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use offshoot_agent_proto::v1;
use offshoot_model::{ErrorKind, Explain, Finding, KernelObject, Mount, Severity, VmId};
use offshoot_sys::programs::is_executable;
use offshoot_vmm::ProbeError;
use offshoot_vmm::plan::SharePlan;
use offshoot_vmm::virtiofsd::{ShareCache, ShareConfig, Virtiofsd, VirtiofsdFacts};

use super::finding;
use super::folders::entries;
use crate::capability::{Capability, CapabilityError, Known, VmPlan};
use crate::definition::VmRecord;
use crate::paths::VmPaths;
use crate::run::Run;
use crate::shares::{end_served, served_sockets, share_object};

/// Shares the host's folders.
pub struct MountsCapability {
    /// Serves them.
    pub virtiofsd: Arc<Virtiofsd>,
    /// Where the run folders of VMs lie.
    pub run_dir: PathBuf,
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

/// Whether there is a virtiofsd that can be used, for a capability that needs one.
pub(super) async fn virtiofsd(capability: &str, virtiofsd: &Virtiofsd) -> Finding {
    let asked = virtiofsd.probe().await;
    // The answer is kept, the program may be gone.
    let gone = |facts: &VirtiofsdFacts| !is_executable(&facts.program);
    let gone = asked.as_ref().is_ok_and(gone);
    judge(capability, asked, gone)
}

fn judge(capability: &str, asked: Result<VirtiofsdFacts, ProbeError>, gone: bool) -> Finding {
    let (id, message, hint) = match asked {
        Ok(facts) if !gone => {
            let message = format!("virtiofsd {} at {}", facts.version, facts.program.display());
            return Finding::ok(capability, message).id("virtiofsd");
        }
        Ok(facts) => (
            "virtiofsd-missing",
            format!("`{}` is not installed any more", facts.program.display()),
            "apt install virtiofsd; on Debian 12 `apt install qemu-system-common`".to_owned(),
        ),
        Err(error) => {
            let id = match error {
                ProbeError::Missing { .. } | ProbeError::NoneOf { .. } => "virtiofsd-missing",
                ProbeError::TooOld { .. } => "virtiofsd-old",
                _ => "virtiofsd-unusable",
            };
            let hint = match error {
                ProbeError::Run { .. } | ProbeError::Timeout { .. } | ProbeError::Answer { .. } => {
                    "run it with `--version`, and look at `virtiofsd` in the daemon's config".to_owned()
                }
                _ => error.hints().into_iter().next().unwrap_or_default(),
            };
            (id, error.to_string(), hint)
        }
    };
    finding(capability, Severity::Warning, message, hint)
        .id(id)
        .cost("no folder can be shared: no `-v` and no `--root virtiofs`")
}

#[async_trait]
impl Capability for MountsCapability {
    fn name(&self) -> &'static str {
        "mounts"
    }

    async fn check(&self) -> Vec<Finding> {
        vec![virtiofsd(self.name(), &self.virtiofsd).await]
    }

    fn plan(&self, vm: &VmRecord, paths: &VmPaths, plan: &mut VmPlan) -> Result<(), CapabilityError> {
        for (tag, mount) in tagged(vm) {
            let socket = paths.share_socket(&tag);
            plan.objects.push(share_object(&socket));
            plan.launch.shares.push(SharePlan {
                socket,
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
                cgroups: run.plan.launch.cgroups.clone(),
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
        // Also what an earlier daemon started and no run of this one knows.
        for socket in served_sockets(run.paths.run()) {
            end_served(&socket).await?;
        }
        Ok(())
    }

    async fn leftovers(&self, known: Known<'_>) -> Vec<KernelObject> {
        let mut found = Vec::new();
        for (name, folder) in entries(&self.run_dir.join("vms")) {
            if !name.parse::<VmId>().is_ok_and(|id| known(&id)) {
                found.extend(served_sockets(&folder).iter().map(|socket| share_object(socket)));
            }
        }
        found
    }

    async fn remove_leftover(&self, object: &KernelObject) -> Result<(), CapabilityError> {
        let file = Path::new(&object.name);
        // The name of the record is that of the socket and an ending.
        end_served(&file.with_extension("")).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_have_no_virtiofsd_is_told() {
        use offshoot_vmm::virtiofsd::VirtiofsdFlavour;
        let program = PathBuf::from("/usr/libexec/virtiofsd");
        let facts = VirtiofsdFacts {
            program: program.clone(),
            version: "1.13.2".into(),
            flavour: VirtiofsdFlavour::Rust,
            read_only: true,
        };
        let check = |asked, gone, severity, id: &str| {
            let found = judge("mounts", asked, gone);
            assert_eq!((found.severity, found.id.as_str()), (severity, id));
            let explained = !found.cost.is_empty() && !found.hint.is_empty();
            assert_eq!(explained, severity != Severity::Ok, "{found:?}");
        };
        check(Ok(facts.clone()), false, Severity::Ok, "virtiofsd");
        check(Ok(facts), true, Severity::Warning, "virtiofsd-missing");
        let missing = ProbeError::Missing {
            program: program.clone(),
            package: "virtiofsd",
        };
        check(Err(missing), false, Severity::Warning, "virtiofsd-missing");
        let old = ProbeError::TooOld {
            program: program.clone(),
            version: "1.9.1".into(),
            least: "1.10",
        };
        check(Err(old), false, Severity::Warning, "virtiofsd-old");
        let answer = ProbeError::Answer {
            program,
            said: "hello".into(),
        };
        check(Err(answer), false, Severity::Warning, "virtiofsd-unusable");
    }

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
