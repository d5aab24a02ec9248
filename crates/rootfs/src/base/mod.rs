//! The store of bases.
//!
//! ```text
//! <data>/bases/<id>/           one for each image and variant; never changed, only swapped as a whole
//!     root.erofs               the tree of the image, 0444
//!     overlay-seed.ext4        the pristine overlay disk, 0444
//!     work-seed.ext4           the pristine work disk: the image's /root, 0444
//!     base.json                what the others are, and their hashes
//!     tree/                    the tree of the image as files, once somebody needed it
//! <data>/locks/base-<id>.lock  held by the process that prepares, unpacks, checks or removes the base
//! <data>/tmp/base-<random>/    a base in the making
//! <data>/tmp/tree-<random>/    a tree in the making
//! ```
//!
//! The id is made from the image's digest and the variant, so a base that exists needs no further key: the same id always
//! means the same content. A base of an earlier variant serves until the current one stands beside it. See
//! `docs/formats/base.md`. Which bases are still needed is not known here.

mod error;
mod flight;
mod lock;
mod manifest;

mod prepare;
mod work_seed;

mod tree;
mod verify;

mod disk;

use std::fmt;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use offshoot_image::layer::Limits;
use offshoot_image::manifest::StoredImage;
use offshoot_model::{BaseId, ByteSize, Digest, Progress};
use offshoot_store::blobs::BlobStore;
use offshoot_sys::durable::{StagingDir, fsync_dir};
use offshoot_sys::lock::FileLock;

use crate::erofs::SpaceGuard;
use crate::seed::SEED_SIZE;

pub use disk::DiskError;
pub use error::{BaseError, PrepareError, TreeError, VerifyError};
pub use manifest::{BaseManifest, RootInfo, SeedInfo, base_id, earlier_base_ids};
pub use verify::{CheckedPart, Verified, VerifiedPart};

use flight::Flights;
use prepare::{Job, Present};

/// What bounds the preparation of a base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BaseStoreConfig {
    /// What an image may unpack to.
    pub limits: Limits,
    /// What must stay free on the disk; without, [`SpaceGuard::of_disk`] decides.
    pub guard: Option<SpaceGuard>,
    /// The length of seeds that are made from now on: disks that are not smaller are clones. A work seed has more where the
    /// image's `/root` needs it.
    pub seed_size: ByteSize,
}

impl Default for BaseStoreConfig {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            guard: None,
            seed_size: SEED_SIZE,
        }
    }
}

/// A pristine disk in a base, of which VMs get clones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seed {
    /// Of overlay disks: empty.
    Overlay,
    /// Of work disks: with the image's `/root`.
    Work,
}

impl fmt::Display for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Overlay => "overlay seed",
            Self::Work => "work seed",
        })
    }
}

/// The bases below a data directory. Cheap to clone; any number of processes may use one store at once.
#[derive(Clone, Debug)]
pub struct BaseStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    bases: PathBuf,
    locks: PathBuf,
    tmp: PathBuf,
    blobs: BlobStore,
    config: BaseStoreConfig,
    flights: Flights<Result<Base, PrepareError>>,
    rebuilds: Flights<Result<Base, PrepareError>>,
    trees: Flights<Result<PathBuf, TreeError>>,
}

/// Where the files of a base lie, whether it is there or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BasePaths {
    dir: PathBuf,
}

impl BasePaths {
    /// The folder itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// See [`Base::root_erofs`].
    pub fn root_erofs(&self) -> PathBuf {
        self.dir.join(manifest::ROOT)
    }

    /// See [`Base::overlay_seed`].
    pub fn overlay_seed(&self) -> PathBuf {
        self.dir.join(manifest::OVERLAY_SEED)
    }

    /// See [`Base::work_seed`].
    pub fn work_seed(&self) -> PathBuf {
        self.dir.join(manifest::WORK_SEED)
    }

    /// See [`Base::tree`].
    pub fn tree(&self) -> PathBuf {
        self.dir.join(manifest::TREE)
    }
}

/// A prepared base.
#[derive(Clone, Debug)]
pub struct Base {
    /// Its id.
    pub id: BaseId,
    /// Its folder.
    pub dir: PathBuf,
    /// What its `base.json` says.
    pub manifest: BaseManifest,
}

impl Base {
    /// The tree of the image, an EROFS image whose size is a multiple of 2 MiB.
    pub fn root_erofs(&self) -> PathBuf {
        self.dir.join(manifest::ROOT)
    }

