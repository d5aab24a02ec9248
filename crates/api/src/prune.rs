//! Deleting what nothing needs any more.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// Query of `GET` and `POST /v1/system/prune`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(default)]
pub struct PruneQuery {
    /// Also bases of images that no VM uses; the next VM makes them again.
    pub all: bool,
    /// What was made or used so many seconds ago stays; the daemon's setting when absent.
    pub grace_s: Option<u64>,
}

/// What went, or for `GET` what would go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct PruneReport {
    /// What was, or would be, removed.
    pub removed: Vec<PruneItem>,
    /// Bytes on disk of all that.
    pub freed_bytes: u64,
    /// What nothing needs either, but was made or used too short a time ago.
    pub kept_for_grace: Vec<PruneItem>,
    /// How many seconds ago that is at most.
    pub grace_s: u64,
    /// What could not be removed.
    pub failed: Vec<PruneFailure>,
    /// What else there is to say: why something was not even looked at.
    pub notes: Vec<String>,
}

/// One thing that goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PruneItem {
    /// What it is.
    pub kind: PruneKind,
    /// Its digest or id.
    pub name: String,
    /// Bytes on disk.
    pub bytes: u64,
}

/// What can go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PruneKind {
    /// A blob that no image has.
    Blob,
    /// The rest of a download that broke off.
    Download,
    /// A base that no image and no VM has; with `all`, one that no VM has.
    Base,
    /// The tree in a base, when no VM has a root that needs it.
    Tree,
    /// A kernel bundle that is not the default and that no VM boots.
    Kernel,
    /// A template whose base or kernel is gone, or from which no VM that runs was restored.
    Template,
}

/// Something that should have gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PruneFailure {
    /// What.
    pub item: PruneItem,
    /// Why it is still there.
    pub reason: String,
}
