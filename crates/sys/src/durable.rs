//! Files and folders that are there whole or not at all, also after a crash of the host.
//!
//! ```text
//! tmp/<prefix>-<random>/   made by StagingDir, locked by its maker, removed when dropped
//!     │  publish: fsync every file and folder in it, rename, fsync the parent
//!     ▼
//! <final>/                 whole
//! ```
//!
//! Staging and final place must be on one file system.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;

use crate::random;

/// What publishing did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// The new one stands at the final place.
    New,
    /// Somebody published there before; theirs stands, ours is still where it was.
    AlreadyThere,
}

/// Makes the names in `dir` durable.
pub fn fsync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Replaces `path` (mode 0644 if it is new, else as before the umask) by `bytes`, whole or not at all.
pub fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let (parent, name) = split(path)?;
    let mut tmp_name = std::ffi::OsString::from(".");
    tmp_name.push(name);
    tmp_name.push(format!(".{:016x}.tmp", u64::from_ne_bytes(random::bytes()?)));
    let tmp = parent.join(tmp_name);
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&tmp)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&tmp, path)
    };
    write().inspect_err(|_| {
        // The write failed; that its remains cannot be removed either adds nothing to that error.
        let _ = std::fs::remove_file(&tmp);
    })?;
    fsync_dir(parent)
}

/// Moves the file or folder `tmp` to `final_path`, durably; what stands there already stays.
pub fn publish(tmp: &Path, final_path: &Path) -> io::Result<Published> {
    fsync_tree(tmp)?;
    match renameat_with(CWD, tmp, CWD, final_path, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        Err(Errno::EXIST | Errno::NOTEMPTY) => return Ok(Published::AlreadyThere),
        Err(errno) => return Err(errno.into()),
    }
    fsync_dir(split(final_path)?.0)?;
    Ok(Published::New)
}

/// Swaps the file or folder `tmp` with the one at `final_path`, durably: afterwards `tmp` is the old one. Where
/// nothing stands at `final_path`, it is [`publish`].
pub fn publish_replacing(tmp: &Path, final_path: &Path) -> io::Result<()> {
    loop {
        if publish(tmp, final_path)? == Published::New {
            return Ok(());
        }
        match renameat_with(CWD, tmp, CWD, final_path, RenameFlags::EXCHANGE) {
            Ok(()) => return fsync_dir(split(final_path)?.0),
            // Removed by somebody between the two calls.
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn split(path: &Path) -> io::Result<(&Path, &std::ffi::OsStr)> {
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "path has no name"))?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    Ok((parent, name))
}

/// Syncs every regular file and folder from `root` down, a folder after what is in it.
fn fsync_tree(root: &Path) -> io::Result<()> {
    let kind = std::fs::symlink_metadata(root)?.file_type();
    if kind.is_dir() {
        for entry in std::fs::read_dir(root)? {
            fsync_tree(&entry?.path())?;
        }
    }
    if kind.is_dir() || kind.is_file() {
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(root)?
            .sync_all()?;
    }
    Ok(())
}

/// A folder for unpublished work, removed with all that is in it when dropped.
///
/// Its maker holds a lock on it, so that [`sweep`] tells the work of a living process from what a dead one left.
#[derive(Debug)]
pub struct StagingDir {
    path: PathBuf,
    _lock: File,
}

impl StagingDir {
    /// Makes `<parent>/<prefix>-<random>` with mode 0700, and `parent` if there is none.
    pub fn new(parent: impl AsRef<Path>, prefix: &str) -> io::Result<Self> {
        let parent = parent.as_ref();
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)?;
        loop {
            let path = parent.join(format!("{prefix}-{:016x}", u64::from_ne_bytes(random::bytes()?)));
            std::fs::DirBuilder::new().mode(0o700).create(&path)?;
            // Between the two calls a sweep may have taken the folder for an abandoned one: then once more.
            match File::open(&path) {
                Ok(lock) => match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                    Ok(()) if path.exists() => return Ok(Self { path, _lock: lock }),
                    Ok(()) | Err(Errno::WOULDBLOCK) => {}
                    Err(errno) => return Err(errno.into()),
                },
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Publishes the whole folder at `final_path`; see [`publish`].
    pub fn publish(self, final_path: &Path) -> io::Result<Published> {
        publish(&self.path, final_path)
    }

    /// Publishes the whole folder at `final_path` and removes what stood there; see [`publish_replacing`].
    pub fn publish_replacing(self, final_path: &Path) -> io::Result<()> {
        publish_replacing(&self.path, final_path)
    }
}

impl Drop for StagingDir {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a staging folder");
        }
    }
}

/// Removes from `parent` what processes that are gone have left; gives how many things it removed.
///
/// Staging folders of living processes stay. Loose files in `parent` carry no lock and go: call it once, at start.
pub fn sweep(parent: &Path) -> io::Result<usize> {
    let entries = match std::fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            std::fs::remove_file(entry.path())?;
        } else {
            let Ok(dir) = File::open(entry.path()) else {
                continue;
            };
            match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => std::fs::remove_dir_all(entry.path())?,
                Err(Errno::WOULDBLOCK) => continue,
                Err(errno) => return Err(errno.into()),
            }
        }
        removed += 1;
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_and_leaves_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        write_file(&path, b"one").unwrap();
        write_file(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(names(dir.path()), ["x.json"]);
        std::fs::create_dir(dir.path().join("dir")).unwrap();
        assert!(write_file(&dir.path().join("dir"), b"x").is_err());
        assert!(write_file(Path::new("/"), b"x").is_err());
        assert_eq!(names(dir.path()), ["dir", "x.json"]);
    }

    #[test]
    fn publishing_is_once_and_replacing_swaps() {
        let dir = tempfile::tempdir().unwrap();
        let (tmp, place) = (dir.path().join("tmp"), dir.path().join("place"));
        let stage = |text: &str| {
            let staging = StagingDir::new(&tmp, "base").unwrap();
            std::fs::create_dir(staging.path().join("sub")).unwrap();
            std::fs::write(staging.path().join("sub/file"), text).unwrap();
            staging
        };
        assert_eq!(stage("one").publish(&place).unwrap(), Published::New);
        assert_eq!(stage("two").publish(&place).unwrap(), Published::AlreadyThere);
        assert_eq!(std::fs::read(place.join("sub/file")).unwrap(), b"one");
        stage("three").publish_replacing(&place).unwrap();
        assert_eq!(std::fs::read(place.join("sub/file")).unwrap(), b"three");
        stage("four")
            .publish_replacing(&dir.path().join("other"))
            .unwrap();
        assert_eq!(names(&tmp), Vec::<String>::new());
        assert_eq!(names(dir.path()), ["other", "place", "tmp"]);
    }

    #[test]
    fn a_sweep_takes_only_what_is_abandoned() {
        let dir = tempfile::tempdir().unwrap();
        let alive = StagingDir::new(dir.path(), "alive").unwrap();
        std::fs::create_dir_all(dir.path().join("dead-1/sub")).unwrap();
        std::fs::write(dir.path().join("loose"), "").unwrap();
        assert_eq!(sweep(dir.path()).unwrap(), 2);
        assert_eq!(names(dir.path()).len(), 1);
        drop(alive);
        assert_eq!(names(dir.path()), Vec::<String>::new());
        assert_eq!(sweep(&dir.path().join("none")).unwrap(), 0);
    }
}
