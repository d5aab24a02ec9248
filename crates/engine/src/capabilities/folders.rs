//! The VM's two folders: one that it keeps, one for its sockets.

use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use offshoot_model::{ErrorKind, Explain, Finding, Severity};

use super::finding;
use crate::capability::{Capability, CapabilityError, VmPlan};
use crate::definition::VmRecord;
use crate::owner::remove_tree;
use crate::paths::VmPaths;
use crate::run::Run;

/// Makes the folders with the owners that the VMM needs.
pub struct FoldersCapability {
    /// The data and run directories.
    pub roots: [PathBuf; 2],
    /// The group that all VMMs have.
    pub gid: u32,
}

/// A folder could not be made or removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot make or remove the folder {}", path.display())]
struct FolderError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl Explain for FolderError {
    fn kind(&self) -> ErrorKind {
        match self.source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            _ => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        vec![format!(
            "look at {}, or run `offshoot doctor`",
            self.path.display()
        )]
    }
}

/// Below this little room a VM that starts now would soon run into a full disk.
const LITTLE_ROOM: u64 = 1 << 30;

#[async_trait]
impl Capability for FoldersCapability {
    fn name(&self) -> &'static str {
        "folders"
    }

    async fn check(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        for root in &self.roots {
            if let Some(closed) = closed_ancestor(root, self.gid) {
                findings.push(finding(
                    self.name(),
                    Severity::Failure,
                    format!("unprivileged VMMs cannot pass through {}", closed.display()),
                    format!(
                        "chmod o+x {}, or choose another --data-dir and --run-dir",
                        closed.display()
                    ),
                ));
            }
        }
        findings.push(match offshoot_sys::space::available(&self.roots[0]) {
            Ok(bytes) if bytes < LITTLE_ROOM => finding(
                self.name(),
                Severity::Warning,
                format!(
                    "only {} left in {}",
                    offshoot_model::ByteSize::from_bytes(bytes),
                    self.roots[0].display()
                ),
                "remove VMs and images with `offshoot rm` and `offshoot image rm`",
            ),
            Ok(_) => finding(self.name(), Severity::Ok, "the data directory has room", ""),
            Err(error) => finding(
                self.name(),
                Severity::Failure,
                format!("cannot look at {}: {error}", self.roots[0].display()),
                "look at the data directory",
            ),
        });
        findings
    }

    fn plan(&self, _: &VmRecord, paths: &VmPaths, plan: &mut VmPlan) -> Result<(), CapabilityError> {
        paths.run().clone_into(&mut plan.launch.run_dir);
        plan.launch.log = paths.vmm_log();
        plan.launch.console = paths.console();
        Ok(())
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        let uid = run.vm.uid;
        // The VMM passes through both and opens what is its own. It can make nothing in them: what is read there again,
        // such as which processes are the VM's, is ours.
        make(run.paths.data(), 0o710, 0, self.gid)?;
        make(run.paths.run(), 0o710, 0, uid)?;
        Ok(())
    }

    async fn stop(&self, run: &Run) -> Result<(), CapabilityError> {
        let path = run.paths.run().to_owned();
        remove_tree(&path).map_err(|source| Box::new(FolderError { path, source }) as CapabilityError)
    }
}

fn make(path: &Path, mode: u32, uid: u32, gid: u32) -> Result<(), CapabilityError> {
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .and_then(|()| chown(path, Some(uid), Some(gid)))
        .and_then(|()| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)));
    made.map_err(|source| {
        Box::new(FolderError {
            path: path.to_owned(),
            source,
        }) as CapabilityError
    })
}

/// The outermost folder on the way to `path` that a process in no group but `gid` cannot pass through.
fn closed_ancestor(path: &Path, gid: u32) -> Option<PathBuf> {
    use std::os::unix::fs::MetadataExt as _;
    let mut ancestors: Vec<_> = path.ancestors().collect();
    ancestors.reverse();
    ancestors.into_iter().find_map(|folder| {
        let meta = std::fs::metadata(folder).ok()?;
        let open = meta.mode() & 0o001 != 0 || (meta.gid() == gid && meta.mode() & 0o010 != 0);
        (!open).then(|| folder.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_folder_on_the_way_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        std::fs::create_dir_all(&inner).unwrap();
        let set =
            |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        set(dir.path(), 0o711);
        set(&dir.path().join("a"), 0o700);
        assert_eq!(closed_ancestor(&inner, 1), Some(dir.path().join("a")));
        set(&dir.path().join("a"), 0o711);
        assert_eq!(closed_ancestor(&inner, 1), None);
    }
}
