//! Preparing a base: the work of one blocking thread and its helpers.
//!
//! ```text
//! lock ─► is it there after all? ─► staging ─┬─► layers ─► root.erofs ─┬─► sync ┬─► base.json ─► publish
//!                                            └─► overlay seed          └─► hash ┘
//! ```
//!
//! Everything happens in a staging folder, which goes when this returns early; the base appears by one rename.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use offshoot_image::layer::{Budget, LayerError, LayerSource, Tree, Watch, read_layer};
use offshoot_image::manifest::StoredImage;
use offshoot_model::{BaseId, ByteSize, Digest, Progress, ProgressUnit};
use offshoot_sys::durable::{StagingDir, write_file};
use offshoot_sys::lock::FileLock;
use sha2::{Digest as _, Sha256};

use super::error::PrepareError;
use super::manifest::{
    BaseManifest, FORMAT, MANIFEST, OVERLAY_SEED, ROOT, RootInfo, SeedInfo, VARIANT, root_uuid,
};
use super::{Base, Shared, waiting_for};
use crate::erofs::{DataWriter, SpaceGuard, Written};
use crate::seed::{SEED_SIZE, SeedError, make_disk, mke2fs_version};

/// How often a lock that another process holds is tried again. A blocking wait could not be cancelled.
const LOCK_POLL: Duration = Duration::from_millis(50);
/// How much is read at once to be hashed: large enough that system calls do not show, small enough for a cache.
const HASH_STEP: usize = 256 << 10;
/// How much is hashed between two words of progress.
const HASH_REPORT: u64 = 16 << 20;

/// One preparation.
struct Job<'a> {
    shared: &'a Shared,
    image: &'a StoredImage,
    progress: &'a Progress,
    cancelled: &'a AtomicBool,
}

/// Prepares the base of an image, or finds that another process did.
pub(super) fn prepare(
    shared: &Shared,
    id: &BaseId,
    image: &StoredImage,
    progress: &Progress,
    cancelled: &AtomicBool,
) -> Result<Base, PrepareError> {
    let job = Job {
        shared,
        image,
        progress,
        cancelled,
    };
    let _lock = job.lock(id)?;
    if let Ok(base) = shared.load(id) {
        return Ok(base);
    }
    let staging = StagingDir::new(&shared.tmp, "base").map_err(job.io("create a folder in", &shared.tmp))?;
    let manifest = job.fill(staging.path())?;
    let dir = shared.dir(id);
    // What is there is damaged, or it would have been taken.
    staging.publish_replacing(&dir).map_err(job.io("publish", &dir))?;
    Ok(Base {
        id: id.clone(),
        dir,
        manifest,
    })
}