    /// The seeds that it does not have, because an earlier version made it.
    pub fn lacks(&self) -> Vec<Seed> {
        let seeds = [
            (Seed::Overlay, &self.manifest.overlay_seed),
            (Seed::Work, &self.manifest.work_seed),
        ];
        let missing = seeds.into_iter().filter(|(_, info)| info.is_none());
        missing.map(|(seed, _)| seed).collect()
    }

    /// The pristine overlay disk, where it has one, for [`clone_seed`](crate::seed::clone_seed).
    pub fn overlay_seed(&self) -> PathBuf {
        self.dir.join(manifest::OVERLAY_SEED)
    }

    /// The pristine work disk with the image's `/root`, where it has one, for [`clone_work_seed`](crate::seed::clone_work_seed).
    pub fn work_seed(&self) -> PathBuf {
        self.dir.join(manifest::WORK_SEED)
    }

    /// The tree of the image as files, where [`ensure_tree`](BaseStore::ensure_tree) made it.
    pub fn tree(&self) -> PathBuf {
        self.dir.join(manifest::TREE)
    }
}

impl BaseStore {
    /// Opens the store below `data_dir` and makes its folders (mode 0700) where they are missing.
    pub fn open(data_dir: &Path, blobs: BlobStore) -> Result<Self, BaseError> {
        Self::open_with(data_dir, blobs, BaseStoreConfig::default())
    }

