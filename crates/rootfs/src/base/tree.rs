//! The tree of a base on disk, for root back ends that show files and not a disk: unpacked from `root.erofs` when it is first
//! needed, once.
//!
//! ```text
//! lock ─► is it there after all? ─► tmp/tree-<random>/tree ─► syncfs ─► rename to bases/<id>/tree
//! ```
//!
//! It appears by one rename, after all of it is on disk, so a tree that is there is whole. One `syncfs` for all files: syncing
//! each of nine thousand takes many times as long.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use offshoot_model::{BaseId, Progress, ProgressUnit};
use offshoot_sys::durable::{StagingDir, fsync_dir};
use offshoot_sys::lock::FileLock;
use rustix::fs::{CWD, RenameFlags, renameat_with, syncfs};

use super::error::{BaseError, TreeError};
use super::lock::lock;
use super::manifest::TREE;
use super::{Base, BaseStore, Shared, waiting_for};
use crate::erofs::ErofsImage;
use crate::room::Room;
use crate::unpack::{UnpackError, UnpackWatch, unpack};

/// What an inode takes on disk beside its content, on average.
const INODE_COST: u64 = 512;

impl BaseStore {
    /// The folder with the tree of a base, unpacked unless it is there. Must be called within a Tokio runtime, by root.
    ///
    /// Who calls it for a base that somebody is unpacking waits and shares the result or the error. Dropping the future gives
    /// up the wait; the work goes on for those who still wait, and when nobody does it stops and leaves nothing behind. The
    /// base itself must be there.
    pub async fn ensure_tree(&self, id: &BaseId, progress: &Progress) -> Result<PathBuf, TreeError> {
        let (shared, wanted) = (self.shared.clone(), id.clone());
        let look = move || {
            let base = shared.load(&wanted)?;
            Ok::<_, BaseError>((present(&base), base.manifest.image))
        };
        let found = tokio::task::spawn_blocking(look).await;
        if let Ok(Ok((Some(tree), _))) = found {
            return Ok(tree);
        }
        let flight = self.shared.trees.join(id, |cancelled: Arc<AtomicBool>| {
            let (shared, id, progress) = (self.shared.clone(), id.clone(), progress.clone());
            move || make(&shared, &id, &progress, &cancelled)
        });
        if flight.joined()
            && let Ok(Ok((_, image))) = found
        {
            progress.message(waiting_for(&image));
        }
        flight
            .outcome()
            .await
            .unwrap_or(Err(TreeError::Stopped { id: id.clone() }))
    }

    /// Removes the tree of a base; it is no error if there is none. Waits for whoever works on the base. Blocks the thread.
    ///
    /// Nobody may be using it: files that are open stay, but names that are still to be opened are gone.
    pub fn remove_tree(&self, id: &BaseId) -> Result<(), BaseError> {
        let lock_path = self.shared.lock_path(id);
        let _lock = FileLock::exclusive(&lock_path).map_err(BaseError::io("lock", &lock_path))?;
        let tmp = &self.shared.tmp;
        let grave = StagingDir::new(tmp, "removed").map_err(BaseError::io("create a folder in", tmp))?;
        let dir = self.shared.dir(id);
        let tree = dir.join(TREE);
        match std::fs::rename(&tree, grave.path().join(TREE)) {
            Ok(()) => fsync_dir(&dir).map_err(BaseError::io("write", &dir)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(BaseError::Io {
                action: "remove",
                path: tree,
                source,
            }),
        }
    }
}

/// The tree of a base, where it has one.
pub(super) fn present(base: &Base) -> Option<PathBuf> {
    let tree = base.tree();
    let is_dir = std::fs::symlink_metadata(&tree).is_ok_and(|metadata| metadata.is_dir());
    is_dir.then_some(tree)
}

fn make(
    shared: &Shared,
    id: &BaseId,
    progress: &Progress,
    cancelled: &AtomicBool,
) -> Result<PathBuf, TreeError> {
    let io = |action, path: &Path| {
        let (id, path) = (id.clone(), path.to_owned());
        move |source: io::Error| TreeError::Io {
            id,
            action,
            path,
            source: Arc::new(source),
        }
    };
    let stop = || cancelled.load(Ordering::Relaxed);
    let waits = || {
        // Without a base there is nothing to wait for, which is told when the lock is ours.
        if let Ok(base) = shared.load(id) {
            progress.message(waiting_for(&base.manifest.image));
        }
    };
    let lock_path = shared.lock_path(id);
    let _lock = lock(&lock_path, &stop, &waits)
        .map_err(io("lock", &lock_path))?
        .ok_or_else(|| TreeError::Cancelled { id: id.clone() })?;
    let base = shared.load(id).map_err(|source| TreeError::Base {
        id: id.clone(),
        source: Arc::new(source),
    })?;
    if let Some(tree) = present(&base) {
        return Ok(tree);
    }
    let tmp = &shared.tmp;
    let staging = StagingDir::new(tmp, "tree").map_err(io("create a folder in", tmp))?;
    let staged = staging.path().join(TREE);
    unpack_all(shared, &base, &staged, progress, &stop).map_err(|error| match error {
        UnpackError::Cancelled => TreeError::Cancelled { id: id.clone() },
        error => TreeError::Unpack {
            id: id.clone(),
            source: Arc::new(error),
        },
    })?;
    File::open(staging.path())
        .and_then(|dir| Ok(syncfs(dir)?))
        .map_err(io("write", &staged))?;
    if stop() {
        return Err(TreeError::Cancelled { id: id.clone() });
    }
    let tree = base.tree();
    renameat_with(CWD, &staged, CWD, &tree, RenameFlags::NOREPLACE)
        .map_err(io::Error::from)
        .and_then(|()| fsync_dir(&base.dir))
        .map_err(io("publish", &tree))?;
    tracing::info!(base = %id, image = %base.manifest.image, "unpacked the tree of a base");
    Ok(tree)
}

fn unpack_all(
    shared: &Shared,
    base: &Base,
    staged: &Path,
    progress: &Progress,
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<(), UnpackError> {
    let root = &base.manifest.root;
    let make_room = |source| UnpackError::Io {
        action: "make room for",
        path: base.tree(),
        source,
    };
    let guard = shared.guard().map_err(make_room)?;
    // Rather now than after some GiB.
    Room::new(&shared.tmp, guard)
        .take(root.allocated.bytes() + root.inodes * INODE_COST)
        .map_err(make_room)?;
    let image = ErofsImage::open(&base.root_erofs())?;
    let label = format!("unpacking the tree of {}", base.manifest.image.short());
    let task = progress.start(label, ProgressUnit::Items, Some(root.inodes));
    let reporter = progress.clone();
    let watch = UnpackWatch {
        cancelled: stop,
        moved: &|done| reporter.moved(task, done),
    };
    unpack(&image, image.root()?, staged, guard, watch)?;
    progress.finish(task);
    Ok(())
}
