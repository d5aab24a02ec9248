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
use offshoot_model::{BaseId, ErrorKind, Explain, Finding, Fix, Progress, Severity, VmName};
use offshoot_rootfs::base::{BaseError, BaseStore, TreeError};
use offshoot_rootfs::copy::make_copy;
use offshoot_rootfs::policy::{RootKind, UnknownRootKind};
use offshoot_store::db::Db;
use offshoot_vmm::plan::{DiskPlan, PmemPlan, SharePlan};
use offshoot_vmm::virtiofsd::{ShareCache, ShareConfig, Virtiofsd};

use super::in_use::{self, Needs};
use super::{blocking, chain, disk, finding, host_disk, mounts};
use crate::capability::{Capability, CapabilityError, VmPlan};
use crate::definition::VmRecord;
use crate::paths::VmPaths;
use crate::run::Run;
use crate::shares::share_object;

const CAPABILITY: &str = "root";
/// The name under which the guest finds its root: a disk's serial or a share's tag.
const NAME: &str = "root";

/// Shows the root to the guest.
pub struct RootCapability {
    /// All bases.
    pub bases: Arc<BaseStore>,
    /// Serves a tree.
    pub virtiofsd: Arc<Virtiofsd>,
    /// Says which bases VMs need.
    pub db: Db,
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

/// Every base that is there or that a VM needs.
fn look(bases: &BaseStore, vms: &[Needs]) -> Vec<Finding> {
    let mut ids = match bases.ids() {
        Ok(ids) => ids,
        Err(error) => {
            let found = finding(
                CAPABILITY,
                Severity::Failure,
                chain(&error),
                format!("look at {}", bases.dir().display()),
            );
            return vec![
                found
                    .id("bases-unreadable")
                    .cost("no VM can be created or started"),
            ];
        }
    };
    ids.extend(vms.iter().map(|vm| vm.base.clone()));
    ids.sort();
    ids.dedup();
    let mut whole = 0;
    let mut findings = Vec::new();
    for id in ids {
        match bases.get(&id) {
            Ok(_) => whole += 1,
            Err(error) => findings.extend(judge(&id, &error, vms)),
        }
    }
    let message = match whole {
        0 => "no image is prepared yet".to_owned(),
        1 => "1 base is whole".to_owned(),
        _ => format!("{whole} bases are whole"),
    };
    findings.push(Finding::ok(CAPABILITY, message).id("bases-whole"));
    findings
}

/// What a base that cannot be used costs. Nothing where it went just now and nobody needs it.
fn judge(id: &BaseId, error: &BaseError, vms: &[Needs]) -> Option<Finding> {
    let users: Vec<_> = vms.iter().filter(|vm| vm.base == *id).collect();
    let name = match error {
        BaseError::NotFound { .. } if users.is_empty() => return None,
        BaseError::NotFound { .. } => "base-missing",
        BaseError::Damaged { .. } => "base-damaged",
        BaseError::Format { .. } => "base-old-format",
        BaseError::Io { .. } => "base-unreadable",
    };
    let mendable = users.is_empty() || name != "base-old-format";
    let (cost, hint) = match users.first() {
        None => (
            "the next VM of its image waits until it is made again".to_owned(),
            "offshoot doctor --fix".to_owned(),
        ),
        Some(first) => {
            let names: Vec<_> = users.iter().map(|vm| &vm.name).collect();
            let hint = if mendable {
                format!("offshoot image prepare --force {}", first.image)
            } else {
                "start them with the offshootd that made them, or make them anew with `offshoot run`"
                    .to_owned()
            };
            (format!("{} cannot be started", in_use::named(&names)), hint)
        }
    };
    // Only a warning: VMs of other bases start.
    let found = finding(CAPABILITY, Severity::Warning, chain(error), hint)
        .id(name)
        .cost(cost);
    Some(if mendable {
        found.fix(Fix::PrepareBases)
    } else {
        found
    })
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
        CAPABILITY
    }

    async fn check(&self) -> Vec<Finding> {
        let vms = in_use::vms(&self.db).await;
        let bases = Arc::clone(&self.bases);
        let mut findings = blocking(move || {
            let mut findings = look(&bases, &vms);
            findings.extend(host_disk::lack_of_room(CAPABILITY, &bases));
            findings
        })
        .await;
        let virtiofsd = mounts::virtiofsd(CAPABILITY, &self.virtiofsd).await;
        findings.extend(Some(virtiofsd).filter(|found| found.severity != Severity::Ok));
        findings
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
                let socket = paths.share_socket(NAME);
                plan.objects.push(share_object(&socket));
                plan.launch.shares.push(SharePlan {
                    tag: NAME.to_owned(),
                    socket,
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
                    cgroups: run.plan.launch.cgroups.clone(),
                };
                run.shares.serve(run, &self.virtiofsd, &share, "its root").await
            }
            RootKind::Copy if run.paths.root_copy().exists() => Ok(()),
            RootKind::Copy => {
                let tree = self.tree(run).await?;
                let size = run.vm.definition.config.disk;
                drop(base);
                disk::ensure(run.paths.root_copy(), run.vm.uid, move |path| {
                    Ok(make_copy(&tree, path, size)?)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capabilities::in_use::tests::needs;

    #[test]
    fn a_base_that_cannot_be_used_costs_its_vms() {
        let id: BaseId = needs("web").base;
        let damaged = BaseError::Damaged {
            dir: "/d".into(),
            what: "it has no base.json",
        };
        let missing = BaseError::NotFound { id: id.clone() };
        let old = BaseError::Format { dir: "/d".into() };
        let check = |error: &BaseError, vms: &[Needs], expected: Option<(&str, &str)>| {
            let found = judge(&id, error, vms);
            let said = found
                .as_ref()
                .map(|found| (found.id.as_str(), found.cost.as_str()));
            assert_eq!(said, expected);
            if let Some(found) = found {
                assert!(
                    found.severity == Severity::Warning && !found.hint.is_empty(),
                    "{found:?}"
                );
                // What another version made cannot be made again for its VMs.
                let mendable = vms.is_empty() || found.id != "base-old-format";
                assert_eq!(found.fix, mendable.then_some(Fix::PrepareBases));
            }
        };
        let nobody = "the next VM of its image waits until it is made again";
        check(&damaged, &[], Some(("base-damaged", nobody)));
        check(&old, &[], Some(("base-old-format", nobody)));
        check(&missing, &[], None);
        let web = [needs("web")];
        check(
            &missing,
            &web,
            Some(("base-missing", "VM `web` cannot be started")),
        );
        check(
            &old,
            &web,
            Some(("base-old-format", "VM `web` cannot be started")),
        );
        check(
            &damaged,
            &web,
            Some(("base-damaged", "VM `web` cannot be started")),
        );
    }
}
