//! A disk of the VM's own: made when it is first needed, given to the VMM's user, and dropped by a reset.

use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use offshoot_model::{ByteSize, ErrorKind, Explain};
use offshoot_rootfs::base::DiskError as MakeError;

use crate::capability::CapabilityError;

/// The disk could not be made or removed.
#[derive(Debug, thiserror::Error)]
enum DiskError {
    #[error("cannot make the disk {}", path.display())]
    Make {
        path: PathBuf,
        #[source]
        source: MakeError,
    },
    #[error("cannot give the disk {} to the VMM", path.display())]
    Owner {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot make the disk {} larger", path.display())]
    Lengthen {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot remove the disk {}", path.display())]
    Remove {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

impl Explain for DiskError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Make { source, .. } => source.kind(),
            Self::Owner { .. } | Self::Lengthen { .. } | Self::Remove { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Make { source, .. } => source.hints(),
            Self::Owner { .. } | Self::Lengthen { .. } | Self::Remove { .. } => {
                vec!["run `offshoot doctor`".into()]
            }
        }
    }
}

/// Makes the disk unless it is there. It gets its name only when it is whole, so that a crash leaves none or all of it.
/// `make` is given the path to make it at.
pub(super) async fn ensure(
    disk: PathBuf,
    uid: u32,
    make: impl FnOnce(&Path) -> Result<(), MakeError> + Send + 'static,
) -> Result<(), CapabilityError> {
    let made = tokio::task::spawn_blocking(move || ensure_blocking(&disk, uid, make)).await;
    match made {
        Ok(result) => result.map_err(|error| Box::new(error) as CapabilityError),
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

fn ensure_blocking(
    disk: &Path,
    uid: u32,
    make: impl FnOnce(&Path) -> Result<(), MakeError>,
) -> Result<(), DiskError> {
    if disk.exists() {
        return Ok(());
    }
    let unfinished = disk.with_extension("new");
    let owner = |source| DiskError::Owner {
        path: disk.to_owned(),
        source,
    };
    let _ = std::fs::remove_file(&unfinished);
    make(&unfinished).map_err(|source| DiskError::Make {
        path: disk.to_owned(),
        source,
    })?;
    chown(&unfinished, Some(uid), Some(uid)).map_err(owner)?;
    std::fs::rename(&unfinished, disk).map_err(owner)
}

/// Makes the file of a warm slot's disk as long as the VM's is to be. Its guest is told later.
pub(super) fn lengthen(disk: PathBuf, size: ByteSize) -> Result<(), CapabilityError> {
    let grown = std::fs::File::options().write(true).open(&disk).and_then(|file| {
        if file.metadata()?.len() < size.bytes() {
            file.set_len(size.bytes())?;
        }
        Ok(())
    });
    grown.map_err(|source| Box::new(DiskError::Lengthen { path: disk, source }) as CapabilityError)
}

/// Removes the disk with all that is on it; it is no error if there is none.
pub(super) fn remove(path: PathBuf) -> Result<(), CapabilityError> {
    match std::fs::remove_file(&path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(Box::new(DiskError::Remove { path, source }))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_disk_is_made_once_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("d.ext4");
        let uid = own_uid(dir.path());
        // What a crash left of an earlier attempt is not taken for a disk.
        std::fs::write(dir.path().join("d.new"), "half").unwrap();
        let make = |path: &Path| {
            assert!(!path.exists());
            std::fs::write(path, "whole").unwrap();
            Ok(())
        };
        ensure(disk.clone(), uid, make).await.unwrap();
        assert_eq!(std::fs::read(&disk).unwrap(), b"whole");
        assert!(!dir.path().join("d.new").exists());
        ensure(disk.clone(), uid, |_: &Path| panic!("made twice"))
            .await
            .unwrap();
        remove(disk.clone()).unwrap();
        remove(disk.clone()).unwrap();
        assert!(!disk.exists());
    }

    /// Our own user, so that the test needs no privileges.
    fn own_uid(path: &Path) -> u32 {
        std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(path).unwrap())
    }
}
