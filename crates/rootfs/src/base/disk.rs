//! The disks of a VM: clones of its base's seeds, built where an earlier version made a base without them.
//!
//! ```text
//! seed ─► clone (reflink, else a copy without the holes) ─► made longer           microseconds, shared or 200 KiB
//! none ─► root.erofs ─► /root ─► tmp/home-<random>/root ─► mke2fs -d              some 100 ms, with a warning
//! ```

use std::io;
use std::path::{Path, PathBuf};

use offshoot_model::{BaseId, ByteSize, ErrorKind, Explain};
use offshoot_sys::durable::StagingDir;

use super::error::BaseError;
use super::work_seed::unpack_home;
use super::{Base, BaseStore, Seed};
use crate::copy::{TreeSize, make_filled};
use crate::room::{Room, is_full};
use crate::seed::{DiskOrigin, SEED_JOURNAL, SeedError, clone_seed, clone_work_seed, make_disk};
use crate::unpack::UnpackError;

/// Why a VM cannot have its disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Its base cannot be used.
    #[error("cannot use the base of the disk")]
    Base {
        /// What is wrong with it.
        #[source]
        source: BaseError,
    },
    /// The seed cannot be cloned, or the file system not be made.
    #[error(transparent)]
    Seed(#[from] SeedError),
    /// What the image has in `/root` cannot be unpacked.
    #[error("cannot unpack the image's /root")]
    Unpack {
        /// What came back.
        #[source]
        source: UnpackError,
    },
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What came back.
        #[source]
        source: io::Error,
    },
}

impl DiskError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

impl Explain for DiskError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Base { source } => source.kind(),
            Self::Seed(source) => source.kind(),
            Self::Unpack { source } => source.kind(),
            Self::Io { source, .. } if is_full(source) => ErrorKind::NoSpace,
            Self::Io { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Base { source } => source.hints(),
            Self::Seed(source) => source.hints(),
            Self::Unpack { source } => source.hints(),
            Self::Io { source, .. } if is_full(source) => {
                vec!["make room with `offshoot rm` and `offshoot image rm`".into()]
            }
            Self::Io { .. } => Vec::new(),
        }
    }
}

impl BaseStore {
    /// Makes `dst`, which must not exist, an empty overlay disk of `size` for a VM of this base. Blocks the thread; nothing is
    /// left behind on failure.
    pub fn make_overlay_disk(
        &self,
        id: &BaseId,
        dst: &Path,
        size: ByteSize,
    ) -> Result<DiskOrigin, DiskError> {
        let base = self.get(id).map_err(|source| DiskError::Base { source })?;
        if base.manifest.overlay_seed.is_some() {
            return Ok(clone_seed(&base.overlay_seed(), dst, size)?);
        }
        warn_of(&base, Seed::Overlay);
        make_disk(dst, size)?;
        Ok(DiskOrigin::Made)
    }

    /// Makes `dst`, which must not exist, a work disk of `size` with what the image has in `/root`, for a VM of this base.
    /// Blocks the thread; nothing is left behind on failure. Where the base has no work seed it needs root.
    pub fn make_work_disk(&self, id: &BaseId, dst: &Path, size: ByteSize) -> Result<DiskOrigin, DiskError> {
        let base = self.get(id).map_err(|source| DiskError::Base { source })?;
        if base.manifest.work_seed.is_some() {
            return Ok(clone_work_seed(&base.work_seed(), dst, size)?);
        }
        warn_of(&base, Seed::Work);
        let tmp = &self.shared.tmp;
        let guard = self
            .shared
            .guard()
            .map_err(DiskError::io("look at the room in", tmp))?;
        let staging = StagingDir::new(tmp, "home").map_err(DiskError::io("create a folder in", tmp))?;
        let home = staging.path().join("root");
        unpack_home(&base.root_erofs(), &home, guard, &|| false)
            .map_err(|source| DiskError::Unpack { source })?;
        let taken = TreeSize::of(&home).map_err(DiskError::io("measure", &home))?;
        Room::new(tmp, guard)
            .take(taken.bytes)
            .map_err(DiskError::io("make room for", dst))?;
        make_filled(&home, taken, dst, size, SEED_JOURNAL)?;
        Ok(DiskOrigin::Built)
    }
}

fn warn_of(base: &Base, seed: Seed) {
    tracing::warn!(
        base = %base.id,
        image = %base.manifest.image,
        "building a disk, because the base was made by an earlier version and has no {seed}; \
         `offshoot image prepare --all` makes one"
    );
}
