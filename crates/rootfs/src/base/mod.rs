//! The store of bases.
//!
//! ```text
//! <data>/bases/<id>/           one for each image and variant; never changed, only swapped as a whole
//!     root.erofs               the tree of the image, 0444
//!     overlay-seed.ext4        the pristine overlay disk, 0444
//!     base.json                what the others are, and the hash of the root
//! <data>/locks/base-<id>.lock  held by the process that prepares or removes the base
//! <data>/tmp/base-<random>/    a base in the making
//! ```
//!
//! The id is made from the image's digest and the variant, so a base that exists needs no further key: the same id always
//! means the same content. See `docs/formats/base.md`. Which bases are still needed is not known here.

mod error;
mod flight;
mod manifest;
mod prepare;

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use offshoot_image::layer::Limits;
use offshoot_image::manifest::StoredImage;
use offshoot_model::{BaseId, Progress};
use offshoot_store::blobs::BlobStore;
use offshoot_sys::durable::{StagingDir, fsync_dir};
use offshoot_sys::lock::FileLock;

use crate::erofs::SpaceGuard;

pub use error::{BaseError, PrepareError, VerifyError};
pub use manifest::{BaseManifest, RootInfo, SeedInfo, base_id};

use flight::Flights;

/// What bounds the preparation of a base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BaseStoreConfig {
    /// What an image may unpack to.
    pub limits: Limits,
    /// What must stay free on the disk; without, [`SpaceGuard::of_disk`] decides.
    pub guard: Option<SpaceGuard>,
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
    flights: Flights,
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

    /// The pristine overlay disk, for [`clone_seed`](crate::seed::clone_seed).
    pub fn overlay_seed(&self) -> PathBuf {
        self.dir.join(manifest::OVERLAY_SEED)
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

    /// Gives the base of an image, preparing it if there is none.
    ///
    /// However many ask at once, in this process and in others, one preparation runs; the others wait for it and share its
    /// result or its error. Dropping the future is safe: the preparation goes on for those who still wait, and when
    /// nobody does it stops and leaves nothing behind. A base that is there but damaged is prepared again and swapped;
    /// VMs that have the old files open keep them.
    pub async fn ensure(&self, image: &StoredImage, progress: &Progress) -> Result<Base, PrepareError> {
        let id = base_id(&image.digest);
        let (shared, wanted) = (self.shared.clone(), id.clone());
        let ready = tokio::task::spawn_blocking(move || shared.load(&wanted).ok()).await;
        if let Ok(Some(base)) = ready {
            return Ok(base);
        }
        let flight = self.shared.flights.join(&id, |cancelled: Arc<AtomicBool>| {
            let (shared, id, image, progress) =
                (self.shared.clone(), id.clone(), image.clone(), progress.clone());
            move || prepare::prepare(&shared, &id, &image, &progress, &cancelled)
        });
        if flight.joined() {
            progress.message(waiting_for(image));
        }
        flight
            .outcome()
            .await
            .unwrap_or(Err(PrepareError::Stopped { image: image.digest }))
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

    /// Reads the whole root of a base and compares it with what was recorded when it was made. Blocks the thread.
    pub fn verify(&self, id: &BaseId) -> Result<(), VerifyError> {
        let base = self
            .shared
            .load(id)
            .map_err(|source| VerifyError::Base { source })?;
        let path = base.root_erofs();
        let read = |source| VerifyError::Read {
            path: path.clone(),
            source,
        };
        let file = std::fs::File::open(&path).map_err(read)?;
        let found = prepare::hash(&file, &mut |_| true).map_err(read)?;
        let expected = base.manifest.root.sha256;
        if found != Some(expected) {
            return Err(VerifyError::Damaged { path });
        }
        Ok(())
    }
}

impl Shared {
    fn dir(&self, id: &BaseId) -> PathBuf {
        self.bases.join(id.as_str())
    }

    fn lock_path(&self, id: &BaseId) -> PathBuf {
        self.locks.join(format!("base-{id}.lock"))
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

fn waiting_for(image: &StoredImage) -> String {
    format!(
        "waiting for another preparation of image {}",
        image.digest.short()
    )
}
