//! Why a layer cannot be unpacked.

use std::io;

use offshoot_model::{ByteSize, Digest, ErrorKind, Explain};

/// Why a layer cannot be unpacked. Every variant names the layer by its blob.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The blob ends early, is damaged, or cannot be read.
    #[error("cannot read layer {}", layer.short())]
    Read {
        /// The layer.
        layer: Digest,
        /// What came back.
        #[source]
        source: io::Error,
    },
    /// The unpacked bytes are not those that the image promises.
    #[error("layer {} unpacks to {found} where the image says {expected}", layer.short())]
    DiffId {
        /// The layer.
        layer: Digest,
        /// What the image's config says.
        expected: Digest,
        /// What it is.
        found: Digest,
    },
    /// The unpacked bytes are not a tar archive that we understand.
    #[error("layer {} is not a proper tar archive at byte {offset}", layer.short())]
    Tar {
        /// The layer.
        layer: Digest,
        /// Where in the unpacked layer.
        offset: u64,
        /// What is wrong there.
        #[source]
        source: TarProblem,
    },
    /// An entry asks for something that cannot or must not be.
    #[error("cannot unpack `{entry}` of layer {}", layer.short())]
    Entry {
        /// The layer.
        layer: Digest,
        /// The entry's name, shortened, control characters escaped.
        entry: String,
        /// What is wrong with it.
        #[source]
        source: EntryProblem,
    },
    /// The image has more entries than it may have.
    #[error("layer {} brings the image to more than {limit} entries", layer.short())]
    TooManyEntries {
        /// The layer.
        layer: Digest,
        /// The most.
        limit: u64,
    },
    /// The image unpacks to more than it may.
    #[error("layer {} brings the image to more than {limit} unpacked", layer.short())]
    TooManyBytes {
        /// The layer.
        layer: Digest,
        /// The most.
        limit: ByteSize,
    },
    /// The content of a file could not be stored.
    #[error("cannot store `{entry}` of layer {}", layer.short())]
    Store {
        /// The layer.
        layer: Digest,
        /// The entry's name, shortened, control characters escaped.
        entry: String,
        /// What came back.
        #[source]
        source: io::Error,
    },
    /// Whoever asked no longer wants it.
    #[error("unpacking layer {} was cancelled", layer.short())]
    Cancelled {
        /// The layer.
        layer: Digest,
    },
}

/// What is wrong with the tar archive itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TarProblem {
    /// The archive stops within a header or a file.
    #[error("the archive is truncated")]
    Truncated,
    /// A header does not add up.
    #[error("a header's checksum is wrong")]
    Checksum,
    /// A number is not one, or is out of range.
    #[error("the {field} of an entry is not a number in range")]
    Number {
        /// Which.
        field: &'static str,
    },
    /// A pax header is not a list of records.
    #[error("a pax header is malformed")]
    Pax,
    /// An extended header, or the name in it, is larger than any sensible one.
    #[error("an extended header has more than {limit} bytes")]
    HeaderTooLarge {
        /// The most.
        limit: u64,
    },
    /// Extended headers that describe nothing.
    #[error("extended headers stand before the end of the archive")]
    NothingDescribed,
    /// A sparse file's map overlaps, runs backwards, or leads past the end of the file.
    #[error("the map of a sparse file is malformed")]
    Sparse,
    /// An entry of a type that we do not know.
    #[error("an entry has the unknown type `{}`", char::from(*flag).escape_default())]
    UnknownType {
        /// The type flag.
        flag: u8,
    },
}

