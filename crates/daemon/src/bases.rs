//! What is done to the parts of one base.

use std::path::Path;

use offshoot_api::image::{BaseParts, PartState, VerifiedPart};
use offshoot_model::BaseId;
use offshoot_rootfs::base::{BaseError, BaseStore, CheckedPart};

use crate::error::chain;

/// The tree in a base, where it has one.
pub const TREE: &str = "tree";

/// What the base in `dir` takes on disk, in all and part by part. Blocks for as long as a tree is walked.
pub fn measure(dir: &Path) -> (u64, BaseParts) {
    let (mut all, mut parts) = (0, BaseParts::default());
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        // What vanishes meanwhile takes nothing.
        let bytes = offshoot_sys::space::disk_usage(&entry.path()).unwrap_or(0);
        all += bytes;
        match entry.file_name().to_str() {
            Some("root.erofs") => parts.root = bytes,
            Some("overlay-seed.ext4") => parts.overlay_seed = bytes,
            Some("work-seed.ext4") => parts.work_seed = bytes,
            Some(TREE) => parts.tree = bytes,
            _ => {}
        }
    }
    (all, parts)
}

/// Reads every part of a base that has a recorded hash and compares it. Blocks.
pub fn verify(bases: &BaseStore, id: &BaseId) -> Vec<VerifiedPart> {
    let part = |name: String, bytes, state, reason| VerifiedPart {
        part: "base".into(),
        name,
        bytes,
        state,
        reason,
    };
    let parts = match bases.verify_parts(id) {
        Ok(parts) => parts,
        Err(BaseError::NotFound { .. }) => {
            return vec![part(id.to_string(), 0, PartState::NotPrepared, None)];
        }
        Err(error) => return vec![part(id.to_string(), 0, PartState::Damaged, Some(chain(&error)))],
    };
    parts
        .into_iter()
        .map(|CheckedPart { path, result }| {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            match result {
                Ok(bytes) => part(name, bytes, PartState::Ok, None),
                Err(error) => part(name, 0, PartState::Damaged, Some(chain(&error))),
            }
        })
        .collect()
}