    /// As [`open`](Self::open), with bounds of one's own.
    pub fn open_with(data_dir: &Path, blobs: BlobStore, config: BaseStoreConfig) -> Result<Self, BaseError> {
        let shared = Shared {
            bases: data_dir.join("bases"),
            locks: data_dir.join("locks"),
            tmp: data_dir.join("tmp"),
            blobs,
            config,
            flights: Flights::default(),
            rebuilds: Flights::default(),
            trees: Flights::default(),
        };
        for dir in [&shared.bases, &shared.locks, &shared.tmp] {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(BaseError::io("create", dir))?;
        }
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Gives the base of an image, preparing it if there is none: the current one, else one that an earlier version made, whose
    /// VMs' disks are built where it lacks a seed.
    ///
    /// However many ask at once, in this process and in others, one preparation runs; the others wait for it and share its
    /// result or its error. Dropping the future is safe: the preparation goes on for those who still wait, and when
    /// nobody does it stops and leaves nothing behind. A base that is there but damaged is prepared again and swapped;
    /// VMs that have the old files open keep them.
    pub async fn ensure(&self, image: &StoredImage, progress: &Progress) -> Result<Base, PrepareError> {
        let (store, digest) = (self.clone(), image.digest);
        let ready = tokio::task::spawn_blocking(move || store.of_image(&digest).ok()).await;
        if let Ok(Some(base)) = ready {
            return Ok(base);
        }
        self.prepare(
            &self.shared.flights,
            &base_id(&image.digest),
            image,
            progress,
            Present::Take,
        )
        .await
    }

    /// As [`ensure`](Self::ensure), but what an earlier version made does not do: the current base is made beside it.
    pub async fn ensure_current(
        &self,
        image: &StoredImage,
        progress: &Progress,
    ) -> Result<Base, PrepareError> {
        let id = base_id(&image.digest);
        let (shared, wanted) = (self.shared.clone(), id.clone());
        let ready = tokio::task::spawn_blocking(move || shared.load(&wanted).ok()).await;
        if let Ok(Some(base)) = ready {
            return Ok(base);
        }
        self.prepare(&self.shared.flights, &id, image, progress, Present::Take)
            .await
    }

    /// Prepares the base of an image again, also where there is one that looks whole, and swaps it in. Its tree goes.
    ///
    /// As [`ensure`](Self::ensure) in all else: who calls it while somebody rebuilds the same base shares the result, and
    /// with nobody left to wait the old base stays. VMs that have the old files open keep them.
    pub async fn rebuild(&self, image: &StoredImage, progress: &Progress) -> Result<Base, PrepareError> {
        let id = base_id(&image.digest);
        self.prepare(&self.shared.rebuilds, &id, image, progress, Present::Replace)
            .await
    }

    async fn prepare(
        &self,
        flights: &Flights<Result<Base, PrepareError>>,
        id: &BaseId,
        image: &StoredImage,
        progress: &Progress,
        present: Present,
    ) -> Result<Base, PrepareError> {
        let flight = flights.join(id, |cancelled: Arc<AtomicBool>| {
            let (shared, id, image, progress) =
                (self.shared.clone(), id.clone(), image.clone(), progress.clone());
            move || {
                let job = Job {
                    shared: &shared,
                    image: &image,
                    progress: &progress,
                    cancelled: &cancelled,
                };
                prepare::prepare(&job, &id, present)
            }
        });
        if flight.joined() {
            progress.message(waiting_for(&image.digest));
        }
        flight
            .outcome()
            .await
            .unwrap_or(Err(PrepareError::Stopped { image: image.digest }))
    }

    /// The folder that all bases lie in.
    pub fn dir(&self) -> &Path {
        &self.shared.bases
    }

    /// Where the files of this base would lie. Looks at nothing.
    pub fn locate(&self, id: &BaseId) -> BasePaths {
        BasePaths {
            dir: self.shared.dir(id),
        }
    }

    /// The base of this id. Reads a small file and blocks for as long.
    pub fn get(&self, id: &BaseId) -> Result<Base, BaseError> {
        self.shared.load(id)
    }

    /// The base that VMs of this image get: the current one, else one that an earlier version made. Where there is neither, the
    /// error is that of the current one. Reads a small file or two and blocks for as long.
    pub fn of_image(&self, image: &Digest) -> Result<Base, BaseError> {
        let current = self.shared.load(&base_id(image));
        // One that is damaged is made again; that an earlier one is left over is no reason to go back to it.
        if !matches!(current, Err(BaseError::NotFound { .. })) {
            return current;
        }
        let mut earlier = earlier_base_ids(image).filter_map(|id| self.shared.load(&id).ok());
        earlier.next().map_or(current, Ok)
    }

    /// Every base that is whole, in the order of their ids.
    pub fn list(&self) -> Result<Vec<Base>, BaseError> {
        let mut bases = Vec::new();
        for id in self.ids()? {
            match self.shared.load(&id) {
                Ok(base) => bases.push(base),
                // Removed since the folder was read.
                Err(BaseError::NotFound { .. }) => {}
                Err(error) => {
                    tracing::warn!(%id, error = %error, "a base is damaged and will be prepared again");
                }
            }
        }
        Ok(bases)
    }

    /// The id of everything that takes the place of a base, whole, damaged or of another version, in order.
    pub fn ids(&self) -> Result<Vec<BaseId>, BaseError> {
        let dir = &self.shared.bases;
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(BaseError::io("list", dir))? {
            let name = entry.map_err(BaseError::io("list", dir))?.file_name();
            ids.extend(name.to_str().and_then(|name| name.parse::<BaseId>().ok()));
        }
        ids.sort();
        Ok(ids)
    }

    /// Removes a base, damaged or whole; it is no error if there is none. Waits for a preparation of it in another process.
    ///
    /// Whoever has its files open keeps them.
    pub fn remove(&self, id: &BaseId) -> Result<(), BaseError> {
        let lock = self.shared.lock_path(id);
        let _lock = FileLock::exclusive(&lock).map_err(BaseError::io("lock", &lock))?;
        let tmp = &self.shared.tmp;
        let grave = StagingDir::new(tmp, "removed").map_err(BaseError::io("create a folder in", tmp))?;
        let dir = self.shared.dir(id);
        match std::fs::rename(&dir, grave.path().join("base")) {
            Ok(()) => fsync_dir(&self.shared.bases).map_err(BaseError::io("write", &self.shared.bases)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(BaseError::Io {
                action: "remove",
                path: dir,
                source,
            }),
        }
    }
}

impl Shared {
    fn dir(&self, id: &BaseId) -> PathBuf {
        self.bases.join(id.as_str())
    }

    fn lock_path(&self, id: &BaseId) -> PathBuf {
        self.locks.join(format!("base-{id}.lock"))
    }

    fn guard(&self) -> io::Result<SpaceGuard> {
        self.config
            .guard
            .map_or_else(|| SpaceGuard::of_disk(&self.tmp), Ok)
    }

    /// The base of this id, if it looks whole: the manifest reads and is current, and the files have the recorded sizes.
    fn load(&self, id: &BaseId) -> Result<Base, BaseError> {
        let dir = self.dir(id);
        let manifest = BaseManifest::read(&dir, id)?;
        Ok(Base {
            id: id.clone(),
            dir,
            manifest,
        })
    }
}

fn waiting_for(image: &Digest) -> String {
    format!("waiting for another preparation of image {}", image.short())
}