/// What is wrong with one entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EntryProblem {
    /// The name starts with `/`.
    #[error("its name is absolute")]
    Absolute,
    /// The name leads outside with `..`.
    #[error("its name leads out of the image with `..`")]
    Climbs,
    /// A NUL byte in a name or a link target.
    #[error("a NUL byte is in its name or target")]
    Nul,
    /// A part of the name is longer than Linux takes.
    #[error("a part of its name has more than {limit} bytes")]
    NameTooLong {
        /// The most.
        limit: usize,
    },
    /// The whole name, or a link target, is longer than Linux takes.
    #[error("its name or target has more than {limit} bytes")]
    PathTooLong {
        /// The most.
        limit: usize,
    },
    /// It lies too deep.
    #[error("it lies more than {limit} folders deep")]
    TooDeep {
        /// The most.
        limit: usize,
    },
    /// The root of the image is not a folder.
    #[error("the root of the image can only be a folder")]
    RootNotDir,
    /// It lies below something that is no folder.
    #[error("it lies below `{parent}`, which is not a folder")]
    ParentNotDir {
        /// That thing's name.
        parent: String,
    },
    /// It lies below a symbolic link that leads out of the image.
    #[error("it lies below the symbolic link `{link}`, whose target `{target}` leads out of the image")]
    LinkClimbs {
        /// The link's name.
        link: String,
        /// Where it points.
        target: String,
    },
    /// It lies below a symbolic link to nothing.
    #[error("it lies below the symbolic link `{link}`, whose target `{target}` does not exist")]
    LinkDangles {
        /// The link's name.
        link: String,
        /// Where it points.
        target: String,
    },
    /// It lies below symbolic links that lead to each other.
    #[error("it lies below symbolic links that lead in a circle")]
    LinkLoops,
    /// A symbolic or hard link without a target.
    #[error("it is a link without a target")]
    NoTarget,
    /// A hard link to something that is not there.
    #[error("it is a hard link to `{target}`, which does not exist")]
    HardLinkMissing {
        /// The target.
        target: String,
    },
    /// A hard link to a folder.
    #[error("it is a hard link to `{target}`, which is a folder")]
    HardLinkToDir {
        /// The target.
        target: String,
    },
    /// A hard link whose target's name is not acceptable.
    #[error("it is a hard link to `{target}`, which lies outside the image")]
    HardLinkOutside {
        /// The target.
        target: String,
    },
    /// A whiteout of nothing, of `.` or of `..`.
    #[error("it is a whiteout of no proper name")]
    Whiteout,
    /// An extended attribute whose name Linux would not take.
    #[error("its extended attribute `{name}` has no proper name")]
    XattrName {
        /// The name, shortened, control characters escaped.
        name: String,
    },
    /// Its extended attributes take too much.
    #[error("its extended attributes have more than {limit} bytes")]
    XattrsTooLarge {
        /// The most.
        limit: usize,
    },
    /// An extended attribute whose value is not proper base64.
    #[error("its extended attribute `{name}` is not proper base64")]
    XattrEncoding {
        /// The name, shortened, control characters escaped.
        name: String,
    },
    /// A device number that Linux does not have.
    #[error("its device number {major}:{minor} is out of range")]
    Device {
        /// Major number.
        major: u64,
        /// Minor number.
        minor: u64,
    },
}

impl LayerError {
    pub(super) fn entry(layer: Digest, name: &[u8], source: EntryProblem) -> Self {
        Self::Entry {
            layer,
            entry: shown(name),
            source,
        }
    }
}

/// A name from outside as it may be printed: lossy, shortened, control characters escaped.
pub(super) fn shown(name: &[u8]) -> String {
    /// Long enough to recognise a file, short enough for one line.
    const MOST: usize = 160;
    // The root has no other name.
    let name = if name.is_empty() { b"." } else { name };
    let mut text = String::new();
    for c in String::from_utf8_lossy(&name[..name.len().min(4 * MOST)])
        .chars()
        .take(MOST)
    {
        if c.is_control() {
            text.extend(c.escape_default());
        } else {
            text.push(c);
        }
    }
    if name.len() > text.len() {
        text.push('…');
    }
    text
}

impl Explain for LayerError {
    fn kind(&self) -> ErrorKind {
        match self {
            // What decompressors say about damaged bytes has no number; what the system says has one.
            Self::Read { source, .. } if source.raw_os_error().is_some() => ErrorKind::Internal,
            Self::Read { .. } | Self::DiffId { .. } | Self::Tar { .. } | Self::Entry { .. } => {
                ErrorKind::BadContent
            }
            Self::TooManyEntries { .. } | Self::TooManyBytes { .. } => ErrorKind::NoSpace,
            Self::Store { source, .. } if is_full(source) => ErrorKind::NoSpace,
            Self::Store { .. } => ErrorKind::Internal,
            Self::Cancelled { .. } => ErrorKind::Cancelled,
        }
    }

    fn hints(&self) -> Vec<String> {
        match self {
            Self::Read { layer, .. } | Self::DiffId { layer, .. } => {
                vec![format!(
                    "the blob {layer} may be damaged: check it with `offshoot image verify`, or pull again"
                )]
            }
            Self::Tar { .. } | Self::Entry { .. } => {
                vec!["the image itself is at fault: rebuild it, or check where it came from".into()]
            }
            Self::Store { source, .. } if is_full(source) => {
                vec!["make room with `offshoot rm` and `offshoot image rm`".into()]
            }
            Self::TooManyEntries { .. } | Self::TooManyBytes { .. } => {
                vec!["see what its layers hold with `offshoot image inspect`, and build a smaller one".into()]
            }
            Self::Store { .. } | Self::Cancelled { .. } => Vec::new(),
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
