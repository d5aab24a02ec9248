//! What is done to the parts of one base.

use std::io;
use std::path::Path;

use offshoot_api::image::{BaseParts, PartState, VerifiedPart};
use offshoot_image::manifest::StoredImage;
use offshoot_model::{BaseId, ErrorKind, Progress};
use offshoot_rootfs::base::{BaseError, BaseStore, VerifyError};
use offshoot_sys::durable::StagingDir;

use crate::error::{Answer, Failure, chain};

/// The tree in a base, where it has one.
pub const TREE: &str = "tree";

/// What the parts of the base in `dir` take on disk. Blocks for as long as a tree is walked.
pub fn parts(dir: &Path) -> BaseParts {
    let bytes = |name| offshoot_sys::space::disk_usage(&dir.join(name)).unwrap_or(0);
    BaseParts {
        root: bytes("root.erofs"),
        overlay_seed: bytes("overlay-seed.ext4"),
        work_seed: bytes("work-seed.ext4"),
        tree: bytes(TREE),
    }
}

/// Makes a base again, whatever is there.
pub async fn rebuild(bases: &BaseStore, image: &StoredImage, id: &BaseId, progress: &Progress) -> Answer<()> {
    let (store, id) = (bases.clone(), id.clone());
    crate::blocking::blocking("removing a base", move || Ok(store.remove(&id)?)).await?;
    bases.ensure(image, progress).await?;
    Ok(())
}

/// Removes the tree of a base and leaves the rest. Whoever has files of it open keeps them. Blocks.
pub fn remove_tree(bases: &BaseStore, tmp: &Path, id: &BaseId) -> Answer<()> {
    let tree = bases.locate(id).dir().join(TREE);
    let failed = |error: &io::Error| {
        let message = format!("cannot remove {}: {error}", tree.display());
        Failure::new(ErrorKind::Internal, message)
    };
    let grave = StagingDir::new(tmp, "tree").map_err(|error| failed(&error))?;
    match std::fs::rename(&tree, grave.path().join(TREE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(&error)),
        _ => Ok(()),
    }
}

/// Reads every part of a base that has a recorded hash and compares it. Blocks.
pub fn verify(bases: &BaseStore, id: &BaseId) -> Vec<VerifiedPart> {
    let part = |name: &str, bytes, state, reason| VerifiedPart {
        part: "base".into(),
        name: name.into(),
        bytes,
        state,
        reason,
    };
    let base = match bases.get(id) {
        Ok(base) => base,
        Err(BaseError::NotFound { .. }) => return vec![part(id.as_str(), 0, PartState::NotPrepared, None)],
        Err(error) => return vec![part(id.as_str(), 0, PartState::Damaged, Some(chain(&error)))],
    };
    let size = base.manifest.root.size.bytes();
    let root = match bases.verify(id) {
        Ok(()) => part("root.erofs", size, PartState::Ok, None),
        // Removed since we looked.
        Err(VerifyError::Base {
            source: BaseError::NotFound { .. },
        }) => part(id.as_str(), 0, PartState::NotPrepared, None),
        Err(error) => part("root.erofs", size, PartState::Damaged, Some(chain(&error))),
    };
    vec![root]
}
