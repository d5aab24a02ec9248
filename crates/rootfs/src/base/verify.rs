//! Whether a base is still what was made: every byte of its files, and its tree where it has one.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use offshoot_model::{BaseId, Digest};
use offshoot_sys::lock::FileLock;

use super::error::{BaseError, VerifyError};
use super::{BaseStore, prepare, tree};
use crate::compare::{CompareError, compare};
use crate::erofs::ErofsImage;
use crate::seed::hash_blocks;

/// A part of a base that is as it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedPart {
    /// The file, or the folder of the tree.
    pub path: PathBuf,
    /// How many bytes were read: of a seed those that are not holes, of a tree those of its files.
    pub bytes: u64,
}

/// A part of a base that was looked at.
#[derive(Debug)]
pub struct CheckedPart {
    /// The file, or the folder of the tree.
    pub path: PathBuf,
    /// How many bytes were read, as in [`VerifiedPart::bytes`], or what is wrong.
    pub result: Result<u64, VerifyError>,
}

/// What was checked, and was well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The root, the seeds, and the tree where there is one.
    pub parts: Vec<VerifiedPart>,
}

impl BaseStore {
    /// Reads all of a base and compares it with what was recorded when it was made; a tree is compared with the root.
    /// Fails with the first part that is not as it was. Waits for whoever works on the base. Blocks the thread; needs root.
    pub fn verify(&self, id: &BaseId) -> Result<Verified, VerifyError> {
        let parts = self
            .verify_parts(id)
            .map_err(|source| VerifyError::Base { source })?;
        let well = |CheckedPart { path, result }| result.map(|bytes| VerifiedPart { path, bytes });
        Ok(Verified {
            parts: parts.into_iter().map(well).collect::<Result<_, _>>()?,
        })
    }

    /// As [`verify`](Self::verify), but tells of each part.
    pub fn verify_parts(&self, id: &BaseId) -> Result<Vec<CheckedPart>, BaseError> {
        // Otherwise a base that is swapped meanwhile would be compared with the record of the old one.
        let lock_path = self.shared.lock_path(id);
        let _lock = FileLock::exclusive(&lock_path).map_err(BaseError::io("lock", &lock_path))?;
        let base = self.shared.load(id)?;
        let mut parts = vec![root(base.root_erofs(), &base.manifest.root)];
        for (path, info) in [
            (base.overlay_seed(), &base.manifest.overlay_seed),
            (base.work_seed(), &base.manifest.work_seed),
        ] {
            // An earlier version made none, or did not say what is in it.
            if let Some(hash) = info.as_ref().and_then(|info| info.blocks_sha256) {
                parts.push(seed(path, hash));
            }
        }
        if let Some(path) = tree::present(&base) {
            let compared = ErofsImage::open(&base.root_erofs())
                .map_err(CompareError::from)
                .and_then(|image| compare(&image, &path));
            let result = compared.map_err(|error| match error {
                CompareError::Image { source } => VerifyError::Image {
                    path: path.clone(),
                    source,
                },
                source => VerifyError::Tree {
                    path: path.clone(),
                    source,
                },
            });
            parts.push(CheckedPart { path, result });
        }
        Ok(parts)
    }
}

fn root(path: PathBuf, info: &super::RootInfo) -> CheckedPart {
    check(path, |file| {
        let hash = prepare::hash(file, &mut |_| true)?;
        Ok((hash == Some(info.sha256), file.metadata()?.len()))
    })
}

fn seed(path: PathBuf, recorded: Digest) -> CheckedPart {
    check(path, |file| {
        let hash = hash_blocks(file, &mut || true)?;
        Ok((hash == Some(recorded), file.metadata()?.blocks() * 512))
    })
}

fn check(path: PathBuf, read: impl FnOnce(&File) -> io::Result<(bool, u64)>) -> CheckedPart {
    let result = match File::open(&path).and_then(|file| read(&file)) {
        Ok((true, bytes)) => Ok(bytes),
        Ok((false, _)) => Err(VerifyError::Damaged { path: path.clone() }),
        Err(source) => Err(VerifyError::Read {
            path: path.clone(),
            source,
        }),
    };
    CheckedPart { path, result }
}