impl Job<'_> {
    fn io(&self, action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PrepareError {
        let (image, path) = (self.image.digest, path.to_owned());
        move |source| PrepareError::Io {
            image,
            action,
            path,
            source: Arc::new(source),
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    fn check_cancelled(&self) -> Result<(), PrepareError> {
        if self.is_cancelled() {
            return Err(PrepareError::Cancelled {
                image: self.image.digest,
            });
        }
        Ok(())
    }

    fn lock(&self, id: &BaseId) -> Result<FileLock, PrepareError> {
        let path = self.shared.lock_path(id);
        let mut told = false;
        loop {
            self.check_cancelled()?;
            if let Some(lock) = FileLock::try_exclusive(&path).map_err(self.io("lock", &path))? {
                return Ok(lock);
            }
            if !told {
                self.progress.message(waiting_for(self.image));
                told = true;
            }
            #[expect(
                clippy::disallowed_methods,
                reason = "nobody is told when a file lock becomes free"
            )]
            thread::sleep(LOCK_POLL);
        }
    }

    /// Makes all files of the base in `dir`.
    fn fill(&self, dir: &Path) -> Result<BaseManifest, PrepareError> {
        thread::scope(|scope| {
            let seed = scope.spawn(|| make_seed(&dir.join(OVERLAY_SEED)));
            let root = self.root(&dir.join(ROOT));
            let seed = seed
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let manifest = BaseManifest {
                format: FORMAT,
                image: self.image.digest,
                variant: VARIANT.to_owned(),
                root: root?,
                overlay_seed: seed.map_err(|source| PrepareError::Seed {
                    image: self.image.digest,
                    source: Arc::new(source),
                })?,
            };
            for name in [ROOT, OVERLAY_SEED] {
                let path = dir.join(name);
                std::fs::set_permissions(&path, Permissions::from_mode(0o444))
                    .map_err(self.io("set the mode of", &path))?;
            }
            let path = dir.join(MANIFEST);
            write_file(&path, &manifest.to_json()).map_err(self.io("write", &path))?;
            // VMMs run as other users and read the root; the data directory above keeps everybody else out.
            std::fs::set_permissions(dir, Permissions::from_mode(0o755))
                .map_err(self.io("set the mode of", dir))?;
            self.check_cancelled()?;
            Ok(manifest)
        })
    }

    fn root(&self, path: &Path) -> Result<RootInfo, PrepareError> {
        let guard = match self.shared.config.guard {
            Some(guard) => guard,
            None => SpaceGuard::of_disk(&self.shared.tmp)
                .map_err(self.io("look at the room in", &self.shared.tmp))?,
        };
        let mut writer = DataWriter::create(path, guard).map_err(self.io("create", path))?;
        let tree = self.layers(&mut writer)?;
        let task = self
            .progress
            .start(format!("writing {ROOT}"), ProgressUnit::Bytes, None);
        let image = self.image.digest;
        let written = writer
            .finish(&tree, root_uuid(&image))
            .map_err(|source| PrepareError::Root {
                image,
                source: Arc::new(source),
            })?;
        drop(tree);
        let Written { file, size, inodes } = &written;
        // The one waits for the disk and the other for the processor.
        let (synced, hashed) = thread::scope(|scope| {
            let sync = scope.spawn(|| file.sync_all());
            let hashed = hash(file, &mut |done| {
                self.progress.moved(task, done);
                !self.is_cancelled()
            });
            (
                sync.join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                hashed,
            )
        });
        synced.map_err(self.io("write", path))?;
        let sha256 = hashed
            .map_err(self.io("read", path))?
            .ok_or(PrepareError::Cancelled { image })?;
        let allocated = file.metadata().map_err(self.io("look at", path))?.blocks() * 512;
        self.progress.finish(task);
        Ok(RootInfo {
            size: ByteSize::from_bytes(*size),
            allocated: ByteSize::from_bytes(allocated),
            inodes: *inodes,
            sha256,
            writer: format!("offshoot-rootfs {}", env!("CARGO_PKG_VERSION")),
        })
    }

    /// Reads all layers, lowest first: content into `writer`, all else into the tree.
    fn layers(&self, writer: &mut DataWriter) -> Result<Tree, PrepareError> {
        let image = self.image.digest;
        let failed = |error| match error {
            LayerError::Cancelled { .. } => PrepareError::Cancelled { image },
            error => PrepareError::Layer {
                image,
                source: Arc::new(error),
            },
        };
        let mut budget = Budget::new(self.shared.config.limits);
        let mut tree = Tree::new();
        for layer in &self.image.layers {
            let blob = self.shared.blobs.open_blob(&layer.digest);
            let blob = blob.map_err(|source| PrepareError::Blob {
                image,
                source: Arc::new(source),
            })?;
            let label = format!("unpacking {}", layer.digest.short());
            let task = self.progress.start(label, ProgressUnit::Bytes, Some(layer.size));
            let (progress, cancelled) = (self.progress.clone(), self.cancelled);
            let watch = Watch {
                cancelled: &|| cancelled.load(Ordering::Relaxed),
                moved: &|done| progress.moved(task, done),
            };
            let entries =
                read_layer(LayerSource { layer, blob }, &mut budget, writer, watch).map_err(failed)?;
            tree.apply(entries).map_err(failed)?;
            self.progress.finish(task);
        }
        Ok(tree)
    }
}

fn make_seed(path: &Path) -> Result<SeedInfo, SeedError> {
    make_disk(path, SEED_SIZE)?;
    Ok(SeedInfo {
        size: SEED_SIZE,
        writer: format!("mke2fs {}", mke2fs_version()?),
    })
}

/// The SHA-256 of a file from its start; `None` if `moved`, which hears how far it is, says to stop.
pub(super) fn hash(file: &File, moved: &mut dyn FnMut(u64) -> bool) -> io::Result<Option<Digest>> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; HASH_STEP];
    let (mut at, mut told) = (0, 0);
    loop {
        let count = match file.read_at(&mut buffer, at) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        at += count as u64;
        if count == 0 || at >= told + HASH_REPORT {
            told = at;
            if !moved(at) {
                return Ok(None);
            }
        }
        if count == 0 {
            return Ok(Some(Digest::from_bytes(hasher.finalize().into())));
        }
        hasher.update(&buffer[..count]);
    }
}
