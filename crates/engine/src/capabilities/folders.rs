//! The VM's two folders: one that it keeps, one for its sockets.

use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use offshoot_model::{ErrorKind, Explain, Finding, KernelObject, ObjectKind, Severity, VmId};

use super::{blocking, host_disk};
use crate::capability::{Capability, CapabilityError, Known, VmPlan};
use crate::definition::VmRecord;
use crate::owner::remove_tree;
use crate::paths::VmPaths;
use crate::run::Run;

const NAME: &str = "folders";

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

#[async_trait]
impl Capability for FoldersCapability {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn check(&self) -> Vec<Finding> {
        let roots = self.roots.clone();
        blocking(move || look(&roots)).await
    }

    fn plan(&self, _: &VmRecord, paths: &VmPaths, plan: &mut VmPlan) -> Result<(), CapabilityError> {
        paths.run().clone_into(&mut plan.launch.run_dir);
        plan.launch.log = paths.vmm_log();
        plan.launch.console = paths.console();
        plan.objects.push(folder(paths.run()));
        Ok(())
    }

    async fn prepare(&self, run: &Run) -> Result<(), CapabilityError> {
        if run.is_warm() {
            return Ok(());
        }
        let uid = run.vm.uid;
        // The VMM passes through both and opens what is its own. It can make nothing in them: what is read there again,
        // such as which processes are the VM's, is ours.
        make(run.paths.data(), 0o710, 0, self.gid)?;
        make(run.paths.run(), 0o710, 0, uid)?;
        // What the run before said stays to be looked at, once.
        for log in [
            run.paths.console(),
            run.paths.vmm_log(),
            run.paths.virtiofsd_log(),
        ] {
            rotate(&log)?;
        }
        Ok(())
    }

    async fn stop(&self, run: &Run) -> Result<(), CapabilityError> {
        let path = run.paths.run().to_owned();
        remove_tree(&path).map_err(|source| Box::new(FolderError { path, source }) as CapabilityError)
    }

    async fn leftovers(&self, known: Known<'_>) -> Vec<KernelObject> {
        let mut found = Vec::new();
        for root in &self.roots {
            let parent = root.join("vms");
            for (name, path) in entries(&parent) {
                // What is no id of a VM is in a place where only VMs are.
                if !name.parse::<VmId>().is_ok_and(|id| known(&id)) {
                    found.push(folder(&path));
                }
            }
        }
        found
    }

    async fn remove_leftover(&self, object: &KernelObject) -> Result<(), CapabilityError> {
        let path = PathBuf::from(&object.name);
        remove_tree(&path).map_err(|source| Box::new(FolderError { path, source }) as CapabilityError)
    }
}

fn folder(path: &Path) -> KernelObject {
    KernelObject {
        kind: ObjectKind::Folder,
        name: path.display().to_string(),
    }
}

/// What is in a folder, by name; nothing where it cannot be listed.
pub(super) fn entries(folder: &Path) -> Vec<(String, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()))
        .collect()
}

/// Makes room for a new log: what is there becomes `<log>.1`, in place of an older one.
fn rotate(log: &Path) -> Result<(), CapabilityError> {
    let mut older = log.as_os_str().to_owned();
    older.push(".1");
    match std::fs::rename(log, older) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Box::new(FolderError {
            path: log.to_owned(),
            source,
        })),
        _ => Ok(()),
    }
}

fn look([data, run]: &[PathBuf; 2]) -> Vec<Finding> {
    let mut findings = vec![host_disk::room_in(NAME, data)];
    // Mostly a disk of memory, on which only sockets lie.
    let run = host_disk::room_in(NAME, run);
    findings.extend(Some(run).filter(|found| found.severity != Severity::Ok));
    findings.push(host_disk::reflink(NAME, data));
    findings
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn folders_of_no_vm_are_leftovers() {
        let dir = tempfile::tempdir().unwrap();
        let roots = [dir.path().join("data"), dir.path().join("run")];
        let (ours, strange) = (VmId::from_bytes(&[1; 6]), VmId::from_bytes(&[2; 6]));
        for path in [
            roots[0].join("vms").join(ours.as_str()),
            roots[1].join("vms").join(strange.as_str()).join("below"),
            roots[0].join("vms/odd"),
        ] {
            std::fs::create_dir_all(path).unwrap();
        }
        let folders = FoldersCapability { roots, gid: 1 };
        let found = folders.leftovers(&|id| *id == ours).await;
        assert_eq!(found.len(), 2, "{found:?}");
        for object in &found {
            folders.remove_leftover(object).await.unwrap();
            folders.remove_leftover(object).await.unwrap();
        }
        assert_eq!(folders.leftovers(&|id| *id == ours).await, []);
        assert!(folders.roots[0].join("vms").join(ours.as_str()).exists());
    }

    #[test]
    fn one_older_log_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (log, older) = (dir.path().join("vmm.log"), dir.path().join("vmm.log.1"));
        rotate(&log).unwrap();
        assert!(!older.exists());
        for run in ["first", "second", "third"] {
            std::fs::write(&log, run).unwrap();
            rotate(&log).unwrap();
            assert!(!log.exists());
            assert_eq!(std::fs::read_to_string(&older).unwrap(), run);
        }
        // A run that said nothing leaves what the last one that did has said.
        rotate(&log).unwrap();
        assert_eq!(std::fs::read_to_string(&older).unwrap(), "third");
    }
}
