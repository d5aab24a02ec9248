//! The work seed: a disk with what the image has in `/root`, from which every VM's work disk is cloned.
//!
//! ```text
//! root.erofs ─► /root ─► tmp/work-<random>/root ─► mke2fs -d ─► work-seed.ext4
//! ```
//!
//! An image whose `/root` is missing, or is no folder, gets an empty one: root's, mode 0700.

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use offshoot_model::ByteSize;
use offshoot_sys::durable::StagingDir;

use super::error::PrepareError;
use super::manifest::SeedInfo;
use super::prepare::Job;
use crate::copy::{TreeSize, make_filled};
use crate::erofs::{ErofsImage, ErofsReadError, Inode, InodeKind};
use crate::room::{Room, SpaceGuard};
use crate::seed::SEED_JOURNAL;
use crate::unpack::{UnpackError, UnpackWatch, unpack};

/// What the size of a seed that must be larger than others is a multiple of.
const SIZE_STEP: u64 = 1 << 30;

impl Job<'_> {
    /// Makes the work seed `path` from the finished `root`.
    pub(super) fn work_seed(&self, root: &Path, path: &Path, writer: &str) -> Result<SeedInfo, PrepareError> {
        let image = self.image.digest;
        let tmp = &self.shared.tmp;
        let staging = StagingDir::new(tmp, "work").map_err(self.io("create a folder in", tmp))?;
        let home = staging.path().join("root");
        let guard = self.guard()?;
        unpack_home(root, &home, guard, &|| self.is_cancelled()).map_err(|error| match error {
            UnpackError::Cancelled => PrepareError::Cancelled { image },
            error => PrepareError::Unpack {
                image,
                source: Arc::new(error),
            },
        })?;
        let taken = TreeSize::of(&home).map_err(self.io("measure", &home))?;
        Room::new(tmp, guard)
            .take(taken.bytes)
            .map_err(self.io("make room for", path))?;
        let size = seed_size(taken, self.shared.config.seed_size);
        make_filled(&home, taken, path, size, SEED_JOURNAL).map_err(self.seed_error())?;
        self.seed_info(path, writer)
    }
}

/// Unpacks what the image in `root` has in `/root` to `home`, which must not exist.
pub(super) fn unpack_home(
    root: &Path,
    home: &Path,
    guard: SpaceGuard,
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<(), UnpackError> {
    let erofs = ErofsImage::open(root)?;
    let Some(dir) = slash_root(&erofs)? else {
        return std::fs::DirBuilder::new()
            .mode(0o700)
            .create(home)
            .map_err(|source| UnpackError::Io {
                action: "create",
                path: home.to_owned(),
                source,
            });
    };
    let watch = UnpackWatch {
        cancelled,
        moved: &|_| (),
    };
    unpack(&erofs, dir, home, guard, watch).map(drop)
}

/// The size of the seed for what is in `/root`: the one that seeds mostly have, where that holds it.
fn seed_size(taken: TreeSize, usual: ByteSize) -> ByteSize {
    let needed = taken.needed(SEED_JOURNAL.bytes()).bytes();
    if needed <= usual.bytes() {
        usual
    } else {
        // As much again is for the user.
        ByteSize::from_bytes((2 * needed).next_multiple_of(SIZE_STEP))
    }
}

/// The folder `/root` of an image.
fn slash_root(image: &ErofsImage) -> Result<Option<Inode>, ErofsReadError> {
    let found = image.lookup(&image.root()?, b"root")?;
    Ok(found.filter(|inode| inode.kind == InodeKind::Dir))
}
