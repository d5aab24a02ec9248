//! Why an import fails.

use std::io;

use offshoot_model::{ByteSize, Digest, ErrorKind, Explain};
use offshoot_store::blobs::BlobError;

use super::scan::TarError;
use crate::index;
use crate::manifest::ManifestError;
use crate::platform::PlatformError;
use crate::reference::ReferenceError;

/// Why an archive does not become an image. Nothing of it is kept.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The client went away or its file cannot be read.
    #[error("cannot read the archive to import")]
    Upload {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The store does not take it.
    #[error("cannot store the archive")]
    Store {
        /// Why.
        #[from]
        source: BlobError,
    },
    /// More bytes than an import may have.
    #[error("archive has more than {limit}, which is the most an import may have")]
    TooLarge {
        /// The most.
        limit: ByteSize,
    },
    /// Not a byte came, or a tar without members.
    #[error("archive is empty")]
    Empty,
    /// Neither an archive nor whole.
    #[error("cannot import the archive")]
    Tar {
        /// What is wrong with it.
        #[from]
        source: TarError,
    },
    /// It does not decompress.
    #[error("cannot decompress the {format} data of {name}")]
    Decompress {
        /// `gzip` or `zstd`.
        format: &'static str,
        /// Which part of the archive.
        name: String,
        /// Where it breaks.
        #[source]
        source: io::Error,
    },
    /// A tar of something else.
    #[error("archive holds neither an image nor a root file system")]
    NoRoot,
    /// It speaks of a file that it does not have.
    #[error("archive is incomplete: it has no `{name}`")]
    Missing {
        /// The file.
        name: String,
    },
    /// A file in it is larger than such a file may be.
    #[error("`{name}` in the archive has {size} bytes: at most {limit} are read")]
    FileTooLarge {
        /// The file.
        name: String,
        /// Its size.
        size: u64,
        /// The most.
        limit: u64,
    },
    /// More files than an image has.
    #[error("archive has more than {limit} files, so it is not an image")]
    TooManyFiles {
        /// The most.
        limit: usize,
    },
    /// A file of the archive's own bookkeeping is malformed.
    #[error("`{name}` in the archive is malformed")]
    Json {
        /// Which file.
        name: String,
        /// Where.
        #[source]
        source: serde_json::Error,
    },
    /// An image-layout version we do not know.
    #[error("archive is an OCI image layout of version {version}: only 1.x is known")]
    LayoutVersion {
        /// What it says.
        version: String,
    },
    /// A manifest or config in it is not right.
    #[error("cannot use an image in the archive")]
    Manifest {
        /// Why.
        #[from]
        source: ManifestError,
    },
    /// A file's content is not what its digest says.
    #[error("`{name}` in the archive does not match its digest: expected {expected}, got {actual}")]
    Digest {
        /// The file.
        name: String,
        /// By the manifest or the file's name.
        expected: Digest,
        /// By its content.
        actual: Digest,
    },
    /// A file's size is not what the manifest says.
    #[error("`{name}` in the archive has {actual} bytes, but its manifest says {expected}")]
    Size {
        /// The file.
        name: String,
        /// By the manifest.
        expected: u64,
        /// By the archive.
        actual: u64,
    },
    /// Indexes within indexes within indexes.
    #[error("images in the archive lie more than {} indexes deep", index::MAX_DEPTH)]
    TooDeep,
    /// Made for other machines.
    #[error("archive has no image for {wanted}: it has {}", index::list(offered))]
    Platform {
        /// What was asked for.
        wanted: String,
        /// What there is.
        offered: Vec<String>,
    },
    /// One name for several images.
    #[error("archive holds {count} images, so they cannot all be named `{reference}`")]
    ManyImages {
        /// How many.
        count: usize,
        /// The name.
        reference: String,
    },
    /// A platform that is none.
    #[error("cannot choose an image from the archive")]
    BadPlatform {
        /// Why.
        #[from]
        source: PlatformError,
    },
    /// A name that is none.
    #[error("cannot name the image")]
    Reference {
        /// Why.
        #[from]
        source: ReferenceError,
    },
}

impl Explain for ImportError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Upload { .. } => ErrorKind::Upstream,
            Self::Store { source } => source.kind(),
            Self::Manifest { source } => source.kind(),
            Self::Reference { source } => source.kind(),
            Self::TooLarge { .. } => ErrorKind::NoSpace,
            Self::Platform { .. } => ErrorKind::NotPossible,
            Self::ManyImages { .. } | Self::BadPlatform { .. } => ErrorKind::InvalidRequest,
            Self::Tar {
                source: TarError::Io(_),
            } => ErrorKind::Internal,
            _ => ErrorKind::BadContent,
        }
    }

    fn hints(&self) -> Vec<String> {
        let hint = match self {
            Self::Store { source } => return source.hints(),
            Self::Manifest { source } => return source.hints(),
            Self::Reference { source } => return source.hints(),
            Self::Empty
            | Self::NoRoot
            | Self::Tar {
                source: TarError::NotATar,
            } => {
                "give `offshoot image import` the output of `docker save`, an OCI image layout, or a tar of a root file system"
            }
            Self::Tar { .. } | Self::Decompress { .. } | Self::Missing { .. } | Self::Digest { .. } => {
                "make the archive again, or copy it again: it is damaged or incomplete"
            }
            Self::ManyImages { .. } => {
                "leave out `--name`: the images keep the names they have in the archive"
            }
            Self::Platform { .. } => {
                "save the image again for this platform: `docker save --platform`, `skopeo copy --override-arch`"
            }
            _ => return Vec::new(),
        };
        vec![hint.into()]
    }
}
