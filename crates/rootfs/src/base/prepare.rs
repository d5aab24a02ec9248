//! Preparing a base: the work of one blocking thread and its helpers.
//!
//! ```text
//! lock ─► is it there after all? ─► staging ─┬─► layers ─► root.erofs ─┬─► sync ──────┬─► base.json ─► publish
//!                                            │                         ├─► hash ──────┤
//!                                            │                         └─► work seed ─┤
//!                                            └─► overlay seed ────────────────────────┘
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

use offshoot_image::layer::{Budget, LayerError, LayerSource, Tree, Watch, read_layer};
use offshoot_image::manifest::StoredImage;
use offshoot_model::{BaseId, ByteSize, Digest, Progress, ProgressUnit};
use offshoot_sys::durable::{StagingDir, write_file};
use sha2::{Digest as _, Sha256};

use super::error::PrepareError;
use super::lock::lock;
use super::manifest::{
    BaseManifest, FORMAT, MANIFEST, OVERLAY_SEED, ROOT, RootInfo, SeedInfo, VARIANT, WORK_SEED, root_uuid,
};
use super::{Base, Shared, waiting_for};
use crate::erofs::{DataWriter, SpaceGuard, Written};
use crate::seed::{SeedError, hash_blocks, make_disk, mke2fs_version};

/// How much is read at once to be hashed: large enough that system calls do not show, small enough for a cache.
const HASH_STEP: usize = 256 << 10;
/// How much is hashed between two words of progress.
const HASH_REPORT: u64 = 16 << 20;

/// One preparation.
pub(super) struct Job<'a> {
    pub(super) shared: &'a Shared,
    pub(super) image: &'a StoredImage,
    pub(super) progress: &'a Progress,
    pub(super) cancelled: &'a AtomicBool,
}

/// What is done about a base that is there and looks whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Present {
    /// It is taken.
    Take,
    /// It is replaced.
    Replace,
}

/// Prepares the base of an image, or finds that another process did.
pub(super) fn prepare(job: &Job<'_>, id: &BaseId, present: Present) -> Result<Base, PrepareError> {
    let Job { shared, image, .. } = job;
    let lock_path = shared.lock_path(id);
    let waits = || job.progress.message(waiting_for(&image.digest));
    let _lock = lock(&lock_path, &|| job.is_cancelled(), &waits)
        .map_err(job.io("lock", &lock_path))?
        .ok_or(PrepareError::Cancelled { image: image.digest })?;
    if present == Present::Take
        && let Ok(base) = shared.load(id)
    {
        return Ok(base);
    }
    let staging = StagingDir::new(&shared.tmp, "base").map_err(job.io("create a folder in", &shared.tmp))?;
    let manifest = job.fill(staging.path())?;
    let dir = shared.dir(id);
    // What is there is damaged, or not wanted. Its tree goes with it.
    staging.publish_replacing(&dir).map_err(job.io("publish", &dir))?;
    tracing::info!(base = %id, image = %image.digest, "prepared a base");
    Ok(Base {
        id: id.clone(),
        dir,
        manifest,
    })
}

impl Job<'_> {
    pub(super) fn io(&self, action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PrepareError {
        let (image, path) = (self.image.digest, path.to_owned());
        move |source| PrepareError::Io {
            image,
            action,
            path,
            source: Arc::new(source),
        }
    }

    pub(super) fn is_cancelled(&self) -> bool {
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

    pub(super) fn seed_error(&self) -> impl Fn(SeedError) -> PrepareError {
        let image = self.image.digest;
        move |source| PrepareError::Seed {
            image,
            source: Arc::new(source),
        }
    }

    pub(super) fn guard(&self) -> Result<SpaceGuard, PrepareError> {
        let tmp = &self.shared.tmp;
        self.shared.guard().map_err(self.io("look at the room in", tmp))
    }

    /// Makes all files of the base in `dir`.
    fn fill(&self, dir: &Path) -> Result<BaseManifest, PrepareError> {
        let writer = format!("mke2fs {}", mke2fs_version().map_err(self.seed_error())?);
        let (root, overlay_seed) = thread::scope(|scope| {
            let overlay_seed = scope.spawn(|| {
                let path = dir.join(OVERLAY_SEED);
                make_disk(&path, self.shared.config.seed_size).map_err(self.seed_error())?;
                self.seed_info(&path, &writer)
            });
            let root = self.root(dir, &writer);
            (root, join(overlay_seed))
        });
        let (root, work_seed) = root?;
        let manifest = BaseManifest {
            format: FORMAT,
            image: self.image.digest,
            variant: VARIANT.to_owned(),
            root,
            overlay_seed: Some(overlay_seed?),
            work_seed: Some(work_seed),
        };
        write_file(&dir.join(MANIFEST), &manifest.to_json())
            .map_err(self.io("write", &dir.join(MANIFEST)))?;
        for name in [ROOT, OVERLAY_SEED, WORK_SEED, MANIFEST] {
            let path = dir.join(name);
            std::fs::set_permissions(&path, Permissions::from_mode(0o444))
                .map_err(self.io("set the mode of", &path))?;
        }
        // VMMs run as other users and read the root; the data directory above keeps everybody else out.
        std::fs::set_permissions(dir, Permissions::from_mode(0o555))
            .map_err(self.io("set the mode of", dir))?;
        self.check_cancelled()?;
        Ok(manifest)
    }

    /// What there is to say about a seed.
    pub(super) fn seed_info(&self, path: &Path, writer: &str) -> Result<SeedInfo, PrepareError> {
        let file = File::open(path).map_err(self.io("open", path))?;
        let metadata = file.metadata().map_err(self.io("look at", path))?;
        let hashed = hash_blocks(&file, &mut || !self.is_cancelled()).map_err(self.io("read", path))?;
        Ok(SeedInfo {
            size: ByteSize::from_bytes(metadata.len()),
            allocated: ByteSize::from_bytes(metadata.blocks() * 512),
            blocks_sha256: Some(hashed.ok_or(PrepareError::Cancelled {
                image: self.image.digest,
            })?),
            writer: writer.to_owned(),
        })
    }

    /// Makes the root, and the work seed, which needs it.
    fn root(&self, dir: &Path, seed_writer: &str) -> Result<(RootInfo, SeedInfo), PrepareError> {
        let path = &dir.join(ROOT);
        let mut writer = DataWriter::create(path, self.guard()?).map_err(self.io("create", path))?;
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
        // One waits for the disk, one for other processes, and one for the processor.
        let (synced, work_seed, hashed) = thread::scope(|scope| {
            let sync = scope.spawn(|| file.sync_all());
            let work_seed = scope.spawn(|| self.work_seed(path, &dir.join(WORK_SEED), seed_writer));
            let hashed = hash(file, &mut |done| {
                self.progress.moved(task, done);
                !self.is_cancelled()
            });
            (join(sync), join(work_seed), hashed)
        });
        synced.map_err(self.io("write", path))?;
        let sha256 = hashed
            .map_err(self.io("read", path))?
            .ok_or(PrepareError::Cancelled { image })?;
        let allocated = file.metadata().map_err(self.io("look at", path))?.blocks() * 512;
        let work_seed = work_seed?;
        self.progress.finish(task);
        let root = RootInfo {
            size: ByteSize::from_bytes(*size),
            allocated: ByteSize::from_bytes(allocated),
            inodes: *inodes,
            sha256,
            writer: format!("offshoot-rootfs {}", env!("CARGO_PKG_VERSION")),
        };
        Ok((root, work_seed))
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

/// The result of a thread, or its panic.
fn join<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
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
