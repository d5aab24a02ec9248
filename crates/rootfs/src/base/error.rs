//! Why a base cannot be had.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use offshoot_image::layer::LayerError;
use offshoot_model::{BaseId, Digest, ErrorKind, Explain};
use offshoot_store::blobs::BlobError;

use crate::compare::CompareError;
use crate::erofs::{ErofsError, ErofsReadError};
use crate::room::is_full;
use crate::seed::SeedError;
use crate::unpack::UnpackError;

fn io_kind(error: &io::Error) -> ErrorKind {
    if is_full(error) {
        ErrorKind::NoSpace
    } else {
        ErrorKind::Internal
    }
}

fn io_hints(error: &io::Error) -> Vec<String> {
    if is_full(error) {
        vec!["make room with `offshoot rm` and `offshoot image rm`".into()]
    } else {
        Vec::new()
    }
}

/// Why a base cannot be found, listed or removed.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// There is no such base.
    #[error("there is no base {id}")]
    NotFound {
        /// The id.
        id: BaseId,
    },
    /// It is not what its manifest says, or its manifest is not one of ours.
    #[error("the base in {} is damaged: {what}", dir.display())]
    Damaged {
        /// Its folder.
        dir: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// Another version of Offshoot made it.
    #[error("the base in {} has the format of another version", dir.display())]
    Format {
        /// Its folder.
        dir: PathBuf,
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

impl BaseError {
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

impl Explain for BaseError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Damaged { .. } => ErrorKind::BadContent,
            Self::Format { .. } => ErrorKind::NotPossible,
            Self::Io { source, .. } => io_kind(source),
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::NotFound { .. } | Self::Damaged { .. } | Self::Format { .. } => {
                vec!["prepare it again: `offshoot image prepare`".into()]
            }
            Self::Io { source, .. } => io_hints(source),
        }
    }
}

/// Why a base is not, or may not be, what it was when it was made.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// There is none, or it is visibly damaged.
    #[error("cannot check the base")]
    Base {
        /// What is wrong.
        #[source]
        source: BaseError,
    },
    /// It cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What came back.
        #[source]
        source: io::Error,
    },
    /// It has other bytes.
    #[error("{} has changed since it was made", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// The root reads as recorded, but makes no sense.
    #[error("cannot compare {} with the root", path.display())]
    Image {
        /// The tree.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: ErofsReadError,
    },
    /// The tree is not that of the root.
    #[error("{} is not what it was unpacked from", path.display())]
    Tree {
        /// The tree.
        path: PathBuf,
        /// The first difference.
        #[source]
        source: CompareError,
    },
}

impl Explain for VerifyError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Base { source } => source.kind(),
            Self::Read { .. } => ErrorKind::Internal,
            Self::Damaged { .. } => ErrorKind::BadContent,
            Self::Image { source, .. } => source.kind(),
            Self::Tree { source, .. } => source.kind(),
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Base { source } => source.hints(),
            Self::Read { .. } => Vec::new(),
            Self::Damaged { .. } | Self::Tree { .. } => {
                vec!["make it again, and restart its VMs: `offshoot image prepare --force`".into()]
            }
            Self::Image { source, .. } => source.hints(),
        }
    }
}

/// Why an image cannot be prepared. Cheap to clone, since everyone who waited for one preparation gets it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PrepareError {
    /// A layer's blob cannot be opened.
    #[error("cannot prepare image {}", image.short())]
    Blob {
        /// The image.
        image: Digest,
        /// What came back.
        #[source]
        source: Arc<BlobError>,
    },
    /// A layer cannot be unpacked.
    #[error("cannot prepare image {}", image.short())]
    Layer {
        /// The image.
        image: Digest,
        /// What is wrong with it.
        #[source]
        source: Arc<LayerError>,
    },
    /// The root cannot be written.
    #[error("cannot prepare image {}", image.short())]
    Root {
        /// The image.
        image: Digest,
        /// What came back.
        #[source]
        source: Arc<ErofsError>,
    },
    /// The image's `/root` cannot be unpacked for the work seed.
    #[error("cannot prepare image {}: cannot unpack its /root", image.short())]
    Unpack {
        /// The image.
        image: Digest,
        /// What came back.
        #[source]
        source: Arc<UnpackError>,
    },
    /// A seed cannot be made.
    #[error("cannot prepare image {}", image.short())]
    Seed {
        /// The image.
        image: Digest,
        /// What came back.
        #[source]
        source: Arc<SeedError>,
    },
    /// The operating system refused.
    #[error("cannot prepare image {}: cannot {action} {}", image.short(), path.display())]
    Io {
        /// The image.
        image: Digest,
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What came back.
        #[source]
        source: Arc<io::Error>,
    },
    /// Nobody wanted it any more.
    #[error("preparing image {} was cancelled", image.short())]
    Cancelled {
        /// The image.
        image: Digest,
    },
    /// The thread that prepared it ended without a result, which is our own mistake.
    #[error("preparing image {} broke off", image.short())]
    Stopped {
        /// The image.
        image: Digest,
    },
}

impl Explain for PrepareError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Blob { source, .. } => source.kind(),
            Self::Layer { source, .. } => source.kind(),
            Self::Root { source, .. } => source.kind(),
            Self::Unpack { source, .. } => source.kind(),
            Self::Seed { source, .. } => source.kind(),
            Self::Io { source, .. } => io_kind(source),
            Self::Cancelled { .. } => ErrorKind::Cancelled,
            Self::Stopped { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Blob { source, .. } => source.hints(),
            Self::Layer { source, .. } => source.hints(),
            Self::Root { source, .. } => source.hints(),
            Self::Unpack { source, .. } => source.hints(),
            Self::Seed { source, .. } => source.hints(),
            Self::Io { source, .. } => io_hints(source),
            Self::Cancelled { .. } | Self::Stopped { .. } => Vec::new(),
        }
    }
}

/// Why the tree of a base cannot be had. Cheap to clone, as [`PrepareError`] is.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TreeError {
    /// There is no such base, or it is damaged.
    #[error("cannot unpack the tree of base {id}")]
    Base {
        /// The base.
        id: BaseId,
        /// What is wrong.
        #[source]
        source: Arc<BaseError>,
    },
    /// It cannot be unpacked.
    #[error("cannot unpack the tree of base {id}")]
    Unpack {
        /// The base.
        id: BaseId,
        /// What came back.
        #[source]
        source: Arc<UnpackError>,
    },
    /// The operating system refused.
    #[error("cannot unpack the tree of base {id}: cannot {action} {}", path.display())]
    Io {
        /// The base.
        id: BaseId,
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What came back.
        #[source]
        source: Arc<io::Error>,
    },
    /// Nobody wanted it any more.
    #[error("unpacking the tree of base {id} was cancelled")]
    Cancelled {
        /// The base.
        id: BaseId,
    },
    /// The thread that unpacked it ended without a result, which is our own mistake.
    #[error("unpacking the tree of base {id} broke off")]
    Stopped {
        /// The base.
        id: BaseId,
    },
}

impl Explain for TreeError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Base { source, .. } => source.kind(),
            Self::Unpack { source, .. } => source.kind(),
            Self::Io { source, .. } => io_kind(source),
            Self::Cancelled { .. } => ErrorKind::Cancelled,
            Self::Stopped { .. } => ErrorKind::Internal,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Base { source, .. } => source.hints(),
            Self::Unpack { source, .. } => source.hints(),
            Self::Io { source, .. } => io_hints(source),
            Self::Cancelled { .. } | Self::Stopped { .. } => Vec::new(),
        }
    }
}
